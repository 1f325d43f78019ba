/*
 * Blocks into work requests.
 *
 * The WRs are linked once and written again and again: one that carries the
 * constants of a plane already (opcode, keys, length, number of SGEs) only gets
 * its addresses and its wr_id. ibv_post_send() keeps no reference to them.
 */
#ifndef KVX_FILL_H
#define KVX_FILL_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdint.h>

#define KVX_MAX_CHAIN 64
#define KVX_MAX_SGE 16

/*
 * One plane of one layer, both ends. Where an end is registered in slices of so many
 * blocks, each slice has its key, and that of the first is not looked at; else the
 * pointer is NULL.
 */
struct kvx_plane {
	uint64_t local_base, local_stride;
	uint64_t remote_base, remote_stride;
	uint64_t block_bytes;
	uint32_t lkey, rkey;
	const uint32_t *lkeys, *rkeys;
	uint32_t local_slice, remote_slice;
};

struct kvx_template {
	struct ibv_send_wr wrs[KVX_MAX_CHAIN];
	struct ibv_sge sges[KVX_MAX_CHAIN * KVX_MAX_SGE];
	/* Whose constants a WR carries; NULL: somebody else used it. */
	const struct kvx_plane *planes[KVX_MAX_CHAIN];
};

struct kvx_limits {
	uint32_t max_sge;
	uint64_t merge_bytes;  /* neighbours merge up to that */
	uint64_t max_wr_bytes; /* longer blocks are split */
};

/* The blocks of one plane, and the next byte to be posted of them. */
struct kvx_blocks {
	const struct kvx_plane *plane;
	const uint32_t *local, *remote;
	uint32_t n;
	uint32_t at;	 /* n: all are posted */
	uint64_t offset; /* in block `at` */
};

/* Planes are about to be freed: others may get their place in memory. */
static inline void kvx_template_forget(struct kvx_template *t)
{
	for (int i = 0; i < KVX_MAX_CHAIN; i++)
		t->planes[i] = NULL;
}

static inline void kvx_template_init(struct kvx_template *t)
{
	for (int i = 0; i < KVX_MAX_CHAIN; i++) {
		t->wrs[i].next = i + 1 < KVX_MAX_CHAIN ? &t->wrs[i + 1] : NULL;
		t->wrs[i].sg_list = &t->sges[i * KVX_MAX_SGE];
	}
	kvx_template_forget(t);
}

static inline uint32_t kvx_lkey(const struct kvx_plane *plane, uint32_t id)
{
	return plane->lkeys ? plane->lkeys[id / plane->local_slice] :
			      plane->lkey;
}

static inline uint32_t kvx_rkey(const struct kvx_plane *plane, uint32_t id)
{
	return plane->rkeys ? plane->rkeys[id / plane->remote_slice] :
			      plane->rkey;
}

static inline void kvx_set_constants(struct kvx_template *t, uint32_t i,
				     const struct kvx_plane *plane)
{
	struct ibv_send_wr *wr = &t->wrs[i];

	wr->opcode = IBV_WR_RDMA_WRITE;
	wr->send_flags = 0;
	wr->num_sge = 1;
	wr->wr.rdma.rkey = plane->rkey;
	wr->sg_list->lkey = plane->lkey;
	wr->sg_list->length = (uint32_t)plane->block_bytes;
	t->planes[i] = plane;
}

/*
 * Lengthen a WR that ends at `end` on the remote side by the blocks that follow
 * there: neighbours on both sides lengthen the SGE, neighbours on the remote
 * side alone become further SGEs. Returns the bytes that it has then.
 *
 * With `sliced`, a constant, it does not go beyond the remote slice, which has
 * `room` blocks more, nor an SGE beyond a local one.
 */
static inline __attribute__((always_inline)) uint64_t
kvx_merge(struct ibv_send_wr *wr, struct kvx_blocks *b,
	  const struct kvx_limits *limits, uint64_t total, bool sliced,
	  uint32_t room)
{
	/* Copies, as in kvx_fill(). */
	const struct kvx_plane plane = *b->plane;
	const uint32_t *const local = b->local, *const remote = b->remote;
	const uint64_t most = limits->merge_bytes;
	struct ibv_sge *sge = wr->sg_list;
	uint64_t end = wr->wr.rdma.remote_addr + total;
	uint64_t here = sge->addr + sge->length;
	uint32_t at = b->at, lkey = plane.lkey;

	for (; at < b->n && total + plane.block_bytes <= most; at++) {
		const uint64_t from = plane.local_base +
				      local[at] * plane.local_stride;

		if (plane.remote_base + remote[at] * plane.remote_stride != end)
			break;
		if (sliced && room-- == 0)
			break;
		if (sliced)
			lkey = kvx_lkey(&plane, local[at]);
		if (from == here && (!sliced || lkey == sge->lkey)) {
			sge->length += (uint32_t)plane.block_bytes;
		} else if ((uint32_t)wr->num_sge < limits->max_sge) {
			*++sge = (struct ibv_sge){
				.addr = from,
				.length = (uint32_t)plane.block_bytes,
				.lkey = lkey,
			};
			wr->num_sge++;
		} else {
			break;
		}
		here = from + plane.block_bytes;
		total += plane.block_bytes;
		end += plane.block_bytes;
	}
	b->at = at;
	return total;
}

/*
 * One WR of a block that is longer than a WR may be, or whose plane is in slices;
 * returns its bytes.
 */
static inline uint64_t kvx_fill_part(struct kvx_template *t, uint32_t i,
				     struct kvx_blocks *b,
				     const struct kvx_limits *limits)
{
	const struct kvx_plane *plane = b->plane;
	const uint32_t local = b->local[b->at], remote = b->remote[b->at];
	struct ibv_send_wr *wr = &t->wrs[i];
	uint64_t length = plane->block_bytes - b->offset;
	uint32_t room = UINT32_MAX;

	if (length > limits->max_wr_bytes)
		length = limits->max_wr_bytes;
	t->planes[i] = NULL;
	wr->sg_list->addr = plane->local_base + local * plane->local_stride +
			    b->offset;
	wr->sg_list->length = (uint32_t)length;
	wr->sg_list->lkey = kvx_lkey(plane, local);
	wr->wr.rdma.remote_addr = plane->remote_base +
				  remote * plane->remote_stride + b->offset;
	wr->wr.rdma.rkey = kvx_rkey(plane, remote);
	b->offset += length;
	if (b->offset == plane->block_bytes) {
		b->offset = 0;
		b->at++;
		if (plane->rkeys)
			room = plane->remote_slice - 1 -
			       remote % plane->remote_slice;
		length = kvx_merge(wr, b, limits, length, true, room);
	}
	return length;
}

/* The same for blocks that are longer than a WR may be, and for slices. */
static inline uint32_t kvx_fill_parts(struct kvx_template *t,
				      struct kvx_blocks *b,
				      const struct kvx_limits *limits,
				      uint32_t i, uint32_t limit,
				      uint64_t wr_id, uint64_t max_bytes,
				      uint64_t *n_bytes)
{
	uint64_t bytes = 0;

	for (; i < limit && bytes < max_bytes && b->at < b->n; i++) {
		kvx_set_constants(t, i, b->plane);
		t->wrs[i].wr_id = wr_id++;
		bytes += kvx_fill_part(t, i, b, limits);
	}
	*n_bytes += bytes;
	return i;
}

/*
 * The number behind the last WR to be filled without another look, from number `i` on:
 * `limit` at most, no more WRs than blocks are left, and no more than are missing where
 * `done` blocks of `enough` are filled.
 */
static inline uint32_t kvx_stop(uint32_t i, uint32_t limit, uint32_t left,
				uint64_t enough, uint32_t done)
{
	uint32_t room = i < limit ? limit - i : 0;

	if (room > left)
		room = left;
	if (done >= enough)
		return i;
	return i + (room < enough - done ? room : (uint32_t)(enough - done));
}

/*
 * Fill WRs from number `i` to `limit`, until there are no blocks left or they
 * have `max_bytes` together. Returns the number behind the last WR; adds what
 * they carry to *n_bytes. The first has wr_id, those behind it the next ones.
 */
static inline uint32_t kvx_fill(struct kvx_template *t, struct kvx_blocks *b,
				const struct kvx_limits *limits, uint32_t i,
				uint32_t limit, uint64_t wr_id,
				uint64_t max_bytes, uint64_t *n_bytes)
{
	/* Copies: the compiler must think that a WR may overlap them. */
	const struct kvx_plane plane = *b->plane;
	const uint32_t *const local = b->local, *const remote = b->remote;
	const uint32_t n = b->n, first = b->at;
	const uint64_t enough = max_bytes / plane.block_bytes +
				(max_bytes % plane.block_bytes != 0);
	uint64_t end; /* of the WR before, on the remote side */
	uint32_t at = first, begin, stop;

	if (plane.block_bytes > limits->max_wr_bytes || plane.lkeys ||
	    plane.rkeys)
		return kvx_fill_parts(t, b, limits, i, limit, wr_id, max_bytes,
				      n_bytes);
	wr_id -= i;
	while (at < n) {
		begin = i;
		stop = kvx_stop(i, limit, n - at, enough, at - first);
		/* There is none yet, and the first block begins anywhere else. */
		end = ~(plane.remote_base + remote[at] * plane.remote_stride);
		for (; i < stop; i++, at++) {
			struct ibv_send_wr *wr = &t->wrs[i];
			const uint64_t to = plane.remote_base +
					    remote[at] * plane.remote_stride;

			if (to == end)
				break;
			if (t->planes[i] != b->plane)
				kvx_set_constants(t, i, b->plane);
			wr->wr_id = wr_id + i;
			t->sges[i * KVX_MAX_SGE].addr =
				plane.local_base +
				local[at] * plane.local_stride;
			wr->wr.rdma.remote_addr = to;
			end = to + plane.block_bytes;
		}
		if (at == n || i == begin ||
		    plane.remote_base + remote[at] * plane.remote_stride != end)
			break;
		/* A run: this WR deviates from the template. */
		t->planes[i - 1] = NULL;
		b->at = at;
		kvx_merge(&t->wrs[i - 1], b, limits, plane.block_bytes, false,
			  0);
		at = b->at;
	}
	*n_bytes += (uint64_t)(at - first) * plane.block_bytes;
	b->at = at;
	return i;
}

#endif
