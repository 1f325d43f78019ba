/* An adapter: opening, closing, its lock, and what a fork does to it. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "cq.h"
#include "event.h"
#include "fault.h"
#include "frame.h"
#include "list.h"
#include "qp.h"
#include "softdev.h"
#include "strict.h"
#include "windows.h"
#include "wire_cma.h"
#include "wire_shm.h"

#define SOCKET_BUFFER_BYTES (4u << 20)

struct soft_tally soft_tally;

static pthread_mutex_t contexts_lock = PTHREAD_MUTEX_INITIALIZER;
static struct soft_list contexts = { &contexts, &contexts };
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

/* Whose lock this thread has. */
static __thread struct soft_context *held;

void soft_lock(struct soft_context *ctx)
{
	pthread_mutex_lock(&ctx->gate);
	pthread_mutex_lock(&ctx->lock);
	pthread_mutex_unlock(&ctx->gate);
	held = ctx;
}

bool soft_trylock(struct soft_context *ctx)
{
	if (pthread_mutex_trylock(&ctx->lock))
		return false;
	held = ctx;
	return true;
}

void soft_unlock(struct soft_context *ctx)
{
	struct soft_channel *bells[SOFT_BELLS];
	uint32_t i, n = ctx->n_bells;

	for (i = 0; i < n; i++)
		bells[i] = ctx->bells[i];
	ctx->n_bells = 0;
	held = NULL;
	pthread_mutex_unlock(&ctx->lock);
	for (i = 0; i < n; i++) {
		soft_ring(bells[i]);
		atomic_fetch_sub(&bells[i]->ringing, 1);
	}
}

bool soft_ring_later(struct soft_context *ctx, struct soft_channel *channel)
{
	uint32_t i;

	if (held != ctx)
		return false;
	for (i = 0; i < ctx->n_bells; i++)
		if (ctx->bells[i] == channel)
			return true;
	if (i == SOFT_BELLS)
		return false;
	atomic_fetch_add(&channel->ringing, 1);
	ctx->bells[ctx->n_bells++] = channel;
	return true;
}

uint64_t soft_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void soft_random(void *out, size_t size)
{
	uint8_t *at = out;
	ssize_t got;

	while (size) {
		got = getrandom(at, size, 0);
		if (got < 0) {
			if (errno == EINTR)
				continue;
			abort(); /* keys and tokens must not become guessable */
		}
		at += got;
		size -= (size_t)got;
	}
}

/*
 * Fork. The child has the sockets but not the device thread. If it kept them,
 * a peer would not learn of the parent's death while the child lives; so the
 * child closes all that reaches the wire and refuses every call. The locks are
 * taken around the fork so that it sees the list and the connections whole.
 */

static void before_fork(void)
{
	struct soft_list *at;

	pthread_mutex_lock(&contexts_lock);
	for (at = contexts.next; at != &contexts; at = at->next)
		soft_lock(soft_of(at, struct soft_context, link));
}

static void after_fork_in_parent(void)
{
	struct soft_list *at;

	for (at = contexts.prev; at != &contexts; at = at->prev)
		soft_unlock(soft_of(at, struct soft_context, link));
	pthread_mutex_unlock(&contexts_lock);
}

static void orphan(struct soft_context *ctx)
{
	struct soft_list *at;
	struct soft_conn *conn;

	atomic_store(&ctx->orphaned, true);
	for (at = ctx->conns.next; at != &ctx->conns; at = at->next) {
		conn = soft_of(at, struct soft_conn, link);
		close(conn->fd);
		conn->fd = -1;
	}
	if (ctx->local_fd >= 0)
		close(ctx->local_fd);
	close(ctx->listen_fd);
	close(ctx->epoll_fd);
	close(ctx->kick_fd);
	ctx->listen_fd = ctx->local_fd = ctx->epoll_fd = ctx->kick_fd = -1;
	if (ctx->datagram_fd >= 0)
		close(ctx->datagram_fd);
	ctx->datagram_fd = -1;
	ctx->has_thread = false;
}

static void after_fork_in_child(void)
{
	struct soft_list *at;

	/* Off the list: some thread that is not here may have been at the gate,
	 * and the next fork of this child would wait for it. */
	while ((at = list_pop(&contexts)))
		orphan(soft_of(at, struct soft_context, link));
	held = NULL;
	pthread_mutex_unlock(&contexts_lock);
}

static void watch_forks(void)
{
	pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

uint32_t soft_allowed_wires(const char *wire)
{
	if (!wire)
		wire = getenv("KVXFER_SOFT_WIRE");
	if (wire && !strcmp(wire, "tcp"))
		return 1u << WIRE_TCP;
	if (wire && !strcmp(wire, "cma"))
		return 1u << WIRE_CMA;
	if (wire && !strcmp(wire, "shm"))
		return 1u << WIRE_SHM;
	if (!wire || !*wire || !strcmp(wire, "auto"))
		return 1u << WIRE_TCP | 1u << WIRE_CMA | 1u << WIRE_SHM;
	return 0;
}

/*
 * Asking for a buffer ends the kernel's own tuning, so ask only where the
 * administrator allows as much as a fast network needs.
 */
static size_t allowed_socket_buffer(void)
{
	static const char *const limits[] = { "/proc/sys/net/core/rmem_max",
					      "/proc/sys/net/core/wmem_max" };
	unsigned long limit;
	FILE *file;
	size_t i;
	int found;

	for (i = 0; i < sizeof(limits) / sizeof(limits[0]); i++) {
		file = fopen(limits[i], "re");
		if (!file)
			return 0;
		found = fscanf(file, "%lu", &limit);
		fclose(file);
		if (found != 1 || limit < SOCKET_BUFFER_BYTES)
			return 0;
	}
	return SOCKET_BUFFER_BYTES;
}

static int open_listener(struct soft_context *ctx)
{
	socklen_t length = soft_address_len(&ctx->bound);

	ctx->listen_fd = socket(ctx->bound.ss_family,
				SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (ctx->listen_fd < 0)
		return errno;
	soft_tune_socket(ctx, ctx->listen_fd); /* before its window is agreed */
	if (bind(ctx->listen_fd, (struct sockaddr *)&ctx->bound, length) ||
	    listen(ctx->listen_fd, SOMAXCONN) ||
	    getsockname(ctx->listen_fd, (struct sockaddr *)&ctx->bound,
			&length))
		return errno;
	return 0;
}

static int open_fds(struct soft_context *ctx)
{
	struct epoll_event event = { .events = EPOLLIN };
	int err;

	ctx->kick_fd = soft_event_fd();
	ctx->verbs.context.async_fd = soft_blocking_event_fd();
	ctx->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (ctx->kick_fd < 0 || ctx->verbs.context.async_fd < 0 ||
	    ctx->epoll_fd < 0)
		return errno;
	if (ctx->is_null)
		return 0;
	err = open_listener(ctx);
	if (err)
		return err;

	/* data.ptr tells the two apart from connections. */
	event.data.ptr = &ctx->kick_fd;
	if (epoll_ctl(ctx->epoll_fd, EPOLL_CTL_ADD, ctx->kick_fd, &event))
		return errno;
	event.data.ptr = &ctx->listen_fd;
	if (epoll_ctl(ctx->epoll_fd, EPOLL_CTL_ADD, ctx->listen_fd, &event))
		return errno;
	return 0;
}

static void close_fds(struct soft_context *ctx)
{
	int fds[] = { ctx->listen_fd, ctx->local_fd,
		      ctx->epoll_fd,  ctx->datagram_fd,
		      ctx->kick_fd,   ctx->verbs.context.async_fd };
	size_t i;

	for (i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

static int query_port_ex(struct ibv_context *context, uint8_t port_num,
			 struct ibv_port_attr *attr, size_t size)
{
	struct ibv_port_attr all;
	int err = soft_query_port(context, port_num, &all);

	if (!err)
		memcpy(attr, &all, size < sizeof(all) ? size : sizeof(all));
	return err;
}

static void init_context(struct soft_context *ctx, struct ibv_device *device)
{
	struct ibv_context *context = &ctx->verbs.context;

	ctx->verbs.sz = sizeof(ctx->verbs);
	ctx->verbs.query_port = query_port_ex;
	context->abi_compat = __VERBS_ABI_IS_EXTENDED;
	context->device = device;
	context->cmd_fd = -1;
	context->async_fd = -1;
	context->num_comp_vectors = 1;
	context->ops.poll_cq = soft_poll_cq;
	context->ops.req_notify_cq = soft_req_notify_cq;
	context->ops.post_send = soft_post_send;
	context->ops.post_recv = soft_post_recv;
	pthread_mutex_init(&context->mutex, NULL);

	pthread_mutex_init(&ctx->gate, NULL);
	pthread_mutex_init(&ctx->lock, NULL);
	pthread_mutex_init(&ctx->event_lock, NULL);
	list_init(&ctx->qps);
	list_init(&ctx->conns);
	list_init(&ctx->ready);
	list_init(&ctx->run);
	list_init(&ctx->dead);
	list_init(&ctx->shms);
	list_init(&ctx->events);
	list_init(&ctx->port_err.link);
	list_init(&ctx->port_active.link);
	list_init(&ctx->gid_change.link);
	list_init(&ctx->device_fatal.link);
	pthread_mutex_init(&ctx->plan.lock, NULL);
	ctx->listen_fd = ctx->local_fd = ctx->epoll_fd = ctx->kick_fd = -1;
	ctx->datagram_fd = -1;
	ctx->timer_ns = NEVER;
}

static void free_context(struct soft_context *ctx)
{
	close_fds(ctx);
	free(ctx->windows);
	pthread_mutex_destroy(&ctx->verbs.context.mutex);
	pthread_mutex_destroy(&ctx->gate);
	pthread_mutex_destroy(&ctx->lock);
	pthread_mutex_destroy(&ctx->event_lock);
	pthread_mutex_destroy(&ctx->plan.lock);
	free(ctx);
}

/* Fault plan, address and wires, as the caller and the environment want them. */
static int configure(struct soft_context *ctx, const char *address,
		     const char *wire)
{
	const char *faults = getenv("KVXFER_SOFT_FAULT");
	const char *strict = getenv("KVXFER_SOFT_STRICT");
	size_t at;
	int err;

	ctx->wires = soft_allowed_wires(wire);
	ctx->pid_ns = soft_pid_namespace();
	ctx->socket_buffer = allowed_socket_buffer();

	err = ctx->wires ? 0 : EINVAL;
	if (!err && !soft_strict_parse(strict, &ctx->strict)) {
		fprintf(stderr,
			"soft0: KVXFER_SOFT_STRICT is '%.40s', not report, "
			"abort or off\n",
			strict);
		err = EINVAL;
	}
	if (!err && faults) {
		err = fault_set(&ctx->plan, faults, soft_now_ns(), &at);
		if (err) /* an errno has no room for the place */
			fprintf(stderr,
				"soft0: KVXFER_SOFT_FAULT, at offset %zu: "
				"'%.40s' is not understood\n",
				at, faults + at);
	}
	if (!err)
		err = soft_parse_address(address ? address : "127.0.0.1",
					 &ctx->bound);
	return err;
}

static struct soft_context *new_context(struct ibv_device *device)
{
	struct soft_context *ctx;

	pthread_once(&fork_once, watch_forks);
	ctx = calloc(1, sizeof(*ctx));
	if (ctx)
		init_context(ctx, device);
	else
		errno = ENOMEM;
	return ctx;
}

/* Open what the kernel gives, and become known; on failure nothing is left. */
static struct ibv_context *start(struct soft_context *ctx, int err)
{
	if (!err)
		err = open_fds(ctx);
	if (err) {
		free_context(ctx);
		errno = err;
		return NULL;
	}
	soft_make_gid(&ctx->bound, &ctx->gid);
	soft_local_listen(ctx);

	pthread_mutex_lock(&contexts_lock);
	list_append(&contexts, &ctx->link);
	pthread_mutex_unlock(&contexts_lock);
	atomic_fetch_add(&soft_tally.contexts, 1);
	return &ctx->verbs.context;
}

struct ibv_context *soft_open_device(struct ibv_device *device,
				     const char *address, const char *wire)
{
	struct soft_context *ctx = new_context(device);

	if (!ctx)
		return NULL;
	soft_offer_windows(&ctx->verbs.context);
	return start(ctx, configure(ctx, address, wire));
}

struct ibv_context *soft_open_null(struct ibv_device *device)
{
	struct soft_context *ctx = new_context(device);

	if (!ctx)
		return NULL;
	ctx->is_null = true;
	ctx->verbs.context.ops.post_send = soft_null_post_send;
	return start(ctx, soft_parse_address("127.0.0.1", &ctx->bound));
}

int soft_close_device(struct ibv_context *context)
{
	struct soft_context *ctx = to_context(context);
	struct soft_list *at;

	if (soft_orphaned(context))
		return ENODEV;
	if (atomic_load(&ctx->children)) {
		soft_strict_close(ctx);
		return EBUSY;
	}

	soft_stop_thread(ctx);
	pthread_mutex_lock(&contexts_lock);
	list_remove(&ctx->link);
	pthread_mutex_unlock(&contexts_lock);

	/* No QP is left, so these are strangers that got no further than hello,
	 * or a NAK that is still being read. */
	soft_lock(ctx);
	while ((at = ctx->conns.next) != &ctx->conns)
		soft_conn_close(soft_of(at, struct soft_conn, link));
	soft_conn_free_dead(ctx);
	soft_unlock(ctx);
	free_context(ctx);
	atomic_fetch_sub(&soft_tally.contexts, 1);
	return 0;
}

/*
 * The GID of a NIC's port is the same for all who open the device, so a program
 * that connects two of its own contexts asks either of them for it. Here each
 * context is an adapter of its own; our own GID with the QP number of another
 * context of this process means that one.
 */
union ibv_gid soft_adapter_of(struct soft_context *ctx,
			      const union ibv_gid *gid, uint32_t qpn)
{
	union ibv_gid found = *gid;
	struct soft_context *other;
	struct soft_list *at;
	bool here;

	if (memcmp(gid, &ctx->gid, sizeof(*gid)))
		return found;
	soft_lock(ctx);
	here = soft_find_qp(ctx, qpn);
	soft_unlock(ctx);
	if (here)
		return found;
	pthread_mutex_lock(&contexts_lock);
	for (at = contexts.next; at != &contexts; at = at->next) {
		other = soft_of(at, struct soft_context, link);
		soft_lock(other);
		if (soft_find_qp(other, qpn))
			found = other->gid;
		soft_unlock(other);
	}
	pthread_mutex_unlock(&contexts_lock);
	return found;
}

void kvx_soft_counts(struct kvx_soft_counts *counts)
{
	counts->contexts = atomic_load(&soft_tally.contexts);
	counts->pds = atomic_load(&soft_tally.pds);
	counts->mrs = atomic_load(&soft_tally.mrs);
	counts->cqs = atomic_load(&soft_tally.cqs);
	counts->channels = atomic_load(&soft_tally.channels);
	counts->qps = atomic_load(&soft_tally.qps);
	counts->connections = atomic_load(&soft_tally.connections);
	counts->threads = atomic_load(&soft_tally.threads);
}
