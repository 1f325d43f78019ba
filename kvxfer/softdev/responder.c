/* The receiving side of a QP: check requests and execute them. */
#define _GNU_SOURCE
#include <errno.h>

#include "connection.h"
#include "context.h"
#include "event.h"
#include "frame.h"
#include "inject.h"
#include "mr.h"
#include "qp.h"
#include "responder.h"
#include "softdev.h"
#include "windows.h"
#include "wire_shm.h"

#define DRAIN_NS (2000 * NS_PER_MS)
#define RNR_FOR_EVER 7
/* What one acknowledgement is for, where more is there to be executed. It wakes the
 * initiator, who has no use for those in the middle of a stream unless he says so: so
 * many frames, if he wants it; or so many bytes, as his window may be full; or
 * whatever was done in so long a time, since it says as well that we are alive: a
 * fraction of the initiator's MIN_RETRY_NS. Who keeps less in flight than all of that
 * is answered where his stream pauses. */
#define OWED_FRAMES 4
#define OWED_BYTES (4u << 20)
#define OWED_NS (4 * NS_PER_MS)

/* What a step came to. */
enum step {
	STEP_ON,    /* go on at once */
	STEP_YIELD, /* more to do, but others first */
	STEP_WAIT,  /* for the peer, a receive or a timer */
	STEP_OVER,  /* the connection is closed or not bound any more */
};

/* Encoded min_rnr_timer in microseconds; 0 is the longest. */
static uint64_t rnr_ns(uint8_t code)
{
	static const uint32_t us[32] = {
		655360, 10,    20,    30,     40,     60,     80,     120,
		160,	240,   320,   480,    640,    960,    1280,   1920,
		2560,	3840,  5120,  7680,   10240,  15360,  20480,  30720,
		40960,	61440, 81920, 122880, 163840, 245760, 327680, 491520,
	};

	return us[code & 31] * 1000ull;
}

static enum step lost(struct soft_conn *conn)
{
	soft_conn_close(conn);
	return STEP_OVER;
}

/* Cumulative: also tells the initiator that we are alive. */
static bool answer(struct soft_conn *conn, enum frame_type type,
		   uint64_t wait_ns)
{
	struct frame_header header = { .type = (uint8_t)type,
				       .seq = conn->qp->rx_seq,
				       .arg = (uint32_t)(wait_ns / 1000) };

	bool good;

	/* Through shared memory it is found when somebody looks. */
	if (conn->shm)
		conn->shm->matter = type != FRAME_ACK ? SHM_NEWS :
				    conn->rx->awaited ? SHM_AWAITED :
							SHM_ANYTHING;
	conn->rx->acks_owed = 0;
	conn->rx->owed_bytes = 0;
	conn->rx->awaited = false;
	good = soft_conn_put(conn, &header, NULL);
	if (conn->shm)
		conn->shm->matter = SHM_NEWS;
	return good;
}

/*
 * Refuse the WR that is next. The connection has said all it will say; an
 * error of the target's kind takes the QP with it, one of the initiator's own
 * (its memory, its patience with RNR) does not.
 */
static enum step nak(struct soft_conn *conn, const struct soft_failure *failure,
		     const struct soft_failure *recv)
{
	struct soft_qp *qp = conn->qp;
	struct frame_header header = {
		.type = FRAME_NAK,
		.seq = qp->rx_seq,
		.arg = failure->status,
		.flags = (uint16_t)failure->vendor_err,
	};

	if (!soft_conn_put(conn, &header, NULL)) {
		soft_conn_close(conn);
	} else {
		conn->state = CONN_DRAIN;
		conn->deadline_ns = conn->ctx->now_ns + DRAIN_NS;
		soft_want_timer(conn->ctx, conn->deadline_ns);
		conn->qp = NULL;
		qp->in = NULL;
		soft_ready(conn);
	}
	switch (failure->status) {
	case IBV_WC_REM_ACCESS_ERR:
		soft_raise_qp(qp, IBV_EVENT_QP_ACCESS_ERR);
		break;
	case IBV_WC_REM_INV_REQ_ERR:
		soft_raise_qp(qp, IBV_EVENT_QP_REQ_ERR);
		break;
	case IBV_WC_REM_OP_ERR:
		soft_raise_qp(qp, IBV_EVENT_QP_FATAL);
		break;
	default:
		return STEP_OVER;
	}
	soft_qp_fail(qp, NULL, recv);
	return STEP_OVER;
}

static unsigned int needed_access(const struct frame_desc *desc)
{
	if (frame_is_atomic(desc->op))
		return IBV_ACCESS_REMOTE_ATOMIC;
	return desc->op == OP_READ ? IBV_ACCESS_REMOTE_READ :
				     IBV_ACCESS_REMOTE_WRITE;
}

static struct soft_failure check_desc(struct soft_qp *qp,
				      const struct frame_desc *desc)
{
	struct soft_failure failure = { 0 };
	unsigned int access = needed_access(desc);
	/* The first descriptor stands for the whole WR, as its first packet
	 * does on a wire: a bad WR writes nothing at all. */
	uint64_t length = desc->flags & DESC_START ? desc->total : desc->len;

	if (desc->op == OP_SEND) { /* goes where its RECV says */
		if (desc->flags & DESC_INV)
			failure.vendor_err = soft_check_invalidate(qp,
								   desc->imm);
		if (failure.vendor_err)
			failure.status = IBV_WC_REM_ACCESS_ERR;
		return failure;
	}
	if (!(qp->attr.qp_access_flags & access) ||
	    (frame_fetches(desc->op) && !qp->attr.max_dest_rd_atomic))
		return (struct soft_failure){ IBV_WC_REM_INV_REQ_ERR,
					      KVX_SOFT_REMOTE_QP_ACCESS };
	if (frame_is_atomic(desc->op) && desc->raddr % FRAME_ATOMIC_BYTES)
		return (struct soft_failure){ IBV_WC_REM_INV_REQ_ERR,
					      KVX_SOFT_REMOTE_ALIGNMENT };
	failure.vendor_err = soft_check_remote(qp, desc->rkey, desc->raddr,
					       length, access);
	if (failure.vendor_err)
		failure.status = IBV_WC_REM_ACCESS_ERR;
	return failure;
}

/* Find the first descriptor, from the present one on, that must fail. */
static void check_frame(struct soft_conn *conn)
{
	const struct soft_mr *mr =
		NULL; /* which the WRITE before may write to */
	struct soft_rx *rx = conn->rx;
	const struct frame_desc *desc;

	rx->mr_generation = conn->ctx->mr_generation;
	for (rx->bad = rx->at; rx->bad < rx->header.n_desc; rx->bad++) {
		desc = &rx->desc[rx->bad];
		if (mr && desc->op == OP_WRITE && desc->rkey == mr->ibv.rkey &&
		    !(desc->flags & DESC_START && desc->total != desc->len) &&
		    soft_mr_covers(mr, desc->raddr, desc->len))
			continue;
		rx->failure = check_desc(conn->qp, &rx->desc[rx->bad]);
		if (!rx->failure.status && rx->faults)
			rx->failure = soft_inject_failure(&rx->faults[rx->bad]);
		if (rx->failure.status)
			return;
		if (desc->op == OP_WRITE && desc->len && !rx->faults)
			mr = soft_find_rkey(conn->ctx, desc->rkey);
	}
}

static enum step take_header(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;
	int got = soft_conn_fill(conn, rx->raw, &rx->raw_len,
				 FRAME_HEADER_BYTES);

	if (got < 0)
		return lost(conn);
	if (got == 0) {
		/* Nothing more has come: answer for what was done. */
		if (rx->acks_owed && !conn->out_len &&
		    !answer(conn, FRAME_ACK, 0))
			return lost(conn);
		return STEP_WAIT;
	}
	if (frame_get_header(rx->raw, &rx->header) ||
	    rx->header.type != FRAME_REQUEST ||
	    rx->header.seq > conn->qp->rx_seq)
		return lost(conn);
	rx->again = rx->header.seq != conn->qp->rx_seq;
	rx->raw_len = 0;
	rx->phase = RX_TABLE;
	return STEP_ON;
}

static enum step take_table(struct soft_conn *conn)
{
	struct frame_message alone = { 0 };
	struct soft_rx *rx = conn->rx;
	int got = soft_conn_fill(conn, rx->raw, &rx->raw_len,
				 (size_t)rx->header.n_desc * FRAME_DESC_BYTES);

	if (got < 0)
		return lost(conn);
	if (got == 0)
		return STEP_WAIT;
	if (frame_get_table(rx->raw, &rx->header, conn->wire != WIRE_TCP,
			    rx->again ? &alone : &rx->message, rx->desc))
		return lost(conn);
	rx->raw_len = 0;
	if (rx->again) {
		rx->skip = rx->header.payload_len;
		rx->phase = RX_SKIP;
		return STEP_ON;
	}
	rx->at = 0;
	rx->at_off = 0;
	rx->phase = RX_EXECUTE;
	if ((soft_faulty(conn->ctx) || rx->faults) && !soft_inject_frame(conn))
		return lost(conn);
	check_frame(conn);
	return STEP_ON;
}

/* What was executed is acknowledged once more, and not executed again. */
static enum step skip(struct soft_conn *conn)
{
	enum chunk_result result = soft_skip_payload(conn);

	if (result != CHUNK_MOVED)
		return result == CHUNK_WAIT ? STEP_WAIT : lost(conn);
	if (conn->rx->skip)
		return STEP_YIELD;
	conn->rx->phase = RX_HEADER;
	return conn->out_len || answer(conn, FRAME_ACK, 0) ? STEP_YIELD :
							     lost(conn);
}

static enum step park(struct soft_conn *conn)
{
	static const struct soft_failure no_recv = { IBV_WC_RNR_RETRY_EXC_ERR,
						     KVX_SOFT_NO_RECV };
	struct soft_rx *rx = conn->rx;
	uint64_t wait_ns = rnr_ns(conn->qp->attr.min_rnr_timer);

	if (conn->rnr_retry != RNR_FOR_EVER && rx->rnr_tries >= conn->rnr_retry)
		return nak(conn, &no_recv, NULL);
	rx->rnr_tries++;
	rx->parked = true;
	rx->rnr_at_ns = conn->ctx->now_ns + wait_ns;
	soft_want_timer(conn->ctx, rx->rnr_at_ns);
	/* While unsent answers wait, another one would say nothing new. */
	if (conn->out_len == 0 && !answer(conn, FRAME_BUSY, wait_ns))
		return lost(conn);
	return STEP_WAIT;
}

/* Is there a RECV? If not, say that post_recv shall wake us. */
static bool has_recv(struct soft_rq *rq)
{
	if (rq->next != atomic_load(&rq->head))
		return true;
	atomic_store(&rq->starved, true);
	return rq->next != atomic_load(&rq->head);
}

/* A SEND is about to begin: is its RECV good for it? */
static enum step check_recv(struct soft_conn *conn,
			    const struct frame_desc *desc)
{
	static const struct soft_failure bad_request = { IBV_WC_REM_INV_REQ_ERR,
							 KVX_SOFT_REMOTE_RECV };
	static const struct soft_failure bad_op = { IBV_WC_REM_OP_ERR,
						    KVX_SOFT_REMOTE_RECV };
	struct soft_failure recv = { IBV_WC_LOC_LEN_ERR, KVX_SOFT_TOO_LONG };
	struct soft_qp *qp = conn->qp;
	struct soft_rq *rq = &qp->rq;
	const struct soft_rqe *rqe = &rq->ring[rq->next & rq->mask];
	const struct ibv_sge *sges = rq->sges +
				     (rq->next & rq->mask) * rq->max_sge;
	uint32_t i;

	if (desc->flags & DESC_START && desc->total > rqe->length)
		return nak(conn, &bad_request, &recv);
	for (i = 0; i < rqe->num_sge; i++) {
		recv.vendor_err = soft_check_local(conn->ctx, qp->ibv.pd,
						   &sges[i],
						   IBV_ACCESS_LOCAL_WRITE);
		if (recv.vendor_err) {
			recv.status = IBV_WC_LOC_PROT_ERR;
			return nak(conn, &bad_op, &recv);
		}
	}
	conn->rx->recv_checked = true;
	return STEP_ON;
}

/* The descriptor under way needs a RECV, to begin or to end. */
static enum step use_recv(struct soft_conn *conn, const struct frame_desc *desc)
{
	struct soft_rx *rx = conn->rx;
	struct soft_qp *qp = conn->qp;
	bool alive;

	if (!has_recv(&qp->rq))
		return park(conn);
	rx->parked = false;
	rx->rnr_tries = 0;
	if (desc->op == OP_SEND && !rx->recv_checked)
		return check_recv(conn, desc);
	soft_inject_announced(qp);
	if (desc->flags & DESC_INV) /* before anybody learns of it */
		soft_invalidate(conn->ctx, desc->imm);
	qp->rx_seq++;
	rx->awaited |= (desc->flags & DESC_SIGNALED) != 0;
	/* The acknowledgement leaves first, as a NIC's does: whoever learns of
	 * the message here may end this QP at once, and the initiator must not
	 * be told that it failed. */
	alive = conn->out_len || answer(conn, FRAME_ACK, 0);
	soft_recv_done(qp, desc, rx->message_off);
	rx->recv_checked = false;
	rx->at++;
	rx->at_off = 0;
	return alive ? STEP_ON : lost(conn);
}

static enum step move(struct soft_conn *conn)
{
	static const struct soft_failure no_source = { IBV_WC_LOC_PROT_ERR,
						       KVX_SOFT_LOCAL_MEMORY };
	static const struct soft_failure no_dest = { IBV_WC_REM_OP_ERR,
						     KVX_SOFT_REMOTE_MEMORY };
	uint32_t at = conn->rx->at;
	uint64_t off = conn->rx->at_off;

	switch (soft_move_chunk(conn)) {
	case CHUNK_MOVED:
		/* Completed without bytes: not worth letting go of the lock. */
		return conn->rx->at == at && conn->rx->at_off == off ?
			       STEP_ON :
			       STEP_YIELD;
	case CHUNK_WAIT:
		return STEP_WAIT;
	case CHUNK_NO_SOURCE:
		return nak(conn, &no_source, NULL);
	case CHUNK_NO_DEST:
		return nak(conn, &no_dest, NULL);
	case CHUNK_LOST:
	default:
		return lost(conn);
	}
}

static bool is_ack_due(const struct soft_conn *conn)
{
	const struct soft_rx *rx = conn->rx;

	return rx->owed_bytes >= OWED_BYTES ||
	       (rx->acks_owed >= OWED_FRAMES &&
		rx->header.flags & REQUEST_ACK) ||
	       soft_now_ns() - rx->owed_ns >= OWED_NS;
}

static enum step execute(struct soft_conn *conn)
{
	struct soft_rx *rx = conn->rx;
	static const struct soft_failure no_target = { IBV_WC_REM_OP_ERR,
						       KVX_SOFT_REMOTE_MEMORY };
	const struct frame_desc *desc = &rx->desc[rx->at];
	bool moved;

	if (rx->at == rx->header.n_desc) {
		rx->phase = RX_HEADER;
		if (rx->acks_owed++ == 0)
			rx->owed_ns = soft_now_ns();
		if (conn->out_len || !is_ack_due(conn))
			return STEP_YIELD;
		return answer(conn, FRAME_ACK, 0) ? STEP_YIELD : lost(conn);
	}
	if (rx->mr_generation != conn->ctx->mr_generation) {
		rx->recv_checked = false;
		check_frame(conn);
	}
	if (rx->at == rx->bad) {
		if (rx->faults && soft_inject_qp_fatal(conn))
			return STEP_OVER;
		return nak(conn, &rx->failure, NULL);
	}
	if (rx->faults && (frame_fetches(desc->op) || !desc->len))
		soft_inject_no_bytes(conn);
	if (frame_fetches(desc->op))
		return soft_begin_read(conn) ? STEP_ON :
					       nak(conn, &no_target, NULL);

	if (desc->flags & DESC_START && rx->at_off == 0)
		rx->message_off = 0;
	moved = rx->at_off == desc->len;
	if (desc->op == OP_SEND && !rx->recv_checked)
		return use_recv(conn, desc);
	if (moved && desc->flags & DESC_END && soft_needs_recv(desc))
		return use_recv(conn, desc);
	return move(conn);
}

static enum step read_on(struct soft_conn *conn)
{
	const struct frame_desc *desc = &conn->rx->desc[conn->rx->at];
	struct soft_failure failure;

	/* The region may have gone since the last piece; an atomic has been
	 * executed and needs it no more. */
	if (desc->op == OP_READ &&
	    conn->rx->mr_generation != conn->ctx->mr_generation) {
		failure = check_desc(conn->qp, desc);
		if (failure.status)
			return soft_read_in_frame(conn) ?
				       lost(conn) :
				       nak(conn, &failure, NULL);
		check_frame(conn);
	}
	switch (soft_send_read(conn)) {
	case CHUNK_MOVED:
		return STEP_YIELD;
	case CHUNK_WAIT:
		return STEP_WAIT;
	default:
		return lost(conn);
	}
}

static enum step step(struct soft_conn *conn)
{
	switch (conn->rx->phase) {
	case RX_HEADER:
		return take_header(conn);
	case RX_TABLE:
		return take_table(conn);
	case RX_READ:
		return read_on(conn);
	case RX_SKIP:
		return skip(conn);
	case RX_EXECUTE:
	default:
		return execute(conn);
	}
}

void soft_respond(struct soft_conn *conn)
{
	enum step what = STEP_ON;

	if ((conn->shm && !soft_shm_alive(conn->shm)) ||
	    !soft_conn_flush(conn)) {
		soft_conn_close(conn);
		return;
	}
	/* Parked: only a receive or the timer lets it go on. */
	if (conn->rx->parked && conn->ctx->now_ns < conn->rx->rnr_at_ns &&
	    !has_recv(&conn->qp->rq))
		return;
	/* Who is to be woken is not to wait for the next copy. */
	while (what == STEP_ON && !conn->ctx->port_down && !conn->ctx->n_bells)
		what = step(conn);
	if (what == STEP_YIELD || (what == STEP_ON && conn->ctx->n_bells))
		soft_ready(conn);
}

void soft_responder_timer(struct soft_conn *conn)
{
	if (!conn->rx->parked)
		return;
	if (conn->ctx->now_ns >= conn->rx->rnr_at_ns)
		soft_ready(conn);
	else
		soft_want_timer(conn->ctx, conn->rx->rnr_at_ns);
}
