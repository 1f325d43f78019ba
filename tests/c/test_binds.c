/* Binds and invalidations as work requests: their failures and their order. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "binding.h"

#define ROUNDS 50
#define SMALL (64u << 10)
#define MANY 32
#define BIG ((size_t)1 << 20)

/* Binds that fail when it is their turn; what is behind them is flushed. */
static void bad_binds(void)
{
	static const struct {
		int mr_access;
		size_t off, length;
		uint32_t vendor_err;
	} cases[] = {
		{ ALL_ACCESS, 0, 64, KVX_SOFT_LOCAL_ACCESS },
		{ IBV_ACCESS_REMOTE_READ | IBV_ACCESS_MW_BIND, 0, 64,
		  KVX_SOFT_LOCAL_ACCESS }, /* no LOCAL_WRITE */
		{ ALL_ACCESS | IBV_ACCESS_MW_BIND, (1 << 20) - 63, 64,
		  KVX_SOFT_LOCAL_BOUNDS },
		{ ALL_ACCESS | IBV_ACCESS_MW_BIND, 0, SIZE_MAX,
		  KVX_SOFT_LOCAL_BOUNDS },
		{ ALL_ACCESS | IBV_ACCESS_MW_BIND, 0, 0,
		  KVX_SOFT_WINDOW_STATE }, /* type 2 to nothing */
	};
	struct ibv_send_wr wrs[2], *bad;
	struct ibv_mw_bind_info info;
	struct ibv_wc wc[2];
	struct ibv_mw *mw;
	struct end a, b;
	size_t i;

	for (i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		make_pair(&a, &b,
			  &(struct options){ .mr_access = cases[i].mr_access });
		mw = new_window(&b, IBV_MW_TYPE_2);
		info = part(&b, ALL_ACCESS);
		info.addr = (uintptr_t)b.buffer + cases[i].off;
		info.length = cases[i].length;
		wrs[0] = bind_wr(mw, mw->rkey, info);
		wrs[1] = bind_wr(mw, mw->rkey, part(&b, ALL_ACCESS));
		wrs[0].next = &wrs[1];
		CHECK(!ibv_post_send(b.qp, wrs, &bad));
		reap(&b, wc, 2);
		CHECK(wc[0].status == IBV_WC_MW_BIND_ERR);
		CHECK(wc[0].vendor_err == cases[i].vendor_err);
		CHECK(wc[1].status == IBV_WC_WR_FLUSH_ERR);
		end_pair(&a, &b, mw); /* with a region that is not bound */
	}
	no_objects_left();
}

/* A key that has been bound, or given up, once already. */
static void wrong_state(void)
{
	struct ibv_mw *mw;
	struct end a, b;
	uint32_t rkey;
	int i;

	for (i = 0; i < 4; i++) {
		make_pair(&a, &b, &bindable);
		mw = new_window(&b, i == 2 ? IBV_MW_TYPE_1 : IBV_MW_TYPE_2);
		rkey = bind_part(&b, mw, ALL_ACCESS);
		if (i == 1)
			must(&b, invalidate_wr(IBV_WR_LOCAL_INV, rkey),
			     IBV_WC_LOCAL_INV);
		must_fail(&b,
			  i == 0 ? bind_wr(mw, ibv_inc_rkey(rkey),
					   part(&b, ALL_ACCESS)) :
				   invalidate_wr(IBV_WR_LOCAL_INV,
						 i == 3 ? b.mr->rkey : rkey),
			  IBV_WC_MW_BIND_ERR,
			  i % 2 ? KVX_SOFT_NO_WINDOW : KVX_SOFT_WINDOW_STATE);
		end_pair(&a, &b, mw);
	}
	no_objects_left();
}

static void refused_at_once(void)
{
	struct ibv_mw_bind how = { 0 };
	struct ibv_mw_bind_info info;
	struct ibv_mw *one_, *two;
	struct ibv_send_wr wr;
	struct end a, b;

	make_pair(&a, &b, &bindable);
	errno = 0;
	CHECK(!ibv_alloc_mw(b.pd, (enum ibv_mw_type)3) && errno == EINVAL);
	one_ = new_window(&b, IBV_MW_TYPE_1);
	two = new_window(&b, IBV_MW_TYPE_2);
	how.bind_info = part(&b, ALL_ACCESS);
	CHECK(ibv_bind_mw(b.qp, two, &how) == EINVAL); /* by post_send alone */
	how.bind_info.mr = NULL;
	CHECK(ibv_bind_mw(b.qp, one_, &how) == EINVAL);
	info = part(&b, ALL_ACCESS | IBV_ACCESS_ZERO_BASED);
	wr = bind_wr(two, two->rkey, info);
	CHECK(post_one(&b, &wr) == EINVAL);
	wr = bind_wr(NULL, 0, part(&b, ALL_ACCESS));
	CHECK(post_one(&b, &wr) == EINVAL);
	CHECK(!ibv_dealloc_mw(one_));
	end_pair(&a, &b, two);
	no_objects_left();
}

/* A bind is the QP's own affair: it needs no peer. */
static void no_peer(void)
{
	struct end a, b;
	struct ibv_mw *mw;
	struct card card_a, card_b;
	uint32_t rkey;

	open_end(&a, &bindable);
	open_end(&b, &bindable);
	card_a = card_of(&a);
	card_b = card_of(&b);
	connect_end(&b, &card_a, &bindable);
	mw = new_window(&b, IBV_MW_TYPE_2);
	rkey = bind_part(&b, mw, ALL_ACCESS);
	connect_end(&a, &card_b, &bindable);
	write_well(&a, &b, rkey);
	write_well(&b, &a, a.mr->rkey); /* the count of WRs agrees */

	/* And in the next life of the QPs. */
	CHECK(!to_state(&a, IBV_QPS_RESET) && !to_state(&b, IBV_QPS_RESET));
	connect_end(&b, &card_a, &bindable);
	connect_end(&a, &card_b, &bindable);
	write_well(&b, &a, a.mr->rkey);
	end_pair(&a, &b, mw);
	no_objects_left();
}

/*
 * READ, WRITEs, bind, WRITEs, a SEND that says so, invalidate: they complete in the
 * order of the queue, and the peer that is told of the key finds it valid.
 */
static void order(unsigned int flags)
{
	enum { READ, WRITE, BIND, AGAIN, SEND, N };
	static const enum ibv_wc_opcode opcodes[N] = {
		IBV_WC_RDMA_READ, IBV_WC_RDMA_WRITE, IBV_WC_BIND_MW,
		IBV_WC_RDMA_WRITE, IBV_WC_SEND
	};
	struct ibv_send_wr wrs[N], *bad;
	struct ibv_sge sges[N];
	struct ibv_wc wc[N];
	struct ibv_mw *mw;
	struct end a, b;
	uint32_t rkey;
	int round, i;

	make_pair(&a, &b, &bindable);
	mw = new_window(&b, IBV_MW_TYPE_2);
	for (round = 0; round < ROUNDS; round++) {
		rkey = ibv_inc_rkey(mw->rkey);
		settle(&a);
		fill_random(a.buffer + (1 << 19), SMALL);
		wrs[READ] = access_wr(&b, &a, &sges[READ], a.mr->rkey,
				      IBV_WR_RDMA_READ, 1 << 19, SMALL);
		sges[READ].addr += 1 << 19;
		wrs[WRITE] = access_wr(&b, &a, &sges[WRITE], a.mr->rkey,
				       IBV_WR_RDMA_WRITE, 1 << 18, SMALL);
		wrs[BIND] = bind_wr(mw, rkey, part(&b, ALL_ACCESS));
		/* What was read goes back: to be sure, behind a fence. */
		wrs[AGAIN] = wrs[WRITE];
		sges[AGAIN] = sges[WRITE];
		sges[AGAIN].addr = sges[READ].addr;
		wrs[AGAIN].sg_list = &sges[AGAIN];
		wrs[SEND] = (struct ibv_send_wr){ .opcode = IBV_WR_SEND };
		for (i = 0; i < N; i++) {
			wrs[i].wr_id = (uint64_t)i;
			wrs[i].send_flags = IBV_SEND_SIGNALED | flags;
			wrs[i].next = i + 1 < N ? &wrs[i + 1] : NULL;
		}
		wrs[AGAIN].send_flags |= IBV_SEND_FENCE;
		CHECK(!post_recv(&a, 9, 0, 0));
		CHECK(!ibv_post_send(b.qp, wrs, &bad));
		CHECK(one(&a).wr_id == 9); /* the bind was before */
		write_well(&a, &b, rkey);
		reap(&b, wc, N);
		for (i = 0; i < N; i++)
			CHECK(wc[i].status == IBV_WC_SUCCESS &&
			      wc[i].wr_id == (uint64_t)i &&
			      wc[i].opcode == opcodes[i]);
		CHECK(!memcmp(a.buffer + (1 << 18), a.buffer + (1 << 19),
			      SMALL));
		must(&b, invalidate_wr(IBV_WR_LOCAL_INV, rkey),
		     IBV_WC_LOCAL_INV);
		mw->rkey = rkey;
	}
	end_pair(&a, &b, mw);
	no_objects_left();
}

/*
 * When an invalidation has completed, no byte comes through the window. It is posted
 * when one WRITE of many announces itself, while those behind it arrive.
 */
static void nothing_lands_after(void)
{
	static const struct options options = {
		.size = 2 * MANY * BIG,
		.mr_access = ALL_ACCESS | IBV_ACCESS_MW_BIND
	};
	const int told = 4;
	struct ibv_send_wr wrs[MANY], *bad;
	struct ibv_sge sges[MANY];
	struct ibv_mw_bind_info info;
	struct ibv_wc wc[MANY];
	uint8_t *after;
	struct ibv_mw *mw;
	struct end a, b;
	int round, i;

	after = malloc(MANY * BIG);
	CHECK(after);
	for (round = 0; round < 4; round++) {
		make_pair(&a, &b, &options);
		mw = new_window(&b, IBV_MW_TYPE_2);
		info = part(&b, ALL_ACCESS);
		info.length = MANY * BIG;
		must(&b, bind_wr(mw, mw->rkey, info), IBV_WC_BIND_MW);
		for (i = 0; i < MANY; i++) {
			memset(a.buffer + (size_t)i * BIG, i + 1, BIG);
			wrs[i] = access_wr(&a, &b, &sges[i], mw->rkey,
					   IBV_WR_RDMA_WRITE,
					   FROM + (size_t)i * BIG, BIG);
			sges[i].addr += (size_t)i * BIG;
			wrs[i].next = i + 1 < MANY ? &wrs[i + 1] : NULL;
		}
		wrs[told].opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
		CHECK(!post_recv(&b, 5, 0, 0));
		CHECK(!ibv_post_send(a.qp, wrs, &bad));
		CHECK(one(&b).wr_id == 5);
		must(&b, invalidate_wr(IBV_WR_LOCAL_INV, mw->rkey),
		     IBV_WC_LOCAL_INV);
		memcpy(after, b.buffer + FROM, MANY * BIG);
		reap(&a, wc, MANY);
		CHECK(!memcmp(after, b.buffer + FROM, MANY * BIG));
		for (i = 0; i < MANY && wc[i].status == IBV_WC_SUCCESS; i++)
			CHECK(!memcmp(after + (size_t)i * BIG,
				      a.buffer + (size_t)i * BIG, BIG));
		CHECK(i > told);
		if (i < MANY) /* some were too late */
			CHECK(wc[i].status == IBV_WC_REM_ACCESS_ERR &&
			      wc[i].vendor_err == KVX_SOFT_NO_RKEY);
		end_pair(&a, &b, mw);
	}
	free(after);
	no_objects_left();
}

/* The fault plan's repetitions and losses name WRs as the peer counts them. */
static void with_faults(void)
{
	static const struct options impatient = {
		.mr_access = ALL_ACCESS | IBV_ACCESS_MW_BIND,
		.any_retry = true,
		.timeout = 12,
		.retry_cnt = 1,
	};
	struct ibv_mw *mw;
	struct ibv_sge sge;
	struct end a, b;
	size_t at;
	int i;

	make_pair(&a, &b, &impatient);
	mw = new_window(&b, IBV_MW_TYPE_1);
	CHECK(!verbs.set_faults(b.context, "act=dup", &at));
	for (i = 0; i < 10; i++) {
		bind_part(&b, mw, ALL_ACCESS);
		write_well(&b, &a, a.mr->rkey);
	}
	CHECK(!verbs.set_faults(b.context, "nth=2,act=ack_lost", &at));
	write_well(&b, &a, a.mr->rkey);
	bind_part(&b, mw, ALL_ACCESS);
	must_fail(&b,
		  access_wr(&b, &a, &sge, a.mr->rkey, IBV_WR_RDMA_WRITE, FROM,
			    64),
		  IBV_WC_RETRY_EXC_ERR, KVX_SOFT_NO_ANSWER);
	CHECK(!memcmp(a.buffer + FROM, b.buffer, 64)); /* it did arrive */
	end_pair(&a, &b, mw);
	no_objects_left();
}

int main(void)
{
	bad_binds();
	wrong_state();
	refused_at_once();
	no_peer();
	order(0);
	order(IBV_SEND_FENCE);
	nothing_lands_after();
	with_faults();
	puts("binds: ok");
	return 0;
}
