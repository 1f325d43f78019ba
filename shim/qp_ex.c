/* Work requests by the ibv_wr_* calls, over the device's post_send. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

#define DATAGRAM_OPS \
	((uint64_t)(IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM))
#define KNOWN_OPS                                                              \
	((uint64_t)(IBV_QP_EX_WITH_RDMA_WRITE |                                \
		    IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_SEND | \
		    IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ |  \
		    IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP |                        \
		    IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD |                      \
		    IBV_QP_EX_WITH_BIND_MW | IBV_QP_EX_WITH_LOCAL_INV |        \
		    IBV_QP_EX_WITH_SEND_WITH_INV))

/*
 * The WRs between ibv_wr_start and ibv_wr_complete. The calls in between have
 * no way to fail: the first error is kept and wr_complete returns it, with
 * nothing posted. From wr_start to wr_complete or wr_abort the lock is held,
 * as the man page has it.
 */
struct builder {
	pthread_mutex_t lock;
	int err;
	uint32_t n, room, max_sge, max_inline;
	struct ibv_send_wr *wrs;
	struct ibv_sge *sges;  /* max_sge for each */
	uint8_t *inline_bytes; /* max_inline for each */
};

static struct builder *builder_of(struct ibv_qp_ex *ex)
{
	return to_qp(&ex->qp_base)->builder;
}

static struct ibv_send_wr *current(struct builder *b)
{
	return &b->wrs[b->n - 1];
}

static void wr_start(struct ibv_qp_ex *ex)
{
	struct builder *b = builder_of(ex);

	pthread_mutex_lock(&b->lock);
	b->n = 0;
	b->err = 0;
}

static void wr_abort(struct ibv_qp_ex *ex)
{
	pthread_mutex_unlock(&builder_of(ex)->lock);
}

/* All or nothing: what does not fit is found before any of it is posted. */
static int check_room(struct soft_qp *qp, uint32_t n)
{
	uint64_t used = atomic_load(&qp->sq.head) - atomic_load(&qp->sq.tail);

	return n > qp->sq.depth - used ? ENOMEM : 0;
}

static int wr_complete(struct ibv_qp_ex *ex)
{
	struct builder *b = builder_of(ex);
	struct ibv_send_wr *bad;
	int err = b->err;
	uint32_t i;

	if (!err)
		err = check_room(to_qp(&ex->qp_base), b->n);
	for (i = 1; i < b->n; i++)
		b->wrs[i - 1].next = &b->wrs[i];
	if (!err && b->n)
		err = soft_post_send(&ex->qp_base, b->wrs, &bad);
	pthread_mutex_unlock(&b->lock);
	return err;
}

static void begin(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode,
		  uint32_t rkey, uint64_t remote_addr, __be32 imm_data)
{
	struct builder *b = builder_of(ex);

	if (b->n == b->room) {
		b->err = ENOMEM;
		return; /* what follows overwrites the last one */
	}
	b->wrs[b->n] = (struct ibv_send_wr){
		.wr_id = ex->wr_id,
		.sg_list = b->sges + (size_t)b->n * b->max_sge,
		.opcode = opcode,
		.send_flags = ex->wr_flags,
		.imm_data = imm_data,
		.wr.rdma = { .remote_addr = remote_addr, .rkey = rkey },
	};
	b->n++;
}

static void wr_rdma_write(struct ibv_qp_ex *ex, uint32_t rkey,
			  uint64_t remote_addr)
{
	begin(ex, IBV_WR_RDMA_WRITE, rkey, remote_addr, 0);
}

static void wr_rdma_write_imm(struct ibv_qp_ex *ex, uint32_t rkey,
			      uint64_t remote_addr, __be32 imm_data)
{
	begin(ex, IBV_WR_RDMA_WRITE_WITH_IMM, rkey, remote_addr, imm_data);
}

static void wr_rdma_read(struct ibv_qp_ex *ex, uint32_t rkey,
			 uint64_t remote_addr)
{
	begin(ex, IBV_WR_RDMA_READ, rkey, remote_addr, 0);
}

static void begin_atomic(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode,
			 uint32_t rkey, uint64_t remote_addr,
			 uint64_t compare_add, uint64_t swap)
{
	struct builder *b = builder_of(ex);

	begin(ex, opcode, 0, 0, 0);
	if (b->n == 0)
		return;
	current(b)->wr.atomic.remote_addr = remote_addr;
	current(b)->wr.atomic.compare_add = compare_add;
	current(b)->wr.atomic.swap = swap;
	current(b)->wr.atomic.rkey = rkey;
}

static void wr_atomic_cmp_swp(struct ibv_qp_ex *ex, uint32_t rkey,
			      uint64_t remote_addr, uint64_t compare,
			      uint64_t swap)
{
	begin_atomic(ex, IBV_WR_ATOMIC_CMP_AND_SWP, rkey, remote_addr, compare,
		     swap);
}

static void wr_atomic_fetch_add(struct ibv_qp_ex *ex, uint32_t rkey,
				uint64_t remote_addr, uint64_t add)
{
	begin_atomic(ex, IBV_WR_ATOMIC_FETCH_AND_ADD, rkey, remote_addr, add,
		     0);
}

static void wr_send(struct ibv_qp_ex *ex)
{
	begin(ex, IBV_WR_SEND, 0, 0, 0);
}

static void wr_send_imm(struct ibv_qp_ex *ex, __be32 imm_data)
{
	begin(ex, IBV_WR_SEND_WITH_IMM, 0, 0, imm_data);
}

/* The key to invalidate goes where immediate data would. */
static void begin_invalidate(struct ibv_qp_ex *ex, enum ibv_wr_opcode opcode,
			     uint32_t invalidate_rkey)
{
	struct builder *b = builder_of(ex);

	begin(ex, opcode, 0, 0, 0);
	if (b->n)
		current(b)->invalidate_rkey = invalidate_rkey;
}

static void wr_send_inv(struct ibv_qp_ex *ex, uint32_t invalidate_rkey)
{
	begin_invalidate(ex, IBV_WR_SEND_WITH_INV, invalidate_rkey);
}

static void wr_local_inv(struct ibv_qp_ex *ex, uint32_t invalidate_rkey)
{
	begin_invalidate(ex, IBV_WR_LOCAL_INV, invalidate_rkey);
}

static void wr_bind_mw(struct ibv_qp_ex *ex, struct ibv_mw *mw, uint32_t rkey,
		       const struct ibv_mw_bind_info *bind_info)
{
	struct builder *b = builder_of(ex);

	begin(ex, IBV_WR_BIND_MW, 0, 0, 0);
	if (b->n == 0)
		return;
	current(b)->bind_mw.mw = mw;
	current(b)->bind_mw.rkey = rkey;
	current(b)->bind_mw.bind_info = *bind_info;
}

static void wr_set_ud_addr(struct ibv_qp_ex *ex, struct ibv_ah *ah,
			   uint32_t remote_qpn, uint32_t remote_qkey)
{
	struct builder *b = builder_of(ex);

	if (b->n == 0) {
		b->err = EINVAL;
		return;
	}
	current(b)->wr.ud.ah = ah;
	current(b)->wr.ud.remote_qpn = remote_qpn;
	current(b)->wr.ud.remote_qkey = remote_qkey;
}

static void wr_set_sge_list(struct ibv_qp_ex *ex, size_t num_sge,
			    const struct ibv_sge *sg_list)
{
	struct builder *b = builder_of(ex);

	if (num_sge > b->max_sge || b->n == 0) {
		b->err = EINVAL;
		return;
	}
	current(b)->num_sge = (int)num_sge;
	memcpy(current(b)->sg_list, sg_list, num_sge * sizeof(*sg_list));
}

static void wr_set_sge(struct ibv_qp_ex *ex, uint32_t lkey, uint64_t addr,
		       uint32_t length)
{
	struct ibv_sge sge = { .addr = addr, .length = length, .lkey = lkey };

	wr_set_sge_list(ex, 1, &sge);
}

/* Copied now: the caller may reuse the buffers before wr_complete. */
static void wr_set_inline_data_list(struct ibv_qp_ex *ex, size_t num_buf,
				    const struct ibv_data_buf *bufs)
{
	struct builder *b = builder_of(ex);
	struct ibv_send_wr *wr;
	size_t used = 0, i;
	uint8_t *slot;

	if (b->n == 0) {
		b->err = EINVAL;
		return;
	}
	wr = current(b);
	slot = b->inline_bytes + (size_t)(b->n - 1) * b->max_inline;
	for (i = 0; i < num_buf; i++) {
		if (bufs[i].length > b->max_inline - used) {
			b->err = ENOMEM;
			return;
		}
		if (bufs[i].length)
			memcpy(slot + used, bufs[i].addr, bufs[i].length);
		used += bufs[i].length;
	}
	wr->sg_list->addr = (uintptr_t)slot;
	wr->sg_list->length = (uint32_t)used;
	wr->num_sge = 1;
	wr->send_flags |= IBV_SEND_INLINE;
}

static void wr_set_inline_data(struct ibv_qp_ex *ex, void *addr, size_t length)
{
	struct ibv_data_buf buf = { .addr = addr, .length = length };

	wr_set_inline_data_list(ex, 1, &buf);
}

static struct builder *new_builder(const struct ibv_qp_cap *cap)
{
	struct builder *b = calloc(1, sizeof(*b));
	size_t room = cap->max_send_wr ? cap->max_send_wr : 1;

	if (!b)
		return NULL;
	b->room = cap->max_send_wr;
	b->max_sge = cap->max_send_sge;
	b->max_inline = cap->max_inline_data;
	b->wrs = calloc(room, sizeof(*b->wrs));
	b->sges = calloc(room * b->max_sge, sizeof(*b->sges));
	b->inline_bytes = calloc(room, b->max_inline ? b->max_inline : 1);
	if (!b->wrs || !b->sges || !b->inline_bytes) {
		free(b->wrs);
		free(b->sges);
		free(b->inline_bytes);
		free(b);
		return NULL;
	}
	pthread_mutex_init(&b->lock, NULL);
	return b;
}

void shim_free_builder(struct ibv_qp *qp)
{
	struct builder *b = to_qp(qp)->builder;

	if (!b)
		return;
	pthread_mutex_destroy(&b->lock);
	free(b->wrs);
	free(b->sges);
	free(b->inline_bytes);
	free(b);
	to_qp(qp)->builder = NULL;
}

static void fill_calls(struct ibv_qp_ex *ex)
{
	ex->wr_start = wr_start;
	ex->wr_complete = wr_complete;
	ex->wr_abort = wr_abort;
	ex->wr_rdma_write = wr_rdma_write;
	ex->wr_rdma_write_imm = wr_rdma_write_imm;
	ex->wr_rdma_read = wr_rdma_read;
	ex->wr_atomic_cmp_swp = wr_atomic_cmp_swp;
	ex->wr_atomic_fetch_add = wr_atomic_fetch_add;
	ex->wr_send = wr_send;
	ex->wr_send_imm = wr_send_imm;
	ex->wr_send_inv = wr_send_inv;
	ex->wr_bind_mw = wr_bind_mw;
	ex->wr_local_inv = wr_local_inv;
	ex->wr_set_ud_addr = wr_set_ud_addr;
	ex->wr_set_sge = wr_set_sge;
	ex->wr_set_sge_list = wr_set_sge_list;
	ex->wr_set_inline_data = wr_set_inline_data;
	ex->wr_set_inline_data_list = wr_set_inline_data_list;
}

struct ibv_qp *shim_create_qp_ex(struct ibv_context *context,
				 struct ibv_qp_init_attr_ex *attr)
{
	const uint32_t known = IBV_QP_INIT_ATTR_PD |
			       IBV_QP_INIT_ATTR_CREATE_FLAGS |
			       IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
	bool flags = attr->comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS;
	bool calls = attr->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
	struct ibv_qp *qp;

	if (attr->comp_mask & ~known || (flags && attr->create_flags) ||
	    (calls && attr->send_ops_flags &
			      ~(attr->qp_type == IBV_QPT_UD ? DATAGRAM_OPS :
							      KNOWN_OPS))) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	if (!(attr->comp_mask & IBV_QP_INIT_ATTR_PD) ||
	    attr->pd->context != context) {
		errno = EINVAL;
		return NULL;
	}
	/* The extended attributes begin like the plain ones. */
	qp = shim_soft.create_qp(attr->pd, (struct ibv_qp_init_attr *)attr);
	if (!qp || !calls)
		return qp;
	to_qp(qp)->builder = new_builder(&attr->cap);
	if (!to_qp(qp)->builder) {
		shim_soft.destroy_qp(qp);
		errno = ENOMEM;
		return NULL;
	}
	fill_calls(&to_qp(qp)->ex);
	return qp;
}

EXPORT struct ibv_qp_ex *ibv_qp_to_qp_ex(struct ibv_qp *qp)
{
	/* Only for a QP that was made for these calls. */
	return to_qp(qp)->builder ? &to_qp(qp)->ex : NULL;
}
