/* From send queue entries to frames of requests. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "initiator.h"
#include "inject.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "windows.h"
#include "wire_shm.h"

/* A frame that is being put together. */
struct builder {
	struct soft_qp *qp;
	struct soft_tx *tx;
	uint32_t n_desc;
	uint64_t payload;
	bool full;
	const struct soft_mr *mr; /* shm: of the WR before, known to the peer */
};

uint32_t soft_wqe_sges(struct soft_qp *qp, uint64_t seq, struct ibv_sge *one,
		       const struct ibv_sge **sges)
{
	const struct soft_sq *sq = &qp->sq;
	const struct soft_wqe *wqe = &sq->ring[seq & sq->mask];
	const uint8_t *slot = sq->slots + (seq & sq->mask) * sq->slot_bytes;

	if (!(wqe->flags & IBV_SEND_INLINE)) {
		*sges = (const struct ibv_sge *)slot;
		return wqe->num_sge;
	}
	one->addr = (uintptr_t)slot;
	one->length = (uint32_t)wqe->length;
	one->lkey = 0;
	*sges = one;
	return 1;
}

struct soft_failure soft_check_wqe(struct soft_qp *qp, uint64_t seq)
{
	const struct soft_wqe *wqe = &qp->sq.ring[seq & qp->sq.mask];
	bool fetches = soft_fetches(wqe);
	struct soft_failure failure = { 0 };
	const struct ibv_sge *sges;
	struct ibv_sge one;
	uint32_t i, n;

	if (wqe->length > FRAME_MAX_MESSAGE)
		return (struct soft_failure){ IBV_WC_LOC_LEN_ERR,
					      KVX_SOFT_TOO_LONG };
	if (fetches && qp->attr.max_rd_atomic == 0)
		return (struct soft_failure){ IBV_WC_LOC_QP_OP_ERR,
					      KVX_SOFT_NO_RD_ATOMIC };
	if (wqe->flags & IBV_SEND_INLINE)
		return failure;
	n = soft_wqe_sges(qp, seq, &one, &sges);
	for (i = 0; i < n && !failure.vendor_err; i++)
		failure.vendor_err = soft_check_local(
			qp_context(qp), qp->ibv.pd, &sges[i],
			fetches ? IBV_ACCESS_LOCAL_WRITE : 0);
	if (failure.vendor_err)
		failure.status = IBV_WC_LOC_PROT_ERR;
	return failure;
}

static uint16_t opcode_of(const struct soft_wqe *wqe)
{
	switch (wqe->opcode) {
	case IBV_WR_RDMA_READ:
		return OP_READ;
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
		return OP_FETCH_ADD;
	case IBV_WR_ATOMIC_CMP_AND_SWP:
		return OP_COMPARE_SWAP;
	case IBV_WR_SEND:
	case IBV_WR_SEND_WITH_IMM:
	case IBV_WR_SEND_WITH_INV:
		return OP_SEND;
	default:
		return OP_WRITE;
	}
}

static uint16_t end_flags(const struct soft_wqe *wqe)
{
	uint16_t flags = DESC_END;

	if (wqe->opcode == IBV_WR_RDMA_WRITE_WITH_IMM ||
	    wqe->opcode == IBV_WR_SEND_WITH_IMM)
		flags |= DESC_IMM;
	if (wqe->opcode == IBV_WR_SEND_WITH_INV)
		flags |= DESC_INV;
	if (wqe->flags & IBV_SEND_SOLICITED)
		flags |= DESC_SOLICITED;
	if (wqe->signaled)
		flags |= DESC_SIGNALED;
	return flags;
}

static void put_operands(const struct soft_sq *sq, const struct soft_wqe *wqe,
			 struct frame_desc *desc)
{
	const uint8_t *slot = sq->slots +
			      (size_t)(wqe - sq->ring) * sq->slot_bytes;
	const struct soft_atomic *atomic = (const struct soft_atomic *)slot;

	if (desc->op == OP_FETCH_ADD) {
		desc->operand = atomic->compare_add;
	} else {
		desc->operand = atomic->swap;
		desc->compare = atomic->compare_add;
	}
}

/* One descriptor for the next len bytes of the WR; flags: DESC_FETCH or 0. */
static void put_desc(struct builder *b, const struct soft_wqe *wqe,
		     uint64_t laddr, uint64_t len, uint16_t flags)
{
	struct soft_sq *sq = &b->qp->sq;
	uint16_t op = opcode_of(wqe);
	struct frame_desc desc = {
		.laddr = laddr,
		.len = (uint32_t)len,
		.op = op,
		.flags = flags,
		.imm = wqe->imm,
		.total = (uint32_t)wqe->length,
	};

	if (op != OP_SEND) {
		desc.raddr = wqe->raddr + sq->next_offset;
		desc.rkey = wqe->rkey;
	}
	if (sq->next_offset == 0)
		desc.flags |= DESC_START;
	sq->next_offset += len;
	if (sq->next_offset == wqe->length)
		desc.flags |= end_flags(wqe);
	if (frame_is_atomic(op))
		put_operands(sq, wqe, &desc);
	frame_put_desc(b->tx->head + FRAME_HEADER_BYTES +
			       (size_t)b->n_desc * FRAME_DESC_BYTES,
		       &desc);
	b->n_desc++;
}

/* Add source bytes to the payload; neighbours become one range. */
static bool put_iov(struct soft_tx *tx, uint64_t addr, uint64_t len)
{
	struct iovec *last = tx->n_iov ? &tx->iov[tx->n_iov - 1] : NULL;

	/* A range stays below a chunk: a call sends its limit and a range at most. */
	if (last && (uintptr_t)last->iov_base + last->iov_len == addr &&
	    last->iov_len + len <= CHUNK_BYTES) {
		last->iov_len += len;
		return true;
	}
	if (tx->n_iov == MAX_IOV - 1) /* one is for the descriptors */
		return false;
	tx->iov[tx->n_iov].iov_base = (void *)(uintptr_t)addr;
	tx->iov[tx->n_iov].iov_len = len;
	tx->n_iov++;
	return true;
}

/* tcp: one descriptor for as much of the WR as the frame has room for. */
static void put_with_payload(struct builder *b, uint64_t seq)
{
	const struct soft_wqe *wqe = &b->qp->sq.ring[seq & b->qp->sq.mask];
	uint64_t skip = b->qp->sq.next_offset, put = 0, len;
	const struct ibv_sge *sges;
	struct ibv_sge one;
	uint32_t i, n = soft_wqe_sges(b->qp, seq, &one, &sges);

	for (i = 0; i < n && !b->full; i++) {
		if (skip >= sges[i].length) {
			skip -= sges[i].length;
			continue;
		}
		while (skip < sges[i].length && !b->full) {
			len = sges[i].length - skip;
			if (len > CHUNK_BYTES)
				len = CHUNK_BYTES;
			if (len > FRAME_MAX_PAYLOAD - b->payload)
				len = FRAME_MAX_PAYLOAD - b->payload;
			if (!len || !put_iov(b->tx, sges[i].addr + skip, len)) {
				b->full = true;
				break;
			}
			skip += len;
			put += len;
			b->payload += len;
		}
		skip = 0;
	}
	if (put || wqe->length == 0)
		put_desc(b, wqe, 0, put, 0);
}

/* cma: one descriptor a range; the responder fetches the bytes. */
static void put_ranges(struct builder *b, uint64_t seq)
{
	const struct soft_wqe *wqe = &b->qp->sq.ring[seq & b->qp->sq.mask];
	uint64_t skip = b->qp->sq.next_offset;
	const struct ibv_sge *sges;
	struct ibv_sge one;
	uint32_t i, n = soft_wqe_sges(b->qp, seq, &one, &sges);

	if (wqe->length == 0) {
		put_desc(b, wqe, 0, 0, 0);
		return;
	}
	for (i = 0; i < n && b->n_desc < FRAME_MAX_DESC; i++) {
		if (skip >= sges[i].length) {
			skip -= sges[i].length;
			continue;
		}
		put_desc(b, wqe, sges[i].addr + skip, sges[i].length - skip,
			 DESC_FETCH);
		skip = 0;
	}
}

/* shm: put len bytes from addr on; false: the frame is full. */
static bool put_range(struct builder *b, const struct soft_wqe *wqe,
		      const struct ibv_sge *sge, uint64_t skip)
{
	struct soft_mr *mr = wqe->flags & IBV_SEND_INLINE ?
				     NULL :
				     soft_find_lkey(qp_context(b->qp),
						    sge->lkey);
	uint64_t addr = sge->addr + skip, len = sge->length - skip, laddr;

	if (mr && soft_shm_name(b->qp->out, mr, addr, &laddr, &b->full)) {
		put_desc(b, wqe, laddr, len, DESC_FETCH);
		return true;
	}
	if (len > CHUNK_BYTES)
		len = CHUNK_BYTES;
	if (len > FRAME_MAX_PAYLOAD - b->payload)
		len = FRAME_MAX_PAYLOAD - b->payload;
	if (b->full || !len || !put_iov(b->tx, addr, len)) {
		b->full = true;
		return false;
	}
	b->payload += len;
	put_desc(b, wqe, 0, len, 0);
	return true;
}

/* shm: what lies in a memfd is fetched, the rest goes along. */
static void put_mixed(struct builder *b, uint64_t seq)
{
	const struct soft_wqe *wqe = &b->qp->sq.ring[seq & b->qp->sq.mask];
	uint64_t skip = b->qp->sq.next_offset, before;
	const struct ibv_sge *sges;
	struct ibv_sge one;
	uint32_t i, n = soft_wqe_sges(b->qp, seq, &one, &sges);

	if (wqe->length == 0) {
		put_desc(b, wqe, 0, 0, 0);
		return;
	}
	for (i = 0; i < n; i++) {
		if (skip >= sges[i].length) {
			skip -= sges[i].length;
			continue;
		}
		while (skip < sges[i].length) {
			before = b->qp->sq.next_offset;
			if (b->n_desc == FRAME_MAX_DESC ||
			    !put_range(b, wqe, &sges[i], skip))
				return;
			skip += b->qp->sq.next_offset - before;
		}
		skip = 0;
	}
}

enum plain { PLAIN_NOT, PLAIN_PUT, PLAIN_HELD };

/*
 * shm: a WRITE of one range of memory that the peer knows, checks and all. Most
 * WRs are that, and of small ones there are many. PLAIN_NOT: it is not one;
 * PLAIN_HELD: the fault plan does not let it leave.
 */
static enum plain put_plain(struct builder *b, uint64_t seq, bool faulty)
{
	struct soft_sq *sq = &b->qp->sq;
	const struct soft_wqe *wqe = &sq->ring[seq & sq->mask];
	const struct ibv_sge *sge;

	if (wqe->opcode != IBV_WR_RDMA_WRITE || wqe->num_sge != 1 ||
	    wqe->flags || !wqe->length || wqe->length > FRAME_MAX_MESSAGE)
		return PLAIN_NOT;
	sge = (const struct ibv_sge *)(sq->slots +
				       (seq & sq->mask) * sq->slot_bytes);
	if (!b->mr || sge->lkey != b->mr->ibv.lkey) {
		b->mr = soft_find_lkey(qp_context(b->qp), sge->lkey);
		if (b->mr && (b->mr->ibv.pd != b->qp->ibv.pd ||
			      !soft_shm_knows(b->qp->out, b->mr)))
			b->mr = NULL;
	}
	if (!b->mr || !soft_mr_covers(b->mr, sge->addr, sge->length))
		return PLAIN_NOT;
	if (faulty && !soft_inject_start(b->qp, b->n_desc == 0))
		return PLAIN_HELD;
	frame_put_write(b->tx->head + FRAME_HEADER_BYTES +
				(size_t)b->n_desc * FRAME_DESC_BYTES,
			wqe->raddr,
			(uint64_t)b->mr->slot << SHM_SLOT_SHIFT |
				(sge->addr - (uintptr_t)b->mr->ibv.addr),
			wqe->rkey, sge->length,
			wqe->signaled ? DESC_FETCH | DESC_SIGNALED :
					DESC_FETCH);
	b->n_desc++;
	return PLAIN_PUT;
}

static void put_wr(struct builder *b, uint64_t seq)
{
	const struct soft_wqe *wqe = &b->qp->sq.ring[seq & b->qp->sq.mask];

	if (soft_fetches(wqe)) {
		put_desc(b, wqe, 0, wqe->length, 0);
		b->qp->reads_out++;
	} else if (b->qp->wire_out == WIRE_CMA) {
		put_ranges(b, seq);
	} else if (b->qp->wire_out == WIRE_SHM) {
		put_mixed(b, seq);
	} else {
		put_with_payload(b, seq);
	}
}

/* Whether the WR may start now. */
static bool may_start(struct soft_qp *qp, uint64_t seq, bool first)
{
	const struct soft_wqe *wqe = &qp->sq.ring[seq & qp->sq.mask];

	if (qp->local.status)
		return false;
	if (soft_is_local(wqe->opcode)) /* when all before it are done */
		return false;
	if (wqe->flags & IBV_SEND_FENCE && qp->reads_out)
		return false;
	if (soft_fetches(wqe) && qp->attr.max_rd_atomic &&
	    qp->reads_out >= qp->attr.max_rd_atomic)
		return false;
	/* A bad one fails in its turn, when those before it are done. */
	qp->local = soft_check_wqe(qp, seq);
	if (qp->local.status)
		return false;
	return !soft_faulty(qp_context(qp)) || soft_inject_start(qp, first);
}

/* So few slots of the send queue are left that it might run dry before the responder
 * says by itself that it has come to the end? */
static bool is_tight(const struct soft_sq *sq)
{
	uint64_t head = atomic_load_explicit(&sq->head, memory_order_relaxed);

	return head - sq->done > sq->depth / 4 * 3;
}

static void close_frame(struct builder *b, uint64_t first)
{
	struct frame_header header = { .type = FRAME_REQUEST,
				       .seq = first - b->qp->sq.n_local,
				       .n_desc = b->n_desc,
				       .payload_len = (uint32_t)b->payload };
	struct soft_tx *tx = b->tx;

	if (is_tight(&b->qp->sq))
		header.flags = REQUEST_ACK;

	frame_put_header(tx->head, &header);
	tx->head_len = FRAME_HEADER_BYTES +
		       (size_t)b->n_desc * FRAME_DESC_BYTES;
	tx->head_off = 0;
	tx->busy = true;
}

bool soft_frame_requests(struct soft_qp *qp, struct soft_tx *tx)
{
	struct builder b = { .qp = qp, .tx = tx };
	struct soft_sq *sq = &qp->sq;
	uint64_t head = atomic_load_explicit(&sq->head, memory_order_acquire);
	uint64_t first = sq->next;
	bool plain = qp->wire_out == WIRE_SHM && !qp->local.status;
	bool faulty = soft_faulty(qp_context(qp));
	enum plain what;

	tx->n_iov = tx->at_iov = 0;
	tx->first_seq = sq->next;
	tx->mr_generation = qp_context(qp)->mr_generation;
	if (soft_inject_again(qp, tx))
		return true;
	while (sq->next != head && b.n_desc < FRAME_MAX_DESC &&
	       b.payload < FRAME_MAX_PAYLOAD && !b.full) {
		what = plain && sq->next_offset == 0 ?
			       put_plain(&b, sq->next, faulty) :
			       PLAIN_NOT;
		if (what == PLAIN_HELD)
			break;
		if (what == PLAIN_PUT) {
			sq->next++;
			continue;
		}
		if (sq->next_offset == 0 &&
		    !may_start(qp, sq->next, b.n_desc == 0))
			break;
		put_wr(&b, sq->next);
		if (sq->next_offset < sq->ring[sq->next & sq->mask].length)
			break;
		sq->next++;
		sq->next_offset = 0;
	}
	if (b.n_desc == 0)
		return false;

	close_frame(&b, first);
	return true;
}

static struct soft_late *copy_of(const struct soft_tx *tx)
{
	struct soft_late *late;
	size_t length = tx->head_len;
	int i;

	for (i = 0; i < tx->n_iov; i++)
		length += tx->iov[i].iov_len;
	late = calloc(1, sizeof(*late) + length);
	if (!late)
		return NULL;
	memcpy(late->bytes, tx->head, tx->head_len);
	late->length = late->head_length = tx->head_len;
	for (i = 0; i < tx->n_iov; i++) {
		memcpy(late->bytes + late->length, tx->iov[i].iov_base,
		       tx->iov[i].iov_len);
		late->length += tx->iov[i].iov_len;
	}
	return late;
}

struct soft_late *soft_frame_late(struct soft_qp *qp)
{
	uint32_t reads_out = qp->reads_out;
	struct soft_late *late = NULL;
	struct builder b = { .qp = qp, .tx = calloc(1, sizeof(*b.tx)) };

	if (!b.tx)
		return NULL;
	put_wr(&b, qp->sq.next);
	if (b.n_desc) {
		close_frame(&b, qp->sq.next);
		late = copy_of(b.tx);
	}
	free(b.tx);
	/* It has not been sent, and is none of the QP's any more. */
	qp->sq.next_offset = 0;
	qp->reads_out = reads_out;
	return late;
}
