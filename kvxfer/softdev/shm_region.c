/* The shm wire: memory regions, and the copy. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "connection.h"
#include "context.h"
#include "copier.h"
#include "frame.h"
#include "list.h"
#include "mr.h"
#include "qp.h"
#include "responder.h"
#include "wire_shm.h"

#define REGION_MAGIC 0x5246564bu /* "KVFR" */
/* What a thread takes of a copy by two at a time. */
#define PART_BYTES (8u << 10)
/* Longer ranges are cut into pieces first. */
#define PIECE_BYTES (64u << 10)
_Static_assert(CHUNK_BYTES / PIECE_BYTES <= MORE_IOV - MAX_IOV, "room to cut");
#define OFFSET_MASK ((1ull << SHM_SLOT_SHIFT) - 1)

/* The packet that makes a region known, its memfd beside it, or lets it go
 * (length 0). One host: both sides have the same byte order. */
struct region_packet {
	uint32_t magic, slot;
	uint64_t offset, length;
};

static bool add_region(struct soft_shm *shm, const struct region_packet *packet,
		       int fd)
{
	struct soft_map *map;

	if (packet->magic != REGION_MAGIC || packet->slot >= SHM_MAX_REGIONS)
		return false;
	map = &shm->regions[packet->slot];
	soft_unmap(map);
	if (packet->length == 0)
		return true;
	return fd >= 0 &&
	       !soft_check_sealed(fd, packet->offset, packet->length) &&
	       !soft_map(map, fd, packet->offset, packet->length, PROT_READ);
}

bool soft_shm_hear(struct soft_conn *conn)
{
	struct soft_shm *shm = conn->shm;
	struct region_packet packet;
	struct iovec iov = { &packet, sizeof(packet) };
	bool good = true;
	ssize_t got;
	int fd;

	while (shm->packets && good) {
		got = soft_local_recv(conn->fd, &iov, 1, &fd);
		if (got < 0 && errno == EAGAIN)
			shm->packets = false;
		else if (got == sizeof(packet))
			good = !conn->outgoing && add_region(shm, &packet, fd);
		else if (got != 1) /* 1: woken, and awake */
			good = got < 0 && errno == EINTR;
		if (fd >= 0)
			close(fd);
	}
	if (!good)
		shm->gone = true;
	return good;
}

bool soft_shm_name(struct soft_conn *conn, const struct soft_mr *mr,
		   uint64_t addr, uint64_t *laddr, bool *full)
{
	struct soft_shm *shm = conn->shm;
	struct region_packet packet = { REGION_MAGIC, mr->slot, mr->offset,
					mr->ibv.length };
	struct iovec iov = { &packet, sizeof(packet) };

	if (mr->fd < 0)
		return false;
	*laddr = (uint64_t)mr->slot << SHM_SLOT_SHIFT |
		 (addr - (uintptr_t)mr->ibv.addr);
	if (shm->told[mr->slot] == mr->serial)
		return true;
	if (soft_local_send(conn->fd, &iov, 1, mr->fd) < 0) {
		*full = true;
		if (errno == EAGAIN)
			conn->writable = false;
		else
			shm->gone = true;
		return false;
	}
	shm->told[mr->slot] = mr->serial;
	atomic_fetch_add(&shm->page->told, 1);
	return true;
}

void soft_shm_forget(struct soft_context *ctx, const struct soft_mr *mr)
{
	struct region_packet packet = { REGION_MAGIC, mr->slot, 0, 0 };
	struct iovec iov = { &packet, sizeof(packet) };
	struct soft_shm *shm;
	struct soft_list *at;

	for (at = ctx->shms.next; at != &ctx->shms; at = at->next) {
		shm = soft_of(at, struct soft_shm, link);
		if (shm->told[mr->slot] != mr->serial)
			continue;
		shm->told[mr->slot] = 0;
		/* If it cannot be told now, the end of the connection does it. */
		(void)soft_local_send(shm->conn->fd, &iov, 1, -1);
		atomic_fetch_add(&shm->page->told, 1);
	}
}

uint64_t soft_shm_place(struct soft_shm *shm, struct soft_mr *mr, uint64_t addr)
{
	/* Into a mapping of our own: as with a NIC's pinned pages, it does not
	 * matter whether the application still has its own. */
	if (mr && mr->fd >= 0 && !mr->map)
		soft_map_mr(mr);
	if (!mr || !mr->map) {
		shm->guarded = true;
		return addr;
	}
	return (uintptr_t)mr->map->base + (addr - (uintptr_t)mr->ibv.addr);
}

/* Know what the peer had told us of its regions when it wrote what we have just
 * read. The socket's event may not have come yet. */
static void hear(struct soft_conn *conn)
{
	struct soft_shm *shm = conn->shm;
	uint64_t told = atomic_load(&shm->page->told);

	if (told == shm->told_seen)
		return;
	shm->told_seen = told;
	shm->packets = true;
	soft_shm_hear(conn);
}

/* From the peer's words to our addresses, up to the first that is wrong. */
static int find_sources(struct soft_conn *conn, int n_remote, size_t *bytes)
{
	struct iovec *remote = conn->ctx->remote_iov;
	struct soft_map *map;
	uint64_t name, offset;
	size_t sum = 0;
	int i;

	for (i = 0; i < n_remote; i++) {
		name = (uintptr_t)remote[i].iov_base;
		offset = name & OFFSET_MASK;
		if (name >> SHM_SLOT_SHIFT >= SHM_MAX_REGIONS)
			break;
		map = &conn->shm->regions[name >> SHM_SLOT_SHIFT];
		if (!map->base || offset > map->length ||
		    remote[i].iov_len > map->length - offset)
			break;
		remote[i].iov_base = map->base + offset;
		sum += remote[i].iov_len;
	}
	if (sum < *bytes)
		*bytes = sum;
	return i;
}

enum chunk_result soft_shm_pull(struct soft_conn *conn, int n_local,
				int n_remote, size_t *bytes)
{
	struct soft_shm *shm = conn->shm;
	struct iovec *local = conn->ctx->local_iov;
	struct iovec *remote = conn->ctx->remote_iov;
	ssize_t done;

	hear(conn);
	n_remote = find_sources(conn, n_remote, bytes);
	if (*bytes == 0)
		return CHUNK_NO_SOURCE;
	done = shm->guarded ?
		       soft_copy_guarded(local, n_local, remote, n_remote) :
		       (ssize_t)soft_copy(local, n_local, remote, n_remote);
	/* Only now is it known that the source was still theirs to give. */
	if (!soft_shm_alive(shm))
		return CHUNK_LOST;
	*bytes = done > 0 ? (size_t)done : 0;
	return done > 0 ? CHUNK_MOVED : CHUNK_NO_DEST;
}

/* A WR of one descriptor whose bytes are fetched and of which nobody here is
 * told. */
static bool is_plain(const struct frame_desc *desc)
{
	const uint16_t all = DESC_START | DESC_END | DESC_FETCH;

	return desc->op == OP_WRITE && desc->len &&
	       (desc->flags & (all | DESC_IMM)) == all;
}

/* The pairs of ranges to copy, in ctx->local_iov (to) and ctx->remote_iov; where the
 * peer has them go, in ctx->more_local_iov: two regions over the same memory have a
 * mapping each. */
static int pair_up(struct soft_conn *conn)
{
	struct iovec *to = conn->ctx->local_iov, *from = conn->ctx->remote_iov;
	struct iovec *asked = conn->ctx->more_local_iov;
	const struct frame_desc *desc = &conn->rx->desc[conn->rx->at];
	const struct frame_desc *end = &conn->rx->desc[conn->rx->bad];
	const struct fault *faults = conn->rx->faults ?
					     &conn->rx->faults[conn->rx->at] :
					     NULL;
	struct soft_map *map = NULL;
	struct soft_mr *mr = NULL;
	uint64_t slot = UINT64_MAX, offset;
	size_t bytes = 0;
	int n = 0;

	for (; desc < end && is_plain(desc) && n < MAX_IOV; desc++, n++) {
		if (desc->len > CHUNK_BYTES - bytes ||
		    (faults && faults[n].act != FAULT_NONE))
			break;
		if (!mr || mr->ibv.rkey != desc->rkey) {
			mr = soft_find_rkey(conn->ctx, desc->rkey);
			conn->shm->guarded = false;
			soft_shm_place(conn->shm, mr, desc->raddr);
			if (conn->shm->guarded)
				break;
		}
		if (desc->laddr >> SHM_SLOT_SHIFT != slot) {
			slot = desc->laddr >> SHM_SLOT_SHIFT;
			if (slot >= SHM_MAX_REGIONS)
				break;
			map = &conn->shm->regions[slot];
		}
		offset = desc->laddr & OFFSET_MASK;
		if (!map->base || offset > map->length ||
		    desc->len > map->length - offset)
			break;
		from[n] = (struct iovec){ map->base + offset, desc->len };
		to[n] = (struct iovec){
			mr->map->base + (desc->raddr - (uintptr_t)mr->ibv.addr),
			desc->len
		};
		asked[n] = (struct iovec){ (void *)(uintptr_t)desc->raddr,
					   desc->len };
		bytes += desc->len;
	}
	return n;
}

/* Cut long ranges into pieces, of which a thread can take some. */
static void cut(struct soft_context *ctx, struct soft_pairs *pairs)
{
	struct iovec to, from, *more_to = ctx->more_local_iov,
			       *more_from = ctx->more_remote_iov;
	uint32_t i, n = 0;

	for (i = 0; i < pairs->n; i++) {
		to = pairs->to[i];
		from = pairs->from[i];
		for (; to.iov_len; n++) {
			more_to[n] = to;
			more_from[n] = from;
			if (to.iov_len > PIECE_BYTES)
				more_to[n].iov_len = more_from[n].iov_len =
					PIECE_BYTES;
			to.iov_base = (uint8_t *)to.iov_base +
				      more_to[n].iov_len;
			from.iov_base = (uint8_t *)from.iov_base +
					more_to[n].iov_len;
			to.iov_len -= more_to[n].iov_len;
		}
	}
	*pairs = (struct soft_pairs){ more_to, more_from, n };
}

/* By two threads, if it is much. */
static void copy_pairs(struct soft_conn *conn, int n)
{
	struct soft_context *ctx = conn->ctx;
	struct soft_pairs pairs = { ctx->local_iov, ctx->remote_iov,
				    (uint32_t)n };
	size_t bytes = 0, longest = 0, step;
	int i;

	for (i = 0; i < n; i++) {
		bytes += pairs.to[i].iov_len;
		if (pairs.to[i].iov_len > longest)
			longest = pairs.to[i].iov_len;
	}
	if (!soft_copier_joins(conn, ctx->more_local_iov, pairs.n, bytes)) {
		soft_copy_pairs(&pairs, 0, pairs.n, false);
		return;
	}
	if (longest > PIECE_BYTES)
		cut(ctx, &pairs);
	step = PART_BYTES / (bytes / pairs.n);
	soft_copier_share(ctx, soft_copy_pairs, &pairs, pairs.n,
			  step ? (uint32_t)step : 1);
}

bool soft_shm_move(struct soft_conn *conn, enum chunk_result *result)
{
	struct soft_rx *rx = conn->rx;
	int i, n;

	if (rx->at_off)
		return false;
	hear(conn);
	n = pair_up(conn);
	if (n == 0)
		return false;
	copy_pairs(conn, n);
	/* Only now is it known that the source was still theirs to give. */
	*result = soft_shm_alive(conn->shm) ? CHUNK_MOVED : CHUNK_LOST;
	if (*result == CHUNK_LOST)
		return true;
	for (i = 0; i < n; i++) {
		rx->owed_bytes += rx->desc[rx->at].len;
		rx->awaited |= (rx->desc[rx->at++].flags & DESC_SIGNALED) != 0;
	}
	conn->qp->rx_seq += (uint64_t)n;
	return true;
}
