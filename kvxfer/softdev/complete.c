/* What a QP writes into its completion queues. */
#define _GNU_SOURCE
#include <string.h>

#include "cq.h"
#include "frame.h"
#include "qp.h"
#include "strict.h"

/* No opcode, length or flag of a failed completion may be used: make sure that
 * whoever does it gets nonsense, here as on a NIC. */
#define POISON 0xa5

static enum ibv_wc_opcode send_opcode(uint8_t opcode)
{
	switch (opcode) {
	case IBV_WR_RDMA_READ:
		return IBV_WC_RDMA_READ;
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
		return IBV_WC_FETCH_ADD;
	case IBV_WR_ATOMIC_CMP_AND_SWP:
		return IBV_WC_COMP_SWAP;
	case IBV_WR_BIND_MW:
		return IBV_WC_BIND_MW;
	case IBV_WR_LOCAL_INV:
		return IBV_WC_LOCAL_INV;
	case IBV_WR_RDMA_WRITE:
	case IBV_WR_RDMA_WRITE_WITH_IMM:
		return IBV_WC_RDMA_WRITE;
	default:
		return IBV_WC_SEND;
	}
}

void soft_sends_done(struct soft_qp *qp, uint64_t seq)
{
	struct soft_cq *cq = to_cq(qp->ibv.send_cq);
	struct soft_sq *sq = &qp->sq;
	struct soft_cqe cqe = { .qp = qp };
	const struct soft_wqe *wqe;

	pthread_mutex_lock(&cq->lock);
	for (; sq->done < seq; sq->done++) {
		wqe = &sq->ring[sq->done & sq->mask];
		if (sq->sums)
			soft_strict_done(qp, sq->done);
		if (!wqe->signaled)
			continue;
		cqe.free_to = sq->done + 1;
		cqe.wc = (struct ibv_wc){
			.wr_id = wqe->wr_id,
			.status = IBV_WC_SUCCESS,
			.opcode = send_opcode(wqe->opcode),
			.byte_len = (uint32_t)wqe->length,
			.qp_num = qp->ibv.qp_num,
		};
		soft_cq_push(cq, &cqe, false);
	}
	pthread_mutex_unlock(&cq->lock);
}

void soft_recv_done(struct soft_qp *qp, const struct frame_desc *desc,
		    uint64_t byte_len)
{
	struct soft_cq *cq = to_cq(qp->ibv.recv_cq);
	struct soft_rq *rq = &qp->rq;
	struct soft_cqe cqe = { .qp = qp, .is_recv = true };

	cqe.free_to = rq->next + 1;
	cqe.wc = (struct ibv_wc){
		.wr_id = rq->ring[rq->next & rq->mask].wr_id,
		.status = IBV_WC_SUCCESS,
		.opcode = desc->op == OP_SEND ? IBV_WC_RECV :
						IBV_WC_RECV_RDMA_WITH_IMM,
		.byte_len = (uint32_t)byte_len,
		.qp_num = qp->ibv.qp_num,
		.src_qp = qp->attr.dest_qp_num,
	};
	if (desc->flags & DESC_IMM) {
		/* Both ends carry the application's four bytes unchanged. */
		cqe.wc.imm_data = desc->imm;
		cqe.wc.wc_flags = IBV_WC_WITH_IMM;
	} else if (desc->flags & DESC_INV) {
		cqe.wc.invalidated_rkey = desc->imm;
		cqe.wc.wc_flags = IBV_WC_WITH_INV;
	}
	rq->next++;
	pthread_mutex_lock(&cq->lock);
	soft_cq_push(cq, &cqe, desc->flags & DESC_SOLICITED);
	pthread_mutex_unlock(&cq->lock);
}

static void push_failure(struct soft_cq *cq, struct soft_cqe *cqe,
			 uint64_t wr_id, enum ibv_wc_status status,
			 uint32_t vendor_err)
{
	memset(&cqe->wc, POISON, sizeof(cqe->wc));
	cqe->wc.wr_id = wr_id;
	cqe->wc.status = status;
	cqe->wc.vendor_err = vendor_err;
	cqe->wc.qp_num = cqe->qp->ibv.qp_num;
	pthread_mutex_lock(&cq->lock);
	soft_cq_push(cq, cqe, true);
	pthread_mutex_unlock(&cq->lock);
}

void soft_send_failed(struct soft_qp *qp, uint64_t seq, uint64_t wr_id,
		      enum ibv_wc_status status, uint32_t vendor_err)
{
	struct soft_cqe cqe = { .qp = qp, .free_to = seq + 1 };

	push_failure(to_cq(qp->ibv.send_cq), &cqe, wr_id, status, vendor_err);
}

void soft_recv_failed(struct soft_qp *qp, uint64_t seq, uint64_t wr_id,
		      enum ibv_wc_status status, uint32_t vendor_err)
{
	struct soft_cqe cqe = { .qp = qp, .free_to = seq + 1, .is_recv = true };

	push_failure(to_cq(qp->ibv.recv_cq), &cqe, wr_id, status, vendor_err);
}
