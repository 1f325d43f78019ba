/*
 * The side of a connection whose WRs they are: it puts them into frames, sends
 * them and takes the answers.
 */
#ifndef KVX_SOFT_INITIATOR_H
#define KVX_SOFT_INITIATOR_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdint.h>

#include "qp.h"

struct soft_conn;
struct soft_context;
struct soft_cq;
struct soft_tx;

/* direct.c: the device's work done by the application's thread; no lock held */
/* Send what has been posted. False: the device thread has to be kicked. */
bool soft_post_direct(struct soft_qp *qp);
/* Take the answers that have come through shared memory. */
void soft_poll_direct(struct soft_context *ctx);
/* The CQ has been armed: what completes from now on must make an event. */
void soft_listen_direct(struct soft_context *ctx, const struct soft_cq *cq);

/* initiator.c; ctx->lock held */
/* Dial, or send what the QP has, one chunk. True: there is more to do now. */
bool soft_initiate(struct soft_qp *qp);
bool soft_outstanding(struct soft_qp *qp);
/* A WR that cannot be executed fails when those before it are done. */
void soft_fail_if_due(struct soft_qp *qp);
/* The outgoing connection is gone. */
void soft_out_lost(struct soft_qp *qp, bool refused);
/* Retry timer and back-off. */
void soft_initiator_timer(struct soft_qp *qp);

/* answers.c; ctx->lock held */
/* Read answers; soft_ready() again when there is more. */
void soft_take_answers(struct soft_conn *conn);

/* request.c; ctx->lock held */
/* Put the QP's next WRs into a frame. False: there is nothing to send. */
bool soft_frame_requests(struct soft_qp *qp, struct soft_tx *tx);
/* A copy of the frame that WR sq.next alone would make. NULL: no memory. */
struct soft_late *soft_frame_late(struct soft_qp *qp);
/* Why a WR cannot be executed on our side; status 0: it can. */
struct soft_failure soft_check_wqe(struct soft_qp *qp, uint64_t seq);
/* The SGEs of a WR, inline bytes as one of them. */
uint32_t soft_wqe_sges(struct soft_qp *qp, uint64_t seq, struct ibv_sge *one,
		       const struct ibv_sge **sges);

#endif
