#define _GNU_SOURCE
#include "binding.h"

#include <errno.h>
#include <string.h>

const struct options bindable = { .mr_access = ALL_ACCESS |
					       IBV_ACCESS_MW_BIND };

struct ibv_mw *new_window(const struct end *end, enum ibv_mw_type type)
{
	struct ibv_mw *mw = ibv_alloc_mw(end->pd, type);

	CHECK(mw && mw->pd == end->pd && mw->type == type);
	return mw;
}

struct ibv_mw_bind_info part(const struct end *end, unsigned int access)
{
	return (struct ibv_mw_bind_info){
		.mr = end->mr,
		.addr = (uintptr_t)end->buffer + FROM,
		.length = LENGTH,
		.mw_access_flags = access,
	};
}

struct ibv_send_wr bind_wr(struct ibv_mw *mw, uint32_t rkey,
			   struct ibv_mw_bind_info info)
{
	return (struct ibv_send_wr){
		.opcode = IBV_WR_BIND_MW,
		.send_flags = IBV_SEND_SIGNALED,
		.bind_mw = { .mw = mw, .rkey = rkey, .bind_info = info },
	};
}

struct ibv_send_wr invalidate_wr(enum ibv_wr_opcode opcode, uint32_t rkey)
{
	return (struct ibv_send_wr){ .opcode = opcode,
				     .send_flags = IBV_SEND_SIGNALED,
				     .invalidate_rkey = rkey };
}

struct ibv_wc one(struct end *end)
{
	struct ibv_wc wc;

	reap(end, &wc, 1);
	return wc;
}

void must(struct end *end, struct ibv_send_wr wr, enum ibv_wc_opcode opcode)
{
	struct ibv_wc wc;

	CHECK(!post_one(end, &wr));
	wc = one(end);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == opcode);
}

void must_fail(struct end *end, struct ibv_send_wr wr,
	       enum ibv_wc_status status, uint32_t vendor_err)
{
	struct ibv_wc wc;

	CHECK(!post_one(end, &wr));
	wc = one(end);
	CHECK(wc.status == status && wc.vendor_err == vendor_err);
}

uint32_t bind_part(struct end *end, struct ibv_mw *mw, unsigned int access)
{
	struct ibv_mw_bind how = { .send_flags = IBV_SEND_SIGNALED,
				   .bind_info = part(end, access) };
	uint32_t before = mw->rkey, rkey = ibv_inc_rkey(mw->rkey);
	struct ibv_wc wc;

	if (mw->type == IBV_MW_TYPE_2) {
		must(end, bind_wr(mw, rkey, how.bind_info), IBV_WC_BIND_MW);
		mw->rkey = rkey;
		return rkey;
	}
	CHECK(!ibv_bind_mw(end->qp, mw, &how));
	wc = one(end);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_BIND_MW);
	CHECK(mw->rkey != before && mw->rkey >> 8 == before >> 8);
	return mw->rkey;
}

struct ibv_send_wr access_wr(const struct end *from, const struct end *to,
			     struct ibv_sge *sge, uint32_t rkey,
			     enum ibv_wr_opcode opcode, size_t off,
			     uint32_t length)
{
	struct card card = card_of(to);
	struct ibv_send_wr wr;

	card.rkey = rkey;
	wr = write_wr(from, &card, sge, 0, off, length);
	wr.opcode = opcode;
	if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = card.addr + off;
		wr.wr.atomic.rkey = rkey;
		wr.wr.atomic.compare_add = 1;
	}
	return wr;
}

void settle(struct end *end)
{
	struct ibv_port_attr attr;

	CHECK(!verbs.query_port(end->context, 1, &attr));
}

void write_well(struct end *from, struct end *to, uint32_t rkey)
{
	struct ibv_sge sge;

	fill_random(from->buffer, LENGTH);
	must(from,
	     access_wr(from, to, &sge, rkey, IBV_WR_RDMA_WRITE, FROM, LENGTH),
	     IBV_WC_RDMA_WRITE);
	CHECK(!memcmp(to->buffer + FROM, from->buffer, LENGTH));
}

void refuse(struct end *from, struct end *to, uint32_t rkey,
	    enum ibv_wr_opcode opcode, size_t off, uint32_t length,
	    uint32_t vendor_err)
{
	uint8_t before[64];
	struct ibv_sge sge;

	memset(from->buffer, 0xee, length);
	memcpy(before, to->buffer + off, sizeof(before));
	must_fail(from, access_wr(from, to, &sge, rkey, opcode, off, length),
		  IBV_WC_REM_ACCESS_ERR, vendor_err);
	CHECK(!memcmp(to->buffer + off, before, sizeof(before)));
}

void end_pair(struct end *a, struct end *b, struct ibv_mw *mw)
{
	CHECK(verbs.dealloc_pd(b->pd) == EBUSY);
	CHECK(!ibv_dealloc_mw(mw));
	close_end(a);
	close_end(b);
}
