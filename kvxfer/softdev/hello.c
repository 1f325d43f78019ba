/* HELLO and WELCOME: whether two QPs mean each other, and by which wire. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <errno.h>

#include "connection.h"
#include "context.h"
#include "frame.h"
#include "initiator.h"
#include "qp.h"
#include "softdev.h"
#include "wire_cma.h"
#include "wire_shm.h"

static const struct soft_failure refused = { IBV_WC_RETRY_EXC_ERR,
					     KVX_SOFT_REFUSED };

static uint32_t offered_wires(const struct soft_qp *qp)
{
	uint32_t wires = qp_wires(qp);

	if (qp->no_cma)
		wires &= ~(1u << WIRE_CMA);
	if (qp->no_shm)
		wires &= ~(1u << WIRE_SHM);
	if (qp->wire_out != WIRE_NONE)
		wires &= 1u << qp->wire_out;
	return wires;
}

/* Which of them this connection can be: the unix socket is for those who share
 * memory or may read each other's, and cma does without it where need be. */
static uint32_t wires_of(const struct soft_conn *conn, uint32_t wires)
{
	const uint32_t shm = 1u << WIRE_SHM, tcp = 1u << WIRE_TCP;

	return wires & ~(conn->shm ? tcp : shm);
}

/* What to propose on it. Memory that cannot be mapped is better read where it
 * is than copied into the ring, so shm is for those of whose most can. */
static uint32_t proposed(const struct soft_conn *conn)
{
	const struct soft_qp *qp = conn->qp;
	uint32_t wires = wires_of(conn, offered_wires(qp));
	const uint32_t shm = 1u << WIRE_SHM;

	return wires == shm || soft_can_be_mapped(qp) ? wires : wires & ~shm;
}

void soft_send_hello(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;
	struct soft_context *ctx = conn->ctx;
	struct frame_header header = { .type = FRAME_HELLO,
				       .payload_len = FRAME_HELLO_BYTES };
	struct frame_hello hello = {
		.src_qpn = qp->ibv.qp_num,
		.dst_qpn = qp->attr.dest_qp_num,
		.psn = qp->attr.sq_psn,
		.wires = proposed(conn),
		.rnr_retry = qp->attr.rnr_retry,
		.pid = (uint32_t)getpid(),
		.pid_ns = ctx->pid_ns,
		.first_seq = qp->sq.done - qp->sq.n_local,
		.nonce_addr = (uintptr_t)qp->nonce,
	};
	uint8_t body[FRAME_HELLO_BYTES];

	memcpy(hello.src_gid, ctx->gid.raw, sizeof(hello.src_gid));
	memcpy(hello.dst_gid, qp->peer_gid.raw, sizeof(hello.dst_gid));
	memcpy(hello.token, qp->hint.remote_token, sizeof(hello.token));
	soft_random(qp->nonce, sizeof(qp->nonce));
	memcpy(hello.nonce, qp->nonce, sizeof(hello.nonce));
	if (conn->shm)
		soft_shm_begin(conn->shm, qp->nonce);
	frame_put_hello(body, &hello);

	conn->state = CONN_HELLO;
	if (!soft_conn_put(conn, &header, body)) {
		soft_conn_close(conn);
		soft_out_lost(qp, false);
		return;
	}
	soft_take_welcome(conn); /* sets the edge-triggered flags right */
}

static bool same_token(const uint8_t *a, const uint8_t *b)
{
	uint8_t difference = 0;
	size_t i;

	/* In constant time: how far it matches is nobody's business. */
	for (i = 0; i < FRAME_TOKEN_BYTES; i++)
		difference |= a[i] ^ b[i];
	return difference == 0;
}

/* The QP that the hello is for, or NULL where a NIC would stay silent. */
static struct soft_qp *addressee(struct soft_context *ctx,
				 const struct frame_hello *hello)
{
	struct soft_qp *qp = soft_find_qp(ctx, hello->dst_qpn);
	int state = qp ? qp_state(qp) : IBV_QPS_RESET;

	if (state != IBV_QPS_RTR && state != IBV_QPS_RTS)
		return NULL;
	if (memcmp(hello->dst_gid, ctx->gid.raw, sizeof(hello->dst_gid)) ||
	    memcmp(hello->src_gid, qp->peer_gid.raw, sizeof(hello->src_gid)))
		return NULL;
	if (hello->src_qpn != qp->attr.dest_qp_num)
		return NULL;
	/* The PSN it starts from and how far it has come since: an old life of
	 * either side does not match. */
	if (hello->psn != qp->attr.rq_psn || hello->first_seq != qp->rx_seq)
		return NULL;
	return qp;
}

static struct frame_header choose_wire(struct soft_conn *conn,
				       struct soft_qp *qp,
				       const struct frame_hello *hello)
{
	struct soft_context *ctx = conn->ctx;
	struct frame_header answer = { .type = FRAME_WELCOME,
				       .arg = ANSWER_OK };
	uint32_t wires = wires_of(conn, hello->wires & qp_wires(qp));
	int err = EOPNOTSUPP;

	if (qp->wire_in != WIRE_NONE)
		wires &= 1u << qp->wire_in;
	if (conn->shm && !soft_shm_probe(conn->shm, hello))
		wires = 0;
	if (wires & 1u << WIRE_CMA && !(wires & 1u << WIRE_SHM)) {
		err = soft_cma_probe(ctx, hello);
		/* Of another host nobody expects it; EACCES is an EPERM that
		 * the peer's leave would not mend. */
		if (err != ENXIO)
			answer.flags = err == EACCES ? EPERM : (uint16_t)err;
	}
	if (wires & 1u << WIRE_SHM) {
		answer.seq = WIRE_SHM;
	} else if (!err) {
		answer.seq = WIRE_CMA;
	} else if (err == EPERM) {
		answer.arg = ANSWER_TRACE_ME;
		answer.seq = (uint32_t)getpid();
	} else if (wires & 1u << WIRE_TCP) {
		answer.seq = WIRE_TCP;
	} else {
		answer.arg = ANSWER_REFUSED;
	}
	return answer;
}

static bool take_up(struct soft_conn *conn, struct soft_qp *qp,
		    const struct frame_hello *hello, enum frame_wire wire)
{
	conn->rx = calloc(1, sizeof(*conn->rx));
	if (!conn->rx)
		return false;
	if (qp->in)
		soft_conn_close(qp->in); /* the same peer dials again */
	qp->in = conn;
	qp->wire_in = wire;
	conn->qp = qp;
	conn->wire = wire;
	conn->rnr_retry = hello->rnr_retry;
	conn->peer_pid = hello->pid;
	conn->peer_nonce_addr = hello->nonce_addr;
	memcpy(conn->peer_nonce, hello->nonce, sizeof(conn->peer_nonce));
	conn->ctx->n_greeting--;
	conn->state = CONN_UP;
	conn->deadline_ns = NEVER;
	return true;
}

void soft_answer_hello(struct soft_conn *conn)
{
	struct frame_header header, answer = { .type = FRAME_WELCOME };
	struct frame_hello hello;
	struct soft_qp *qp;
	int got;

	got = soft_conn_fill(conn, conn->in, &conn->in_len, sizeof(conn->in));
	if (got == 0)
		return;
	if (got < 0 || frame_get_header(conn->in, &header) ||
	    header.type != FRAME_HELLO) {
		soft_conn_close(conn);
		return;
	}
	frame_get_hello(conn->in + FRAME_HEADER_BYTES, &hello);
	qp = addressee(conn->ctx, &hello);
	if (!qp)
		answer.arg = ANSWER_NOT_READY;
	else if (!same_token(hello.token, qp->hint.local_token))
		answer.arg = ANSWER_REFUSED;
	else
		answer = choose_wire(conn, qp, &hello);

	if (answer.arg == ANSWER_OK &&
	    !take_up(conn, qp, &hello, (enum frame_wire)answer.seq)) {
		soft_conn_close(conn);
		return;
	}
	/* The peer says nothing more before it has this, so closing right
	 * after it loses nothing. */
	if (!soft_conn_put(conn, &answer, NULL) || answer.arg != ANSWER_OK) {
		soft_conn_close(conn);
		return;
	}
	if (conn->shm)
		soft_shm_up(conn->shm);
	soft_ready(conn);
}

static bool start(struct soft_conn *conn, uint64_t wire)
{
	struct soft_qp *qp = conn->qp;

	if (wire > WIRE_SHM || !(proposed(conn) & 1u << wire))
		return false;
	conn->tx = calloc(1, sizeof(*conn->tx));
	if (!conn->tx)
		return false;
	conn->state = CONN_UP;
	conn->wire = (enum frame_wire)wire;
	conn->in_len = 0;
	qp->wire_out = conn->wire;
	/* Through a socket it would be a system call for each chain. */
	atomic_store(&qp->direct, conn->shm != NULL);
	qp->dial = DIAL_UP;
	qp->was_up = true;
	qp->backoff_ms = 0;
	qp->progress_ns = conn->ctx->now_ns;
	if (conn->shm)
		soft_shm_up(conn->shm);
	soft_run(qp);
	soft_ready(conn);
	return true;
}

/* The responder's host wants our leave before its process may read ours. */
static void allow_trace(struct soft_qp *qp, uint64_t pid)
{
	if (!qp->trace_allowed && soft_cma_allow((uint32_t)pid))
		qp->trace_allowed = true;
	else
		qp->no_cma = true;
	qp->cma_errno = qp->no_cma ? EPERM : 0;
	qp->dial = DIAL_IDLE;
	if (offered_wires(qp))
		soft_run(qp);
	else
		soft_qp_fail(qp, &refused, NULL);
}

/* The peer does not want us, or not by this road. */
static void refuse(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;

	if (conn->shm)
		qp->no_shm = true;
	if (!conn->shm || !offered_wires(qp)) {
		soft_qp_fail(qp, &refused, NULL);
		return;
	}
	soft_conn_close(conn);
	qp->dial = DIAL_IDLE;
	soft_run(qp);
}

void soft_take_welcome(struct soft_conn *conn)
{
	struct soft_qp *qp = conn->qp;
	struct frame_header answer;
	int got;

	if (!soft_conn_flush(conn))
		goto lost;
	got = soft_conn_fill(conn, conn->in, &conn->in_len, FRAME_HEADER_BYTES);
	if (got == 0)
		return;
	if (got < 0 || frame_get_header(conn->in, &answer) ||
	    answer.type != FRAME_WELCOME)
		goto lost;
	if (answer.flags)
		qp->cma_errno = answer.flags;
	if (answer.arg == ANSWER_OK && start(conn, answer.seq))
		return;
	if (answer.arg == ANSWER_REFUSED) {
		refuse(conn);
		return;
	}
	if (answer.arg == ANSWER_TRACE_ME) {
		soft_conn_close(conn);
		allow_trace(qp, answer.seq);
		return;
	}
lost: /* not ready, or nothing that we understand */
	soft_conn_close(conn);
	soft_out_lost(qp, false);
}
