/* Queue pairs: creation, look-up, end. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "cq.h"
#include "datagram.h"
#include "event.h"
#include "frame.h"
#include "inject.h"
#include "list.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "windows.h"

static int check_create(struct ibv_pd *pd, const struct ibv_qp_init_attr *init)
{
	const struct ibv_qp_cap *cap = &init->cap;

	if (soft_orphaned(pd->context))
		return ENODEV;
	if ((init->qp_type != IBV_QPT_RC &&
	     (init->qp_type != IBV_QPT_UD ||
	      to_context(pd->context)->is_null)) ||
	    init->srq)
		return EOPNOTSUPP;
	if (!init->send_cq || !init->recv_cq ||
	    init->send_cq->context != pd->context ||
	    init->recv_cq->context != pd->context)
		return EINVAL;
	if (cap->max_send_wr > SOFT_MAX_QP_WR ||
	    cap->max_recv_wr > SOFT_MAX_QP_WR ||
	    cap->max_send_sge > SOFT_MAX_SGE ||
	    cap->max_recv_sge > SOFT_MAX_SGE ||
	    cap->max_inline_data > SOFT_MAX_INLINE)
		return EINVAL;
	return 0;
}

static uint32_t round_up(uint32_t count)
{
	uint32_t size = 1;

	while (size < count)
		size *= 2;
	return count ? size : 0;
}

static size_t at_least(size_t size, size_t least)
{
	return size > least ? size : least;
}

/* Grant what was asked for, rounded up as NICs do, and allocate it all now. */
static int allocate_queues(struct soft_qp *qp, const struct ibv_qp_cap *asked)
{
	struct soft_sq *sq = &qp->sq;
	struct soft_rq *rq = &qp->rq;

	qp->cap.max_send_wr = round_up(asked->max_send_wr);
	qp->cap.max_recv_wr = round_up(asked->max_recv_wr);
	qp->cap.max_send_sge = (uint32_t)at_least(asked->max_send_sge, 1);
	qp->cap.max_recv_sge = (uint32_t)at_least(asked->max_recv_sge, 1);
	qp->cap.max_inline_data = (asked->max_inline_data + 15u) & ~15u;

	sq->depth = qp->cap.max_send_wr;
	sq->mask = sq->depth ? sq->depth - 1 : 0;
	sq->slot_bytes = at_least(qp->cap.max_send_sge * sizeof(struct ibv_sge),
				  qp->cap.max_inline_data);
	sq->slot_bytes = at_least(sq->slot_bytes, sizeof(struct soft_atomic));
	sq->slot_bytes = at_least(sq->slot_bytes, sizeof(struct soft_local));
	if (soft_is_ud(qp))
		sq->slot_bytes += sizeof(struct soft_target);
	sq->ring = calloc(at_least(sq->depth, 1), sizeof(*sq->ring));
	sq->slots = calloc(at_least(sq->depth, 1), sq->slot_bytes);

	rq->depth = qp->cap.max_recv_wr;
	rq->mask = rq->depth ? rq->depth - 1 : 0;
	rq->max_sge = qp->cap.max_recv_sge;
	rq->ring = calloc(at_least(rq->depth, 1), sizeof(*rq->ring));
	rq->sges = calloc(at_least(rq->depth, 1) * rq->max_sge,
			  sizeof(*rq->sges));
	if (qp_context(qp)->strict)
		sq->sums = calloc(at_least(sq->depth, 1), sizeof(*sq->sums));
	if (qp_context(qp)->strict && !sq->sums)
		return ENOMEM;
	return sq->ring && sq->slots && rq->ring && rq->sges ? 0 : ENOMEM;
}

static void free_qp(struct soft_qp *qp)
{
	free(qp->sq.ring);
	free(qp->sq.slots);
	free(qp->sq.sums);
	free(qp->rq.ring);
	free(qp->rq.sges);
	free(qp);
}

static struct soft_qp **bucket(struct soft_context *ctx, uint32_t qpn)
{
	return &ctx->qp_table[qpn & (SOFT_BUCKETS - 1)];
}

struct soft_qp *soft_find_qp(struct soft_context *ctx, uint32_t qpn)
{
	struct soft_qp *qp = *bucket(ctx, qpn);

	while (qp && qp->ibv.qp_num != qpn)
		qp = qp->next_qpn;
	return qp;
}

/* QP numbers are random, so that one of a former life means nobody. */
static int enlist(struct soft_context *ctx, struct soft_qp *qp)
{
	uint32_t qpn;
	int err = 0;

	soft_lock(ctx);
	if (ctx->n_qps >= SOFT_MAX_QP)
		err = ENOMEM;
	if (!err && !ctx->is_null)
		err = soft_start_thread(ctx);
	if (!err && soft_is_ud(qp))
		err = soft_open_datagrams(ctx);
	if (!err) {
		do {
			soft_random(&qpn, sizeof(qpn));
			qpn &= 0xffffffu;
		} while (qpn < 2 || soft_find_qp(ctx, qpn));
		qp->ibv.qp_num = qpn;
		qp->next_qpn = *bucket(ctx, qpn);
		*bucket(ctx, qpn) = qp;
		list_append(&ctx->qps, &qp->link);
		ctx->n_qps++;
	}
	soft_unlock(ctx);
	return err;
}

static void init_qp(struct soft_qp *qp, struct ibv_pd *pd,
		    const struct ibv_qp_init_attr *init)
{
	qp->ibv.context = pd->context;
	qp->ibv.qp_context = init->qp_context;
	qp->ibv.pd = pd;
	qp->ibv.send_cq = init->send_cq;
	qp->ibv.recv_cq = init->recv_cq;
	qp->ibv.qp_type = init->qp_type;
	qp->ibv.state = IBV_QPS_RESET;
	pthread_mutex_init(&qp->ibv.mutex, NULL);
	pthread_cond_init(&qp->ibv.cond, NULL);
	pthread_mutex_init(&qp->sq_lock, NULL);
	pthread_mutex_init(&qp->rq_lock, NULL);
	atomic_init(&qp->state, IBV_QPS_RESET);
	qp->sq_sig_all = init->sq_sig_all;
	list_init(&qp->link);
	list_init(&qp->run_link);
	list_init(&qp->async.link);
	qp->async.event.element.qp = &qp->ibv;
}

struct ibv_qp *soft_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	struct soft_context *ctx = to_context(pd->context);
	struct soft_qp *qp = NULL;
	int err;

	err = check_create(pd, init);
	if (err)
		goto fail;
	err = ENOMEM;
	qp = calloc(1, sizeof(*qp));
	if (!qp)
		goto fail;
	init_qp(qp, pd, init);
	err = allocate_queues(qp, &init->cap);
	if (!err)
		err = enlist(ctx, qp);
	if (err)
		goto fail;

	init->cap = qp->cap;
	atomic_fetch_add(&to_pd(pd)->users, 1);
	atomic_fetch_add(&to_cq(init->send_cq)->users, 1);
	atomic_fetch_add(&to_cq(init->recv_cq)->users, 1);
	atomic_fetch_add(&to_cq(init->send_cq)->depths, qp->sq.depth);
	atomic_fetch_add(&to_cq(init->recv_cq)->depths, qp->rq.depth);
	atomic_fetch_add(&soft_tally.qps, 1);
	return &qp->ibv;

fail:
	if (qp)
		free_qp(qp);
	errno = err;
	return NULL;
}

/* Let nothing of the device know the QP any more; ctx->lock held. */
static void delist(struct soft_context *ctx, struct soft_qp *qp)
{
	struct soft_qp **at = bucket(ctx, qp->ibv.qp_num);
	struct soft_qp *kicked, *next;

	while (*at != qp)
		at = &(*at)->next_qpn;
	*at = qp->next_qpn;
	list_remove(&qp->link);
	ctx->n_qps--;

	/* The list of kicks cannot be searched: take it all. */
	kicked = atomic_exchange(&ctx->kicks, NULL);
	for (; kicked; kicked = next) {
		next = kicked->next_kicked;
		atomic_store(&kicked->kicked, false);
		soft_run(kicked);
	}
	list_remove(&qp->run_link);
	soft_wake(ctx);
}

int soft_destroy_qp(struct ibv_qp *ibqp)
{
	struct soft_context *ctx = to_context(ibqp->context);
	struct soft_qp *qp = to_qp(ibqp);

	if (soft_orphaned(ibqp->context))
		return ENODEV;
	soft_lock(ctx);
	soft_qp_hang_up(qp);
	soft_inject_reset(qp);
	soft_forget_windows(qp);
	delist(ctx, qp);
	soft_unlock(ctx);

	soft_cq_purge(to_cq(ibqp->send_cq), qp);
	soft_cq_purge(to_cq(ibqp->recv_cq), qp);
	soft_settle_qp_events(qp);
	atomic_fetch_sub(&to_cq(ibqp->send_cq)->depths, qp->sq.depth);
	atomic_fetch_sub(&to_cq(ibqp->recv_cq)->depths, qp->rq.depth);
	atomic_fetch_sub(&to_cq(ibqp->send_cq)->users, 1);
	atomic_fetch_sub(&to_cq(ibqp->recv_cq)->users, 1);
	atomic_fetch_sub(&to_pd(ibqp->pd)->users, 1);
	atomic_fetch_sub(&soft_tally.qps, 1);
	pthread_mutex_destroy(&ibqp->mutex);
	pthread_cond_destroy(&ibqp->cond);
	pthread_mutex_destroy(&qp->sq_lock);
	pthread_mutex_destroy(&qp->rq_lock);
	free_qp(qp);
	return 0;
}

int soft_query_qp(struct ibv_qp *ibqp, struct ibv_qp_attr *attr, int attr_mask,
		  struct ibv_qp_init_attr *init_attr)
{
	struct soft_context *ctx = to_context(ibqp->context);
	struct soft_qp *qp = to_qp(ibqp);

	(void)attr_mask; /* a minimum: all is given */
	if (soft_orphaned(ibqp->context))
		return ENODEV;
	soft_lock(ctx);
	*attr = qp->attr;
	attr->qp_state = attr->cur_qp_state = (enum ibv_qp_state)qp_state(qp);
	attr->cap = qp->cap;
	ibqp->state = attr->qp_state;
	soft_unlock(ctx);
	*init_attr = (struct ibv_qp_init_attr){
		.qp_context = ibqp->qp_context,
		.send_cq = ibqp->send_cq,
		.recv_cq = ibqp->recv_cq,
		.cap = qp->cap,
		.qp_type = ibqp->qp_type,
		.sq_sig_all = qp->sq_sig_all,
	};
	return 0;
}

int soft_bind_peer(struct ibv_qp *ibqp, const struct kvx_peer_hint *hint)
{
	struct soft_context *ctx = to_context(ibqp->context);
	struct soft_qp *qp = to_qp(ibqp);
	struct sockaddr_storage address;
	uint32_t wires = 0;
	int state, err = 0;

	if (soft_orphaned(ibqp->context))
		return ENODEV;
	if (memchr(hint->address, '\0', sizeof(hint->address)) == NULL ||
	    memchr(hint->wire, '\0', sizeof(hint->wire)) == NULL)
		return EINVAL;
	if (*hint->wire) {
		wires = soft_allowed_wires(hint->wire) & ctx->wires;
		if (!wires)
			return EINVAL;
	}
	if (*hint->address)
		err = soft_parse_address(hint->address, &address);
	if (err)
		return err;
	soft_lock(ctx);
	state = qp_state(qp);
	if (state == IBV_QPS_RESET || state == IBV_QPS_INIT)
		qp->hint = *hint;
	else
		err = EINVAL;
	if (!err)
		qp->wires = wires;
	soft_unlock(ctx);
	return err;
}

int soft_wire_name(struct ibv_qp *ibqp, char name[KVX_WIRE_NAME_BYTES])
{
	static const char *const names[] = {
		[WIRE_NONE] = "none",
		[WIRE_TCP] = "tcp",
		[WIRE_CMA] = "cma",
		[WIRE_SHM] = "shm",
	};
	struct soft_context *ctx = to_context(ibqp->context);
	enum frame_wire wire = WIRE_NONE;
	int err = 0;

	if (!soft_orphaned(ibqp->context)) {
		soft_lock(ctx);
		err = to_qp(ibqp)->cma_errno;
		wire = to_qp(ibqp)->wire_out;
		if (wire == WIRE_NONE)
			wire = to_qp(ibqp)->wire_in;
		soft_unlock(ctx);
	}
	snprintf(name, KVX_WIRE_NAME_BYTES, "%s", names[wire]);
	return err;
}
