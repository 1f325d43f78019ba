/*
 * Queue pairs: their send and receive queues, the state of both sides of one, and
 * what posts to them, changes their state and completes their work.
 */
#ifndef KVX_SOFT_QP_H
#define KVX_SOFT_QP_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "context.h"
#include "event.h"
#include "fault.h"
#include "frame.h"
#include "list.h"
#include "softdev.h"

struct soft_conn;
struct soft_landing;

#define SOFT_MAX_QP 65536
#define SOFT_MAX_QP_WR 32768
#define SOFT_MAX_SGE 32
#define SOFT_MAX_INLINE 512
#define SOFT_MAX_RD_ATOMIC 16

struct soft_wqe {
	uint64_t wr_id;
	uint64_t raddr;
	uint64_t length;
	uint32_t rkey;
	uint32_t imm;
	uint16_t num_sge;
	uint8_t opcode; /* enum ibv_wr_opcode */
	uint8_t signaled;
	uint8_t flags; /* IBV_SEND_FENCE | IBV_SEND_SOLICITED | IBV_SEND_INLINE */
};

/* In the slot of an atomic WR. */
struct soft_atomic {
	struct ibv_sge sge; /* first, where other WRs have theirs */
	uint64_t compare_add, swap;
};

static inline bool soft_is_atomic(uint8_t opcode)
{
	return opcode == IBV_WR_ATOMIC_FETCH_AND_ADD ||
	       opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
}

/* Is it done when bytes have come back? */
static inline bool soft_fetches(const struct soft_wqe *wqe)
{
	return wqe->opcode == IBV_WR_RDMA_READ || soft_is_atomic(wqe->opcode);
}

struct soft_rqe {
	uint64_t wr_id;
	uint64_t length;
	uint32_t num_sge;
};

/*
 * Positions count WRs since RESET and never wrap. tail <= done <= next <= head:
 * [tail, done) wait to be polled, [done, next) are on their way, [next, head)
 * were posted. In ERR only head moves; done and next mean nothing there.
 */
struct soft_sq {
	struct soft_wqe *ring;
	uint8_t *slots; /* per WR: its SGEs, its inline bytes, or an atomic */
	size_t slot_bytes;
	uint64_t mask;
	uint32_t depth;
	atomic_uint_fast64_t head; /* by sq_lock; the device thread reads it */
	atomic_uint_fast64_t tail; /* by the send CQ's lock */
	uint64_t done, next;	   /* by ctx->lock */
	uint64_t next_offset; /* bytes of WR next that are framed already */
	uint64_t n_local;     /* WRs before next that no peer hears of */
	/* Strict mode: checksums of what the WRs send. */
	uint64_t *sums;
	bool told_full; /* by sq_lock */
};

struct soft_rq {
	struct soft_rqe *ring;
	struct ibv_sge *sges;
	uint64_t mask;
	uint32_t depth, max_sge;
	atomic_uint_fast64_t head; /* by rq_lock */
	atomic_uint_fast64_t tail; /* by the receive CQ's lock */
	uint64_t next;		   /* by ctx->lock: next to be consumed */
	atomic_bool starved;	   /* post_recv must wake the device thread */
};

/* Why a WR fails. */
struct soft_failure {
	enum ibv_wc_status status;
	uint32_t vendor_err;
};

/* A frame that somebody holds back, whole. */
struct soft_late {
	size_t length, sent, head_length; /* head: without the payload */
	uint8_t bytes[];
};

/* What the fault plan has in store for a QP; by ctx->lock. */
struct soft_qp_faults {
	uint64_t decided;   /* WRs that the plan was asked about */
	struct fault now;   /* the answer for the last of them */
	uint64_t hold_ns;   /* FAULT_DELAY: until then */
	uint64_t deaf_from; /* answers from this WR on are lost; 0: none */
	struct soft_late *late;
	struct soft_late *again;       /* FAULT_DUP: to be sent once more */
	struct soft_landing *landings; /* of WRs that came in; oldest first */
};

enum dial_state { DIAL_IDLE, DIAL_BUSY, DIAL_UP, DIAL_BACKOFF };

struct soft_qp {
	union { /* as in soft_cq */
		struct ibv_qp ibv;
		struct ibv_qp_ex ex;
	};
	atomic_int state; /* enum ibv_qp_state; by ctx->lock and both below */
	atomic_bool posting; /* strict mode: somebody is in post_send */
	pthread_mutex_t sq_lock, rq_lock;
	struct soft_sq sq;
	struct soft_rq rq;
	struct ibv_qp_cap cap;
	bool sq_sig_all;

	/* By ctx->lock from here on. */
	struct soft_qp *next_qpn;  /* hash chain */
	struct soft_list link;	   /* ctx->qps */
	struct ibv_qp_attr attr;   /* as modified so far */
	union ibv_gid peer_gid;	   /* of the adapter that has the peer's QP */
	struct kvx_peer_hint hint; /* zero: nothing is known */
	uint32_t wires; /* that are allowed, bit mask; 0: the context's */
	/* Each direction is probed by itself, and then kept for life. */
	enum frame_wire wire_out, wire_in;

	/* Initiator. */
	struct soft_conn *out;
	enum dial_state dial;
	bool was_up;
	atomic_bool direct; /* post_send may frame WRs itself: it is quick */
	bool active;	    /* WRs are outstanding: the retry timer runs */
	bool trace_allowed; /* answered TRACE_ME once */
	bool no_cma;	    /* and it did not help */
	bool no_shm;	    /* the unix socket led nowhere */
	int cma_errno;	    /* why the peer cannot read our memory; or 0 */
	uint32_t backoff_ms;
	uint64_t dial_at_ns;  /* DIAL_BACKOFF: when to try again */
	uint64_t progress_ns; /* last sign of life while WRs are on their way */
	uint32_t reads_out;   /* READs framed and not answered */
	uint64_t read_offset; /* bytes received for the oldest of them */
	struct soft_failure
		local; /* fails WR next once those before are done */
	/* The responder reads this cell after each batch that it pulls: while it
	 * matches the hello, the pulled bytes are of this life. */
	uint8_t nonce[FRAME_NONCE_BYTES];

	struct soft_qp_faults faults;

	/* Responder. */
	struct soft_conn *in;
	uint64_t rx_seq; /* WRs executed since RESET */

	/* Scheduling. */
	atomic_bool kicked;
	struct soft_qp *next_kicked;
	struct soft_list run_link; /* ctx->run; empty when not queued */

	struct soft_event async;
	void *builder; /* of the WRs between ibv_wr_start and ibv_wr_complete */
};

static inline struct soft_qp *to_qp(struct ibv_qp *qp)
{
	return soft_of(qp, struct soft_qp, ibv);
}

static inline struct soft_context *qp_context(const struct soft_qp *qp)
{
	return to_context(qp->ibv.context);
}

static inline uint32_t qp_wires(const struct soft_qp *qp)
{
	return qp->wires ? qp->wires : qp_context(qp)->wires;
}

/* Has it WRs that have not left yet? */
static inline bool soft_unsent(const struct soft_qp *qp)
{
	return qp->sq.next !=
	       atomic_load_explicit(&qp->sq.head, memory_order_acquire);
}

static inline int qp_state(struct soft_qp *qp)
{
	return atomic_load_explicit(&qp->state, memory_order_acquire);
}

/* qp.c */
struct ibv_qp *soft_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init);
int soft_destroy_qp(struct ibv_qp *qp);
int soft_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int attr_mask,
		  struct ibv_qp_init_attr *init_attr);
int soft_bind_peer(struct ibv_qp *qp, const struct kvx_peer_hint *hint);
int soft_wire_name(struct ibv_qp *qp, char name[KVX_WIRE_NAME_BYTES]);
struct soft_qp *soft_find_qp(struct soft_context *ctx, uint32_t qpn);

/* qp_state.c */
int soft_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int attr_mask);
/*
 * Put the QP into ERR and complete all it has: the first outstanding send with
 * *send and the first receive with *recv (NULL: flushed), the rest flushed.
 * ctx->lock held.
 */
void soft_qp_fail(struct soft_qp *qp, const struct soft_failure *send,
		  const struct soft_failure *recv);
/* Close the QP's connections and void its nonce; ctx->lock held. */
void soft_qp_hang_up(struct soft_qp *qp);

/* post.c */
int soft_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr,
		   struct ibv_send_wr **bad_wr);
int soft_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr,
		   struct ibv_recv_wr **bad_wr);

/* null.c */
int soft_null_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr,
			struct ibv_send_wr **bad_wr);

/* complete.c: CQEs of a QP; ctx->lock held unless said otherwise */
/* All sends before WR seq have succeeded. */
void soft_sends_done(struct soft_qp *qp, uint64_t seq);
/* Complete the QP's next receive and consume it. */
void soft_recv_done(struct soft_qp *qp, const struct frame_desc *desc,
		    uint64_t byte_len);
/* One failed CQE; sq_lock or rq_lock held, ctx->lock not needed. */
void soft_send_failed(struct soft_qp *qp, uint64_t seq, uint64_t wr_id,
		      enum ibv_wc_status status, uint32_t vendor_err);
void soft_recv_failed(struct soft_qp *qp, uint64_t seq, uint64_t wr_id,
		      enum ibv_wc_status status, uint32_t vendor_err);

#endif
