/* The sending side of a QP: dial, send requests, give up in time. */
#define _GNU_SOURCE
#include <errno.h>

#include "connection.h"
#include "context.h"
#include "initiator.h"
#include "qp.h"
#include "softdev.h"
#include "windows.h"
#include "wire_shm.h"

#define BACKOFF_MAX_MS 50
/* Of long ranges a socket is given so many at once that they have this together. */
#define LONG_CALL_BYTES (2u << 20)
/* A process may have to wait this long for a CPU; a NIC never does. */
#define MIN_RETRY_NS (20 * NS_PER_MS)

static const struct soft_failure no_answer = { IBV_WC_RETRY_EXC_ERR,
					       KVX_SOFT_NO_ANSWER };
static const struct soft_failure peer_gone = { IBV_WC_RETRY_EXC_ERR,
					       KVX_SOFT_PEER_GONE };
static const struct soft_failure no_memory = { IBV_WC_LOC_PROT_ERR,
					       KVX_SOFT_LOCAL_MEMORY };

/* How long without a sign of life until RETRY_EXC, or NEVER. */
static uint64_t retry_ns(const struct soft_qp *qp)
{
	uint64_t budget;

	if (qp->attr.timeout == 0)
		return NEVER;
	budget = (qp->attr.retry_cnt + 1u) * (4096ull << qp->attr.timeout);
	return budget > MIN_RETRY_NS ? budget : MIN_RETRY_NS;
}

static void want_retry_timer(struct soft_qp *qp)
{
	uint64_t budget = retry_ns(qp);

	if (budget != NEVER)
		soft_want_timer(qp_context(qp), qp->progress_ns + budget);
}

bool soft_outstanding(struct soft_qp *qp)
{
	return qp->sq.done !=
	       atomic_load_explicit(&qp->sq.head, memory_order_acquire);
}

void soft_out_lost(struct soft_qp *qp, bool refused)
{
	struct soft_context *ctx = qp_context(qp);
	bool was_up = qp->dial == DIAL_UP || (refused && qp->was_up);

	qp->dial = DIAL_IDLE;
	if (qp_state(qp) != IBV_QPS_RTS || !soft_outstanding(qp))
		return; /* the next WR dials again */
	if (was_up) {
		soft_qp_fail(qp, &peer_gone, NULL);
		return;
	}
	qp->backoff_ms = qp->backoff_ms ? qp->backoff_ms * 2 : 1;
	if (qp->backoff_ms > BACKOFF_MAX_MS)
		qp->backoff_ms = BACKOFF_MAX_MS;
	qp->dial = DIAL_BACKOFF;
	qp->dial_at_ns = ctx->now_ns + qp->backoff_ms * NS_PER_MS;
	soft_want_timer(ctx, qp->dial_at_ns);
}

void soft_initiator_timer(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	uint64_t budget = retry_ns(qp);

	if (!qp->active || qp_state(qp) != IBV_QPS_RTS)
		return;
	/* An answer that nobody has looked at yet is a sign of life. */
	if (qp->out && qp->out->shm && soft_shm_answered(qp->out)) {
		qp->progress_ns = ctx->now_ns;
		soft_ready(qp->out);
	}
	if (budget != NEVER && ctx->now_ns >= qp->progress_ns + budget) {
		soft_qp_fail(qp, &no_answer, NULL);
		return;
	}
	want_retry_timer(qp);
	if (qp->dial != DIAL_BACKOFF)
		return;
	if (ctx->now_ns >= qp->dial_at_ns) {
		qp->dial = DIAL_IDLE;
		soft_run(qp);
	} else {
		soft_want_timer(ctx, qp->dial_at_ns);
	}
}

static void dial(struct soft_qp *qp)
{
	struct sockaddr_storage address;

	qp->dial = DIAL_BUSY;
	if (soft_local_first(qp)) {
		if (soft_local_dial(qp))
			return;
		/* Not on this host, or not with such a wire. */
		if (errno != ECONNREFUSED || soft_only_local(qp)) {
			soft_out_lost(qp, errno == ECONNREFUSED);
			return;
		}
	}
	errno = 0;
	if (soft_resolve(qp_context(qp), &qp->peer_gid, qp->hint.address,
			 &address) ||
	    !soft_dial(qp, &address))
		soft_out_lost(qp, errno == ECONNREFUSED);
}

/* A WR that cannot be executed fails when its turn comes. */
void soft_fail_if_due(struct soft_qp *qp)
{
	struct soft_failure failure = qp->local;

	if (failure.status && qp->sq.done == qp->sq.next)
		soft_qp_fail(qp, &failure, NULL);
}

/* Part of a frame may have waited for the peer while regions went away. */
static bool still_registered(struct soft_qp *qp, struct soft_tx *tx)
{
	uint64_t generation = qp_context(qp)->mr_generation;
	uint64_t last = qp->sq.next_offset ? qp->sq.next + 1 : qp->sq.next;
	uint64_t seq;

	if (tx->mr_generation == generation)
		return true;
	for (seq = tx->first_seq; seq != last; seq++)
		if (soft_check_wqe(qp, seq).status)
			return false;
	tx->mr_generation = generation;
	return true;
}

/* How much one call is to send. Nobody else gets the lock before it returns. */
static size_t call_bytes(const struct soft_conn *conn)
{
	const struct soft_tx *tx = conn->tx;
	bool is_short = tx->at_iov < tx->n_iov &&
			tx->iov[tx->at_iov].iov_len < SOFT_SHORT_BYTES;

	if (conn->shm)
		return CHUNK_BYTES;
	return is_short ? SOFT_SHORT_CALL_BYTES : LONG_CALL_BYTES;
}

static int gather(struct soft_context *ctx, struct soft_tx *tx, size_t limit)
{
	struct iovec *iov = ctx->local_iov;
	size_t bytes = 0;
	int n = 0, i;

	if (tx->head_off < tx->head_len) {
		iov[n].iov_base = tx->head + tx->head_off;
		iov[n++].iov_len = tx->head_len - tx->head_off;
	}
	for (i = tx->at_iov; i < tx->n_iov && bytes < limit; i++) {
		iov[n++] = tx->iov[i];
		bytes += tx->iov[i].iov_len;
	}
	return n;
}

static void advance(struct soft_tx *tx, size_t sent)
{
	size_t part = tx->head_len - tx->head_off;
	struct iovec *iov;

	if (part > sent)
		part = sent;
	tx->head_off += part;
	sent -= part;
	while (sent) {
		iov = &tx->iov[tx->at_iov];
		part = iov->iov_len < sent ? iov->iov_len : sent;
		iov->iov_base = (char *)iov->iov_base + part;
		iov->iov_len -= part;
		sent -= part;
		if (iov->iov_len == 0)
			tx->at_iov++;
	}
	if (tx->head_off == tx->head_len && tx->at_iov == tx->n_iov)
		tx->busy = false;
}

/* True: go on at once. */
static bool send_chunk(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	struct soft_conn *conn = qp->out;
	ssize_t sent;
	int n;

	if (!still_registered(qp, conn->tx)) {
		soft_qp_fail(qp, &no_memory, NULL);
		return false;
	}
	n = gather(ctx, conn->tx, call_bytes(conn));
	sent = soft_stream_send(conn, ctx->local_iov, n,
				conn->tx->at_iov < conn->tx->n_iov);
	if (sent >= 0) {
		qp->progress_ns = ctx->now_ns;
		advance(conn->tx, (size_t)sent);
		return true;
	}
	if (errno == EAGAIN) {
		conn->writable = false;
	} else if (errno == EFAULT) {
		/* Which WR it was cannot be said with part of the frame gone;
		 * the first outstanding one carries it. */
		soft_qp_fail(qp, &no_memory, NULL);
	} else if (errno != EINTR) {
		soft_conn_close(conn);
		soft_out_lost(qp, false);
	}
	return errno == EINTR;
}

bool soft_initiate(struct soft_qp *qp)
{
	struct soft_conn *conn;

	if (qp_state(qp) == IBV_QPS_RTS)
		soft_run_local(qp);
	if (qp_state(qp) != IBV_QPS_RTS || !soft_outstanding(qp))
		return false;
	if (!qp->active) {
		qp->active = true;
		qp->progress_ns = qp_context(qp)->now_ns;
		want_retry_timer(qp);
	}
	if (qp->dial == DIAL_IDLE)
		dial(qp);
	conn = qp->out;
	if (qp->dial != DIAL_UP || !conn->writable)
		return false;
	if (!conn->tx->busy && !soft_frame_requests(qp, conn->tx)) {
		soft_fail_if_due(qp);
		return false;
	}
	return send_chunk(qp);
}
