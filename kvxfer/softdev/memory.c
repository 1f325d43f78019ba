/* Protection domains and memory regions. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "context.h"
#include "inject.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "windows.h"
#include "wire_shm.h"

#define KNOWN_ACCESS                                                        \
	((unsigned int)(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |  \
			IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC | \
			IBV_ACCESS_MW_BIND | IBV_ACCESS_HUGETLB |           \
			IBV_ACCESS_OPTIONAL_RANGE))

struct ibv_pd *soft_alloc_pd(struct ibv_context *context)
{
	struct soft_pd *pd;

	if (soft_orphaned(context)) {
		errno = ENODEV;
		return NULL;
	}
	pd = calloc(1, sizeof(*pd));
	if (!pd) {
		errno = ENOMEM;
		return NULL;
	}
	pd->ibv.context = context;
	atomic_fetch_add(&to_context(context)->children, 1);
	atomic_fetch_add(&soft_tally.pds, 1);
	return &pd->ibv;
}

int soft_dealloc_pd(struct ibv_pd *ibpd)
{
	struct soft_pd *pd = to_pd(ibpd);

	if (soft_orphaned(ibpd->context))
		return ENODEV;
	if (atomic_load(&pd->users))
		return EBUSY;
	atomic_fetch_sub(&to_context(ibpd->context)->children, 1);
	atomic_fetch_sub(&soft_tally.pds, 1);
	free(pd);
	return 0;
}

static struct soft_mr **lkey_bucket(struct soft_context *ctx, uint32_t lkey)
{
	return &ctx->lkeys[lkey & (SOFT_BUCKETS - 1)];
}

static struct soft_mr **rkey_bucket(struct soft_context *ctx, uint32_t rkey)
{
	return &ctx->rkeys[rkey & (SOFT_BUCKETS - 1)];
}

struct soft_mr *soft_find_lkey(struct soft_context *ctx, uint32_t lkey)
{
	struct soft_mr *mr = *lkey_bucket(ctx, lkey);

	while (mr && mr->ibv.lkey != lkey)
		mr = mr->next_lkey;
	return mr;
}

static struct soft_mr *find_rkey(struct soft_context *ctx, uint32_t rkey)
{
	struct soft_mr *mr = *rkey_bucket(ctx, rkey);

	while (mr && mr->ibv.rkey != rkey)
		mr = mr->next_rkey;
	return mr;
}

struct soft_mr *soft_find_rkey(struct soft_context *ctx, uint32_t rkey)
{
	struct soft_mr *mr = find_rkey(ctx, rkey);

	return mr ? mr : soft_window_region(ctx, rkey);
}

static void drop_fd(struct soft_mr *mr)
{
	if (mr->fd >= 0)
		close(mr->fd);
	mr->fd = -1;
}

/* Give the MR a slot by which peers name it; without one its bytes are sent. */
static void share_mr(struct soft_context *ctx, struct soft_mr *mr)
{
	struct soft_pd *pd = to_pd(mr->ibv.pd);
	uint32_t slot = 0;

	while (mr->fd >= 0 && slot < SHM_MAX_REGIONS && ctx->shared[slot])
		slot++;
	if (slot == SHM_MAX_REGIONS)
		drop_fd(mr);
	if (mr->fd < 0) {
		atomic_fetch_add(&pd->private_bytes, mr->ibv.length);
		return;
	}
	mr->slot = slot;
	ctx->shared[slot] = mr;
	atomic_fetch_add(&pd->shared_bytes, mr->ibv.length);
}

static void unshare_mr(struct soft_context *ctx, struct soft_mr *mr)
{
	struct soft_pd *pd = to_pd(mr->ibv.pd);

	if (mr->fd < 0) {
		atomic_fetch_sub(&pd->private_bytes, mr->ibv.length);
		return;
	}
	soft_shm_forget(ctx, mr);
	ctx->shared[mr->slot] = NULL;
	atomic_fetch_sub(&pd->shared_bytes, mr->ibv.length);
	if (mr->map)
		soft_unmap(mr->map);
	free(mr->map);
	drop_fd(mr);
}

void soft_map_mr(struct soft_mr *mr)
{
	struct soft_map *map = calloc(1, sizeof(*map));

	if (map && soft_map(map, mr->fd, mr->offset, mr->ibv.length,
			    PROT_READ | PROT_WRITE)) {
		free(map);
		map = NULL;
	}
	mr->map = map;
}

/*
 * Keys are random and differ from each other: a stale key hits nothing (but
 * for one chance in 2^32 per region), and mixing up lkey and rkey shows.
 */
static void insert_mr(struct soft_context *ctx, struct soft_mr *mr)
{
	struct soft_mr **bucket;

	do {
		soft_random(&mr->ibv.lkey, sizeof(mr->ibv.lkey));
	} while (!mr->ibv.lkey || soft_find_lkey(ctx, mr->ibv.lkey));
	do {
		soft_random(&mr->ibv.rkey, sizeof(mr->ibv.rkey));
	} while (!mr->ibv.rkey || find_rkey(ctx, mr->ibv.rkey) ||
		 soft_is_window_key(ctx, mr->ibv.rkey) ||
		 mr->ibv.rkey == mr->ibv.lkey);

	bucket = lkey_bucket(ctx, mr->ibv.lkey);
	mr->next_lkey = *bucket;
	*bucket = mr;
	bucket = rkey_bucket(ctx, mr->ibv.rkey);
	mr->next_rkey = *bucket;
	*bucket = mr;
	mr->serial = ++ctx->mr_generation;
	share_mr(ctx, mr);
}

static void remove_mr(struct soft_context *ctx, struct soft_mr *mr)
{
	struct soft_mr **at = lkey_bucket(ctx, mr->ibv.lkey);

	while (*at != mr)
		at = &(*at)->next_lkey;
	*at = mr->next_lkey;
	at = rkey_bucket(ctx, mr->ibv.rkey);
	while (*at != mr)
		at = &(*at)->next_rkey;
	*at = mr->next_rkey;
	ctx->mr_generation++;
	unshare_mr(ctx, mr);
}

static int check_registration(uintptr_t addr, size_t length,
			      unsigned int access)
{
	const unsigned int remote_store = IBV_ACCESS_REMOTE_WRITE |
					  IBV_ACCESS_REMOTE_ATOMIC;

	if (access & (IBV_ACCESS_ON_DEMAND | IBV_ACCESS_ZERO_BASED))
		return EOPNOTSUPP;
	if (access & ~KNOWN_ACCESS || length == 0 || addr + length < addr)
		return EINVAL;
	if (access & remote_store && !(access & IBV_ACCESS_LOCAL_WRITE))
		return EINVAL;
	return soft_check_mapped(addr, length, access & IBV_ACCESS_LOCAL_WRITE);
}

struct ibv_mr *soft_reg_mr(struct ibv_pd *pd, void *addr, size_t length,
			   unsigned int access)
{
	return soft_reg_mr_fd(pd, -1, 0, addr, length, access);
}

/* The descriptor for our own use, or -1 where it cannot be shared: it is not
 * the memory that is registered, or could be cut short under a peer. */
static int usable_fd(int fd, uint64_t offset, const void *addr, size_t length)
{
	if (fd < 0 || soft_check_sealed(fd, offset, length) ||
	    !soft_is_mapping_of((uintptr_t)addr, length, fd, offset))
		return -1;
	return fcntl(fd, F_DUPFD_CLOEXEC, 0);
}

struct ibv_mr *soft_reg_mr_fd(struct ibv_pd *pd, int fd, uint64_t offset,
			      void *addr, size_t length, unsigned int access)
{
	struct soft_context *ctx = to_context(pd->context);
	struct soft_mr *mr = NULL;
	int err;

	err = soft_orphaned(pd->context) ?
		      ENODEV :
		      check_registration((uintptr_t)addr, length, access);
	if (!err) {
		mr = calloc(1, sizeof(*mr));
		err = mr ? 0 : ENOMEM;
	}
	if (err) {
		errno = err;
		return NULL;
	}
	mr->ibv.context = pd->context;
	mr->ibv.pd = pd;
	mr->ibv.addr = addr;
	mr->ibv.length = length;
	mr->access = access;
	mr->fd = usable_fd(fd, offset, addr, length);
	mr->offset = offset;
	if (mr->fd >= 0)
		soft_make_huge(addr, length);
	soft_lock(ctx);
	insert_mr(ctx, mr);
	soft_unlock(ctx);
	atomic_fetch_add(&to_pd(pd)->users, 1);
	atomic_fetch_add(&soft_tally.mrs, 1);
	return &mr->ibv;
}

struct ibv_mr *soft_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset,
				  size_t length, uint64_t iova, int fd,
				  unsigned int access)
{
	/* It moves bytes by the processor, which has no way into a GPU. */
	(void)pd;
	(void)offset;
	(void)length;
	(void)iova;
	(void)fd;
	(void)access;
	errno = EOPNOTSUPP;
	return NULL;
}

int soft_dereg_mr(struct ibv_mr *ibmr)
{
	struct soft_context *ctx = to_context(ibmr->context);
	struct soft_mr *mr = to_mr(ibmr);

	if (soft_orphaned(ibmr->context))
		return ENODEV;
	/* Nothing moves while we hold the lock, and whoever moves next sees the
	 * new generation and looks the key up again. */
	soft_lock(ctx);
	if (mr->n_windows) {
		soft_unlock(ctx);
		return EBUSY;
	}
	soft_inject_land_all(ctx);
	remove_mr(ctx, mr);
	soft_unlock(ctx);
	atomic_fetch_sub(&to_pd(ibmr->pd)->users, 1);
	atomic_fetch_sub(&soft_tally.mrs, 1);
	free(mr);
	return 0;
}

uint32_t soft_check_local(struct soft_context *ctx, struct ibv_pd *pd,
			  const struct ibv_sge *sge, unsigned int access)
{
	struct soft_mr *mr;

	if (sge->length == 0)
		return 0;
	mr = soft_find_lkey(ctx, sge->lkey);
	if (!mr)
		return KVX_SOFT_NO_LKEY;
	if (mr->ibv.pd != pd)
		return KVX_SOFT_LOCAL_PD;
	if (!soft_mr_covers(mr, sge->addr, sge->length))
		return KVX_SOFT_LOCAL_BOUNDS;
	if (access & ~mr->access)
		return KVX_SOFT_LOCAL_ACCESS;
	return 0;
}

uint32_t soft_check_remote(struct soft_qp *qp, uint32_t rkey, uint64_t addr,
			   uint64_t length, unsigned int access)
{
	struct soft_mr *mr;

	if (length == 0) /* as on a NIC: no bytes, no key */
		return 0;
	mr = find_rkey(qp_context(qp), rkey);
	if (!mr)
		return soft_check_window(qp, rkey, addr, length, access);
	if (mr->ibv.pd != qp->ibv.pd)
		return KVX_SOFT_REMOTE_PD;
	if (!soft_mr_covers(mr, addr, length))
		return KVX_SOFT_REMOTE_BOUNDS;
	if (access & ~mr->access)
		return KVX_SOFT_REMOTE_ACCESS;
	return 0;
}
