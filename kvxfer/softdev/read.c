/* The target's side of an RDMA READ: its bytes go back over the socket. */
#define _GNU_SOURCE
#include <errno.h>

#include "internal.h"

/* One response frame; short enough to be one chunk. */
#define READ_FRAME_BYTES CHUNK_BYTES

static void next_frame(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;
	struct frame_header header = { .type = FRAME_READ_RESP,
				       .seq = conn->qp->rx_seq };

	rx->read_frame_left = rx->read_left < READ_FRAME_BYTES ?
				      rx->read_left : READ_FRAME_BYTES;
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

bool soft_begin_read(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;

	/* The response says as well that all before it is done. */
	rx->acks_owed = 0;
	rx->read_left = rx->desc[rx->at].len;
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
	struct iovec iov[2] = {
		{ rx->read_head + rx->read_head_off,
		  FRAME_HEADER_BYTES - rx->read_head_off },
		{ (void *)(uintptr_t)(desc->raddr + desc->len - rx->read_left),
		  rx->read_frame_left },
	};
	struct msghdr message = { .msg_iov = iov, .msg_iovlen = 2 };
	ssize_t sent;

	if (conn->out_len || !conn->writable)
		return CHUNK_WAIT; /* answers keep their order */
	do {
		sent = sendmsg(conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
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
