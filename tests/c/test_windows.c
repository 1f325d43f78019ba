/* Memory windows: who may do what with them, and until when. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "binding.h"

static const enum ibv_mw_type types[] = { IBV_MW_TYPE_1, IBV_MW_TYPE_2 };

static void bounds_and_access(enum ibv_mw_type type)
{
	static const struct {
		enum ibv_wr_opcode opcode;
		size_t off;
		uint32_t length, vendor_err;
		unsigned int access;
	} cases[] = {
		{ IBV_WR_RDMA_WRITE, FROM - 1, 64, KVX_SOFT_REMOTE_BOUNDS,
		  ALL_ACCESS },
		{ IBV_WR_RDMA_WRITE, FROM + LENGTH - 63, 64,
		  KVX_SOFT_REMOTE_BOUNDS, ALL_ACCESS },
		{ IBV_WR_RDMA_WRITE, FROM, LENGTH + 1, KVX_SOFT_REMOTE_BOUNDS,
		  ALL_ACCESS },
		{ IBV_WR_RDMA_READ, FROM + LENGTH, 64, KVX_SOFT_REMOTE_BOUNDS,
		  ALL_ACCESS },
		{ IBV_WR_ATOMIC_FETCH_AND_ADD, FROM - 8, 8,
		  KVX_SOFT_REMOTE_BOUNDS, ALL_ACCESS },
		{ IBV_WR_RDMA_WRITE, FROM, 64, KVX_SOFT_REMOTE_ACCESS,
		  IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC },
		{ IBV_WR_RDMA_READ, FROM, 64, KVX_SOFT_REMOTE_ACCESS,
		  IBV_ACCESS_REMOTE_WRITE },
		{ IBV_WR_ATOMIC_FETCH_AND_ADD, FROM, 8, KVX_SOFT_REMOTE_ACCESS,
		  IBV_ACCESS_REMOTE_WRITE },
		{ IBV_WR_RDMA_WRITE, FROM, 64, KVX_SOFT_REMOTE_ACCESS,
		  IBV_ACCESS_LOCAL_WRITE },
	};
	struct ibv_mw *mw;
	struct end a, b;
	uint32_t rkey;
	size_t i;

	for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		make_pair(&a, &b, &bindable);
		mw = new_window(&b, type);
		rkey = bind_part(&b, mw, cases[i].access);
		if (cases[i].access & IBV_ACCESS_REMOTE_WRITE)
			write_well(&a, &b, rkey);
		refuse(&a, &b, rkey, cases[i].opcode, cases[i].off,
		       cases[i].length, cases[i].vendor_err);
		end_pair(&a, &b, mw);
	}
	no_objects_left();
}

/* What the region's own rights do not give, the window may. */
static void rights_of_its_own(enum ibv_mw_type type)
{
	static const struct options local_only = {
		.mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND
	};
	uint64_t counter = 7;
	struct ibv_sge sge;
	struct ibv_mw *mw;
	struct end a, b;
	uint32_t rkey;

	make_pair(&a, &b, &local_only);
	mw = new_window(&b, type);
	rkey = bind_part(&b, mw, ALL_ACCESS);
	write_well(&a, &b, rkey);
	memset(a.buffer, 0, LENGTH);
	must(&a, access_wr(&a, &b, &sge, rkey, IBV_WR_RDMA_READ, FROM, LENGTH),
	     IBV_WC_RDMA_READ);
	CHECK(!memcmp(a.buffer, b.buffer + FROM, LENGTH));
	settle(&b);
	memcpy(b.buffer + FROM, &counter, sizeof(counter));
	must(&a,
	     access_wr(&a, &b, &sge, rkey, IBV_WR_ATOMIC_FETCH_AND_ADD, FROM,
		       8),
	     IBV_WC_FETCH_ADD);
	memcpy(&counter, b.buffer + FROM, sizeof(counter));
	CHECK(counter == 8);
	refuse(&a, &b, b.mr->rkey, IBV_WR_RDMA_WRITE, FROM, 64,
	       KVX_SOFT_REMOTE_ACCESS);
	end_pair(&a, &b, mw);
	no_objects_left();
}

static void stale_keys(void)
{
	struct ibv_mw_bind nothing = { .send_flags = IBV_SEND_SIGNALED };
	uint32_t rkey, old;
	struct ibv_mw *mw;
	struct end a, b;
	int i;

	/* 0: before it is bound; 1: bound anew; 2: bound to nothing; 3: gone */
	for (i = 0; i < 4; i++) {
		make_pair(&a, &b, &bindable);
		mw = new_window(&b, IBV_MW_TYPE_1);
		old = mw->rkey;
		if (i > 0) {
			old = bind_part(&b, mw, ALL_ACCESS);
			write_well(&a, &b, old);
		}
		if (i == 1) {
			rkey = bind_part(&b, mw, ALL_ACCESS);
			write_well(&a, &b, rkey);
		}
		if (i == 2) {
			CHECK(!ibv_bind_mw(b.qp, mw, &nothing));
			CHECK(one(&b).status == IBV_WC_SUCCESS);
			CHECK(mw->rkey != old);
		}
		if (i == 3) {
			CHECK(!ibv_dealloc_mw(mw));
			mw = new_window(&b, IBV_MW_TYPE_1);
		}
		refuse(&a, &b, i == 2 ? mw->rkey : old, IBV_WR_RDMA_WRITE, FROM,
		       64, KVX_SOFT_NO_RKEY);
		end_pair(&a, &b, mw);
	}
	no_objects_left();
}

static void invalidated(void)
{
	struct ibv_mw *mw;
	struct ibv_wc wc;
	struct end a, b;
	uint32_t rkey;
	int i;

	for (i = 0; i < 2; i++) {
		make_pair(&a, &b, &bindable);
		mw = new_window(&b, IBV_MW_TYPE_2);
		rkey = bind_part(&b, mw, ALL_ACCESS);
		write_well(&a, &b, rkey);
		CHECK(verbs.dereg_mr(b.mr) == EBUSY);
		if (i == 0) {
			must(&b, invalidate_wr(IBV_WR_LOCAL_INV, rkey),
			     IBV_WC_LOCAL_INV);
		} else {
			CHECK(!post_recv(&b, 5, 0, 0));
			must(&a, invalidate_wr(IBV_WR_SEND_WITH_INV, rkey),
			     IBV_WC_SEND);
			wc = one(&b);
			CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 5);
			CHECK(wc.opcode == IBV_WC_RECV);
			CHECK(wc.wc_flags == IBV_WC_WITH_INV);
			CHECK(wc.invalidated_rkey == rkey);
		}
		/* It is free to be bound again, and the old key stays dead. */
		write_well(&a, &b, bind_part(&b, mw, ALL_ACCESS));
		refuse(&a, &b, rkey, IBV_WR_RDMA_WRITE, FROM, 64,
		       KVX_SOFT_NO_RKEY);
		end_pair(&a, &b, mw);
	}
	no_objects_left();
}

/* What a peer may not invalidate: nothing, a window of type 1, a region. */
static void remote_invalidate_refused(void)
{
	struct ibv_mw *mw;
	struct ibv_wc wc;
	struct end a, b;
	uint32_t rkey;
	int i;

	for (i = 0; i < 3; i++) {
		make_pair(&a, &b, &bindable);
		mw = new_window(&b, i ? IBV_MW_TYPE_1 : IBV_MW_TYPE_2);
		rkey = i ? bind_part(&b, mw, ALL_ACCESS) : mw->rkey;
		CHECK(!post_recv(&b, 5, 0, 0));
		must_fail(&a,
			  invalidate_wr(IBV_WR_SEND_WITH_INV,
					i == 2 ? b.mr->rkey : rkey),
			  IBV_WC_REM_ACCESS_ERR,
			  i == 1 ? KVX_SOFT_REMOTE_OTHER_QP : KVX_SOFT_NO_RKEY);
		wc = one(&b);
		CHECK(wc.status == IBV_WC_WR_FLUSH_ERR && wc.wr_id == 5);
		end_pair(&a, &b, mw);
	}
	no_objects_left();
}

/* A second pair of QPs on the adapters, and so the PDs, of a pair. */
static void new_qps(struct end *a, struct end *b)
{
	struct ibv_qp_init_attr init = { .qp_type = IBV_QPT_RC,
					 .cap = { .max_send_wr = 16,
						  .max_recv_wr = 16,
						  .max_send_sge = 1,
						  .max_recv_sge = 1 } };
	struct card card_a, card_b;

	init.send_cq = init.recv_cq = a->cq;
	a->qp = verbs.create_qp(a->pd, &init);
	init.send_cq = init.recv_cq = b->cq;
	b->qp = verbs.create_qp(b->pd, &init);
	CHECK(a->qp && b->qp);
	card_a = card_of(a);
	card_b = card_of(b);
	connect_end(a, &card_b, &bindable);
	connect_end(b, &card_a, &bindable);
}

/* Type 1 is for every QP of the PD, type 2 for the one that has bound it. */
static void other_qp(void)
{
	struct ibv_qp *first_a, *first_b, *second_a, *second_b;
	struct ibv_mw *mw;
	struct end a, b;
	uint32_t rkey;

	make_pair(&a, &b, &bindable);
	first_a = a.qp;
	first_b = b.qp;
	mw = new_window(&b, IBV_MW_TYPE_1);
	rkey = bind_part(&b, mw, ALL_ACCESS);
	write_well(&a, &b, rkey);
	new_qps(&a, &b);
	second_a = a.qp;
	second_b = b.qp;
	write_well(&a, &b, rkey);
	CHECK(!ibv_dealloc_mw(mw));

	mw = new_window(&b, IBV_MW_TYPE_2);
	a.qp = first_a;
	b.qp = first_b;
	rkey = bind_part(&b, mw, ALL_ACCESS);
	write_well(&a, &b, rkey);
	a.qp = second_a;
	b.qp = second_b;
	refuse(&a, &b, rkey, IBV_WR_RDMA_WRITE, FROM, 64,
	       KVX_SOFT_REMOTE_OTHER_QP);
	a.qp = first_a;
	b.qp = first_b;
	write_well(&a, &b, rkey);

	/* With the QP that has bound it the window's key ends, and its hold on
	 * the region. */
	CHECK(verbs.dereg_mr(b.mr) == EBUSY);
	CHECK(!verbs.destroy_qp(first_a) && !verbs.destroy_qp(first_b));
	CHECK(!verbs.dereg_mr(b.mr));
	b.mr = verbs.reg_mr(b.pd, b.buffer, b.size, ALL_ACCESS);
	CHECK(b.mr);
	a.qp = second_a;
	b.qp = second_b;
	end_pair(&a, &b, mw);
	no_objects_left();
}

static void other_pd(void)
{
	struct ibv_mw_bind how = { .send_flags = IBV_SEND_SIGNALED };
	struct ibv_mr *foreign_mr;
	struct ibv_mw_bind_info info;
	struct ibv_mw *mw;
	struct ibv_pd *pd;
	struct end a, b;
	int i;

	/* 0: the window's PD is another; 1: the region's is */
	for (i = 0; i < 2; i++) {
		make_pair(&a, &b, &bindable);
		pd = verbs.alloc_pd(b.context);
		CHECK(pd);
		foreign_mr = verbs.reg_mr(pd, b.buffer, b.size,
					  ALL_ACCESS | IBV_ACCESS_MW_BIND);
		mw = ibv_alloc_mw(i ? b.pd : pd, IBV_MW_TYPE_2);
		CHECK(foreign_mr && mw);
		info = part(&b, ALL_ACCESS);
		if (i)
			info.mr = foreign_mr;
		must_fail(&b, bind_wr(mw, mw->rkey, info), IBV_WC_MW_BIND_ERR,
			  i ? KVX_SOFT_LOCAL_PD : KVX_SOFT_NO_WINDOW);
		CHECK(!ibv_dealloc_mw(mw));
		mw = ibv_alloc_mw(i ? b.pd : pd, IBV_MW_TYPE_1);
		how.bind_info = info;
		CHECK(mw && ibv_bind_mw(b.qp, mw, &how) == EPERM);
		CHECK(!ibv_dealloc_mw(mw) && !verbs.dereg_mr(foreign_mr));
		CHECK(!verbs.dealloc_pd(pd));
		close_end(&a);
		close_end(&b);
	}
	no_objects_left();
}

int main(void)
{
	size_t i;

	for (i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
		bounds_and_access(types[i]);
		rights_of_its_own(types[i]);
	}
	stale_keys();
	invalidated();
	remote_invalidate_refused();
	other_qp();
	other_pd();
	puts("windows: ok");
	return 0;
}
