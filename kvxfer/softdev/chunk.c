/* Moving data into place: the part that all wires share. */
#define _GNU_SOURCE
#include <errno.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "inject.h"
#include "mr.h"
#include "qp.h"
#include "responder.h"
#include "wire_cma.h"
#include "wire_shm.h"

/* The ranges of one chunk, in ctx->local_iov (to) and ctx->remote_iov (from). */
struct chunk {
	struct soft_conn *conn;
	int n_local, n_remote;
	size_t bytes;
	uint16_t fetch; /* DESC_FETCH, or 0: the bytes come with the stream */
};

static bool add(struct iovec *iov, int *n, uint64_t addr, size_t len)
{
	if (*n &&
	    (uintptr_t)iov[*n - 1].iov_base + iov[*n - 1].iov_len == addr) {
		iov[*n - 1].iov_len += len;
		return true;
	}
	if (*n == MAX_IOV - 1) /* the last one is the nonce's */
		return false;
	iov[*n].iov_base = (void *)(uintptr_t)addr;
	iov[*n].iov_len = len;
	++*n;
	return true;
}

/* Add len bytes; both arrays or neither. */
static bool add_pair(struct chunk *chunk, uint64_t to, uint64_t from,
		     size_t len)
{
	struct soft_context *ctx = chunk->conn->ctx;

	if (chunk->n_local == MAX_IOV - 1 || chunk->n_remote == MAX_IOV - 1)
		return false;
	add(ctx->local_iov, &chunk->n_local, to, len);
	if (chunk->fetch)
		add(ctx->remote_iov, &chunk->n_remote, from, len);
	chunk->bytes += len;
	return true;
}

/* The part of a SEND that goes into the SGE at its present offset. */
static uint64_t recv_range(const struct soft_qp *qp, uint64_t offset,
			   size_t *len, uint32_t *lkey)
{
	const struct soft_rq *rq = &qp->rq;
	const struct ibv_sge *sge = rq->sges +
				    (rq->next & rq->mask) * rq->max_sge;

	/* The RECV was checked to be long enough. */
	for (; offset >= sge->length; sge++)
		offset -= sge->length;
	if (*len > sge->length - offset)
		*len = sge->length - offset;
	*lkey = sge->lkey;
	return sge->addr + offset;
}

/* Where the next *len bytes of a descriptor go, or fewer of them. */
static uint64_t target(struct soft_conn *conn, const struct frame_desc *desc,
		       uint64_t off, uint64_t message_off, size_t *len)
{
	bool send = desc->op == OP_SEND;
	uint64_t to = desc->raddr + off;
	struct soft_mr *mr;
	uint32_t lkey;

	if (send)
		to = recv_range(conn->qp, message_off, len, &lkey);
	if (conn->wire != WIRE_SHM)
		return to;
	mr = send ? soft_find_lkey(conn->ctx, lkey) :
		    soft_find_rkey(conn->ctx, desc->rkey);
	return soft_shm_place(conn->shm, mr, to);
}

/* Add what is left of a descriptor. False: the chunk is full. */
static bool add_desc(struct chunk *chunk, const struct frame_desc *desc,
		     uint64_t off, uint64_t message_off)
{
	uint64_t to;
	size_t len;

	while (off < desc->len) {
		len = desc->len - off;
		if (len > CHUNK_BYTES - chunk->bytes)
			len = CHUNK_BYTES - chunk->bytes;
		if (!len)
			return false;
		to = target(chunk->conn, desc, off, message_off, &len);
		if (!add_pair(chunk, to, desc->laddr + off, len))
			return false;
		off += len;
		message_off += len;
	}
	return true;
}

static void gather(struct chunk *chunk)
{
	const struct soft_rx *rx = chunk->conn->rx;
	uint64_t off = rx->at_off, message_off = rx->message_off;
	const struct frame_desc *desc;
	uint32_t i;

	for (i = rx->at; i < rx->bad; i++, off = 0) {
		desc = &rx->desc[i];
		if (desc->flags & DESC_START && off == 0)
			message_off = 0;
		if (frame_fetches(desc->op))
			return;
		if (desc->op == OP_SEND && i != rx->at)
			return; /* its RECV is looked at first */
		if (rx->faults && rx->faults[i].act != rx->faults[rx->at].act)
			return;
		if (off < desc->len && !chunk->bytes)
			chunk->fetch = desc->flags & DESC_FETCH;
		if (off < desc->len &&
		    chunk->fetch != (desc->flags & DESC_FETCH))
			return;
		if (!add_desc(chunk, desc, off, message_off))
			return;
		message_off += desc->len - off;
		if (desc->flags & DESC_END && soft_needs_recv(desc))
			return;
	}
}

static void advance(struct soft_conn *conn, size_t bytes)
{
	struct soft_rx *rx = conn->rx;
	const struct frame_desc *desc;
	uint32_t begin = rx->at;
	uint64_t part;

	rx->owed_bytes += bytes;
	for (; rx->at < rx->bad; rx->at++, rx->at_off = 0) {
		desc = &rx->desc[rx->at];
		if (frame_fetches(desc->op) ||
		    (desc->op == OP_SEND && !rx->recv_checked))
			return;
		if (!desc->len && rx->faults && rx->at != begin)
			return; /* it is looked at by itself */
		if (desc->flags & DESC_START && rx->at_off == 0)
			rx->message_off = 0;
		part = desc->len - rx->at_off;
		if (part > bytes)
			part = bytes;
		rx->at_off += part;
		rx->message_off += part;
		bytes -= part;
		if (rx->at_off < desc->len)
			return;
		if (desc->flags & DESC_END) {
			if (soft_needs_recv(desc))
				return; /* completes with its RECV */
			conn->qp->rx_seq++;
			rx->awaited |= (desc->flags & DESC_SIGNALED) != 0;
		}
	}
}

static enum chunk_result receive(struct chunk *chunk)
{
	struct soft_conn *conn = chunk->conn;
	ssize_t got;

	if (!conn->readable)
		return CHUNK_WAIT;
	do {
		got = soft_stream_recv(conn, conn->ctx->local_iov,
				       chunk->n_local,
				       conn->shm && conn->shm->guarded);
	} while (got < 0 && errno == EINTR);
	if (got > 0) {
		chunk->bytes = (size_t)got;
		return CHUNK_MOVED;
	}
	if (got < 0 && errno == EAGAIN) {
		conn->readable = false;
		return CHUNK_WAIT;
	}
	return got < 0 && errno == EFAULT ? CHUNK_NO_DEST : CHUNK_LOST;
}

enum chunk_result soft_skip_payload(struct soft_conn *conn)
{
	size_t part = conn->rx->skip < CHUNK_BYTES ? conn->rx->skip :
						     CHUNK_BYTES;
	ssize_t got = 0;

	if (!part)
		return CHUNK_MOVED;
	if (!conn->readable)
		return CHUNK_WAIT;
	do {
		got = soft_stream_skip(conn, part);
	} while (got < 0 && errno == EINTR);
	if (got > 0) {
		conn->rx->skip -= (size_t)got;
		return CHUNK_MOVED;
	}
	if (got < 0 && errno == EAGAIN) {
		conn->readable = false;
		return CHUNK_WAIT;
	}
	return CHUNK_LOST;
}

enum chunk_result soft_move_chunk(struct soft_conn *conn)
{
	struct chunk chunk = { .conn = conn };
	enum chunk_result result = CHUNK_MOVED;
	struct soft_landing *landing = NULL;
	bool faulty = conn->rx->faults != NULL;

	if (conn->wire == WIRE_SHM && soft_shm_move(conn, &result))
		return result;
	if (conn->shm)
		conn->shm->guarded = false;
	gather(&chunk);
	if (faulty && chunk.bytes)
		landing = soft_inject_detour(conn, &chunk.n_local,
					     &chunk.n_remote, &chunk.bytes);
	if (chunk.bytes && chunk.fetch)
		result = conn->wire == WIRE_SHM ?
				 soft_shm_pull(conn, chunk.n_local,
					       chunk.n_remote, &chunk.bytes) :
				 soft_cma_pull(conn, chunk.n_local,
					       chunk.n_remote, &chunk.bytes);
	else if (chunk.bytes)
		result = receive(&chunk);
	if (faulty && chunk.bytes)
		soft_inject_arrived(conn, landing,
				    result == CHUNK_MOVED ? chunk.bytes : 0);
	if (result == CHUNK_MOVED)
		advance(conn, chunk.bytes);
	return result;
}
