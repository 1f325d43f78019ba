/*
 * The inside of the software device: its objects and who may touch them.
 *
 * Locks, always taken in this order:
 *
 *   contexts_lock   the process's list of contexts; held across fork
 *   ctx->lock       the QP and MR tables, every change of a QP's state, all
 *                   connections, and all execution that touches user memory.
 *                   The device thread works in chunks (<= CHUNK_BYTES or one
 *                   frame) and lets go between them, so whoever takes this lock
 *                   knows that no byte is moving: what the copier copies,
 *                   the device thread waits for. That is the promise of
 *                   dereg_mr, destroy_qp and modify_qp to ERR or RESET.
 *                   Taken through soft_lock(), which is fair.
 *   qp->sq_lock     what post_send changes. A change of state takes it as well,
 *                   so post_send needs no more than this one.
 *   qp->rq_lock     the same for post_recv.
 *   cq->lock        the CQ's ring and its arming.
 *   channel->lock, ctx->event_lock   leaves: pending events.
 *
 * The device thread may hold ctx->lock and then any of the lower ones. Nobody
 * holds a lock while it waits for acknowledgements of events.
 */
#ifndef KVX_SOFT_INTERNAL_H
#define KVX_SOFT_INTERNAL_H

#include <infiniband/verbs.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "fault.h"
#include "frame.h"
#include "list.h"
#include "softdev.h"

#define SOFT_MAX_QP 65536
#define SOFT_MAX_QP_WR 32768
#define SOFT_MAX_SGE 32
#define SOFT_MAX_INLINE 512
#define SOFT_MAX_CQE 4194303
#define SOFT_MAX_RD_ATOMIC 16
#define SOFT_BUCKETS 1024u  /* of each hash table; a power of two */
#define SHM_MAX_REGIONS 256 /* memfds that an adapter shares with its peers */

#define CHUNK_BYTES (1u << 20)	/* moved at most per hold of ctx->lock */
#define MAX_IOV 1024		/* the kernel's limit per call */
#define MORE_IOV (MAX_IOV + 16) /* when long ranges are cut into pieces */

#define NS_PER_MS 1000000ull
#define NEVER UINT64_MAX

struct soft_context;
struct soft_qp;
struct soft_conn;
struct soft_shm;
struct soft_map;
struct soft_windows;
struct soft_copier;

/* --- events -------------------------------------------------------------- */

/* Lives inside the object that it is about. Guarded by ctx->event_lock. */
struct soft_event {
	struct soft_list link;
	bool pending;	/* on ctx->events */
	uint32_t taken; /* handed out by get_async_event so far */
	struct ibv_async_event event;
};

struct soft_channel {
	struct ibv_comp_channel
		ibv; /* fd: readable while events is not empty */
	pthread_mutex_t lock;
	struct soft_list events; /* CQs with events to fetch */
};

/* --- memory -------------------------------------------------------------- */

struct soft_pd {
	struct ibv_pd ibv;
	atomic_int users;
	/* Bytes of MRs that peers can map, and of those that they cannot. */
	atomic_size_t shared_bytes, private_bytes;
};

struct soft_mr {
	struct ibv_mr ibv;
	unsigned int access;
	uint32_t n_windows;		       /* bound to it; by ctx->lock */
	struct soft_mr *next_lkey, *next_rkey; /* hash chains, by ctx->lock */
	/* Memory that is a memfd; fd is ours. -1: it is not. */
	int fd;
	uint64_t offset; /* of addr in it */
	uint32_t slot;	 /* its place in ctx->shared */
	uint64_t serial; /* no other MR of the adapter ever has it */
	struct soft_map
		*map; /* where a responder puts bytes; made when needed */
};

/* --- completion queues --------------------------------------------------- */

struct soft_cqe {
	struct ibv_wc wc;
	/* Polling this entry frees the slots of its queue below free_to. */
	struct soft_qp *qp;
	uint64_t free_to;
	bool is_recv;
};

enum soft_armed { ARMED_NOT = 0, ARMED_SOLICITED, ARMED_NEXT };

struct soft_cq {
	/* One object with two faces, as applications cast one to the other. */
	union {
		struct ibv_cq ibv;
		struct ibv_cq_ex ex;
	};
	pthread_mutex_t lock; /* everything up to users */
	struct soft_cqe *ring;
	uint32_t mask;
	uint64_t head, tail; /* head: next to write; tail: next to poll */
	enum soft_armed armed;
	bool overrun; /* a CQE was lost: nothing more is stored */
	atomic_uint_fast64_t
		ready; /* head - tail, for a lock-free empty poll */
	atomic_int users;
	atomic_uint_fast64_t depths; /* of its queues, all together */

	/* Completion events; by channel->lock. */
	struct soft_list event_link;
	uint32_t events_pending;
	uint32_t events_taken;

	struct soft_event async;
	struct ibv_wc polled; /* of an ibv_start_poll that is under way */
};

/* --- queue pairs --------------------------------------------------------- */

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

/* --- connections --------------------------------------------------------- */

enum conn_state {
	CONN_DIALING, /* out: connect() under way */
	CONN_HELLO,   /* out: waits for WELCOME; in: waits for HELLO */
	CONN_UP,
	CONN_DRAIN, /* in: NAK sent, the rest is thrown away */
	CONN_LATE,  /* out: its QP has failed, late is still to come */
	CONN_DEAD,  /* closed; freed by the device thread */
};

/* A frame of requests on its way out. */
struct soft_tx {
	bool busy;
	uint8_t head[FRAME_HEADER_BYTES + FRAME_TABLE_BYTES];
	size_t head_len, head_off;
	struct iovec iov[MAX_IOV];
	int n_iov, at_iov;
	uint64_t first_seq; /* its first WR; the last is sq.next or before */
	uint64_t mr_generation; /* when its WRs were checked */
};

enum rx_phase { RX_HEADER, RX_TABLE, RX_EXECUTE, RX_READ, RX_SKIP };

/* A frame of requests being executed. */
struct soft_rx {
	enum rx_phase phase;
	uint8_t raw[FRAME_HEADER_BYTES + FRAME_TABLE_BYTES];
	size_t raw_len; /* bytes received of the present part */
	struct frame_header header;
	struct frame_message message;
	struct frame_desc desc[FRAME_MAX_DESC];
	uint32_t at;	 /* descriptor under way */
	uint64_t at_off; /* bytes of it that are done */
	uint32_t bad;	 /* first descriptor that fails, or n_desc */
	struct soft_failure failure;
	uint64_t mr_generation; /* when the rest was last checked */
	uint64_t message_off;	/* bytes of the present message that are done */
	bool recv_checked;	/* SEND: its RECV is there and good */
	struct fault fault;	/* of the message under way */
	struct fault *faults; /* per descriptor; NULL: there was no plan yet */
	uint32_t acks_owed;   /* frames executed since the last */
	uint64_t owed_bytes;  /* those of them, and what of the next is done */
	uint64_t owed_ns;     /* since when there are any */
	bool again;	      /* the frame repeats what was executed */
	uint64_t skip; /* RX_SKIP: payload of it still to be thrown away */
	bool awaited;  /* one of them is for a WR that somebody waits for */
	/* RNR */
	bool parked;
	uint32_t rnr_tries;
	uint64_t rnr_at_ns;
	/* READ under way: a response frame and what is left after it. */
	uint64_t read_left;
	uint64_t fetched; /* atomic: what was there before */
	uint8_t read_head[FRAME_HEADER_BYTES];
	size_t read_head_off;
	size_t read_frame_left;
};

struct soft_conn {
	struct soft_list link;	     /* ctx->conns or ctx->dead */
	struct soft_list ready_link; /* ctx->ready; empty when not queued */
	struct soft_context *ctx;
	struct soft_qp *qp; /* NULL: not bound (yet, or any more) */
	int fd;
	enum conn_state state;
	bool outgoing;
	/* From epoll, edge-triggered; cleared on EAGAIN. */
	bool readable, writable;
	uint64_t deadline_ns; /* HELLO, DRAIN: close when it passes */
	bool broken; /* reset by the peer: what is queued counts no more */
	bool deaf;   /* out: what the peer says is lost */
	struct soft_late *late;

	/* Small frames to send: hello, answers. */
	uint8_t out[1024];
	size_t out_len, out_off;
	/* A small frame being received: answers, hello. */
	uint8_t in[FRAME_HEADER_BYTES + FRAME_HELLO_BYTES];
	size_t in_len;

	/* Outgoing: the READ_RESP payload still to come. */
	size_t resp_left;
	bool resp_end, in_resp;

	/* Incoming: from the hello. */
	uint32_t rnr_retry;
	enum frame_wire wire;
	uint32_t peer_pid;
	uint64_t peer_nonce_addr;
	uint8_t peer_nonce[FRAME_NONCE_BYTES];

	struct soft_shm *shm; /* a unix socket; NULL: TCP */
	struct soft_tx *tx;
	struct soft_rx *rx;
};

/* --- the adapter --------------------------------------------------------- */

/* KVXFER_SOFT_STRICT: what happens when wrong use is seen. */
enum soft_strict { STRICT_OFF = 0, STRICT_REPORT, STRICT_ABORT };

struct soft_context {
	struct verbs_context verbs; /* ends with the ibv_context */
	struct soft_list link;	    /* contexts; by contexts_lock */
	atomic_bool orphaned;	    /* we are a forked child: nothing works */
	atomic_int children;	    /* PDs, CQs, channels */
	bool is_null; /* null.c: no listener, no wire, no thread */

	union ibv_gid gid;
	struct sockaddr_storage bound;
	uint32_t wires; /* allowed, bit mask */
	enum soft_strict strict;
	uint64_t pid_ns;
	int listen_fd, local_fd, epoll_fd, kick_fd;
	int datagram_fd; /* -1 before there is a UD QP; by ctx->lock */

	pthread_mutex_t gate, lock; /* soft_lock() */
	struct soft_qp *qp_table[SOFT_BUCKETS];
	struct soft_mr *lkeys[SOFT_BUCKETS], *rkeys[SOFT_BUCKETS];
	uint64_t
		mr_generation; /* moves with every registration and the end of one */
	struct soft_windows *windows; /* NULL: there never was one */
	struct soft_mr *shared[SHM_MAX_REGIONS];
	struct soft_list qps, conns, ready, run, dead, shms;
	uint32_t n_qps,
		n_greeting; /* incoming connections before their hello */
	uint64_t timer_ns;  /* when somebody wants to be looked at, or NEVER */
	uint64_t sleep_ns; /* until when the device thread sleeps, if it does */
	uint64_t now_ns;   /* of this turn of the device thread */
	uint64_t spin_until_ns, patient_until_ns;
	size_t socket_buffer; /* bytes; 0: leave it to the kernel */

	_Atomic(struct soft_qp *) kicks;
	atomic_bool asleep, poked;
	atomic_uint n_rings; /* outgoing connections that use shared memory */
	atomic_bool cq_overrun; /* some CQ: find its QPs */
	atomic_bool stop;
	bool has_thread; /* by ctx->lock */
	pthread_t thread;

	struct fault_plan plan;
	atomic_uint fault_wanted; /* bit mask of 1 << enum fault_act */
	bool port_down, lost;	  /* by ctx->lock */
	uint32_t n_landings;

	struct soft_copier *copier; /* NULL: it was not needed so far */
	bool no_copier;		    /* and is not to be had */

	/* Scratch of whoever holds ctx->lock. */
	struct iovec local_iov[MAX_IOV], remote_iov[MAX_IOV];
	struct iovec more_local_iov[MORE_IOV], more_remote_iov[MORE_IOV];

	pthread_mutex_t event_lock; /* async events */
	struct soft_list events;
	struct soft_event port_err, port_active, gid_change, device_fatal;
};

#define soft_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))

static inline struct soft_context *to_context(struct ibv_context *context)
{
	return soft_of(context, struct soft_context, verbs.context);
}

static inline struct soft_qp *to_qp(struct ibv_qp *qp)
{
	return soft_of(qp, struct soft_qp, ibv);
}

static inline struct soft_cq *to_cq(struct ibv_cq *cq)
{
	return soft_of(cq, struct soft_cq, ibv);
}

static inline struct soft_pd *to_pd(struct ibv_pd *pd)
{
	return soft_of(pd, struct soft_pd, ibv);
}

static inline struct soft_mr *to_mr(struct ibv_mr *mr)
{
	return soft_of(mr, struct soft_mr, ibv);
}

static inline struct soft_channel *to_channel(struct ibv_comp_channel *channel)
{
	return soft_of(channel, struct soft_channel, ibv);
}

static inline bool soft_orphaned(struct ibv_context *context)
{
	return atomic_load_explicit(&to_context(context)->orphaned,
				    memory_order_relaxed);
}

static inline struct soft_context *qp_context(const struct soft_qp *qp)
{
	return to_context(qp->ibv.context);
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

/* context.c */
extern struct soft_tally {
	atomic_uint_fast64_t contexts, pds, mrs, cqs, channels, qps,
		connections, threads;
} soft_tally;
/*
 * A plain mutex would let the device thread, which unlocks and locks again at
 * once, starve everybody else. Whoever waits for the lock holds the gate, so
 * that the device thread queues up behind him.
 */
void soft_lock(struct soft_context *ctx);
void soft_unlock(struct soft_context *ctx);
uint64_t soft_now_ns(void);
void soft_random(void *out, size_t size);
struct ibv_context *soft_open_device(struct ibv_device *device,
				     const char *address, const char *wire);
int soft_close_device(struct ibv_context *context);
struct ibv_context *soft_open_null(struct ibv_device *device); /* null.c's */
/*
 * The GID of the adapter that qpn is to be found at, if somebody says that it
 * is at gid. ctx->lock not held.
 */
union ibv_gid soft_adapter_of(struct soft_context *ctx,
			      const union ibv_gid *gid, uint32_t qpn);

/* table.c */
int soft_query_port(struct ibv_context *context, uint8_t port_num,
		    struct ibv_port_attr *attr);

/* address.c */
int soft_parse_address(const char *text, struct sockaddr_storage *address);
socklen_t soft_address_len(const struct sockaddr_storage *address);
void soft_make_gid(const struct sockaddr_storage *bound, union ibv_gid *gid);
bool soft_gid_is_ours(const union ibv_gid *gid);
/* Where the adapter with this GID listens, as seen from ctx. hint: its address
 * if known, or "". Returns 0 or EHOSTUNREACH. */
int soft_resolve(const struct soft_context *ctx, const union ibv_gid *gid,
		 const char *hint, struct sockaddr_storage *address);

/* memory.c */
struct ibv_pd *soft_alloc_pd(struct ibv_context *context);
int soft_dealloc_pd(struct ibv_pd *pd);
struct ibv_mr *soft_reg_mr(struct ibv_pd *pd, void *addr, size_t length,
			   unsigned int access);
struct ibv_mr *soft_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset,
				  size_t length, uint64_t iova, int fd,
				  unsigned int access);
struct ibv_mr *soft_reg_mr_fd(struct ibv_pd *pd, int fd, uint64_t offset,
			      void *addr, size_t length, unsigned int access);
int soft_dereg_mr(struct ibv_mr *mr);
static inline bool soft_mr_covers(const struct soft_mr *mr, uint64_t addr,
				  uint64_t length)
{
	uint64_t base = (uintptr_t)mr->ibv.addr;

	return addr >= base && addr - base <= mr->ibv.length &&
	       length <= mr->ibv.length - (addr - base);
}
struct soft_mr *soft_find_lkey(struct soft_context *ctx, uint32_t lkey);
/* The region behind the key, be it its own or that of a window. */
struct soft_mr *soft_find_rkey(struct soft_context *ctx, uint32_t rkey);
/* Give the MR a mapping of its own; ctx->lock held. Without, map stays NULL. */
void soft_map_mr(struct soft_mr *mr);
/* Checks; ctx->lock held. Return the vendor_err, or 0 if all is well. */
uint32_t soft_check_local(struct soft_context *ctx, struct ibv_pd *pd,
			  const struct ibv_sge *sge, unsigned int access);
uint32_t soft_check_remote(struct soft_qp *qp, uint32_t rkey, uint64_t addr,
			   uint64_t length, unsigned int access);

/* maps.c */
int soft_check_mapped(uintptr_t addr, size_t length, bool write);
/* Is the memory at addr the bytes of fd from offset on? */
bool soft_is_mapping_of(uintptr_t addr, size_t length, int fd, uint64_t offset);

/* event.c */
struct ibv_comp_channel *soft_create_comp_channel(struct ibv_context *context);
int soft_destroy_comp_channel(struct ibv_comp_channel *channel);
int soft_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq,
		      void **cq_context);
void soft_ack_cq_events(struct ibv_cq *cq, unsigned int nevents);
int soft_get_async_event(struct ibv_context *context,
			 struct ibv_async_event *event);
void soft_ack_async_event(struct ibv_async_event *event);
void soft_notify_cq(struct soft_cq *cq); /* cq->lock held */
void soft_forget_cq_events(struct soft_cq *cq);
void soft_raise_qp(struct soft_qp *qp, enum ibv_event_type type);
void soft_raise_cq(struct soft_cq *cq, enum ibv_event_type type);
void soft_raise_adapter(struct soft_context *ctx, enum ibv_event_type type);
/* Take the event back if it is pending and wait until all taken are acked. */
void soft_settle_qp_events(struct soft_qp *qp);
void soft_settle_cq_events(struct soft_cq *cq);
int soft_event_fd(void);
int soft_blocking_event_fd(void); /* as an application expects it */
void soft_event_fd_set(int fd);
void soft_event_fd_clear(int fd);

/* cq.c */
struct ibv_cq *soft_create_cq(struct ibv_context *context, int cqe,
			      void *cq_context,
			      struct ibv_comp_channel *channel,
			      int comp_vector);
/* As ibv_resize_cq(3); EINVAL also where more entries wait to be polled. */
int soft_resize_cq(struct ibv_cq *cq, int cqe);
int soft_destroy_cq(struct ibv_cq *cq);
int soft_poll_cq(struct ibv_cq *cq, int num_entries, struct ibv_wc *wc);
int soft_req_notify_cq(struct ibv_cq *cq, int solicited_only);
/* Store one CQE; cq->lock held. */
void soft_cq_push(struct soft_cq *cq, const struct soft_cqe *cqe,
		  bool solicited);
/* Drop the QP's entries. */
void soft_cq_purge(struct soft_cq *cq, const struct soft_qp *qp);
bool soft_cq_is_overrun(struct soft_cq *cq);
/* Is somebody to hear of the next completion? */
bool soft_cq_is_armed(struct soft_cq *cq);
/* Are its queues deeper than it is? */
bool soft_cq_can_overrun(struct soft_cq *cq);
void soft_cq_overrun(struct soft_cq *cq); /* a CQE is lost; cq->lock held */

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

/* device.c */
int soft_start_thread(struct soft_context *ctx); /* ctx->lock held */
void soft_stop_thread(struct soft_context *ctx); /* not held */
/* Have the device thread look at the QP. Any thread, no lock needed. */
void soft_kick(struct soft_qp *qp);
void soft_wake(struct soft_context *ctx);
/* Queue for service; ctx->lock held. */
void soft_run(struct soft_qp *qp);
void soft_ready(struct soft_conn *conn);
/* Be looked at no later than then; ctx->lock held. */
void soft_want_timer(struct soft_context *ctx, uint64_t when_ns);

/* connection.c; ctx->lock held */
void soft_tune_socket(const struct soft_context *ctx, int fd);
void soft_accept(struct soft_context *ctx);
/* Take over fd, also on failure. */
struct soft_conn *soft_new_conn(struct soft_context *ctx, int fd,
				enum conn_state state);
/* Be told no more that there is room in the socket: a unix socket says so each time
 * that the peer reads from it. */
void soft_conn_writes_elsewhere(struct soft_conn *conn);
/* The same for a caller who has yet to say hello. */
struct soft_conn *soft_greet(struct soft_context *ctx, int fd);
struct soft_conn *soft_dial(struct soft_qp *qp,
			    const struct sockaddr_storage *address);
void soft_conn_close(struct soft_conn *conn);
void soft_conn_free_dead(struct soft_context *ctx);
void soft_conn_service(struct soft_conn *conn);
/* Over a socket: is the peer at work on something that we wait for? */
bool soft_expects(const struct soft_conn *conn);
void soft_conn_expire(struct soft_conn *conn);
/* Say no more, and close when the peer has read what was said. */
void soft_conn_finish(struct soft_conn *conn);

/* stream.c; ctx->lock held */
/*
 * As sendmsg(2) and readv(2), never waiting, on whatever carries the connection.
 * user: some ranges are the application's, which may have unmapped them.
 */
ssize_t soft_stream_send(struct soft_conn *conn, const struct iovec *iov, int n,
			 bool user);
ssize_t soft_stream_recv(struct soft_conn *conn, const struct iovec *iov, int n,
			 bool user);
/* Throw up to n bytes away. As readv(2). */
ssize_t soft_stream_skip(struct soft_conn *conn, size_t n);
/* Queue a small frame and try to send it. False: the connection is lost. */
bool soft_conn_put(struct soft_conn *conn, const struct frame_header *header,
		   const uint8_t *payload);
bool soft_conn_flush(struct soft_conn *conn);
/* Fill buffer to want bytes. 1: there, 0: not yet, -1: the peer is gone. */
int soft_conn_fill(struct soft_conn *conn, uint8_t *buffer, size_t *have,
		   size_t want);

/* hello.c; ctx->lock held */
void soft_send_hello(struct soft_conn *conn);
void soft_answer_hello(struct soft_conn *conn);
void soft_take_welcome(struct soft_conn *conn);

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

/* responder.c; ctx->lock held */
void soft_respond(struct soft_conn *conn);
void soft_responder_timer(struct soft_conn *conn);

/* chunk.c */
/*
 * Move up to one chunk of WRITE and SEND data into place and advance over the
 * descriptors that this completes, up to one that needs a receive.
 */
enum chunk_result {
	CHUNK_MOVED,
	CHUNK_WAIT,
	CHUNK_LOST,
	CHUNK_NO_SOURCE,
	CHUNK_NO_DEST
};
enum chunk_result soft_move_chunk(struct soft_conn *conn);
/* Throw payload away; rx->skip is what is left of it. */
enum chunk_result soft_skip_payload(struct soft_conn *conn);
static inline bool soft_needs_recv(const struct frame_desc *desc)
{
	return desc->op == OP_SEND || desc->flags & DESC_IMM;
}

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

/* strict.c: wrong use that no status reports */
/* False: the text means nothing. */
bool soft_strict_parse(const char *text, enum soft_strict *strict);
/* Around what post_send does. */
void soft_strict_enter(struct soft_qp *qp);
void soft_strict_leave(struct soft_qp *qp);
/* WRs up to head are posted, WR seq is; sq_lock held. */
void soft_strict_full(struct soft_qp *qp, uint64_t head);
void soft_strict_posted(struct soft_qp *qp, uint64_t seq);
/* WR seq is about to complete; ctx->lock held. */
void soft_strict_done(struct soft_qp *qp, uint64_t seq);
/* The device is closed although it has children. */
void soft_strict_close(struct soft_context *ctx);
/* Wait until all events that were taken are acknowledged; *acked by mutex. */
void soft_await_acks(struct soft_context *ctx, pthread_mutex_t *mutex,
		     pthread_cond_t *cond, const uint32_t *acked,
		     uint32_t taken, const char *what);

/* read.c; ctx->lock held */
/* False: an atomic's target is not mapped. */
bool soft_begin_read(struct soft_conn *conn);
/* Send the next piece. CHUNK_MOVED, _WAIT or _LOST. */
enum chunk_result soft_send_read(struct soft_conn *conn);
bool soft_read_in_frame(const struct soft_conn *conn);

/* wire_cma.c */
uint64_t soft_pid_namespace(void);
/* 0: this process can read the hello's sender; else an errno. */
int soft_cma_probe(const struct soft_context *ctx,
		   const struct frame_hello *hello);
/* Allow pid to read us, where that needs saying. False: it cannot be had. */
bool soft_cma_allow(uint32_t pid);
/*
 * Pull *bytes from n_remote ranges of ctx->remote_iov into n_local ones of
 * ctx->local_iov; both have one entry free for the nonce, and are used up. *bytes
 * becomes what arrived; CHUNK_WAIT does not happen.
 */
enum chunk_result soft_cma_pull(struct soft_conn *conn, int n_local,
				int n_remote, size_t *bytes);

#endif
