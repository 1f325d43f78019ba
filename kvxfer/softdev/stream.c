/* The bytes of a connection, whichever wire carries them. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "connection.h"
#include "frame.h"
#include "wire_shm.h"

/* Of what comes next from a socket; it seldom holds more when it is read. */
#define RECV_AHEAD_BYTES (128u << 10)

/* Have what a socket takes or fills next come to the cache, unless most of it was asked
 * for when a call before moved less. */
static void ask_ahead(size_t *asked, const struct iovec *iov, int n,
		      size_t bytes, bool to_write)
{
	if (*asked < bytes / 2)
		*asked = soft_ask_for(iov, n, bytes, to_write);
}

static void moved(size_t *asked, ssize_t done)
{
	if (done > 0)
		*asked -= (size_t)done < *asked ? (size_t)done : *asked;
}

ssize_t soft_stream_send(struct soft_conn *conn, const struct iovec *iov, int n,
			 bool user)
{
	struct msghdr message = { .msg_iov = (struct iovec *)iov,
				  .msg_iovlen = (size_t)n };
	ssize_t done;

	if (conn->shm)
		return soft_shm_send(conn, iov, n, user);
	ask_ahead(&conn->asked_out, iov, n, SOFT_SHORT_CALL_BYTES, false);
	done = sendmsg(conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
	moved(&conn->asked_out, done);
	return done;
}

ssize_t soft_stream_recv(struct soft_conn *conn, const struct iovec *iov, int n,
			 bool user)
{
	ssize_t done;

	if (conn->shm)
		return soft_shm_recv(conn, iov, n, user);
	ask_ahead(&conn->asked_in, iov, n, RECV_AHEAD_BYTES, true);
	done = readv(conn->fd, iov, n);
	moved(&conn->asked_in, done);
	return done;
}

ssize_t soft_stream_skip(struct soft_conn *conn, size_t n)
{
	if (conn->shm)
		return soft_shm_skip(conn, n);
	/* With TCP, MSG_TRUNC throws the bytes away without copying them. */
	return recv(conn->fd, NULL, n, MSG_TRUNC);
}

bool soft_conn_flush(struct soft_conn *conn)
{
	struct iovec iov;
	ssize_t done;

	while (conn->out_off < conn->out_len) {
		if (!conn->writable)
			return true;
		iov.iov_base = conn->out + conn->out_off;
		iov.iov_len = conn->out_len - conn->out_off;
		done = soft_stream_send(conn, &iov, 1, false);
		if (done >= 0) {
			conn->out_off += (size_t)done;
		} else if (errno == EAGAIN) {
			conn->writable = false;
		} else if (errno != EINTR) {
			return false;
		}
	}
	conn->out_off = conn->out_len = 0;
	return true;
}

bool soft_conn_put(struct soft_conn *conn, const struct frame_header *header,
		   const uint8_t *payload)
{
	size_t need = FRAME_HEADER_BYTES + header->payload_len;

	if (need > sizeof(conn->out) - conn->out_len)
		return false; /* a peer that never reads its answers */
	frame_put_header(conn->out + conn->out_len, header);
	if (header->payload_len)
		memcpy(conn->out + conn->out_len + FRAME_HEADER_BYTES, payload,
		       header->payload_len);
	conn->out_len += need;
	return soft_conn_flush(conn);
}

int soft_conn_fill(struct soft_conn *conn, uint8_t *buffer, size_t *have,
		   size_t want)
{
	struct iovec iov;
	ssize_t got;

	while (*have < want) {
		if (!conn->readable)
			return 0;
		iov.iov_base = buffer + *have;
		iov.iov_len = want - *have;
		got = soft_stream_recv(conn, &iov, 1, false);
		if (got > 0) {
			*have += (size_t)got;
		} else if (got < 0 && errno == EAGAIN) {
			conn->readable = false;
		} else if (got == 0 || errno != EINTR) {
			return -1;
		}
	}
	return 1;
}
