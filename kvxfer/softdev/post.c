/* The fast path of the application: post_send and post_recv. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "context.h"
#include "datagram.h"
#include "frame.h"
#include "initiator.h"
#include "inject.h"
#include "qp.h"
#include "softdev.h"
#include "strict.h"
#include "windows.h"

/*
 * Errno as mlx5 has it: ENOMEM for a queue that is full, for too many SGEs, and
 * for a QP that cannot send yet. Whoever wants to know which keeps count.
 */
static int check_send(const struct soft_qp *qp, const struct ibv_send_wr *wr,
		      int state, uint64_t head)
{
	uint64_t tail = atomic_load_explicit(&qp->sq.tail,
					     memory_order_acquire);

	if (state != IBV_QPS_RTS && state != IBV_QPS_ERR)
		return soft_is_ud(qp) ? EINVAL : ENOMEM;
	/* Slots come back only when a completion at or after them is polled. */
	if (head - tail >= qp->sq.depth)
		return ENOMEM;
	if (wr->num_sge < 0 || (uint32_t)wr->num_sge > qp->cap.max_send_sge)
		return ENOMEM;
	if (soft_is_ud(qp))
		return (wr->opcode == IBV_WR_SEND ||
			wr->opcode == IBV_WR_SEND_WITH_IMM) &&
				       wr->wr.ud.ah ?
			       0 :
			       EINVAL;

	switch (wr->opcode) {
	case IBV_WR_RDMA_WRITE:
	case IBV_WR_RDMA_WRITE_WITH_IMM:
	case IBV_WR_SEND:
	case IBV_WR_SEND_WITH_IMM:
	case IBV_WR_SEND_WITH_INV:
		return 0;
	case IBV_WR_BIND_MW:
	case IBV_WR_LOCAL_INV:
	case IBV_WR_RDMA_READ:
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
	case IBV_WR_ATOMIC_CMP_AND_SWP:
		return wr->send_flags & IBV_SEND_INLINE ? EINVAL : 0;
	default:
		return EINVAL;
	}
}

static uint64_t total_length(const struct ibv_sge *sge, int n)
{
	uint64_t length = 0;
	int i;

	for (i = 0; i < n; i++)
		length += sge[i].length;
	return length;
}

static void copy_inline(uint8_t *slot, const struct ibv_send_wr *wr)
{
	int i;

	for (i = 0; i < wr->num_sge; i++) {
		if (!wr->sg_list[i].length)
			continue;
		memcpy(slot, (const void *)(uintptr_t)wr->sg_list[i].addr,
		       wr->sg_list[i].length);
		slot += wr->sg_list[i].length;
	}
}

static int fill_atomic(struct soft_wqe *wqe, uint8_t *slot,
		       const struct ibv_send_wr *wr)
{
	struct soft_atomic *atomic = (struct soft_atomic *)slot;

	if (wr->num_sge != 1 || wqe->length != FRAME_ATOMIC_BYTES)
		return EINVAL;
	atomic->compare_add = wr->wr.atomic.compare_add;
	atomic->swap = wr->wr.atomic.swap;
	wqe->raddr = wr->wr.atomic.remote_addr;
	wqe->rkey = wr->wr.atomic.rkey;
	return 0;
}

/* The WR, its SGEs and inline bytes are copied; the payload is read later. */
static int fill_wqe(struct soft_qp *qp, const struct ibv_send_wr *wr,
		    uint64_t head)
{
	struct soft_sq *sq = &qp->sq;
	struct soft_wqe *wqe = &sq->ring[head & sq->mask];
	uint8_t *slot = sq->slots + (head & sq->mask) * sq->slot_bytes;
	bool local = soft_is_local((uint8_t)wr->opcode);
	int n_sge = local ? 0 : wr->num_sge; /* no bytes of ours */
	uint64_t length = total_length(wr->sg_list, n_sge);

	if (wr->send_flags & IBV_SEND_INLINE) {
		if (length > qp->cap.max_inline_data)
			return ENOMEM;
		copy_inline(slot, wr);
	} else if (n_sge) {
		memcpy(slot, wr->sg_list,
		       (size_t)n_sge * sizeof(struct ibv_sge));
	}
	wqe->wr_id = wr->wr_id;
	wqe->raddr = wr->wr.rdma.remote_addr;
	wqe->rkey = wr->wr.rdma.rkey;
	wqe->imm = wr->imm_data;
	wqe->length = length;
	wqe->num_sge = (uint16_t)n_sge;
	wqe->opcode = (uint8_t)wr->opcode;
	wqe->signaled = qp->sq_sig_all || wr->send_flags & IBV_SEND_SIGNALED;
	wqe->flags = (uint8_t)(wr->send_flags &
			       (IBV_SEND_FENCE | IBV_SEND_SOLICITED |
				IBV_SEND_INLINE));
	if (local)
		return soft_fill_local(slot, wr);
	if (soft_is_ud(qp))
		soft_fill_target(qp, slot, wr);
	return soft_is_atomic(wqe->opcode) ? fill_atomic(wqe, slot, wr) : 0;
}

int soft_post_send(struct ibv_qp *ibqp, struct ibv_send_wr *wr,
		   struct ibv_send_wr **bad_wr)
{
	struct soft_qp *qp = to_qp(ibqp);
	uint64_t first, head;
	int state, err = 0;

	if (soft_orphaned(ibqp->context)) {
		*bad_wr = wr;
		return ENODEV;
	}
	if (qp->sq.sums)
		soft_strict_enter(qp);
	if (soft_faulty(qp_context(qp)))
		soft_inject_slow_post(qp, wr);
	pthread_mutex_lock(&qp->sq_lock);
	state = qp_state(qp);
	first = head = atomic_load_explicit(&qp->sq.head, memory_order_relaxed);
	for (; wr; wr = wr->next) {
		err = check_send(qp, wr, state, head);
		if (!err && soft_faulty(qp_context(qp)))
			err = soft_inject_post(qp);
		if (!err && state == IBV_QPS_RTS)
			err = fill_wqe(qp, wr, head);
		if (!err && qp->sq.sums && state == IBV_QPS_RTS)
			soft_strict_posted(qp, head);
		if (err) {
			*bad_wr = wr;
			break;
		}
		if (state ==
		    IBV_QPS_ERR) /* all before it are flushed already */
			soft_send_failed(qp, head, wr->wr_id,
					 IBV_WC_WR_FLUSH_ERR, KVX_SOFT_FLUSHED);
		head++;
	}
	if (qp->sq.sums && state == IBV_QPS_RTS)
		soft_strict_full(qp, head);
	atomic_store_explicit(&qp->sq.head, head, memory_order_release);
	pthread_mutex_unlock(&qp->sq_lock);
	if (qp->sq.sums)
		soft_strict_leave(qp);

	if (head == first || state != IBV_QPS_RTS)
		return err;
	if (soft_is_ud(qp))
		soft_send_datagrams(qp);
	else if (!soft_post_direct(qp))
		soft_kick(qp);
	return err;
}

static int check_recv(const struct soft_qp *qp, const struct ibv_recv_wr *wr,
		      int state, uint64_t head)
{
	uint64_t tail = atomic_load_explicit(&qp->rq.tail,
					     memory_order_acquire);

	if (state == IBV_QPS_RESET)
		return EINVAL;
	if (wr->num_sge < 0 || (uint32_t)wr->num_sge > qp->rq.max_sge)
		return EINVAL;
	return head - tail >= qp->rq.depth ? ENOMEM : 0;
}

static void fill_rqe(struct soft_rq *rq, const struct ibv_recv_wr *wr,
		     uint64_t head)
{
	struct soft_rqe *rqe = &rq->ring[head & rq->mask];

	rqe->wr_id = wr->wr_id;
	rqe->num_sge = (uint32_t)wr->num_sge;
	rqe->length = total_length(wr->sg_list, wr->num_sge);
	if (wr->num_sge)
		memcpy(rq->sges + (head & rq->mask) * rq->max_sge, wr->sg_list,
		       (size_t)wr->num_sge * sizeof(struct ibv_sge));
}

int soft_post_recv(struct ibv_qp *ibqp, struct ibv_recv_wr *wr,
		   struct ibv_recv_wr **bad_wr)
{
	struct soft_qp *qp = to_qp(ibqp);
	struct soft_rq *rq = &qp->rq;
	int state, err = 0;
	uint64_t head;

	if (soft_orphaned(ibqp->context)) {
		*bad_wr = wr;
		return ENODEV;
	}
	pthread_mutex_lock(&qp->rq_lock);
	state = qp_state(qp);
	head = atomic_load_explicit(&rq->head, memory_order_relaxed);
	for (; wr; wr = wr->next) {
		err = check_recv(qp, wr, state, head);
		if (err) {
			*bad_wr = wr;
			break;
		}
		if (state == IBV_QPS_ERR)
			soft_recv_failed(qp, head, wr->wr_id,
					 IBV_WC_WR_FLUSH_ERR, KVX_SOFT_FLUSHED);
		else
			fill_rqe(rq, wr, head);
		head++;
	}
	/* Pairs with the responder, which says starved and then looks at head. */
	atomic_store(&rq->head, head);
	pthread_mutex_unlock(&qp->rq_lock);

	if (atomic_load(&rq->starved) && atomic_exchange(&rq->starved, false))
		soft_kick(qp);
	return err;
}
