/*
 * Many queues, threads and moments of death at once: for the race detector.
 *
 * Each pair writes patterns that name their round and place. The promises
 * checked: what a completion covers is there; after dereg_mr, destroy_qp or
 * modify_qp to ERR has returned nothing changes any more.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "harness.h"

enum { PAIRS = 4, WRITES = 64, BLOCK = 3000, ROUNDS = 40 };

static void pattern(uint8_t *at, uint32_t round, uint32_t place)
{
	uint32_t i, words[2] = { round, place };

	for (i = 0; i + 8 <= BLOCK; i += 8)
		memcpy(at + i, words, 8);
}

static void *traffic(void *arg)
{
	static const struct options options = { .size = WRITES * BLOCK,
						.send_wr = 32 };
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc[32];
	struct end a, b;
	struct card to;
	uint32_t round, i, open, signaled;

	(void)arg;
	make_pair(&a, &b, &options);
	to = card_of(&b);
	for (round = 1; round <= ROUNDS; round++) {
		for (i = 0; i < WRITES; i++)
			pattern(a.buffer + i * BLOCK, round, i);
		for (i = 0, open = 0, signaled = 0; i < WRITES; i++, open++) {
			if (open == 32) {
				reap(&a, wc, (int)signaled);
				open = signaled = 0;
			}
			wr = write_wr(&a, &to, &sge, i * BLOCK, i * BLOCK,
				      BLOCK);
			if (i % 4 != 3)
				wr.send_flags = 0;
			else
				signaled++;
			CHECK(!post_one(&a, &wr));
		}
		reap(&a, wc, (int)signaled);
		CHECK(!memcmp(a.buffer, b.buffer, WRITES * BLOCK - BLOCK % 8));
	}
	close_end(&a);
	close_end(&b);
	return NULL;
}

enum fence { DEREG, QP_ERROR, QP_RESET, QP_DESTROY, FENCES };

static void busy_wait_us(uint32_t us)
{
	struct timespec start, now;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do {
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((now.tv_sec - start.tv_sec) * 1000000 +
			 (now.tv_nsec - start.tv_nsec) / 1000 <
		 us);
}

/* Keep writing while the target takes its memory back, by each way. */
static void fence_round(enum fence how, uint32_t delay_us)
{
	/* Four chunks a frame, so that the end comes in the middle of one. */
	enum { BIG = 16384, SIZE = 256 * BIG };
	static const struct options options = { .size = SIZE, .send_wr = 256 };
	static uint8_t before[SIZE];
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct end a, b;
	struct card to;
	uint32_t i;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	memset(a.buffer, 0x11, SIZE);
	for (i = 0; i < 256; i++) {
		wr = write_wr(&a, &to, &sge, 0, i * BIG, BIG);
		CHECK(!post_one(&a, &wr));
	}
	busy_wait_us(delay_us);
	switch (how) {
	case DEREG:
		CHECK(!verbs.dereg_mr(b.mr));
		break;
	case QP_ERROR:
		CHECK(!to_state(&b, IBV_QPS_ERR));
		break;
	case QP_RESET:
		CHECK(!to_state(&b, IBV_QPS_RESET));
		break;
	default:
		CHECK(!verbs.destroy_qp(b.qp));
	}
	memcpy(before, b.buffer, SIZE);
	/* From now on the initiator cannot get through any more: see it fail. */
	{
		struct ibv_wc wc[256];
		uint32_t ok = 0;

		if (how == DEREG) {
			reap(&a, wc, 256);
			for (i = 0; i < 256; i++)
				ok += wc[i].status == IBV_WC_SUCCESS;
		} else {
			CHECK(!to_state(&a, IBV_QPS_ERR));
			reap(&a, wc, 256);
			for (i = 0; i < 256; i++)
				ok += wc[i].status == IBV_WC_SUCCESS;
		}
		CHECK(!memcmp(before, b.buffer, SIZE));
		for (i = 0; i < ok * BIG; i++)
			CHECK(b.buffer[i] == 0x11);
	}
	if (how == DEREG)
		b.mr = verbs.reg_mr(b.pd, b.buffer, b.size, 0);
	if (how == QP_DESTROY) {
		struct ibv_qp_init_attr init = { .qp_type = IBV_QPT_RC,
						 .send_cq = b.cq,
						 .recv_cq = b.cq };
		b.qp = verbs.create_qp(b.pd, &init);
	}
	close_end(&a);
	close_end(&b);
}

static void *fences(void *arg)
{
	uint32_t round;

	(void)arg;
	for (round = 0; round < 80; round++)
		fence_round(round % FENCES, round * 20);
	return NULL;
}

int main(void)
{
	pthread_t threads[PAIRS + 1];
	int i;

	kvx_load_softdev(&verbs);
	for (i = 0; i < PAIRS; i++)
		CHECK(!pthread_create(&threads[i], NULL, traffic, NULL));
	CHECK(!pthread_create(&threads[i], NULL, fences, NULL));
	for (i = 0; i <= PAIRS; i++)
		pthread_join(threads[i], NULL);
	no_objects_left();
	puts("stress: ok");
	return 0;
}
