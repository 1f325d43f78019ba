/* The device thread: who gets a turn, and when it may sleep. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "copier.h"
#include "cq.h"
#include "datagram.h"
#include "event.h"
#include "initiator.h"
#include "inject.h"
#include "list.h"
#include "qp.h"
#include "responder.h"
#include "wire_shm.h"

#define MAX_EVENTS 64
#define TURN_ITEMS 16 /* queues and connections served between two looks */
/* Sleeping and being woken costs some microseconds; a queue that was busy a
 * moment ago will often be busy again in less. Between two looks the processor is
 * left to whoever wants it. */
#define AWAKE_NS 20000u
/* On sockets, where the peer is at work on what we wait for. */
#define PATIENT_NS 150000u

void soft_wake(struct soft_context *ctx)
{
	atomic_store(&ctx->poked, true);
	if (atomic_load(&ctx->asleep) && atomic_exchange(&ctx->asleep, false))
		soft_event_fd_set(ctx->kick_fd);
}

void soft_kick(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	struct soft_qp *first;

	/* Taken by the device thread with an exchange as well, so that it sees
	 * all that was posted before a kick that finds the flag set. */
	if (atomic_exchange(&qp->kicked, true))
		return;
	first = atomic_load_explicit(&ctx->kicks, memory_order_relaxed);
	do {
		qp->next_kicked = first;
	} while (!atomic_compare_exchange_weak(&ctx->kicks, &first, qp));
	soft_wake(ctx);
}

void soft_run(struct soft_qp *qp)
{
	if (list_empty(&qp->run_link))
		list_append(&qp_context(qp)->run, &qp->run_link);
}

void soft_ready(struct soft_conn *conn)
{
	if (list_empty(&conn->ready_link) && conn->state != CONN_DEAD)
		list_append(&conn->ctx->ready, &conn->ready_link);
}

void soft_want_timer(struct soft_context *ctx, uint64_t when_ns)
{
	if (when_ns < ctx->timer_ns)
		ctx->timer_ns = when_ns;
}

static void take_kicks(struct soft_context *ctx)
{
	struct soft_qp *qp, *next;

	if (!atomic_load_explicit(&ctx->kicks, memory_order_relaxed))
		return;
	for (qp = atomic_exchange(&ctx->kicks, NULL); qp; qp = next) {
		next = qp->next_kicked;
		atomic_exchange(&qp->kicked, false);
		soft_run(qp);
		if (qp->in) /* it may have waited for a receive */
			soft_ready(qp->in);
	}
}

/* A CQ lost a completion: its QPs can no longer be trusted to report. */
static void fail_overrun(struct soft_context *ctx)
{
	struct soft_list *at;
	struct soft_qp *qp;

	for (at = ctx->qps.next; at != &ctx->qps; at = at->next) {
		qp = soft_of(at, struct soft_qp, link);
		if (qp_state(qp) == IBV_QPS_RESET)
			continue;
		if (soft_cq_is_overrun(to_cq(qp->ibv.send_cq)) ||
		    soft_cq_is_overrun(to_cq(qp->ibv.recv_cq)))
			soft_qp_fail(qp, NULL, NULL);
	}
}

static void run_timers(struct soft_context *ctx)
{
	struct soft_list *at, *next;
	struct soft_conn *conn;
	struct soft_qp *qp;

	ctx->timer_ns = NEVER;
	for (at = ctx->qps.next; at != &ctx->qps; at = at->next) {
		qp = soft_of(at, struct soft_qp, link);
		soft_initiator_timer(qp);
		soft_inject_timer(qp);
	}
	for (at = ctx->conns.next; at != &ctx->conns; at = next) {
		next = at->next; /* it may close itself, but no other */
		conn = soft_of(at, struct soft_conn, link);
		soft_conn_expire(conn);
		if (conn->state == CONN_UP && !conn->outgoing)
			soft_responder_timer(conn);
	}
}

static void stay_awake(struct soft_context *ctx, uint64_t until_ns)
{
	if (ctx->awake_until_ns < until_ns)
		ctx->awake_until_ns = until_ns;
}

/* What comes before the turns of QPs and connections. */
static void look_around(struct soft_context *ctx)
{
	soft_lock(ctx);
	ctx->now_ns = soft_now_ns();
	soft_shm_awake(ctx);
	take_kicks(ctx);
	if (atomic_exchange(&ctx->cq_overrun, false))
		fail_overrun(ctx);
	if (ctx->now_ns >= ctx->timer_ns)
		run_timers(ctx);
	if (soft_faulty(ctx))
		soft_inject_look(ctx);
	if (soft_shm_poll(ctx))
		stay_awake(ctx, ctx->now_ns + AWAKE_NS);
	soft_unlock(ctx);
}

/* Over sockets, a processor that falls asleep between a request and its answer or
 * between two pieces of a message takes longer to wake up than they to come. */
static void look_on(struct soft_context *ctx)
{
	stay_awake(ctx, soft_now_ns() + PATIENT_NS);
}

/* One turn each, the lock let go between them. True: somebody wants more. */
static bool serve(struct soft_context *ctx)
{
	struct soft_list *link;
	struct soft_conn *conn;
	struct soft_qp *qp;
	bool more = false;
	int i;

	for (i = 0; i < TURN_ITEMS; i++) {
		soft_lock(ctx);
		link = list_pop(&ctx->run);
		if (link) {
			qp = soft_of(link, struct soft_qp, run_link);
			if (!ctx->port_down && soft_initiate(qp))
				soft_run(qp);
			if (qp->out && soft_expects(qp->out))
				look_on(ctx);
		}
		soft_unlock(ctx);

		soft_lock(ctx);
		link = list_pop(&ctx->ready);
		if (link && !ctx->port_down) {
			conn = soft_of(link, struct soft_conn, ready_link);
			soft_conn_service(conn);
			if (soft_expects(conn))
				look_on(ctx);
		}
		more = !list_empty(&ctx->run) || !list_empty(&ctx->ready);
		soft_unlock(ctx);
		if (!more)
			break;
		/* Work has just been done: its end is near the last look. */
	}
	return more;
}

static void mark_ready(struct soft_conn *conn, uint32_t events)
{
	if (conn->state == CONN_DEAD)
		return;
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		conn->readable = true;
	if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
		conn->writable = true;
	if (events & (EPOLLHUP | EPOLLERR))
		conn->broken = true;
	if (conn->shm)
		conn->shm->packets = true;
	soft_ready(conn);
}

static void take_events(struct soft_context *ctx,
			const struct epoll_event *events, int n)
{
	int i;

	soft_lock(ctx);
	ctx->now_ns = soft_now_ns();
	for (i = 0; i < n; i++) {
		if (events[i].data.ptr == &ctx->kick_fd)
			soft_event_fd_clear(ctx->kick_fd);
		else if (events[i].data.ptr == &ctx->listen_fd)
			soft_accept(ctx);
		else if (events[i].data.ptr == &ctx->local_fd)
			soft_local_accept(ctx);
		else if (events[i].data.ptr == &ctx->datagram_fd)
			soft_take_datagrams(ctx);
		else
			mark_ready(events[i].data.ptr, events[i].events);
	}
	stay_awake(ctx, ctx->now_ns + AWAKE_NS);
	soft_unlock(ctx);
}

static int sleep_ms(uint64_t now_ns, uint64_t until_ns)
{
	uint64_t ms;

	if (until_ns == NEVER)
		return -1;
	if (until_ns <= now_ns)
		return 0;
	ms = (until_ns - now_ns + NS_PER_MS - 1) / NS_PER_MS;
	return ms > 3600000 ? 3600000 : (int)ms;
}

/* Wait for something to do, no longer than the next timer. */
static void wait_for_events(struct soft_context *ctx, bool more)
{
	struct epoll_event events[MAX_EVENTS];
	int n, timeout;
	bool idle;

	soft_lock(ctx);
	/* No event is in hand that could still point to one of them. */
	soft_conn_free_dead(ctx);
	if (!more)
		soft_copier_dismiss(ctx);
	timeout = sleep_ms(ctx->now_ns, ctx->timer_ns);
	ctx->sleep_ns = ctx->timer_ns;
	idle = !more && ctx->now_ns < ctx->awake_until_ns;
	if (more || idle)
		timeout = 0;
	if (timeout && !soft_shm_sleep(ctx))
		timeout = 0;
	soft_unlock(ctx);

	if (idle)
		sched_yield();
	if (timeout)
		atomic_store(&ctx->asleep, true);
	/* Whoever poked before that did not write to kick_fd. */
	if (atomic_exchange(&ctx->poked, false))
		timeout = 0;
	n = epoll_wait(ctx->epoll_fd, events, MAX_EVENTS, timeout);
	atomic_store(&ctx->asleep, false);
	if (n > 0)
		take_events(ctx, events, n);
}

static void *device_thread(void *arg)
{
	struct soft_context *ctx = arg;
	bool more;

	pthread_setname_np(pthread_self(), "kvx-soft");
	while (!atomic_load(&ctx->stop)) {
		look_around(ctx);
		more = serve(ctx);
		wait_for_events(ctx, more);
	}
	return NULL;
}

int soft_start_thread(struct soft_context *ctx)
{
	sigset_t all, before;
	int err;

	if (ctx->has_thread)
		return 0;
	/* The application's signals are for the application's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(&ctx->thread, NULL, device_thread, ctx);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err)
		return err;
	ctx->has_thread = true;
	atomic_fetch_add(&soft_tally.threads, 1);
	return 0;
}

void soft_stop_thread(struct soft_context *ctx)
{
	bool had;

	soft_lock(ctx);
	had = ctx->has_thread;
	ctx->has_thread = false;
	soft_unlock(ctx);
	if (!had)
		return;
	atomic_store(&ctx->stop, true);
	soft_wake(ctx);
	pthread_join(ctx->thread, NULL);
	soft_copier_stop(ctx);
	atomic_fetch_sub(&soft_tally.threads, 1);
}
