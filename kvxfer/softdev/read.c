/* The target's side of READs and atomics: bytes go back over the socket. */
#define _GNU_SOURCE
#include <errno.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "inject.h"
#include "mr.h"
#include "qp.h"
#include "responder.h"

/* One response frame; short enough to be one chunk. */
#define READ_FRAME_BYTES CHUNK_BYTES

static void next_frame(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;
	struct frame_header header = { .type = FRAME_READ_RESP,
				       .seq = conn->qp->rx_seq };

	rx->read_frame_left = rx->read_left < READ_FRAME_BYTES ?
				      rx->read_left :
				      READ_FRAME_BYTES;
	header.payload_len = (uint32_t)rx->read_frame_left;
	if (rx->read_frame_left == rx->read_left)
		header.flags = RESP_END;
	frame_put_header(rx->read_head, &header);
	rx->read_head_off = 0;
}

/* Part of a response frame is out: the stream must go on with the rest. */
bool soft_read_in_frame(const struct soft_conn *conn)
{
	const struct soft_rx *rx = conn->rx;

	return rx->read_head_off > 0;
}

/*
 * Once and all at once, also for the threads of this process. The region is
 * registered, but the application may have unmapped it; touching that would end
 * the process, so look first.
 */
static bool execute_atomic(struct soft_rx *rx, const struct frame_desc *desc)
{
	uint64_t *target = (uint64_t *)(uintptr_t)desc->raddr;

	if (soft_check_mapped((uintptr_t)target, sizeof(*target), true))
		return false;
	if (desc->op == OP_FETCH_ADD) {
		rx->fetched = __atomic_fetch_add(target, desc->operand,
						 __ATOMIC_SEQ_CST);
		return true;
	}
	rx->fetched = desc->compare;
	__atomic_compare_exchange_n(target, &rx->fetched, desc->operand, false,
				    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return true;
}

bool soft_begin_read(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;
	const struct frame_desc *desc = &rx->desc[rx->at];

	soft_inject_read(conn->qp);
	if (frame_is_atomic(desc->op) && !execute_atomic(rx, desc))
		return false;
	/* The response says as well that all before it is done. */
	rx->acks_owed = 0;
	rx->owed_bytes = 0;
	rx->read_left = desc->len;
	rx->phase = RX_READ;
	next_frame(conn);
	return true;
}

static void advance(struct soft_conn *conn, size_t sent)
{
	struct soft_rx *rx = conn->rx;
	size_t part = FRAME_HEADER_BYTES - rx->read_head_off;

	if (part > sent)
		part = sent;
	rx->read_head_off += part;
	rx->read_frame_left -= sent - part;
	rx->read_left -= sent - part;
	if (rx->read_head_off < FRAME_HEADER_BYTES || rx->read_frame_left)
		return;
	if (rx->read_left) {
		next_frame(conn);
		return;
	}
	conn->qp->rx_seq++;
	rx->at++;
	rx->at_off = 0;
	rx->phase = RX_EXECUTE;
}

enum chunk_result soft_send_read(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;
	const struct frame_desc *desc = &rx->desc[rx->at];
	uint64_t from = frame_is_atomic(desc->op) ? (uintptr_t)&rx->fetched :
						    desc->raddr;
	struct iovec iov[2] = {
		{ rx->read_head + rx->read_head_off,
		  FRAME_HEADER_BYTES - rx->read_head_off },
		{ (void *)(uintptr_t)(from + desc->len - rx->read_left),
		  rx->read_frame_left },
	};
	ssize_t sent;

	if (conn->out_len || !conn->writable)
		return CHUNK_WAIT; /* answers keep their order */
	do {
		sent = soft_stream_send(conn, iov, 2, true);
	} while (sent < 0 && errno == EINTR);
	if (sent < 0 && errno == EAGAIN) {
		conn->writable = false;
		return CHUNK_WAIT;
	}
	if (sent < 0)
		return CHUNK_LOST;
	advance(conn, (size_t)sent);
	return CHUNK_MOVED;
}
