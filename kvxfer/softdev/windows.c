/* Memory windows: windows.h has the idea. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>

#include "context.h"
#include "initiator.h"
#include "inject.h"
#include "list.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "windows.h"

#define KEY_BITS 8
#define KEY_MASK 0xffu
#define INDEX_MASK 0xffffffu

/* LOCAL_WRITE is taken and means nothing, as on the NICs. */
#define WINDOW_ACCESS                                                      \
	((unsigned int)(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | \
			IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC))
#define WINDOW_STORES \
	((unsigned int)(IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC))

struct soft_mw {
	struct ibv_mw ibv;    /* its rkey is what the application believes */
	struct soft_mw *next; /* hash chain */
	uint32_t rkey;	      /* without effect while mr is NULL */
	struct soft_mr *mr;   /* NULL: not bound */
	const struct soft_qp *qp; /* type 2: that has bound it */
	uint64_t addr, length;
	unsigned int access;
};

struct soft_windows {
	struct soft_mw *buckets[SOFT_BUCKETS]; /* by index */
	uint32_t n;
};

static struct soft_mw *to_mw(struct ibv_mw *mw)
{
	return soft_of(mw, struct soft_mw, ibv);
}

static struct soft_mw **bucket(struct soft_windows *windows, uint32_t rkey)
{
	return &windows->buckets[rkey >> KEY_BITS & (SOFT_BUCKETS - 1)];
}

/* By index: the rkey's last bits may be old ones. */
static struct soft_mw *find(const struct soft_context *ctx, uint32_t rkey)
{
	struct soft_mw *mw;

	if (!ctx->windows)
		return NULL;
	mw = *bucket(ctx->windows, rkey);
	while (mw && (mw->ibv.handle != rkey >> KEY_BITS))
		mw = mw->next;
	return mw;
}

static struct soft_mw *find_bound(const struct soft_context *ctx, uint32_t rkey)
{
	struct soft_mw *mw = find(ctx, rkey);

	return mw && mw->mr && mw->rkey == rkey ? mw : NULL;
}

bool soft_is_window_key(const struct soft_context *ctx, uint32_t rkey)
{
	return find(ctx, rkey);
}

struct soft_mr *soft_window_region(const struct soft_context *ctx,
				   uint32_t rkey)
{
	struct soft_mw *mw = find_bound(ctx, rkey);

	return mw ? mw->mr : NULL;
}

/* --- allocation ---------------------------------------------------------- */

static bool is_taken(struct soft_context *ctx, uint32_t first)
{
	uint32_t key;

	if (find(ctx, first))
		return true;
	for (key = 0; key <= KEY_MASK; key++)
		if (soft_find_rkey(ctx, first | key))
			return true;
	return false;
}

/* Random like the keys of regions, but for the part that counts binds. */
static int insert(struct soft_context *ctx, struct soft_mw *mw)
{
	struct soft_mw **head;
	uint32_t index;

	if (!ctx->windows)
		ctx->windows = calloc(1, sizeof(*ctx->windows));
	if (!ctx->windows || ctx->windows->n == SOFT_MAX_MW)
		return ENOMEM;
	do {
		soft_random(&index, sizeof(index));
		index &= INDEX_MASK;
	} while (!index || is_taken(ctx, index << KEY_BITS));
	mw->ibv.handle = index;
	mw->ibv.rkey = mw->rkey = index << KEY_BITS;
	head = bucket(ctx->windows, mw->rkey);
	mw->next = *head;
	*head = mw;
	ctx->windows->n++;
	return 0;
}

/* Who checked a key before has to do it again. */
static void unbind(struct soft_context *ctx, struct soft_mw *mw)
{
	if (!mw->mr)
		return;
	soft_inject_land_all(ctx);
	mw->mr->n_windows--;
	mw->mr = NULL;
	mw->qp = NULL;
	ctx->mr_generation++;
}

static struct ibv_mw *alloc_mw(struct ibv_pd *pd, enum ibv_mw_type type)
{
	struct soft_context *ctx = to_context(pd->context);
	struct soft_mw *mw = NULL;
	int err = 0;

	if (soft_orphaned(pd->context))
		err = ENODEV;
	else if (type != IBV_MW_TYPE_1 && type != IBV_MW_TYPE_2)
		err = EINVAL;
	else
		mw = calloc(1, sizeof(*mw));
	if (mw) {
		mw->ibv.context = pd->context;
		mw->ibv.pd = pd;
		mw->ibv.type = type;
		soft_lock(ctx);
		err = insert(ctx, mw);
		soft_unlock(ctx);
	} else if (!err) {
		err = ENOMEM;
	}
	if (err) {
		free(mw);
		errno = err;
		return NULL;
	}
	atomic_fetch_add(&to_pd(pd)->users, 1);
	return &mw->ibv;
}

static int dealloc_mw(struct ibv_mw *ibmw)
{
	struct soft_context *ctx = to_context(ibmw->context);
	struct soft_mw *mw = to_mw(ibmw), **at;

	if (soft_orphaned(ibmw->context))
		return ENODEV;
	soft_lock(ctx);
	unbind(ctx, mw);
	at = bucket(ctx->windows, mw->rkey);
	while (*at != mw)
		at = &(*at)->next;
	*at = mw->next;
	ctx->windows->n--;
	soft_unlock(ctx);
	atomic_fetch_sub(&to_pd(ibmw->pd)->users, 1);
	free(mw);
	return 0;
}

void soft_forget_windows(const struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	struct soft_mw *mw;
	uint32_t i;

	if (!ctx->windows || !ctx->windows->n)
		return;
	for (i = 0; i < SOFT_BUCKETS; i++)
		for (mw = ctx->windows->buckets[i]; mw; mw = mw->next)
			if (mw->qp == qp)
				unbind(ctx, mw);
}

/* --- work requests ------------------------------------------------------- */

static int bind_mw(struct ibv_qp *qp, struct ibv_mw *mw,
		   struct ibv_mw_bind *bind)
{
	struct ibv_send_wr wr = {
		.wr_id = bind->wr_id,
		.opcode = IBV_WR_BIND_MW,
		.send_flags = bind->send_flags,
		.bind_mw = { .mw = mw,
			     .rkey = ibv_inc_rkey(mw->rkey),
			     .bind_info = bind->bind_info },
	};
	struct ibv_send_wr *bad;
	int err;

	if (bind->bind_info.mr && bind->bind_info.mr->pd != mw->pd)
		return EPERM;
	err = ibv_post_send(qp, &wr, &bad);
	if (!err) /* whoever finds it failed puts the old one back */
		mw->rkey = wr.bind_mw.rkey;
	return err;
}

void soft_offer_windows(struct ibv_context *context)
{
	context->ops.alloc_mw = alloc_mw;
	context->ops.bind_mw = bind_mw;
	context->ops.dealloc_mw = dealloc_mw;
}

/* Keys, not pointers: what they mean may have gone when it is the WR's turn. */
int soft_fill_local(uint8_t *slot, const struct ibv_send_wr *wr)
{
	const struct ibv_mw_bind_info *info = &wr->bind_mw.bind_info;
	struct soft_local *local = (struct soft_local *)slot;

	if (wr->opcode == IBV_WR_LOCAL_INV) {
		*local = (struct soft_local){ .rkey = wr->invalidate_rkey };
		return 0;
	}
	/* Addresses from zero on are for regions that have them. */
	if (!wr->bind_mw.mw || info->mw_access_flags & ~WINDOW_ACCESS ||
	    (!info->mr && (info->addr || info->length)))
		return EINVAL;
	*local = (struct soft_local){
		.addr = info->addr,
		.length = info->length,
		.rkey = wr->bind_mw.mw->handle << KEY_BITS |
			(wr->bind_mw.rkey & KEY_MASK),
		.lkey = info->mr ? info->mr->lkey : 0,
		.access = info->mw_access_flags,
	};
	return 0;
}

/* May the region have such a window? The vendor_err, or 0. */
static uint32_t check_region(const struct soft_qp *qp, const struct soft_mr *mr,
			     const struct soft_local *local)
{
	if (!mr)
		return KVX_SOFT_NO_LKEY;
	if (mr->ibv.pd != qp->ibv.pd)
		return KVX_SOFT_LOCAL_PD;
	if (!soft_mr_covers(mr, local->addr, local->length))
		return KVX_SOFT_LOCAL_BOUNDS;
	/* Its own remote rights do not matter. */
	if (!(mr->access & IBV_ACCESS_MW_BIND) ||
	    (local->access & WINDOW_STORES &&
	     !(mr->access & IBV_ACCESS_LOCAL_WRITE)))
		return KVX_SOFT_LOCAL_ACCESS;
	return 0;
}

static uint32_t do_bind(struct soft_qp *qp, const struct soft_local *local)
{
	struct soft_context *ctx = qp_context(qp);
	struct soft_mw *mw = find(ctx, local->rkey);
	bool type_2 = mw && mw->ibv.type == IBV_MW_TYPE_2;
	struct soft_mr *mr = NULL;
	uint32_t error;

	if (!mw || mw->ibv.pd != qp->ibv.pd)
		return KVX_SOFT_NO_WINDOW;
	/* Only a window of type 1 is bound anew, or to nothing. */
	if (type_2 && (mw->mr || !local->length))
		return KVX_SOFT_WINDOW_STATE;
	if (local->length) {
		mr = soft_find_lkey(ctx, local->lkey);
		error = check_region(qp, mr, local);
		if (error)
			return error;
	}
	unbind(ctx, mw);
	mw->rkey = local->rkey;
	if (!mr)
		return 0;
	mw->mr = mr;
	mr->n_windows++;
	mw->qp = type_2 ? qp : NULL;
	mw->addr = local->addr;
	mw->length = local->length;
	mw->access = local->access;
	ctx->mr_generation++;
	return 0;
}

void soft_invalidate(struct soft_context *ctx, uint32_t rkey)
{
	unbind(ctx, find_bound(ctx, rkey));
}

static uint32_t do_invalidate(struct soft_qp *qp, uint32_t rkey)
{
	struct soft_mw *mw = find_bound(qp_context(qp), rkey);

	if (!mw || mw->ibv.pd != qp->ibv.pd)
		return KVX_SOFT_NO_WINDOW;
	if (mw->ibv.type != IBV_MW_TYPE_2)
		return KVX_SOFT_WINDOW_STATE;
	unbind(qp_context(qp), mw);
	return 0;
}

void soft_run_local(struct soft_qp *qp)
{
	struct soft_sq *sq = &qp->sq;
	struct soft_failure failure = { IBV_WC_MW_BIND_ERR, 0 };
	const struct soft_local *local;
	const struct soft_wqe *wqe;

	while (sq->done == sq->next && soft_unsent(qp)) {
		wqe = &sq->ring[sq->next & sq->mask];
		if (!soft_is_local(wqe->opcode))
			return;
		local = (const struct soft_local *)(sq->slots +
						    (sq->next & sq->mask) *
							    sq->slot_bytes);
		failure.vendor_err = wqe->opcode == IBV_WR_BIND_MW ?
					     do_bind(qp, local) :
					     do_invalidate(qp, local->rkey);
		if (failure.vendor_err) {
			soft_qp_fail(qp, &failure, NULL);
			return;
		}
		sq->next++;
		sq->n_local++;
		soft_sends_done(qp, sq->next);
		qp->active = qp->active && soft_outstanding(qp);
	}
}

/* --- what peers may -------------------------------------------------------- */

uint32_t soft_check_window(const struct soft_qp *qp, uint32_t rkey,
			   uint64_t addr, uint64_t length, unsigned int access)
{
	const struct soft_mw *mw = find_bound(qp_context(qp), rkey);

	if (!mw)
		return KVX_SOFT_NO_RKEY;
	if (mw->ibv.pd != qp->ibv.pd)
		return KVX_SOFT_REMOTE_PD;
	if (mw->qp && mw->qp != qp)
		return KVX_SOFT_REMOTE_OTHER_QP;
	if (addr < mw->addr || addr - mw->addr > mw->length ||
	    length > mw->length - (addr - mw->addr))
		return KVX_SOFT_REMOTE_BOUNDS;
	if (access & ~mw->access)
		return KVX_SOFT_REMOTE_ACCESS;
	return 0;
}

uint32_t soft_check_invalidate(const struct soft_qp *qp, uint32_t rkey)
{
	const struct soft_mw *mw = find_bound(qp_context(qp), rkey);

	if (!mw)
		return KVX_SOFT_NO_RKEY;
	if (mw->ibv.type != IBV_MW_TYPE_2 || mw->qp != qp)
		return KVX_SOFT_REMOTE_OTHER_QP;
	return 0;
}
