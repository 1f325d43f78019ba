/* Completion channels and asynchronous events. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "context.h"
#include "cq.h"
#include "event.h"
#include "list.h"
#include "qp.h"
#include "strict.h"

/*
 * Both kinds of queue have an eventfd that is readable exactly while the queue
 * holds something: it is set when the queue stops being empty and cleared when
 * it is empty again, both under the queue's lock. So it works level-triggered
 * in anybody's poll loop.
 */

int soft_event_fd(void)
{
	return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

void soft_event_fd_set(int fd)
{
	const uint64_t one = 1;
	ssize_t done;

	/* It fails only on a full counter, and then it is set already. */
	do {
		done = write(fd, &one, sizeof(one));
	} while (done < 0 && errno == EINTR);
}

void soft_event_fd_clear(int fd)
{
	struct pollfd look = { .fd = fd, .events = POLLIN };
	uint64_t count;
	ssize_t done;

	/* The application may have made it blocking. */
	if (poll(&look, 1, 0) <= 0)
		return;
	do {
		done = read(fd, &count, sizeof(count));
	} while (done < 0 && errno == EINTR);
}

/* Wait as the fd's flags ask. 0: look again; -1 with errno. */
static int wait_readable(int fd)
{
	struct pollfd look = { .fd = fd, .events = POLLIN };
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return -1;
	if (flags & O_NONBLOCK) {
		errno = EAGAIN;
		return -1;
	}
	return poll(&look, 1, -1) < 0 ? -1 : 0;
}

/* An fd of ours starts out blocking, like that of libibverbs. */
int soft_blocking_event_fd(void)
{
	return eventfd(0, EFD_CLOEXEC);
}

struct ibv_comp_channel *soft_create_comp_channel(struct ibv_context *context)
{
	struct soft_channel *channel;

	if (soft_orphaned(context)) {
		errno = ENODEV;
		return NULL;
	}
	channel = calloc(1, sizeof(*channel));
	if (!channel) {
		errno = ENOMEM;
		return NULL;
	}
	channel->ibv.context = context;
	channel->ibv.fd = soft_blocking_event_fd();
	if (channel->ibv.fd < 0) {
		free(channel);
		return NULL;
	}
	pthread_mutex_init(&channel->lock, NULL);
	list_init(&channel->events);
	atomic_fetch_add(&to_context(context)->children, 1);
	atomic_fetch_add(&soft_tally.channels, 1);
	return &channel->ibv;
}

int soft_destroy_comp_channel(struct ibv_comp_channel *ibchannel)
{
	struct soft_channel *channel = to_channel(ibchannel);
	struct soft_context *ctx = to_context(ibchannel->context);
	int users;

	if (soft_orphaned(ibchannel->context))
		return ENODEV;
	pthread_mutex_lock(&channel->lock);
	users = ibchannel->refcnt;
	pthread_mutex_unlock(&channel->lock);
	if (users)
		return EBUSY;
	/* Who rings has let go of all locks, and is nearly done. */
	while (atomic_load(&channel->ringing))
		sched_yield();
	close(ibchannel->fd);
	pthread_mutex_destroy(&channel->lock);
	free(channel);
	atomic_fetch_sub(&ctx->children, 1);
	atomic_fetch_sub(&soft_tally.channels, 1);
	return 0;
}

void soft_ring(struct soft_channel *channel)
{
	if (atomic_exchange(&channel->owed, false))
		soft_event_fd_set(channel->ibv.fd);
}

/* There are no events left, channel->lock held: the fd is not to be readable. */
static void hush(struct soft_channel *channel)
{
	struct pollfd look = { .fd = channel->ibv.fd, .events = POLLIN };

	if (atomic_exchange(&channel->owed, false))
		return;
	/* Whoever has taken the debt is about to set it. */
	while (poll(&look, 1, 0) == 0)
		sched_yield();
	soft_event_fd_clear(channel->ibv.fd);
}

void soft_notify_cq(struct soft_cq *cq)
{
	struct soft_context *ctx = to_context(cq->ibv.context);
	struct soft_channel *channel;
	bool first;

	if (!cq->ibv.channel)
		return;
	channel = to_channel(cq->ibv.channel);
	pthread_mutex_lock(&channel->lock);
	cq->events_pending++;
	first = list_empty(&channel->events);
	if (list_empty(&cq->event_link))
		list_append(&channel->events, &cq->event_link);
	if (first)
		atomic_store(&channel->owed, true);
	if (first && !soft_ring_later(ctx, channel))
		soft_ring(channel);
	pthread_mutex_unlock(&channel->lock);
}

int soft_get_cq_event(struct ibv_comp_channel *ibchannel, struct ibv_cq **ibcq,
		      void **cq_context)
{
	struct soft_channel *channel = to_channel(ibchannel);
	struct soft_list *link;
	struct soft_cq *cq;

	if (soft_orphaned(ibchannel->context)) {
		errno = ENODEV;
		return -1;
	}
	for (;;) {
		pthread_mutex_lock(&channel->lock);
		link = list_pop(&channel->events);
		if (link)
			break;
		pthread_mutex_unlock(&channel->lock);
		if (wait_readable(ibchannel->fd))
			return -1;
	}
	cq = soft_of(link, struct soft_cq, event_link);
	cq->events_taken++;
	if (--cq->events_pending)
		list_append(&channel->events, &cq->event_link);
	if (list_empty(&channel->events))
		hush(channel);
	*ibcq = &cq->ibv;
	*cq_context = cq->ibv.cq_context;
	pthread_mutex_unlock(&channel->lock);
	return 0;
}

void soft_ack_cq_events(struct ibv_cq *cq, unsigned int nevents)
{
	if (soft_orphaned(cq->context))
		return;
	pthread_mutex_lock(&cq->mutex);
	cq->comp_events_completed += nevents;
	pthread_cond_broadcast(&cq->cond);
	pthread_mutex_unlock(&cq->mutex);
}

void soft_forget_cq_events(struct soft_cq *cq)
{
	struct soft_channel *channel;
	uint32_t taken;

	if (!cq->ibv.channel)
		return;
	channel = to_channel(cq->ibv.channel);
	pthread_mutex_lock(&channel->lock);
	if (!list_empty(&cq->event_link)) {
		list_remove(&cq->event_link);
		cq->events_pending = 0;
		if (list_empty(&channel->events))
			hush(channel);
	}
	taken = cq->events_taken;
	channel->ibv.refcnt--;
	pthread_mutex_unlock(&channel->lock);

	soft_await_acks(to_context(cq->ibv.context), &cq->ibv.mutex,
			&cq->ibv.cond, &cq->ibv.comp_events_completed, taken,
			"a CQ");
}

/*
 * One event per object is enough: a QP or CQ reports that it broke, and a
 * second report before the first was fetched adds nothing.
 */
static void raise_event(struct soft_context *ctx, struct soft_event *event,
			enum ibv_event_type type)
{
	pthread_mutex_lock(&ctx->event_lock);
	if (!event->pending) {
		event->pending = true;
		event->event.event_type = type;
		if (list_empty(&ctx->events))
			soft_event_fd_set(ctx->verbs.context.async_fd);
		list_append(&ctx->events, &event->link);
	}
	pthread_mutex_unlock(&ctx->event_lock);
}

void soft_raise_qp(struct soft_qp *qp, enum ibv_event_type type)
{
	raise_event(qp_context(qp), &qp->async, type);
}

void soft_raise_cq(struct soft_cq *cq, enum ibv_event_type type)
{
	raise_event(to_context(cq->ibv.context), &cq->async, type);
}

void soft_raise_adapter(struct soft_context *ctx, enum ibv_event_type type)
{
	struct soft_event *event = &ctx->device_fatal;

	if (type == IBV_EVENT_GID_CHANGE)
		event = &ctx->gid_change;
	else if (type == IBV_EVENT_PORT_ERR)
		event = &ctx->port_err;
	else if (type == IBV_EVENT_PORT_ACTIVE)
		event = &ctx->port_active;
	event->event.element.port_num = 1;
	raise_event(ctx, event, type);
}

int soft_get_async_event(struct ibv_context *context,
			 struct ibv_async_event *out)
{
	struct soft_context *ctx = to_context(context);
	struct soft_event *event;
	struct soft_list *link;

	if (soft_orphaned(context)) {
		errno = ENODEV;
		return -1;
	}
	for (;;) {
		pthread_mutex_lock(&ctx->event_lock);
		link = list_pop(&ctx->events);
		if (link)
			break;
		pthread_mutex_unlock(&ctx->event_lock);
		if (wait_readable(context->async_fd))
			return -1;
	}
	event = soft_of(link, struct soft_event, link);
	event->pending = false;
	event->taken++;
	*out = event->event;
	if (list_empty(&ctx->events))
		soft_event_fd_clear(context->async_fd);
	pthread_mutex_unlock(&ctx->event_lock);
	return 0;
}

static void ack(pthread_mutex_t *mutex, pthread_cond_t *cond, uint32_t *acked)
{
	pthread_mutex_lock(mutex);
	++*acked;
	pthread_cond_broadcast(cond);
	pthread_mutex_unlock(mutex);
}

void soft_ack_async_event(struct ibv_async_event *event)
{
	struct ibv_qp *qp;
	struct ibv_cq *cq;

	switch (event->event_type) {
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
		qp = event->element.qp;
		ack(&qp->mutex, &qp->cond, &qp->events_completed);
		break;
	case IBV_EVENT_CQ_ERR:
		cq = event->element.cq;
		ack(&cq->mutex, &cq->cond, &cq->async_events_completed);
		break;
	default: /* of a port or device: nothing waits for those */
		break;
	}
}

static void settle(struct soft_context *ctx, struct soft_event *event,
		   pthread_mutex_t *mutex, pthread_cond_t *cond,
		   const uint32_t *acked, const char *what)
{
	uint32_t taken;

	pthread_mutex_lock(&ctx->event_lock);
	if (event->pending) {
		list_remove(&event->link);
		event->pending = false;
		if (list_empty(&ctx->events))
			soft_event_fd_clear(ctx->verbs.context.async_fd);
	}
	taken = event->taken;
	pthread_mutex_unlock(&ctx->event_lock);

	soft_await_acks(ctx, mutex, cond, acked, taken, what);
}

void soft_settle_qp_events(struct soft_qp *qp)
{
	settle(qp_context(qp), &qp->async, &qp->ibv.mutex, &qp->ibv.cond,
	       &qp->ibv.events_completed, "a QP");
}

void soft_settle_cq_events(struct soft_cq *cq)
{
	settle(to_context(cq->ibv.context), &cq->async, &cq->ibv.mutex,
	       &cq->ibv.cond, &cq->ibv.async_events_completed, "a CQ");
}
