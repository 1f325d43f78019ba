/*
 * The adapter and its device thread: what an open device has, how a thread comes
 * to touch it, and how the device thread is told what there is to do.
 *
 * Locks, always taken in this order:
 *
 *   contexts_lock   the process's list of contexts; held across fork
 *   ctx->lock       the QP and MR tables, every change of a QP's state, all
 *                   connections, and all execution that touches user memory.
 *                   The device thread works in chunks (<= CHUNK_BYTES, one
 *                   frame or one call of a socket) and lets go between
 *                   them, so whoever takes this lock knows that no byte is
 *                   moving: what the copier copies, the device thread waits
 *                   for. That is the promise of
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
#ifndef KVX_SOFT_CONTEXT_H
#define KVX_SOFT_CONTEXT_H

#include <infiniband/verbs.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "event.h"
#include "fault.h"
#include "list.h"
#include "strict.h"

struct soft_conn;
struct soft_copier;
struct soft_mr;
struct soft_qp;
struct soft_windows;

#define SOFT_BUCKETS 1024u  /* of each hash table; a power of two */
#define SHM_MAX_REGIONS 256 /* memfds that an adapter shares with its peers */

#define SOFT_BELLS 8u /* channels woken at the end of one hold of ctx->lock */
#define CHUNK_BYTES (1u << 20)	/* copied at most per hold of ctx->lock */
#define MAX_IOV 1024		/* the kernel's limit per call */
#define MORE_IOV (MAX_IOV + 16) /* when long ranges are cut into pieces */

#define NS_PER_MS 1000000ull
#define NEVER UINT64_MAX

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
	/* Whom to wake when it is let go. */
	struct soft_channel *bells[SOFT_BELLS];
	uint32_t n_bells;
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
	uint64_t awake_until_ns; /* it looks on, though it has nothing to do */
	size_t socket_buffer;	 /* bytes; 0: leave it to the kernel */

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

static inline struct soft_context *to_context(struct ibv_context *context)
{
	return soft_of(context, struct soft_context, verbs.context);
}

static inline bool soft_orphaned(struct ibv_context *context)
{
	return atomic_load_explicit(&to_context(context)->orphaned,
				    memory_order_relaxed);
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
bool soft_trylock(struct soft_context *ctx); /* false: somebody has it */
void soft_unlock(struct soft_context *ctx);
/* Set the channel's fd when this thread lets go of ctx->lock. False: it does not have
 * the lock, or too many channels already. */
bool soft_ring_later(struct soft_context *ctx, struct soft_channel *channel);
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
/* The wires that a name stands for, as a bit mask; 0: none has that name. NULL:
 * what the environment says. */
uint32_t soft_allowed_wires(const char *wire);

/* Where the adapter with this GID listens, as seen from ctx. hint: its address
 * if known, or "". Returns 0 or EHOSTUNREACH. */
int soft_resolve(const struct soft_context *ctx, const union ibv_gid *gid,
		 const char *hint, struct sockaddr_storage *address);

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

#endif
