/*
 * The wire between two processes of one host that share memory.
 *
 * The connection is a unix socket of packets. HELLO and WELCOME travel in it,
 * with the memfd of shm_ring.h beside the hello; from then on the frames go
 * through the rings, and the socket carries descriptors of memory regions, the
 * packet that wakes a sleeper, and the news of the peer's death.
 *
 * A range of a region that is a memfd is not sent at all: the responder maps
 * the memfd, read-only, and copies. Such a descriptor is marked DESC_FETCH and
 * its laddr is the region's slot and the offset there. Bytes of other memory go
 * through the ring as payload.
 *
 * All functions want ctx->lock unless said otherwise.
 */
#ifndef KVX_SOFT_WIRE_SHM_H
#define KVX_SOFT_WIRE_SHM_H

#include "connection.h"
#include "context.h"
#include "list.h"
#include "mr.h"
#include "responder.h"
#include "shm_ring.h"

#define SHM_SLOT_SHIFT 48

/* A memfd, or a part of one, mapped by us. */
struct soft_map {
	uint8_t *
		base; /* the byte that was asked for; NULL: nothing is mapped */
	size_t length;
	void *mapping;
	size_t mapped;
};

struct soft_shm {
	struct soft_list link; /* ctx->shms, once the rings are in use */
	struct soft_conn *conn;
	int ring_fd; /* of the initiator: until the hello is sent */
	struct shm_page *page;
	struct shm_end in, out;
	uint64_t life;
	bool packets;	      /* the socket may have some */
	bool gone;	      /* the peer has closed it */
	bool wants;	      /* we have said that we sleep */
	enum shm_wish matter; /* whom what is sent now is to wake */
	bool guarded; /* of the present chunk: the target may be unmapped */
	uint64_t told_seen; /* Responder: of page->told */
	/* Initiator: which region the peer knows by the slot; 0: none. */
	uint64_t told[SHM_MAX_REGIONS];
	/* Responder: the peer's regions. */
	struct soft_map regions[SHM_MAX_REGIONS];
};

/* map.c */
/*
 * Map length bytes of fd from offset on, in a place where huge pages fit. The
 * mapping does not survive a fork. 0 or errno.
 */
int soft_map(struct soft_map *map, int fd, uint64_t offset, size_t length,
	     int prot);
void soft_unmap(struct soft_map *map);
/* Put registered memory of ours on huge pages, where there is memory enough. */
void soft_make_huge(uint8_t *addr, size_t length);
/* Whether fd is memory of which no byte can be taken away: 0 or errno. */
int soft_check_sealed(int fd, uint64_t offset, uint64_t length);

/* copy.c; no lock */
/* Ranges, each to be copied from its own. */
struct soft_pairs {
	const struct iovec *to, *from;
	uint32_t n;
};
/* Copy those of [first, end). down: those before them are next, else those behind
 * them; as for a soft_part_fn. */
void soft_copy_pairs(void *pairs, uint32_t first, uint32_t end, bool down);
/* A system call copies ranges below this size faster if they are on their way to the
 * cache before: each of them begins with some lines that nothing foresees. So much of
 * them is for one call, or the first are out of the cache when the last are asked for. */
#define SOFT_SHORT_BYTES (4u << 10)
#define SOFT_SHORT_CALL_BYTES (256u << 10)
/* Have the short ones come, until so many bytes are seen to. They may be unmapped.
 * Returns for how many bytes it has seen to. */
size_t soft_ask_for(const struct iovec *ranges, int n, size_t bytes,
		    bool to_write);
/* Copy until either list is used up. Returns the bytes copied. */
size_t soft_copy(const struct iovec *to, int n_to, const struct iovec *from,
		 int n_from);
/* The same for ranges that the application may have unmapped: -1 with EFAULT
 * instead of a crash, or fewer bytes than there are. */
ssize_t soft_copy_guarded(const struct iovec *to, int n_to,
			  const struct iovec *from, int n_from);

/* local.c: the unix socket */
/* Listen under the name that the GID gives. Without it there is no shm. */
void soft_local_listen(struct soft_context *ctx);
void soft_local_accept(struct soft_context *ctx);
/* Whether peers can map most of the memory that is registered beside the QP. */
bool soft_can_be_mapped(const struct soft_qp *qp);
/* Whether the QP is to look for its peer on this host first. */
bool soft_local_first(const struct soft_qp *qp);
/* Whether it can be nowhere else. */
bool soft_only_local(const struct soft_qp *qp);
/* NULL with errno. ECONNREFUSED: the peer is not on this host. */
struct soft_conn *soft_local_dial(struct soft_qp *qp);
ssize_t soft_local_send(int fd, const struct iovec *iov, int n, int passed_fd);
/* *passed_fd: a descriptor that came with it, the caller's from then on. */
ssize_t soft_local_recv(int fd, const struct iovec *iov, int n, int *passed_fd);

/* wire_shm.c */
struct soft_shm *soft_shm_new(struct soft_conn *conn, bool initiator);
void soft_shm_free(struct soft_shm *shm);
/* The hello's nonce goes into the page; the QP's life begins. */
void soft_shm_begin(struct soft_shm *shm, const uint8_t *nonce);
void soft_shm_end_life(struct soft_shm *shm);
/* Responder: is what came with the hello the page that it speaks of? */
bool soft_shm_probe(struct soft_shm *shm, const struct frame_hello *hello);
/* WELCOME is out or in: frames go through the rings from here on. */
void soft_shm_up(struct soft_shm *shm);
/* The connection is closed. */
void soft_shm_unlink(struct soft_shm *shm);
bool soft_shm_alive(const struct soft_shm *shm);
ssize_t soft_shm_send(struct soft_conn *conn, const struct iovec *iov, int n,
		      bool user);
ssize_t soft_shm_recv(struct soft_conn *conn, const struct iovec *iov, int n,
		      bool user);
ssize_t soft_shm_skip(struct soft_conn *conn, size_t n);
/* Initiator: has something come that was not read? */
bool soft_shm_answered(struct soft_conn *conn);

/* shm_region.c */
/* Read the packets that wait. False: the peer is gone, or makes no sense. */
bool soft_shm_hear(struct soft_conn *conn);
/* Initiator: how the peer finds addr of the region, which it is told of if need
 * be. False: the bytes have to be sent. *full: try again when there is room. */
bool soft_shm_name(struct soft_conn *conn, const struct soft_mr *mr,
		   uint64_t addr, uint64_t *laddr, bool *full);
/* Initiator: can it be named without telling the peer of it first? */
static inline bool soft_shm_knows(const struct soft_conn *conn,
				  const struct soft_mr *mr)
{
	return mr->fd >= 0 && conn->shm->told[mr->slot] == mr->serial;
}
/* A region of ours ends: whoever has mapped it shall let go. */
void soft_shm_forget(struct soft_context *ctx, const struct soft_mr *mr);
/* Responder: where to put bytes for addr of one of our regions; sets guarded. */
uint64_t soft_shm_place(struct soft_shm *shm, struct soft_mr *mr,
			uint64_t addr);
/* As soft_cma_pull(). */
enum chunk_result soft_shm_pull(struct soft_conn *conn, int n_local,
				int n_remote, size_t *bytes);
/* Copy as many plain WRITEs as come next, each whole, and advance over them.
 * False: the next is not that plain, and nothing was done. */
bool soft_shm_move(struct soft_conn *conn, enum chunk_result *result);

/* shm_wake.c */
/* Take up what has come through the rings. True: something has. */
bool soft_shm_poll(struct soft_context *ctx);
/* Have the peers wake us. False: there is something to do instead. */
bool soft_shm_sleep(struct soft_context *ctx);
/* The CQ has been armed while the device thread sleeps. True: the thread has to be
 * woken, for something has come already. */
bool soft_shm_listen(struct soft_context *ctx, const struct soft_cq *cq);
void soft_shm_awake(struct soft_context *ctx);
void soft_shm_wake_peer(struct soft_shm *shm);

#endif
