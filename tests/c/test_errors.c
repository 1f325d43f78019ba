/* Every way a work request can fail, and what the QPs do then. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "harness.h"

static const struct options impatient = {
	.any_retry = true, .timeout = 12, .retry_cnt = 1, .rnr_retry = 1
};

static void expect_async(struct end *end, enum ibv_event_type type)
{
	struct ibv_async_event event;

	CHECK(!verbs.get_async_event(end->context, &event));
	CHECK(event.event_type == type);
	verbs.ack_async_event(&event);
}

/* good, good, bad, good, good: unsignaled ones fail aloud as well. */
static void fail_third(const struct options *options, uint32_t rkey_xor,
		       size_t to_off, uint32_t lkey_xor,
		       enum ibv_wc_status status, uint32_t vendor_err,
		       bool target_dies)
{
	struct ibv_send_wr wrs[5], *bad;
	struct ibv_sge sges[5];
	struct ibv_wc wc[4];
	struct end a, b;
	struct card to;
	int i;

	make_pair(&a, &b, options);
	to = card_of(&b);
	fill_random(a.buffer, a.size);
	CHECK(!post_recv(&b, 77, 0, 0));
	for (i = 0; i < 5; i++) {
		wrs[i] = write_wr(&a, &to, &sges[i], 0, (size_t)i * 1000, 1000);
		wrs[i].wr_id = (uint64_t)i;
		wrs[i].send_flags = 0;
		wrs[i].next = i < 4 ? &wrs[i + 1] : NULL;
	}
	wrs[2].wr.rdma.rkey ^= rkey_xor;
	if (to_off)
		wrs[2].wr.rdma.remote_addr = to.addr + to_off;
	sges[2].lkey ^= lkey_xor;
	CHECK(!ibv_post_send(a.qp, wrs, &bad));
	reap(&a, wc, 3);
	CHECK(wc[0].wr_id == 2 && wc[0].status == status);
	CHECK(wc[0].vendor_err == vendor_err);
	CHECK(wc[0].qp_num == a.qp->qp_num && wc[0].byte_len == 0xa5a5a5a5);
	for (i = 1; i < 3; i++)
		CHECK(wc[i].wr_id == (uint64_t)i + 2 &&
		      wc[i].status == IBV_WC_WR_FLUSH_ERR);
	CHECK(!memcmp(b.buffer, a.buffer, 1000));
	CHECK(!memcmp(b.buffer + 1000, a.buffer, 1000));
	for (i = 2000; i < 5000; i++)
		CHECK(b.buffer[i] == 0);
	CHECK(b.buffer[b.size - 1] == 0);

	/* Later posts are taken and flushed. */
	wrs[0].next = NULL;
	CHECK(!post_one(&a, &wrs[0]));
	reap(&a, wc, 1);
	CHECK(wc->status == IBV_WC_WR_FLUSH_ERR);
	if (target_dies) {
		reap(&b, wc, 1);
		CHECK(wc->status == IBV_WC_WR_FLUSH_ERR && wc->wr_id == 77);
		expect_async(&b, IBV_EVENT_QP_ACCESS_ERR);
	} else {
		quiet(&b, 5);
	}
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void access_errors(void)
{
	static const struct options no_mr_write = {
		.mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ
	};
	struct end a, b;
	struct card to;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct ibv_wc wc;

	fail_third(NULL, 1, 0, 0, IBV_WC_REM_ACCESS_ERR, KVX_SOFT_NO_RKEY,
		   true);
	fail_third(NULL, 0, (1 << 20) - 999, 0, IBV_WC_REM_ACCESS_ERR,
		   KVX_SOFT_REMOTE_BOUNDS, true);
	fail_third(NULL, 0, SIZE_MAX / 2, 0, IBV_WC_REM_ACCESS_ERR,
		   KVX_SOFT_REMOTE_BOUNDS, true);
	fail_third(NULL, 0, 0, 1, IBV_WC_LOC_PROT_ERR, KVX_SOFT_NO_LKEY, false);

	make_pair(&a, &b, &no_mr_write);
	to = card_of(&b);
	wr = write_wr(&a, &to, &sge, 0, 0, 1);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_REM_ACCESS_ERR &&
	      wc.vendor_err == KVX_SOFT_REMOTE_ACCESS);
	close_end(&a);
	close_end(&b);

	/* The region is there and allows it; the QP does not. */
	make_pair(&a, &b, &(struct options){ .qp_access = -1 });
	to = card_of(&b);
	wr = write_wr(&a, &to, &sge, 0, 0, 1);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_REM_INV_REQ_ERR);
	expect_async(&b, IBV_EVENT_QP_REQ_ERR);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* A zero-length write asks for no key. */
static void zero_length(void)
{
	struct end a, b;
	struct card to;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct ibv_wc wc;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	wr = write_wr(&a, &to, &sge, 0, 0, 0);
	wr.wr.rdma.rkey = 12345;
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);
	close_end(&a);
	close_end(&b);
}

static void slots(void)
{
	enum { DEPTH = 16 };
	static const struct options options = { .send_wr = DEPTH };
	struct ibv_send_wr wrs[DEPTH + 4], *bad;
	struct ibv_sge sges[DEPTH + 4];
	struct ibv_wc wc[DEPTH];
	struct end a, b;
	struct card to;
	int i;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	for (i = 0; i < DEPTH + 4; i++) {
		wrs[i] = write_wr(&a, &to, &sges[i], 0, (size_t)i * 8, 8);
		wrs[i].send_flags = i == 9 ? IBV_SEND_SIGNALED : 0;
		wrs[i].wr_id = (uint64_t)i;
		wrs[i].next = i < DEPTH + 3 ? &wrs[i + 1] : NULL;
	}
	CHECK(ibv_post_send(a.qp, wrs, &bad) == ENOMEM);
	CHECK(bad == &wrs[DEPTH]);
	reap(&a, wc, 1);
	CHECK(wc->wr_id == 9);
	/* The slots up to the polled one are back, no more. */
	wrs[9].next = NULL;
	wrs[9].send_flags = 0;
	for (i = 0; i < 9; i++)
		CHECK(!post_one(&a, &wrs[9]));
	wrs[9].send_flags = IBV_SEND_SIGNALED;
	CHECK(!ibv_req_notify_cq(a.cq, 0));
	CHECK(!post_one(&a, &wrs[9]));
	/* All is done, as the event says, but not polled: still full. */
	await(&a, 5000);
	CHECK(post_one(&a, &wrs[9]) == ENOMEM);
	reap(&a, wc, 1);
	for (i = 0; i < DEPTH; i++)
		CHECK(!post_one(&a, &wrs[9]));
	CHECK(post_one(&a, &wrs[9]) == ENOMEM);
	reap(&a, wc, DEPTH);
	close_end(&a);
	close_end(&b);
}

static void silent_peer(void)
{
	struct ibv_wc wc;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct end a, b;
	struct card to;
	uint64_t start;

	/* The peer never leaves INIT. */
	open_end(&a, &impatient);
	open_end(&b, &impatient);
	to = card_of(&b);
	connect_end(&a, &to, &impatient);
	CHECK(!to_init(&b, &impatient));
	wr = write_wr(&a, &to, &sge, 0, 0, 8);
	start = now_ms();
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_RETRY_EXC_ERR);
	CHECK(now_ms() - start >= 30 && now_ms() - start < 1000);
	close_end(&a);

	/* It knows another QP number. */
	open_end(&a, &impatient);
	to = card_of(&a);
	to.qpn ^= 1;
	CHECK(!to_rtr(&b, &to, &impatient));
	to = card_of(&b);
	connect_end(&a, &to, &impatient);
	wr = write_wr(&a, &to, &sge, 0, 0, 8);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_RETRY_EXC_ERR);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* An established peer that goes is noticed at once. */
static void peer_goes(bool destroy)
{
	struct ibv_wc wc;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct end a, b;
	struct card to;
	uint64_t start;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	wr = write_wr(&a, &to, &sge, 0, 0, 8);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);
	if (destroy)
		close_end(&b);
	else
		CHECK(!to_state(&b, IBV_QPS_ERR));
	quiet(&a, 20);
	start = now_ms();
	CHECK(!post_one(&a, &wr));
	if (destroy) {
		reap(&a, &wc, 1);
		CHECK(wc.status == IBV_WC_RETRY_EXC_ERR);
		CHECK(now_ms() - start < 2000);
	} else {
		CHECK(!to_state(&a, IBV_QPS_ERR));
		reap(&a, &wc, 1);
		CHECK(wc.status != IBV_WC_SUCCESS);
		close_end(&b);
	}
	close_end(&a);
	no_objects_left();
}

static void no_receive(void)
{
	struct ibv_wc wc;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct end a, b;
	struct card to;

	make_pair(&a, &b, &impatient);
	to = card_of(&b);
	fill_random(a.buffer, 100);
	wr = write_wr(&a, &to, &sge, 0, 0, 100);
	wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_RNR_RETRY_EXC_ERR);
	/* The target is well: its own receives are not flushed. */
	CHECK(!post_recv(&b, 1, 0, 0));
	quiet(&b, 5);
	close_end(&a);
	close_end(&b);

	/* A SEND longer than its receive. */
	make_pair(&a, &b, NULL);
	to = card_of(&b);
	CHECK(!post_recv(&b, 5, 0, 99));
	wr = write_wr(&a, &to, &sge, 0, 0, 100);
	wr.opcode = IBV_WR_SEND;
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_REM_INV_REQ_ERR);
	reap(&b, &wc, 1);
	CHECK(wc.status == IBV_WC_LOC_LEN_ERR && wc.wr_id == 5);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* Memory that was unmapped while it was registered: no crash, an error. */
static void unmapped(bool source)
{
	struct ibv_wc wc;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct end a, b, *victim = source ? &a : &b;
	struct card to;

	make_pair(&a, &b, &(struct options){ .plain = true });
	to = card_of(&b);
	/* Without leaving a hole that the device's own mappings might fill. */
	CHECK(mmap(victim->buffer, victim->size, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
		   0) == victim->buffer);
	wr = write_wr(&a, &to, &sge, 0, 0, 10000);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == (source ? IBV_WC_LOC_PROT_ERR : IBV_WC_REM_OP_ERR));
	if (!source)
		expect_async(&b, IBV_EVENT_QP_FATAL);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void overrun(void)
{
	static const struct options options = { .cqe = 4, .sig_all = true };
	struct ibv_wc wc[8];
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;
	struct end a, b;
	struct card to;
	int i;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	CHECK(a.cq->cqe == 7);
	for (i = 0; i < 12; i++) {
		wr = write_wr(&a, &to, &sge, 0, 0, 8);
		CHECK(!post_one(&a, &wr));
	}
	expect_async(&a, IBV_EVENT_CQ_ERR);
	CHECK(ibv_poll_cq(a.cq, 8, wc) == 7);
	CHECK(ibv_poll_cq(a.cq, 8, wc) < 0);
	do {
		CHECK(!verbs.query_qp(a.qp, &attr, IBV_QP_STATE, &init));
	} while (attr.qp_state != IBV_QPS_ERR);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void recovery(void)
{
	static const struct options options = { .size = 1 << 16 };
	struct ibv_wc wc[64];
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct end a, b;
	struct card to_a, to_b;
	int round;

	make_pair(&a, &b, &options);
	for (round = 0; round < 10; round++) {
		to_a = card_of(&a);
		to_b = card_of(&b);
		fill_random(a.buffer, a.size);
		wr = write_wr(&a, &to_b, &sge, 0, 0, 1 << 16);
		CHECK(!post_one(&a, &wr));
		reap(&a, wc, 1);
		CHECK(wc->status == IBV_WC_SUCCESS);
		CHECK(!memcmp(a.buffer, b.buffer, a.size));
		CHECK(!post_recv(&a, 1, 0, 0));
		CHECK(!post_one(&a, &wr)); /* its completion is dropped */
		CHECK(!to_state(&a, IBV_QPS_ERR));
		if (round & 1) {
			reap(&a, wc, 2);
			CHECK(wc[1].status == IBV_WC_WR_FLUSH_ERR);
		}
		CHECK(!to_state(&a, IBV_QPS_RESET));
		CHECK(!to_state(&b, IBV_QPS_RESET));
		quiet(&a, 1);
		a.psn += 1000;
		b.psn += 1000;
		to_a.psn = a.psn;
		to_b.psn = b.psn;
		connect_end(&a, &to_b, &options);
		connect_end(&b, &to_a, &options);
	}
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void busy_objects(void)
{
	struct ibv_cq *cq;
	struct end a, b;
	void *context;

	make_pair(&a, &b, NULL);
	CHECK(verbs.dealloc_pd(a.pd) == EBUSY);
	CHECK(verbs.destroy_cq(a.cq) == EBUSY);
	CHECK(verbs.destroy_comp_channel(a.channel) == EBUSY);
	CHECK(verbs.close_device(a.context) == EBUSY);
	CHECK(!verbs.reg_mr(a.pd, a.buffer, 0, 0) && errno == EINVAL);
	CHECK(!verbs.reg_mr(a.pd, a.buffer, a.size, IBV_ACCESS_REMOTE_WRITE) &&
	      errno == EINVAL);
	CHECK(!verbs.reg_mr(a.pd, (void *)8, 8, 0) && errno == EFAULT);
	CHECK(!verbs.reg_mr(a.pd, a.buffer, SIZE_MAX, 0) && errno == EINVAL);
	CHECK(!verbs.reg_mr(a.pd, (void *)"x", 1, IBV_ACCESS_LOCAL_WRITE) &&
	      errno == EFAULT);
	(void)cq;
	(void)context;
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

int main(void)
{
	access_errors();
	zero_length();
	slots();
	silent_peer();
	peer_goes(true);
	peer_goes(false);
	no_receive();
	unmapped(true);
	unmapped(false);
	overrun();
	recovery();
	busy_objects();
	puts("errors: ok");
	return 0;
}
