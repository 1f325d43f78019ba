/* Extended completion queues, over the device's poll_cq. */
#define _GNU_SOURCE
#include <errno.h>

#include "shim.h"

/* What the device knows of a completion. */
#define KNOWN_FIELDS                                                \
	((uint64_t)(IBV_WC_EX_WITH_BYTE_LEN | IBV_WC_EX_WITH_IMM |  \
		    IBV_WC_EX_WITH_QP_NUM | IBV_WC_EX_WITH_SRC_QP | \
		    IBV_WC_EX_WITH_SLID | IBV_WC_EX_WITH_SL |       \
		    IBV_WC_EX_WITH_DLID_PATH_BITS))

static struct soft_cq *cq_of(struct ibv_cq_ex *ex)
{
	return to_cq(ibv_cq_ex_to_cq(ex));
}

/* 0, ENOENT when there is none, or another errno. */
static int next_poll(struct ibv_cq_ex *ex)
{
	struct soft_cq *cq = cq_of(ex);
	int n = soft_poll_cq(&cq->ibv, 1, &cq->polled);

	if (n < 0)
		return errno;
	if (n == 0)
		return ENOENT;
	ex->status = cq->polled.status;
	ex->wr_id = cq->polled.wr_id;
	return 0;
}

static int start_poll(struct ibv_cq_ex *ex, struct ibv_poll_cq_attr *attr)
{
	return attr->comp_mask ? EINVAL : next_poll(ex);
}

static void end_poll(struct ibv_cq_ex *ex)
{
	(void)ex; /* each entry was taken when it was read */
}

#define READER(type, field)                            \
	static type read_##field(struct ibv_cq_ex *ex) \
	{                                              \
		return cq_of(ex)->polled.field;        \
	}
READER(enum ibv_wc_opcode, opcode)
READER(uint32_t, vendor_err)
READER(uint32_t, byte_len)
READER(__be32, imm_data)
READER(uint32_t, qp_num)
READER(uint32_t, src_qp)
READER(unsigned int, wc_flags)
READER(uint8_t, sl)
READER(uint8_t, dlid_path_bits)
#undef READER

static uint32_t read_slid(struct ibv_cq_ex *ex)
{
	return cq_of(ex)->polled.slid;
}

struct ibv_cq_ex *shim_create_cq_ex(struct ibv_context *context,
				    struct ibv_cq_init_attr_ex *attr)
{
	const uint32_t known_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
	/* Every CQ of the device may be used by one thread. */
	const uint32_t known_flags = IBV_CREATE_CQ_ATTR_SINGLE_THREADED;
	struct ibv_cq_ex *ex;
	struct ibv_cq *cq;

	if (attr->comp_mask & ~known_mask || attr->wc_flags & ~KNOWN_FIELDS ||
	    (attr->comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS &&
	     attr->flags & ~known_flags)) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	if (attr->cqe > INT32_MAX || attr->comp_vector > INT32_MAX) {
		errno = EINVAL;
		return NULL;
	}
	cq = shim_soft.create_cq(context, (int)attr->cqe, attr->cq_context,
				 attr->channel, (int)attr->comp_vector);
	if (!cq)
		return NULL;
	ex = &to_cq(cq)->ex;
	ex->start_poll = start_poll;
	ex->next_poll = next_poll;
	ex->end_poll = end_poll;
	ex->read_opcode = read_opcode;
	ex->read_vendor_err = read_vendor_err;
	ex->read_byte_len = read_byte_len;
	ex->read_imm_data = read_imm_data;
	ex->read_qp_num = read_qp_num;
	ex->read_src_qp = read_src_qp;
	ex->read_wc_flags = read_wc_flags;
	ex->read_slid = read_slid;
	ex->read_sl = read_sl;
	ex->read_dlid_path_bits = read_dlid_path_bits;
	return ex;
}
