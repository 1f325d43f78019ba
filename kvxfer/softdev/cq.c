/* Completion queues. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "context.h"
#include "cq.h"
#include "event.h"
#include "initiator.h"
#include "list.h"
#include "qp.h"

static int check_create(struct ibv_context *context, int cqe,
			struct ibv_comp_channel *channel, int comp_vector)
{
	if (soft_orphaned(context))
		return ENODEV;
	if (cqe < 1 || cqe > SOFT_MAX_CQE || comp_vector != 0)
		return EINVAL;
	if (channel && channel->context != context)
		return EINVAL;
	return 0;
}

/* One entry of the power of two stays unused, as on the NICs: 4 become 7. */
static uint32_t ring_size(int cqe)
{
	uint32_t size = 2;

	while (size < (uint32_t)cqe + 1)
		size *= 2;
	return size;
}

struct ibv_cq *soft_create_cq(struct ibv_context *context, int cqe,
			      void *cq_context,
			      struct ibv_comp_channel *channel, int comp_vector)
{
	struct soft_cq *cq = NULL;
	uint32_t size;
	int err;

	err = check_create(context, cqe, channel, comp_vector);
	if (err)
		goto fail;
	err = ENOMEM;
	cq = calloc(1, sizeof(*cq));
	if (!cq)
		goto fail;
	size = ring_size(cqe);
	cq->ring = calloc(size, sizeof(*cq->ring));
	if (!cq->ring)
		goto fail;

	cq->mask = size - 1;
	cq->ibv.context = context;
	cq->ibv.channel = channel;
	cq->ibv.cq_context = cq_context;
	cq->ibv.cqe = (int)size - 1;
	pthread_mutex_init(&cq->ibv.mutex, NULL);
	pthread_cond_init(&cq->ibv.cond, NULL);
	pthread_mutex_init(&cq->lock, NULL);
	list_init(&cq->event_link);
	list_init(&cq->async.link);
	cq->async.event.element.cq = &cq->ibv;
	if (channel) {
		pthread_mutex_lock(&to_channel(channel)->lock);
		channel->refcnt++;
		pthread_mutex_unlock(&to_channel(channel)->lock);
	}
	atomic_fetch_add(&to_context(context)->children, 1);
	atomic_fetch_add(&soft_tally.cqs, 1);
	return &cq->ibv;

fail:
	free(cq);
	errno = err;
	return NULL;
}

int soft_destroy_cq(struct ibv_cq *ibcq)
{
	struct soft_context *ctx = to_context(ibcq->context);
	struct soft_cq *cq = to_cq(ibcq);

	if (soft_orphaned(ibcq->context))
		return ENODEV;
	if (atomic_load(&cq->users))
		return EBUSY;
	/* The wait below is without end, as the man page has it. */
	soft_forget_cq_events(cq);
	soft_settle_cq_events(cq);
	pthread_mutex_destroy(&cq->lock);
	pthread_mutex_destroy(&ibcq->mutex);
	pthread_cond_destroy(&ibcq->cond);
	free(cq->ring);
	free(cq);
	atomic_fetch_sub(&ctx->children, 1);
	atomic_fetch_sub(&soft_tally.cqs, 1);
	return 0;
}

int soft_resize_cq(struct ibv_cq *ibcq, int cqe)
{
	struct soft_cq *cq = to_cq(ibcq);
	struct soft_cqe *ring, *old;
	uint32_t size;
	uint64_t at;

	if (soft_orphaned(ibcq->context))
		return ENODEV;
	if (cqe < 1 || cqe > SOFT_MAX_CQE)
		return EINVAL;
	size = ring_size(cqe);
	ring = calloc(size, sizeof(*ring));
	if (!ring)
		return ENOMEM;
	pthread_mutex_lock(&cq->lock);
	if (cq->head - cq->tail > (uint64_t)cqe) {
		pthread_mutex_unlock(&cq->lock);
		free(ring);
		return EINVAL;
	}
	for (at = cq->tail; at != cq->head; at++)
		ring[at & (size - 1)] = cq->ring[at & cq->mask];
	old = cq->ring;
	cq->ring = ring;
	cq->mask = size - 1;
	ibcq->cqe = (int)size - 1;
	pthread_mutex_unlock(&cq->lock);
	free(old);
	/* A thread that sleeps knew of more room. */
	soft_wake(to_context(ibcq->context));
	return 0;
}

static void free_slots(const struct soft_cqe *cqe)
{
	atomic_uint_fast64_t *tail = cqe->is_recv ? &cqe->qp->rq.tail :
						    &cqe->qp->sq.tail;

	/* Release: whoever sees the slots free also sees us done with them. */
	atomic_store_explicit(tail, cqe->free_to, memory_order_release);
}

int soft_poll_cq(struct ibv_cq *ibcq, int num_entries, struct ibv_wc *wc)
{
	struct soft_cq *cq = to_cq(ibcq);
	const struct soft_cqe *cqe;
	int n = 0;

	if (soft_orphaned(ibcq->context)) {
		errno = ENODEV;
		return -1;
	}
	/* An overrun leaves ready non-zero, so that it is noticed below. */
	if (!atomic_load_explicit(&cq->ready, memory_order_acquire)) {
		soft_poll_direct(to_context(ibcq->context));
		if (!atomic_load_explicit(&cq->ready, memory_order_acquire))
			return 0;
	}

	pthread_mutex_lock(&cq->lock);
	while (n < num_entries && cq->tail != cq->head) {
		cqe = &cq->ring[cq->tail & cq->mask];
		free_slots(cqe);
		wc[n++] = cqe->wc;
		cq->tail++;
	}
	if (cq->overrun && n == 0 && num_entries > 0)
		n = -1; /* completions are lost: there is no going on */
	atomic_store_explicit(&cq->ready, cq->head - cq->tail + cq->overrun,
			      memory_order_relaxed);
	pthread_mutex_unlock(&cq->lock);
	if (n < 0)
		errno = EOVERFLOW;
	return n;
}

int soft_req_notify_cq(struct ibv_cq *ibcq, int solicited_only)
{
	struct soft_cq *cq = to_cq(ibcq);
	enum soft_armed armed = solicited_only ? ARMED_SOLICITED : ARMED_NEXT;
	bool news;

	if (soft_orphaned(ibcq->context))
		return ENODEV;
	pthread_mutex_lock(&cq->lock);
	news = armed > cq->armed;
	if (news)
		cq->armed = armed;
	pthread_mutex_unlock(&cq->lock);
	if (news)
		soft_listen_direct(to_context(ibcq->context), cq);
	return 0;
}

void soft_cq_overrun(struct soft_cq *cq)
{
	struct soft_context *ctx = to_context(cq->ibv.context);

	if (cq->overrun)
		return;
	cq->overrun = true;
	atomic_store_explicit(&cq->ready, cq->head - cq->tail + 1,
			      memory_order_release);
	soft_raise_cq(cq, IBV_EVENT_CQ_ERR);
	if (cq->armed !=
	    ARMED_NOT) { /* who waits for this one must not sleep on */
		cq->armed = ARMED_NOT;
		soft_notify_cq(cq);
	}
	/* Its QPs must go to ERR, which needs ctx->lock: not from here. */
	atomic_store(&ctx->cq_overrun, true);
	soft_wake(ctx);
}

void soft_cq_push(struct soft_cq *cq, const struct soft_cqe *cqe,
		  bool solicited)
{
	if (cq->overrun || cq->head - cq->tail >= cq->mask) {
		soft_cq_overrun(cq);
		return;
	}
	cq->ring[cq->head & cq->mask] = *cqe;
	cq->head++;
	atomic_store_explicit(&cq->ready, cq->head - cq->tail,
			      memory_order_release);

	if (cqe->wc.status != IBV_WC_SUCCESS)
		solicited = true;
	if (cq->armed == ARMED_NEXT ||
	    (cq->armed == ARMED_SOLICITED && solicited)) {
		cq->armed = ARMED_NOT;
		soft_notify_cq(cq);
	}
}

void soft_cq_purge(struct soft_cq *cq, const struct soft_qp *qp)
{
	uint64_t from, to;

	pthread_mutex_lock(&cq->lock);
	for (from = to = cq->tail; from != cq->head; from++)
		if (cq->ring[from & cq->mask].qp != qp)
			cq->ring[to++ & cq->mask] = cq->ring[from & cq->mask];
	cq->head = to;
	atomic_store_explicit(&cq->ready, cq->head - cq->tail + cq->overrun,
			      memory_order_relaxed);
	pthread_mutex_unlock(&cq->lock);
}

bool soft_cq_is_armed(struct soft_cq *cq)
{
	bool yes;

	pthread_mutex_lock(&cq->lock);
	yes = cq->armed != ARMED_NOT;
	pthread_mutex_unlock(&cq->lock);
	return yes;
}

bool soft_cq_can_overrun(struct soft_cq *cq)
{
	bool yes;

	pthread_mutex_lock(&cq->lock);
	yes = atomic_load_explicit(&cq->depths, memory_order_relaxed) >
	      cq->mask;
	pthread_mutex_unlock(&cq->lock);
	return yes;
}

bool soft_cq_is_overrun(struct soft_cq *cq)
{
	bool yes;

	pthread_mutex_lock(&cq->lock);
	yes = cq->overrun;
	pthread_mutex_unlock(&cq->lock);
	return yes;
}
