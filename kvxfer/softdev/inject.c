/* What the fault plan does to the device: the initiator, the port, the adapter. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "cq.h"
#include "event.h"
#include "fault.h"
#include "frame.h"
#include "initiator.h"
#include "inject.h"
#include "list.h"
#include "qp.h"
#include "softdev.h"
#include "wire_shm.h"

int soft_set_faults(struct ibv_context *context, const char *plan, size_t *at)
{
	struct soft_context *ctx = to_context(context);
	int err;

	if (soft_orphaned(context))
		return ENODEV;
	err = fault_set(&ctx->plan, plan, soft_now_ns(), at);
	if (!err)
		soft_wake(ctx); /* a rule may have a time of its own */
	return err;
}

int soft_inject_post(struct soft_qp *qp)
{
	struct fault fault = fault_meet(&qp_context(qp)->plan, POINT_POST,
					qp->ibv.qp_num);

	return fault.act == FAULT_ENOMEM ? ENOMEM : 0;
}

void soft_inject_slow_post(struct soft_qp *qp, const struct ibv_send_wr *wr)
{
	struct timespec nap;
	uint64_t ns = 0;

	for (; wr; wr = wr->next)
		ns += fault_meet(&qp_context(qp)->plan, POINT_CALL,
				 qp->ibv.qp_num)
			      .delay_ns;
	nap.tv_sec = (time_t)(ns / 1000000000u);
	nap.tv_nsec = (long)(ns % 1000000000u);
	while (ns && nanosleep(&nap, &nap) && errno == EINTR)
		;
}

bool soft_inject_again(struct soft_qp *qp, struct soft_tx *tx)
{
	struct soft_late *again = qp->faults.again;

	if (!again || again->sent || qp->sq.next_offset)
		return false;
	/* It is freed when the next one is made, or with the QP's life. */
	again->sent = again->length;
	memcpy(tx->head, again->bytes, again->head_length);
	tx->head_len = again->head_length;
	tx->head_off = 0;
	tx->iov[0].iov_base = again->bytes + again->head_length;
	tx->iov[0].iov_len = again->length - again->head_length;
	tx->n_iov = tx->iov[0].iov_len ? 1 : 0;
	tx->busy = true;
	return true;
}

/* False: the one before has to leave first. */
static bool send_twice(struct soft_qp *qp)
{
	struct soft_qp_faults *faults = &qp->faults;

	if (faults->again && !faults->again->sent)
		return false;
	free(faults->again);
	faults->again = soft_frame_late(qp);
	return true;
}

/* What closes connections is left to a moment when none is being served. */
static void have_done(struct soft_context *ctx, enum fault_act act)
{
	atomic_fetch_or(&ctx->fault_wanted, 1u << act);
	soft_wake(ctx);
}

/* Nothing leaves and nothing is taken in; clocks run on. */
static void set_port(struct soft_context *ctx, bool down)
{
	struct soft_list *at;

	if (ctx->port_down == down)
		return;
	ctx->port_down = down;
	soft_raise_adapter(ctx,
			   down ? IBV_EVENT_PORT_ERR : IBV_EVENT_PORT_ACTIVE);
	if (down)
		return;
	for (at = ctx->qps.next; at != &ctx->qps; at = at->next)
		soft_run(soft_of(at, struct soft_qp, link));
	for (at = ctx->conns.next; at != &ctx->conns; at = at->next)
		soft_ready(soft_of(at, struct soft_conn, link));
}

/* The effects that are the same for a WR on its way out and one that came in. */
void soft_inject_strike(struct soft_qp *qp, const struct fault *fault,
			struct ibv_cq *ibcq)
{
	struct soft_cq *cq = to_cq(ibcq);

	switch (fault->act) {
	case FAULT_CQ_OVERFLOW:
		pthread_mutex_lock(&cq->lock);
		soft_cq_overrun(cq);
		pthread_mutex_unlock(&cq->lock);
		break;
	case FAULT_PORT_DOWN:
		set_port(qp_context(qp), true); /* at once: the WR stays out */
		break;
	case FAULT_DEVICE_FATAL:
	case FAULT_GID_CHANGE:
		have_done(qp_context(qp), fault->act);
		break;
	default:
		break;
	}
}

/* Send the first half of the WR's frame and be gone. */
static void die(struct soft_qp *qp)
{
	struct soft_late *late = soft_frame_late(qp);
	size_t left = late ? late->length / 2 : 0, off = 0;
	struct iovec iov;
	ssize_t sent;

	while (left && qp->out) {
		iov = (struct iovec){ late->bytes + off, left };
		sent = soft_stream_send(qp->out, &iov, 1, false);
		if (sent < 0 && errno != EAGAIN && errno != EINTR)
			break;
		off += sent > 0 ? (size_t)sent : 0;
		left -= sent > 0 ? (size_t)sent : 0;
	}
	kill(getpid(), SIGKILL);
}

/* Apply what was decided for the WR at sq.next. True: it may leave. */
static bool apply(struct soft_qp *qp, bool first)
{
	struct soft_qp_faults *faults = &qp->faults;
	struct soft_context *ctx = qp_context(qp);

	switch (faults->now.act) {
	case FAULT_STATUS:
		qp->local.status = (enum ibv_wc_status)faults->now.status;
		qp->local.vendor_err = KVX_SOFT_INJECTED;
		return false;
	case FAULT_QP_FATAL:
		soft_raise_qp(qp, IBV_EVENT_QP_FATAL);
		qp->local.status = IBV_WC_WR_FLUSH_ERR;
		qp->local.vendor_err = KVX_SOFT_INJECTED;
		return false;
	case FAULT_ACK_LOST:
		if (!faults->deaf_from)
			faults->deaf_from = qp->sq.next + 1;
		return true;
	case FAULT_DELAY:
		if (ctx->now_ns >= faults->hold_ns)
			return true;
		soft_want_timer(ctx, faults->hold_ns);
		return false;
	case FAULT_DROP:
	case FAULT_PORT_DOWN:
		return !ctx->port_down && faults->now.act != FAULT_DROP;
	case FAULT_LATE_WRITE:
		if (!faults->late)
			faults->late = soft_frame_late(qp);
		return false;
	case FAULT_DUP:
		return send_twice(qp);
	case FAULT_DIE:
		if (first)
			die(qp);
		return false; /* the WRs before it leave first */
	default:
		return true;
	}
}

bool soft_inject_start(struct soft_qp *qp, bool first)
{
	struct soft_qp_faults *faults = &qp->faults;
	struct soft_context *ctx = qp_context(qp);

	if (faults->decided <= qp->sq.next) {
		faults->decided = qp->sq.next + 1;
		faults->now = fault_meet(&ctx->plan, POINT_INITIATOR,
					 qp->ibv.qp_num);
		soft_inject_strike(qp, &faults->now, qp->ibv.send_cq);
		if (faults->now.act == FAULT_DELAY) {
			faults->hold_ns = ctx->now_ns + faults->now.delay_ns;
			/* It is we who wait, and not for the peer. */
			qp->progress_ns = faults->hold_ns;
		}
	}
	return apply(qp, first);
}

bool soft_inject_lost(struct soft_conn *conn, struct frame_header *header)
{
	uint64_t from = conn->qp->faults.deaf_from;

	if (header->seq < from - 1 ||
	    (header->seq == from - 1 &&
	     (header->type == FRAME_ACK || header->type == FRAME_BUSY)))
		return false;
	/* What it says of the WRs before may be known. */
	*header = (struct frame_header){ .type = FRAME_ACK, .seq = from - 1 };
	conn->deaf = true;
	return true;
}

bool soft_inject_hang_up(struct soft_qp *qp)
{
	struct soft_conn *conn = qp->out;
	struct soft_late *late = qp->faults.late;

	qp->faults.late = NULL;
	if (!late || !conn || conn->state != CONN_UP || conn->tx->busy) {
		free(late);
		return false;
	}
	/* The network still holds the WR, whatever becomes of the QP. */
	conn->qp = NULL;
	qp->out = NULL;
	conn->state = CONN_LATE;
	conn->late = late;
	conn->deadline_ns = soft_now_ns() + qp->faults.now.delay_ns;
	soft_want_timer(conn->ctx, conn->deadline_ns);
	soft_wake(conn->ctx);
	return true;
}

void soft_inject_late(struct soft_conn *conn)
{
	struct soft_late *late = conn->late;
	struct iovec iov;
	ssize_t sent = 1;

	while (sent > 0 && late->sent < late->length) {
		iov = (struct iovec){ late->bytes + late->sent,
				      late->length - late->sent };
		sent = soft_stream_send(conn, &iov, 1, false);
		late->sent += sent > 0 ? (size_t)sent : 0;
	}
	if (sent < 0 && (errno == EAGAIN || errno == EINTR)) {
		conn->deadline_ns = conn->ctx->now_ns + NS_PER_MS;
		soft_want_timer(conn->ctx, conn->deadline_ns);
		return;
	}
	if (sent < 0) {
		soft_conn_close(conn);
		return;
	}
	soft_conn_finish(conn);
}

void soft_inject_timer(struct soft_qp *qp)
{
	uint64_t hold_ns = qp->faults.hold_ns;

	soft_inject_land(qp, qp_context(qp)->now_ns);
	if (!hold_ns || qp->faults.now.act != FAULT_DELAY)
		return;
	if (qp_context(qp)->now_ns < hold_ns) {
		soft_want_timer(qp_context(qp), hold_ns);
		return;
	}
	qp->faults.hold_ns = 0;
	soft_run(qp);
}

void soft_inject_reset(struct soft_qp *qp)
{
	free(qp->faults.late);
	free(qp->faults.again);
	memset(&qp->faults, 0, sizeof(qp->faults));
}

/* All QPs that are connected to anything. */
static void fail_all(struct soft_context *ctx)
{
	static const struct soft_failure fatal = { IBV_WC_FATAL_ERR,
						   KVX_SOFT_INJECTED };
	struct soft_list *at;
	struct soft_qp *qp;

	ctx->lost = true;
	for (at = ctx->qps.next; at != &ctx->qps; at = at->next) {
		qp = soft_of(at, struct soft_qp, link);
		if (qp_state(qp) != IBV_QPS_RESET)
			soft_qp_fail(qp, &fatal, NULL);
	}
	soft_raise_adapter(ctx, IBV_EVENT_DEVICE_FATAL);
}

/* The address that all connections are made between is no more. */
static void change_gid(struct soft_context *ctx)
{
	struct soft_list *at, *next;
	struct soft_conn *conn;
	struct soft_qp *qp;

	soft_make_gid(&ctx->bound, &ctx->gid);
	soft_local_listen(ctx); /* under the new name */
	for (at = ctx->conns.next; at != &ctx->conns; at = next) {
		next = at->next;
		conn = soft_of(at, struct soft_conn, link);
		qp = conn->outgoing ? conn->qp : NULL;
		soft_conn_close(conn);
		if (qp)
			soft_out_lost(qp, false);
	}
	soft_raise_adapter(ctx, IBV_EVENT_GID_CHANGE);
}

void soft_inject_look(struct soft_context *ctx)
{
	unsigned int wanted = atomic_exchange(&ctx->fault_wanted, 0);
	uint64_t next_ns = NEVER;
	enum fault_act act;

	while ((act = fault_due(&ctx->plan, ctx->now_ns, &next_ns)))
		wanted |= 1u << act;
	soft_want_timer(ctx, next_ns);
	if (wanted & 1u << FAULT_PORT_DOWN)
		set_port(ctx, true);
	if (wanted & 1u << FAULT_PORT_UP)
		set_port(ctx, false);
	if (wanted & 1u << FAULT_GID_CHANGE)
		change_gid(ctx);
	if (wanted & 1u << FAULT_DEVICE_FATAL)
		fail_all(ctx);
}
