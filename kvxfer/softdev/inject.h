/*
 * Faults on purpose: what the decisions of a fault plan do to the device, as an
 * initiator and as a target.
 */
#ifndef KVX_SOFT_INJECT_H
#define KVX_SOFT_INJECT_H

#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "context.h"
#include "qp.h"

struct fault;
struct frame_header;
struct soft_conn;
struct soft_landing;
struct soft_tx;

/* inject.c: faults on purpose; ctx->lock held unless said otherwise */
static inline bool soft_faulty(struct soft_context *ctx)
{
	return atomic_load_explicit(&ctx->plan.on, memory_order_relaxed);
}
int soft_set_faults(struct ibv_context *context, const char *plan,
		    size_t *at); /* not held */
/* post_send is given a WR: 0 or the errno to refuse it with. sq_lock held. */
int soft_inject_post(struct soft_qp *qp);
/* post_send is called with these WRs, and takes its time. No lock held. */
void soft_inject_slow_post(struct soft_qp *qp, const struct ibv_send_wr *wr);
/* Is something to be sent once more? Then it is in the frame. */
bool soft_inject_again(struct soft_qp *qp, struct soft_tx *tx);
/* WR sq.next is about to leave, the first of its frame or not. True: it may. */
bool soft_inject_start(struct soft_qp *qp, bool first);
/* An answer came, and some of it is lost: the header says what is left. */
bool soft_inject_lost(struct soft_conn *conn, struct frame_header *header);
/* The QP ends. True: its outgoing connection lives on, without it. */
bool soft_inject_hang_up(struct soft_qp *qp);
/* CONN_LATE: the time has come. */
void soft_inject_late(struct soft_conn *conn);
void soft_inject_timer(struct soft_qp *qp);
void soft_inject_reset(struct soft_qp *qp);
/* What concerns the whole adapter. */
void soft_inject_look(struct soft_context *ctx);
/* What a WR of either side does beside failing; cq: where it completes. */
void soft_inject_strike(struct soft_qp *qp, const struct fault *fault,
			struct ibv_cq *cq);

/* inject_target.c; ctx->lock held */
/* A table of descriptors has come. False: no memory. */
bool soft_inject_frame(struct soft_conn *conn);
struct soft_failure soft_inject_failure(const struct fault *fault);
/* The WR under way ends the QP. False: it does not. */
bool soft_inject_qp_fatal(struct soft_conn *conn);
/* The WR under way moves no bytes to us: it may be one to die of. */
void soft_inject_no_bytes(struct soft_conn *conn);
/* A chunk is about to be moved: it may be cut short, or have to be put in place
 * by soft_inject_arrived(), which is called in any case. */
struct soft_landing *soft_inject_detour(struct soft_conn *conn, int *n_local,
					int *n_remote, size_t *bytes);
void soft_inject_arrived(struct soft_conn *conn, struct soft_landing *landing,
			 size_t bytes);
/* Put in place what is due by then (NEVER: everything). */
void soft_inject_land(struct soft_qp *qp, uint64_t now_ns);
void soft_inject_land_all(struct soft_context *ctx);
/* The same, what an announcement on the QP is behind. */
void soft_inject_announced(struct soft_qp *qp);
/* What a READ on the QP is behind: memory of a GPU by whatever QP. */
void soft_inject_read(struct soft_qp *qp);

#endif
