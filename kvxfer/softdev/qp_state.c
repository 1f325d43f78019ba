/* The state machine of a QP, and the way it dies. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "connection.h"
#include "context.h"
#include "cq.h"
#include "datagram.h"
#include "frame.h"
#include "inject.h"
#include "qp.h"
#include "softdev.h"
#include "wire_shm.h"

#define QPN_MASK 0xffffffu
#define QP_ACCESS                                                          \
	((unsigned int)(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | \
			IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC))

/* Legal moves and the attributes that each must and may carry. */
struct move {
	enum ibv_qp_state from, to;
	int required, optional;
};

static const struct move rc_moves[] = {
	{ IBV_QPS_RESET, IBV_QPS_INIT,
	  IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0 },
	{ IBV_QPS_INIT, IBV_QPS_INIT, 0,
	  IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS },
	{ IBV_QPS_INIT, IBV_QPS_RTR,
	  IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
		  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
	  IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX },
	{ IBV_QPS_RTR, IBV_QPS_RTS,
	  IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
		  IBV_QP_MAX_QP_RD_ATOMIC,
	  IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
	{ IBV_QPS_RTS, IBV_QPS_RTS, 0,
	  IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
};

static const struct move ud_moves[] = {
	{ IBV_QPS_RESET, IBV_QPS_INIT,
	  IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY, 0 },
	{ IBV_QPS_INIT, IBV_QPS_INIT, 0,
	  IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY },
	{ IBV_QPS_INIT, IBV_QPS_RTR, 0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY },
	{ IBV_QPS_RTR, IBV_QPS_RTS, IBV_QP_SQ_PSN,
	  IBV_QP_CUR_STATE | IBV_QP_QKEY },
	{ IBV_QPS_RTS, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_QKEY },
};

/* Of either. */
static const struct move ends[] = {
	{ IBV_QPS_INIT, IBV_QPS_ERR, 0, 0 },
	{ IBV_QPS_RTR, IBV_QPS_ERR, 0, 0 },
	{ IBV_QPS_RTS, IBV_QPS_ERR, 0, 0 },
	{ IBV_QPS_ERR, IBV_QPS_ERR, 0, 0 },
	{ IBV_QPS_RESET, IBV_QPS_RESET, 0, 0 },
	{ IBV_QPS_INIT, IBV_QPS_RESET, 0, 0 },
	{ IBV_QPS_RTR, IBV_QPS_RESET, 0, 0 },
	{ IBV_QPS_RTS, IBV_QPS_RESET, 0, 0 },
	{ IBV_QPS_ERR, IBV_QPS_RESET, 0, 0 },
};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static const struct move *find_move(const struct move *moves, size_t n,
				    enum ibv_qp_state from,
				    enum ibv_qp_state to)
{
	size_t i;

	for (i = 0; i < n; i++)
		if (moves[i].from == from && moves[i].to == to)
			return &moves[i];
	return NULL;
}

static int check_move(const struct soft_qp *qp, enum ibv_qp_state from,
		      enum ibv_qp_state to, int mask)
{
	const struct move *move = find_move(ends, COUNT(ends), from, to);

	if (!move && soft_is_ud(qp))
		move = find_move(ud_moves, COUNT(ud_moves), from, to);
	else if (!move)
		move = find_move(rc_moves, COUNT(rc_moves), from, to);
	if (!move || (mask & move->required) != move->required ||
	    mask & ~(IBV_QP_STATE | move->required | move->optional))
		return EINVAL;
	return 0;
}

static int check_address(const struct ibv_ah_attr *ah)
{
	if (!ah->is_global || ah->port_num != 1) /* as RoCE: no LIDs */
		return EINVAL;
	if (ah->grh.sgid_index != 0)
		return ENODATA;
	return soft_gid_is_ours(&ah->grh.dgid) ? 0 : EHOSTUNREACH;
}

static int check_values(const struct ibv_qp_attr *attr, int mask)
{
	if (mask & IBV_QP_PORT && attr->port_num != 1)
		return EINVAL;
	if (mask & IBV_QP_PKEY_INDEX && attr->pkey_index != 0)
		return EINVAL;
	if (mask & IBV_QP_ACCESS_FLAGS && attr->qp_access_flags & ~QP_ACCESS)
		return EINVAL;
	if (mask & IBV_QP_PATH_MTU &&
	    (attr->path_mtu < IBV_MTU_256 || attr->path_mtu > IBV_MTU_4096))
		return EINVAL;
	if (mask & IBV_QP_DEST_QPN && attr->dest_qp_num > QPN_MASK)
		return EINVAL;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC &&
	    attr->max_dest_rd_atomic > SOFT_MAX_RD_ATOMIC)
		return EINVAL;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC &&
	    attr->max_rd_atomic > SOFT_MAX_RD_ATOMIC)
		return EINVAL;
	if (mask & IBV_QP_MIN_RNR_TIMER && attr->min_rnr_timer > 31)
		return EINVAL;
	if (mask & IBV_QP_TIMEOUT && attr->timeout > 31)
		return EINVAL;
	if (mask & IBV_QP_RETRY_CNT && attr->retry_cnt > 7)
		return EINVAL;
	if (mask & IBV_QP_RNR_RETRY && attr->rnr_retry > 7)
		return EINVAL;
	return mask & IBV_QP_AV ? check_address(&attr->ah_attr) : 0;
}

static void take_values(struct soft_qp *qp, const struct ibv_qp_attr *attr,
			int mask)
{
	struct ibv_qp_attr *own = &qp->attr;

#define TAKE(bit, field)  \
	if (mask & (bit)) \
	own->field = attr->field
	TAKE(IBV_QP_PORT, port_num);
	TAKE(IBV_QP_PKEY_INDEX, pkey_index);
	TAKE(IBV_QP_ACCESS_FLAGS, qp_access_flags);
	TAKE(IBV_QP_QKEY, qkey);
	TAKE(IBV_QP_AV, ah_attr);
	TAKE(IBV_QP_PATH_MTU, path_mtu);
	TAKE(IBV_QP_DEST_QPN, dest_qp_num);
	TAKE(IBV_QP_RQ_PSN, rq_psn);
	TAKE(IBV_QP_SQ_PSN, sq_psn);
	TAKE(IBV_QP_MAX_DEST_RD_ATOMIC, max_dest_rd_atomic);
	TAKE(IBV_QP_MAX_QP_RD_ATOMIC, max_rd_atomic);
	TAKE(IBV_QP_MIN_RNR_TIMER, min_rnr_timer);
	TAKE(IBV_QP_TIMEOUT, timeout);
	TAKE(IBV_QP_RETRY_CNT, retry_cnt);
	TAKE(IBV_QP_RNR_RETRY, rnr_retry);
#undef TAKE
	own->rq_psn &= QPN_MASK;
	own->sq_psn &= QPN_MASK;
}

static void lock_queues(struct soft_qp *qp)
{
	pthread_mutex_lock(&qp->sq_lock);
	pthread_mutex_lock(&qp->rq_lock);
}

static void unlock_queues(struct soft_qp *qp)
{
	pthread_mutex_unlock(&qp->rq_lock);
	pthread_mutex_unlock(&qp->sq_lock);
}

static void set_state(struct soft_qp *qp, enum ibv_qp_state state)
{
	lock_queues(qp);
	atomic_store_explicit(&qp->state, state, memory_order_release);
	unlock_queues(qp);
}

void soft_qp_hang_up(struct soft_qp *qp)
{
	/* From here on what a responder pulls from us no longer counts. */
	explicit_bzero(qp->nonce, sizeof(qp->nonce));
	if (qp->out && qp->out->shm)
		soft_shm_end_life(qp->out->shm);
	/* What was acknowledged is in place before anybody learns of the end. */
	soft_inject_land(qp, NEVER);
	if (qp->out && !soft_inject_hang_up(qp))
		soft_conn_close(qp->out);
	if (qp->in)
		soft_conn_close(qp->in);
	atomic_store(&qp->direct, false);
	qp->dial = DIAL_IDLE;
	qp->active = false;
	qp->local = (struct soft_failure){ 0 };
}

static void flush(struct soft_qp *qp, const struct soft_failure *send,
		  const struct soft_failure *recv)
{
	static const struct soft_failure flushed = { IBV_WC_WR_FLUSH_ERR,
						     KVX_SOFT_FLUSHED };
	const struct soft_failure *why = send ? send : &flushed;
	uint64_t head = atomic_load(&qp->sq.head);
	uint64_t seq;

	for (seq = qp->sq.done; seq != head; seq++, why = &flushed)
		soft_send_failed(qp, seq, qp->sq.ring[seq & qp->sq.mask].wr_id,
				 why->status, why->vendor_err);
	why = recv ? recv : &flushed;
	head = atomic_load(&qp->rq.head);
	for (seq = qp->rq.next; seq != head; seq++, why = &flushed)
		soft_recv_failed(qp, seq, qp->rq.ring[seq & qp->rq.mask].wr_id,
				 why->status, why->vendor_err);
}

void soft_qp_fail(struct soft_qp *qp, const struct soft_failure *send,
		  const struct soft_failure *recv)
{
	if (qp_state(qp) == IBV_QPS_ERR)
		return;
	soft_qp_hang_up(qp);
	/* Under both locks, so that a post that comes after sees ERR and its
	 * completion comes after these. */
	lock_queues(qp);
	atomic_store_explicit(&qp->state, IBV_QPS_ERR, memory_order_release);
	flush(qp, send, recv);
	unlock_queues(qp);
}

/* Empty the queues without a completion, and forget the peer. */
static void reset(struct soft_qp *qp)
{
	soft_qp_hang_up(qp);
	lock_queues(qp);
	atomic_store_explicit(&qp->state, IBV_QPS_RESET, memory_order_release);
	/* First the entries, since polling one of them would move a tail. */
	soft_cq_purge(to_cq(qp->ibv.send_cq), qp);
	soft_cq_purge(to_cq(qp->ibv.recv_cq), qp);
	atomic_store(&qp->sq.head, 0);
	atomic_store(&qp->sq.tail, 0);
	atomic_store(&qp->rq.head, 0);
	atomic_store(&qp->rq.tail, 0);
	atomic_store(&qp->rq.starved, false);
	qp->sq.done = qp->sq.next = qp->sq.next_offset = 0;
	qp->sq.n_local = 0;
	qp->rq.next = 0;
	unlock_queues(qp);

	memset(&qp->attr, 0, sizeof(qp->attr));
	memset(&qp->peer_gid, 0, sizeof(qp->peer_gid));
	memset(&qp->hint, 0, sizeof(qp->hint));
	qp->wires = 0;
	qp->wire_out = qp->wire_in = WIRE_NONE;
	qp->was_up = qp->trace_allowed = qp->active = false;
	qp->no_cma = qp->no_shm = false;
	qp->cma_errno = 0;
	qp->reads_out = 0;
	qp->read_offset = 0;
	qp->rx_seq = 0;
	soft_inject_reset(qp);
}

/* What has been answered by now is no failure. No more than the ring holds. */
static void take_answers(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	unsigned int turns = SHM_RING_BYTES / FRAME_HEADER_BYTES;

	ctx->now_ns = soft_now_ns();
	while (turns-- && qp->out && qp->out->shm && soft_shm_answered(qp->out))
		soft_conn_service(qp->out);
}

int soft_modify_qp(struct ibv_qp *ibqp, struct ibv_qp_attr *attr, int mask)
{
	struct soft_context *ctx = to_context(ibqp->context);
	struct soft_qp *qp = to_qp(ibqp);
	union ibv_gid peer_gid = { 0 };
	enum ibv_qp_state from, to;
	int err;

	if (soft_orphaned(ibqp->context))
		return ENODEV;
	if (mask & IBV_QP_AV) /* where it is legal, so is the number */
		peer_gid = soft_adapter_of(ctx, &attr->ah_attr.grh.dgid,
					   attr->dest_qp_num);
	soft_lock(ctx);
	from = (enum ibv_qp_state)qp_state(qp);
	to = mask & IBV_QP_STATE ? attr->qp_state : from;
	err = mask & IBV_QP_CUR_STATE && attr->cur_qp_state != from ? EINVAL :
								      0;
	if (!err)
		err = check_move(qp, from, to, mask);
	if (!err)
		err = check_values(attr, mask);
	if (!err && ctx->lost && to != IBV_QPS_ERR && to != IBV_QPS_RESET)
		err = EIO;
	if (err)
		goto out;

	if (to == IBV_QPS_ERR) {
		take_answers(qp);
		soft_qp_fail(qp, NULL, NULL);
	} else if (to == IBV_QPS_RESET) {
		reset(qp);
	} else {
		take_values(qp, attr, mask);
		if (mask & IBV_QP_AV)
			qp->peer_gid = peer_gid;
		ctx->mr_generation++; /* access flags may have changed */
		set_state(qp, to);
	}
	ibqp->state = to;
out:
	soft_unlock(ctx);
	return err;
}
