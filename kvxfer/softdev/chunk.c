/* Moving data into place: the part that both wires share. */
#define _GNU_SOURCE
#include <errno.h>

#include "internal.h"

/* The ranges of one chunk, in ctx->local_iov (to) and ctx->remote_iov (from). */
struct chunk {
	struct soft_conn *conn;
	int n_local, n_remote;
	size_t bytes;
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
	if (chunk->conn->wire == WIRE_CMA)
		add(ctx->remote_iov, &chunk->n_remote, from, len);
	chunk->bytes += len;
	return true;
}

/* The part of a SEND that goes into the SGE at its present offset. */
static uint64_t recv_range(const struct soft_qp *qp, uint64_t offset,
			   size_t *len)
{
	const struct soft_rq *rq = &qp->rq;
	const struct ibv_sge *sge = rq->sges +
				    (rq->next & rq->mask) * rq->max_sge;

	/* The RECV was checked to be long enough. */
	for (; offset >= sge->length; sge++)
		offset -= sge->length;
	if (*len > sge->length - offset)
		*len = sge->length - offset;
	return sge->addr + offset;
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
		to = desc->op == OP_SEND ?
			     recv_range(chunk->conn->qp, message_off, &len) :
			     desc->raddr + off;
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
		got = readv(conn->fd, conn->ctx->local_iov, chunk->n_local);
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
		got = recv(conn->fd, NULL, part, MSG_TRUNC);
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

	gather(&chunk);
	if (faulty && chunk.bytes)
		landing = soft_inject_detour(conn, &chunk.n_local,
					     &chunk.n_remote, &chunk.bytes);
	if (chunk.bytes && conn->wire == WIRE_CMA)
		result = soft_cma_pull(conn, chunk.n_local, chunk.n_remote,
				       &chunk.bytes);
	else if (chunk.bytes)
		result = receive(&chunk);
	if (faulty && chunk.bytes)
		soft_inject_arrived(conn, landing,
				    result == CHUNK_MOVED ? chunk.bytes : 0);
	if (result == CHUNK_MOVED)
		advance(conn, chunk.bytes);
	return result;
}
