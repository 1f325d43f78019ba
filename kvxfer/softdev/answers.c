/* The sending side of a QP: what the responder answers. */
#define _GNU_SOURCE
#include <errno.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "initiator.h"
#include "inject.h"
#include "qp.h"
#include "softdev.h"

#define ANSWERS_PER_TURN 32
#define BUSY_MAX_NS (1000 * NS_PER_MS) /* the longest RNR timer is 655 ms */

static const struct soft_failure bad_peer = { IBV_WC_RETRY_EXC_ERR,
					      KVX_SOFT_BAD_PEER };
static const struct soft_failure no_memory = { IBV_WC_LOC_PROT_ERR,
					       KVX_SOFT_LOCAL_MEMORY };

/* All WRs before seq are done. False: the peer cannot know that. */
static bool complete(struct soft_qp *qp, uint64_t seq)
{
	struct soft_sq *sq = &qp->sq;
	uint64_t at;

	if (seq < sq->done || seq > sq->next)
		return false;
	/* A READ is done when its bytes are here, not when somebody says so. */
	for (at = sq->done; qp->reads_out && at != seq; at++)
		if (soft_fetches(&sq->ring[at & sq->mask]))
			return false;
	soft_sends_done(qp, seq);
	qp->active = soft_outstanding(qp);
	return true;
}

static bool take_nak(struct soft_qp *qp, const struct frame_header *nak)
{
	struct soft_failure failure = { (enum ibv_wc_status)nak->arg,
					nak->flags };

	/* Only a WR that is at least partly on its way can have failed. */
	if (nak->seq > qp->sq.next ||
	    (nak->seq == qp->sq.next && !qp->sq.next_offset) ||
	    !complete(qp, nak->seq))
		return false;
	switch (failure.status) {
	case IBV_WC_LOC_PROT_ERR:
	case IBV_WC_REM_INV_REQ_ERR:
	case IBV_WC_REM_ACCESS_ERR:
	case IBV_WC_REM_OP_ERR:
	case IBV_WC_RNR_RETRY_EXC_ERR:
		break;
	default:
		return false;
	}
	soft_qp_fail(qp, &failure, NULL);
	return true;
}

/* The header of some bytes for the oldest READ. */
static bool take_read_header(struct soft_conn *conn,
			     const struct frame_header *header)
{
	struct soft_qp *qp = conn->qp;
	struct soft_sq *sq = &qp->sq;
	const struct soft_wqe *wqe = &sq->ring[header->seq & sq->mask];
	uint64_t after = qp->read_offset + header->payload_len;

	if (!qp->reads_out || !complete(qp, header->seq) ||
	    header->seq >= sq->next || !soft_fetches(wqe))
		return false;
	if (after > wqe->length ||
	    (after == wqe->length) != !!(header->flags & RESP_END))
		return false;
	conn->in_resp = true;
	conn->resp_left = header->payload_len;
	conn->resp_end = header->flags & RESP_END;
	return true;
}

static int read_ranges(struct soft_qp *qp, size_t want)
{
	struct iovec *iov = qp_context(qp)->local_iov;
	uint64_t skip = qp->read_offset;
	const struct ibv_sge *sges;
	struct ibv_sge one;
	uint32_t i, n_sges = soft_wqe_sges(qp, qp->sq.done, &one, &sges);
	size_t len;
	int n = 0;

	for (i = 0; i < n_sges && want; i++) {
		if (skip >= sges[i].length) {
			skip -= sges[i].length;
			continue;
		}
		len = sges[i].length - skip < want ? sges[i].length - skip :
						     want;
		iov[n].iov_base = (void *)(uintptr_t)(sges[i].addr + skip);
		iov[n++].iov_len = len;
		want -= len;
		skip = 0;
	}
	return n;
}

/* Read payload of a READ straight to where it belongs. As soft_conn_fill(). */
static int take_read_data(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;
	struct soft_failure failure = soft_check_wqe(qp, qp->sq.done);
	size_t want = conn->resp_left < CHUNK_BYTES ? conn->resp_left :
						      CHUNK_BYTES;
	ssize_t got = 0;

	if (failure.status) {
		soft_qp_fail(qp, &failure, NULL);
		return 0;
	}
	if (want) {
		if (!conn->readable)
			return 0;
		got = soft_stream_recv(conn, conn->ctx->local_iov,
				       read_ranges(qp, want), true);
		if (got < 0 && errno == EFAULT) {
			soft_qp_fail(qp, &no_memory, NULL);
			return 0;
		}
		if (got < 0 && errno == EAGAIN)
			conn->readable = false;
		if (got < 0)
			return errno == EAGAIN || errno == EINTR ? 0 : -1;
		if (got == 0)
			return -1;
	}
	qp->progress_ns = conn->ctx->now_ns;
	conn->resp_left -= (size_t)got;
	qp->read_offset += (uint64_t)got;
	if (conn->resp_left == 0) {
		conn->in_resp = false;
		if (conn->resp_end) {
			qp->reads_out--;
			qp->read_offset = 0;
			soft_sends_done(qp, qp->sq.done + 1);
			qp->active = soft_outstanding(qp);
		}
	}
	return 1;
}

static uint64_t busy_ns(const struct frame_header *busy)
{
	uint64_t ns = busy->arg * 1000ull;

	return ns < BUSY_MAX_NS ? ns : BUSY_MAX_NS;
}

/* What the peer says. False: it makes no sense. */
static bool obey(struct soft_conn *conn, const struct frame_header *header)
{
	switch (header->type) {
	case FRAME_ACK:
		return complete(conn->qp, header->seq);
	case FRAME_BUSY:
		/* As with an RNR NAK, the retry timer rests meanwhile. */
		conn->qp->progress_ns += busy_ns(header);
		return complete(conn->qp, header->seq);
	case FRAME_NAK:
		return take_nak(conn->qp, header);
	case FRAME_READ_RESP:
		return take_read_header(conn, header);
	default:
		return false;
	}
}

/* As soft_conn_fill(). */
static int take_answer(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;
	struct frame_header header;
	int got;

	if (conn->deaf) {
		conn->readable = false;
		return 0;
	}
	if (conn->in_resp)
		return take_read_data(conn);
	got = soft_conn_fill(conn, conn->in, &conn->in_len, FRAME_HEADER_BYTES);
	if (got <= 0)
		return got;
	conn->in_len = 0;
	if (frame_get_header(conn->in, &header))
		header.type = 0;
	/* The peer counts the WRs that it is sent. */
	header.seq += qp->sq.n_local;
	if (!qp->faults.deaf_from || !soft_inject_lost(conn, &header))
		qp->progress_ns = conn->ctx->now_ns;
	if (!obey(conn, &header))
		soft_qp_fail(qp, &bad_peer, NULL);
	return 1;
}

void soft_take_answers(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;
	int i, got = 1;

	for (i = 0; i < ANSWERS_PER_TURN && got > 0; i++) {
		got = take_answer(conn);
		if (conn->state == CONN_DEAD)
			return;
	}
	if (got < 0) {
		soft_conn_close(conn);
		soft_out_lost(qp, false);
		return;
	}
	soft_fail_if_due(qp);
	if (conn->state == CONN_DEAD)
		return;
	if (conn->readable)
		soft_ready(conn);
	/* There may be room again, or a READ that others waited for is done. */
	soft_run(qp);
}
