/* One write, many writes, immediate data, reads, sends; in one process. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <string.h>

#include "harness.h"

static void one_write(void)
{
	struct end a, b;
	struct card to;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct ibv_wc wc;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	fill_random(a.buffer, a.size);
	wr = write_wr(&a, &to, &sge, 100, 4000, 1024);
	wr.wr_id = 42;
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 42);
	CHECK(wc.opcode == IBV_WC_RDMA_WRITE && wc.qp_num == a.qp->qp_num);
	CHECK(!memcmp(b.buffer + 4000, a.buffer + 100, 1024));
	CHECK(b.buffer[3999] == 0 && b.buffer[5024] == 0);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* A chain of scattered blocks, only the last one signaled, SQ refilled. */
static void many_writes(void)
{
	enum { BLOCKS = 700, BLOCK = 1000, ROUNDS = 5 };
	static struct ibv_send_wr wrs[BLOCKS];
	static struct ibv_sge sges[BLOCKS];
	struct ibv_send_wr *bad;
	struct end a, b;
	struct card to;
	struct ibv_wc wc;
	int round, i;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	for (round = 0; round < ROUNDS; round++) {
		fill_random(a.buffer, a.size);
		for (i = 0; i < BLOCKS; i++) {
			wrs[i] = write_wr(&a, &to, &sges[i],
					  (size_t)(i * 331 % BLOCKS) * BLOCK,
					  (size_t)(i * 173 % BLOCKS) * BLOCK,
					  BLOCK);
			wrs[i].send_flags = 0;
			wrs[i].next = i + 1 < BLOCKS ? &wrs[i + 1] : NULL;
		}
		wrs[BLOCKS - 1].send_flags = IBV_SEND_SIGNALED;
		CHECK(!ibv_post_send(a.qp, wrs, &bad));
		reap(&a, &wc, 1);
		CHECK(wc.status == IBV_WC_SUCCESS);
		for (i = 0; i < BLOCKS; i++)
			CHECK(!memcmp(b.buffer + i * 173 % BLOCKS * BLOCK,
				      a.buffer + i * 331 % BLOCKS * BLOCK,
				      BLOCK));
	}
	quiet(&a, 1);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* Large and odd sizes, several SGEs to one remote range. */
static void long_writes(void)
{
	static const struct options options = { .size = 40u << 20 };
	static const uint32_t sizes[] = {
		1, 4095, 1u << 20, (4u << 20) - 1, (4u << 20) + 1, 33u << 20
	};
	struct ibv_sge sges[4];
	struct ibv_send_wr wr;
	struct end a, b;
	struct card to;
	struct ibv_wc wc;
	size_t i, j;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	fill_random(a.buffer, a.size);
	for (i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		memset(b.buffer, 0, b.size);
		wr = write_wr(&a, &to, sges, 7, 13, sizes[i]);
		CHECK(!post_one(&a, &wr));
		reap(&a, &wc, 1);
		CHECK(wc.status == IBV_WC_SUCCESS);
		CHECK(!memcmp(b.buffer + 13, a.buffer + 7, sizes[i]));
		CHECK(b.buffer[12] == 0 && b.buffer[13 + sizes[i]] == 0);
	}
	wr = write_wr(&a, &to, sges, 0, 0, 3u << 20);
	for (j = 1; j < 4; j++) {
		sges[j] = sges[0];
		sges[j].addr += j * 5000000;
	}
	wr.num_sge = 4;
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.byte_len == 12u << 20);
	for (j = 0; j < 4; j++)
		CHECK(!memcmp(b.buffer + j * (3u << 20), a.buffer + j * 5000000,
			      3u << 20));
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void immediate(void)
{
	static const struct options patient = {
		.any_retry = true, .timeout = 18, .retry_cnt = 6, .rnr_retry = 7
	};
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct end a, b;
	struct card to;
	struct ibv_wc wc;

	make_pair(&a, &b, &patient);
	to = card_of(&b);
	fill_random(a.buffer, a.size);
	CHECK(!post_recv(&b, 7, 0, 0));
	wr = write_wr(&a, &to, &sge, 0, 512, 300);
	wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
	wr.imm_data = htonl(0x12345678);
	CHECK(!post_one(&a, &wr));
	reap(&b, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 7);
	CHECK(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM && wc.byte_len == 300);
	CHECK(wc.wc_flags & IBV_WC_WITH_IMM);
	CHECK(ntohl(wc.imm_data) == 0x12345678);
	CHECK(!memcmp(b.buffer + 512, a.buffer, 300));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);

	/* Without a byte, and before its receive is there. */
	wr.num_sge = 0;
	wr.wr.rdma.rkey = 0;
	CHECK(!post_one(&a, &wr));
	quiet(&a, 20);
	CHECK(!post_recv(&b, 8, 0, 0));
	reap(&b, &wc, 1);
	CHECK(wc.wr_id == 8 && wc.byte_len == 0);
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void reads(void)
{
	static const struct options options = { .size = 9u << 20,
						.rd_atomic = 2 };
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct end a, b;
	struct card to;
	struct ibv_wc wc[8];
	uint32_t i;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	fill_random(b.buffer, b.size);
	for (i = 0; i < 8; i++) {
		wr = write_wr(&a, &to, &sge, i << 20, i << 20,
			      i == 3 ? 0 : (1u << 20) - i);
		wr.opcode = IBV_WR_RDMA_READ;
		wr.wr_id = i;
		CHECK(!post_one(&a, &wr));
	}
	reap(&a, wc, 8);
	for (i = 0; i < 8; i++) {
		CHECK(wc[i].status == IBV_WC_SUCCESS && wc[i].wr_id == i);
		CHECK(wc[i].opcode == IBV_WC_RDMA_READ);
		if (i != 3)
			CHECK(!memcmp(a.buffer + (i << 20),
				      b.buffer + (i << 20), (1u << 20) - i));
	}
	/* A fenced write after a read sends what the read brought. */
	wr = write_wr(&a, &to, &sge, 0, 4u << 20, 1u << 20);
	wr.opcode = IBV_WR_RDMA_READ;
	CHECK(!post_one(&a, &wr));
	wr = write_wr(&a, &to, &sge, 0, 0, 1u << 20);
	wr.send_flags |= IBV_SEND_FENCE;
	CHECK(!post_one(&a, &wr));
	reap(&a, wc, 2);
	CHECK(wc[0].status == IBV_WC_SUCCESS && wc[1].status == IBV_WC_SUCCESS);
	CHECK(!memcmp(b.buffer, b.buffer + (4u << 20), 1u << 20));
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void atomics(void)
{
	enum { N = 16 };
	struct ibv_send_wr wr;
	uint64_t *fetched, *target;
	struct ibv_sge sge;
	struct end a, b;
	struct card to;
	struct ibv_wc wc[N + 1];
	uint32_t i;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	fetched = (uint64_t *)a.buffer;
	target = (uint64_t *)b.buffer;
	*target = UINT64_MAX;
	/* More of them than may be under way, then one of each kind of swap. */
	for (i = 0; i < N; i++) {
		wr = write_wr(&a, &to, &sge, i * 8, 0, 8);
		wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
		wr.wr.atomic.remote_addr = to.addr;
		wr.wr.atomic.rkey = to.rkey;
		wr.wr.atomic.compare_add = (1ull << 40) + 1;
		CHECK(!post_one(&a, &wr));
	}
	reap(&a, wc, N);
	for (i = 0; i < N; i++) {
		CHECK(wc[i].status == IBV_WC_SUCCESS);
		CHECK(wc[i].opcode == IBV_WC_FETCH_ADD && wc[i].byte_len == 8);
		CHECK(fetched[i] == UINT64_MAX + i * ((1ull << 40) + 1));
	}
	wr.opcode = IBV_WR_ATOMIC_CMP_AND_SWP;
	for (i = 0; i < 2; i++) {
		wr.wr.atomic.compare_add = i ? 5 : *target;
		wr.wr.atomic.swap = (7ull << 33) + i;
		CHECK(!post_one(&a, &wr));
		reap(&a, wc, 1);
		CHECK(wc[0].status == IBV_WC_SUCCESS);
		CHECK(wc[0].opcode == IBV_WC_COMP_SWAP);
		CHECK(*target == 7ull << 33); /* the second one did not match */
	}
	CHECK(fetched[N - 1] == 7ull << 33);
	sge.length = 4;
	CHECK(post_one(&a, &wr) == EINVAL);
	sge.length = 8;
	wr.wr.atomic.remote_addr += 4;
	CHECK(!post_one(&a, &wr));
	reap(&a, wc, 1);
	CHECK(wc[0].status == IBV_WC_REM_INV_REQ_ERR);
	CHECK(wc[0].vendor_err == KVX_SOFT_REMOTE_ALIGNMENT);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void sends(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct end a, b;
	struct card to;
	struct ibv_wc wc[2];
	uint32_t i;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	fill_random(a.buffer, a.size);
	for (i = 0; i < 3; i++)
		CHECK(!post_recv(&b, i, i * 10000, 10000));
	for (i = 0; i < 3; i++) {
		wr = write_wr(&a, &to, &sge, i * 5000, 0, i * 5000);
		wr.opcode = i == 1 ? IBV_WR_SEND_WITH_IMM : IBV_WR_SEND;
		wr.imm_data = htonl(99);
		CHECK(!post_one(&a, &wr));
		reap(&a, wc, 1);
		CHECK(wc->status == IBV_WC_SUCCESS &&
		      wc->opcode == IBV_WC_SEND);
		reap(&b, wc, 1);
		CHECK(wc->status == IBV_WC_SUCCESS && wc->wr_id == i);
		CHECK(wc->opcode == IBV_WC_RECV && wc->byte_len == i * 5000);
		CHECK(!!(wc->wc_flags & IBV_WC_WITH_IMM) == (i == 1));
		CHECK(!memcmp(b.buffer + i * 10000, a.buffer + i * 5000,
			      i * 5000));
	}
	/* Inline bytes are taken at once, SGE keys do not matter. */
	CHECK(!post_recv(&b, 9, 0, 64));
	wr = write_wr(&a, &to, &sge, 0, 0, 60);
	sge.lkey = 1;
	wr.opcode = IBV_WR_SEND;
	wr.send_flags |= IBV_SEND_INLINE;
	a.buffer[0] = 1;
	CHECK(!post_one(&a, &wr));
	a.buffer[0] = 2;
	reap(&a, wc, 1);
	reap(&b, wc, 1);
	CHECK(wc->wr_id == 9 && b.buffer[0] == 1);
	sge.length = 65;
	CHECK(post_one(&a, &wr) == ENOMEM);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

int main(void)
{
	one_write();
	many_writes();
	long_writes();
	immediate();
	reads();
	atomics();
	sends();
	puts("basic: ok");
	return 0;
}
