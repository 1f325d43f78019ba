/*
 * Protection domains and memory regions: what is registered, whether a range may
 * be touched with a key, and what the kernel says of an address.
 */
#ifndef KVX_SOFT_MR_H
#define KVX_SOFT_MR_H

#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "list.h"

struct soft_context;
struct soft_map;
struct soft_qp;

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

static inline struct soft_pd *to_pd(struct ibv_pd *pd)
{
	return soft_of(pd, struct soft_pd, ibv);
}

static inline struct soft_mr *to_mr(struct ibv_mr *mr)
{
	return soft_of(mr, struct soft_mr, ibv);
}

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

#endif
