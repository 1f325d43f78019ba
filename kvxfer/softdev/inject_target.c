/* What the fault plan does to work requests that come in. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "event.h"
#include "fault.h"
#include "frame.h"
#include "inject.h"
#include "list.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"

/* Bytes that have been acknowledged and are not in place yet. */
struct soft_landing {
	struct soft_landing *next;
	uint64_t due_ns;
	bool backwards;
	bool on_gpu; /* an announcement is not behind it: only a READ is */
	int n_to;
	struct iovec *to;
	size_t length;
	uint8_t bytes[];
};

/* Is it for memory that plays a GPU's? Nobody could flush what cannot be read. */
static bool is_for_gpu(struct soft_conn *conn, const struct frame_desc *desc)
{
	return desc->op == OP_WRITE && desc->len &&
	       !soft_check_remote(conn->qp, desc->rkey, desc->raddr, desc->len,
				  IBV_ACCESS_REMOTE_READ);
}

bool soft_inject_frame(struct soft_conn *conn)
{
	struct soft_context *ctx = conn->ctx;
	struct soft_rx *rx = conn->rx;
	struct soft_qp *qp = conn->qp;
	uint32_t i;

	if (!rx->faults)
		rx->faults = calloc(FRAME_MAX_DESC, sizeof(*rx->faults));
	if (!rx->faults)
		return false;
	for (i = 0; i < rx->header.n_desc; i++) {
		if (rx->desc[i].flags & DESC_START) {
			rx->fault = fault_meet(&ctx->plan, POINT_TARGET,
					       qp->ibv.qp_num);
			soft_inject_strike(qp, &rx->fault, qp->ibv.recv_cq);
		}
		rx->faults[i] = rx->fault;
		if (rx->fault.act == FAULT_LATE_GPU &&
		    !is_for_gpu(conn, &rx->desc[i]))
			rx->faults[i].act = FAULT_NONE;
	}
	return true;
}

struct soft_failure soft_inject_failure(const struct fault *fault)
{
	struct soft_failure failure = { 0 };

	if (fault->act == FAULT_STATUS)
		failure.status = (enum ibv_wc_status)fault->status;
	else if (fault->act == FAULT_QP_FATAL)
		failure.status = IBV_WC_FATAL_ERR;
	else
		return failure;
	failure.vendor_err = KVX_SOFT_INJECTED;
	return failure;
}

bool soft_inject_qp_fatal(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;

	if (conn->rx->faults[conn->rx->at].act != FAULT_QP_FATAL)
		return false;
	soft_raise_qp(qp, IBV_EVENT_QP_FATAL);
	soft_qp_fail(qp, NULL, NULL);
	return true;
}

void soft_inject_no_bytes(struct soft_conn *conn)
{
	if (conn->rx->faults[conn->rx->at].act == FAULT_DIE)
		kill(getpid(), SIGKILL);
}

/* Keep the first bytes of the ranges. */
static void cut(struct iovec *iov, int *n, size_t bytes)
{
	int i;

	for (i = 0; i < *n && bytes; i++) {
		if (iov[i].iov_len > bytes)
			iov[i].iov_len = bytes;
		bytes -= iov[i].iov_len;
	}
	*n = i;
}

struct soft_landing *soft_inject_detour(struct soft_conn *conn, int *n_local,
					int *n_remote, size_t *bytes)
{
	const struct fault *fault = &conn->rx->faults[conn->rx->at];
	struct soft_context *ctx = conn->ctx;
	struct soft_landing *landing;

	if (fault->act == FAULT_DIE) {
		*bytes = *bytes > 1 ? *bytes / 2 : 1;
		cut(ctx->local_iov, n_local, *bytes);
		cut(ctx->remote_iov, n_remote, *bytes);
	}
	if (fault->act != FAULT_LATE_BYTES && fault->act != FAULT_LATE_GPU &&
	    fault->act != FAULT_REORDER_BYTES)
		return NULL;
	landing = malloc(sizeof(*landing) + *bytes);
	if (!landing)
		return NULL;
	landing->next = NULL;
	landing->n_to = *n_local;
	landing->to = calloc((size_t)*n_local, sizeof(*landing->to));
	if (!landing->to) {
		free(landing);
		return NULL;
	}
	memcpy(landing->to, ctx->local_iov,
	       (size_t)*n_local * sizeof(*landing->to));
	landing->on_gpu = fault->act == FAULT_LATE_GPU;
	landing->backwards = fault->act == FAULT_REORDER_BYTES;
	landing->due_ns = ctx->now_ns + fault->delay_ns;
	ctx->local_iov[0] = (struct iovec){ landing->bytes, *bytes };
	*n_local = 1;
	return landing;
}

/* Last to first, each by itself, for whoever looks at the same time. */
static void store_backwards(volatile uint8_t *to, const uint8_t *from, size_t n)
{
	while (n--)
		to[n] = from[n];
}

static void put_in_place(const struct soft_landing *landing)
{
	size_t off = landing->length, len;
	int i;

	for (i = landing->n_to - 1; i >= 0; i--) {
		len = landing->to[i].iov_len;
		off -= len;
		/* Memory that has gone since takes no more bytes, and no harm. */
		if (soft_check_mapped((uintptr_t)landing->to[i].iov_base, len,
				      true))
			continue;
		if (landing->backwards)
			store_backwards(landing->to[i].iov_base,
					landing->bytes + off, len);
		else
			memcpy(landing->to[i].iov_base, landing->bytes + off,
			       len);
	}
}

static void free_landing(struct soft_landing *landing)
{
	free(landing->to);
	free(landing);
}

void soft_inject_arrived(struct soft_conn *conn, struct soft_landing *landing,
			 size_t bytes)
{
	struct soft_landing **last = &conn->qp->faults.landings;

	if (conn->rx->faults[conn->rx->at].act == FAULT_DIE && bytes)
		kill(getpid(), SIGKILL);
	if (!landing)
		return;
	cut(landing->to, &landing->n_to, bytes);
	landing->length = bytes;
	if (landing->backwards || !bytes) {
		put_in_place(landing);
		free_landing(landing);
		return;
	}
	while (*last)
		last = &(*last)->next;
	*last = landing;
	conn->ctx->n_landings++;
	soft_want_timer(conn->ctx, landing->due_ns);
}

void soft_inject_land(struct soft_qp *qp, uint64_t now_ns)
{
	struct soft_landing *landing;

	while ((landing = qp->faults.landings) && landing->due_ns <= now_ns) {
		qp->faults.landings = landing->next;
		qp_context(qp)->n_landings--;
		put_in_place(landing);
		free_landing(landing);
	}
	if (landing)
		soft_want_timer(qp_context(qp), landing->due_ns);
}

/* Put in place what is in this memory, of one QP, whenever it was due. */
static void land_these(struct soft_qp *qp, bool on_gpu)
{
	struct soft_landing **at = &qp->faults.landings, *landing;

	while ((landing = *at)) {
		if (landing->on_gpu != on_gpu) {
			at = &landing->next;
			continue;
		}
		*at = landing->next;
		qp_context(qp)->n_landings--;
		put_in_place(landing);
		free_landing(landing);
	}
}

void soft_inject_announced(struct soft_qp *qp)
{
	land_these(qp, false);
}

void soft_inject_read(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	struct soft_list *at;

	land_these(qp, false);
	if (!ctx->n_landings)
		return;
	/* It goes the way of all writes to that memory, and behind them. */
	for (at = ctx->qps.next; at != &ctx->qps; at = at->next)
		land_these(soft_of(at, struct soft_qp, link), true);
}

void soft_inject_land_all(struct soft_context *ctx)
{
	struct soft_list *at;

	if (!ctx->n_landings)
		return;
	for (at = ctx->qps.next; at != &ctx->qps; at = at->next)
		soft_inject_land(soft_of(at, struct soft_qp, link), NEVER);
}
