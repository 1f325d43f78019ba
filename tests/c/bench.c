/*
 * How fast the device is: 1538 scattered blocks from one process to another,
 * one batch after the other, beside a memcpy of the same blocks in one process.
 *
 * Build with -O2, not with sanitizers. Prints median and best of some batches.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"

enum { BLOCKS = 1538, CHAIN = 64, BATCHES = 60 };

static uint32_t from[BLOCKS], to[BLOCKS];

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void scatter(uint32_t *ids, uint32_t n_blocks, uint32_t seed)
{
	uint32_t *all = malloc(n_blocks * sizeof(*all)), i, j, swap;

	for (i = 0; i < n_blocks; i++)
		all[i] = i;
	srandom(seed);
	for (i = 0; i < BLOCKS; i++) {
		j = i + (uint32_t)random() % (n_blocks - i);
		swap = all[i];
		all[i] = all[j];
		all[j] = swap;
		ids[i] = all[i];
	}
	free(all);
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void report(const char *what, uint32_t block, uint64_t *ns)
{
	double bytes = (double)BLOCKS * block;

	qsort(ns, BATCHES, sizeof(*ns), by_value);
	printf("%-8s %7u B: median %8.1f us  %6.2f GB/s   best %8.1f us  %6.2f "
	       "GB/s\n",
	       what, block, (double)ns[BATCHES / 2] / 1e3,
	       bytes / (double)ns[BATCHES / 2], (double)ns[0] / 1e3,
	       bytes / (double)ns[0]);
}

static void batch(struct end *a, const struct card *peer, uint32_t block)
{
	static struct ibv_send_wr wrs[CHAIN], *bad;
	static struct ibv_sge sges[CHAIN];
	struct ibv_wc wc;
	int i, j, n;

	for (i = 0; i < BLOCKS; i += n) {
		n = BLOCKS - i < CHAIN ? BLOCKS - i : CHAIN;
		for (j = 0; j < n; j++) {
			wrs[j] = write_wr(a, peer, &sges[j],
					  (size_t)from[i + j] * block,
					  (size_t)to[i + j] * block, block);
			wrs[j].send_flags = 0;
			wrs[j].next = j + 1 < n ? &wrs[j + 1] : NULL;
		}
		if (i + n == BLOCKS)
			wrs[n - 1].send_flags = IBV_SEND_SIGNALED;
		CHECK(!ibv_post_send(a->qp, wrs, &bad));
	}
	reap(a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);
}

static void target(int in, int out, const struct options *options)
{
	struct card mine, peer;
	struct end b;
	char byte;

	open_end(&b, options);
	memset(b.buffer, 1, b.size);
	mine = card_of(&b);
	CHECK(write(out, &mine, sizeof(mine)) == sizeof(mine));
	CHECK(read(in, &peer, sizeof(peer)) == sizeof(peer));
	connect_end(&b, &peer, options);
	CHECK(write(out, "r", 1) == 1);
	CHECK(read(in, &byte, 1) == 1);
	close_end(&b);
	_exit(0);
}

static void measure(uint32_t block, size_t pool)
{
	struct options options = { .size = pool, .send_wr = 2048 };
	char wire[KVX_WIRE_NAME_BYTES];
	struct card mine, peer;
	int up[2], down[2], i;
	uint64_t ns[BATCHES];
	struct end a;
	char byte;
	pid_t pid;

	CHECK(!pipe(up) && !pipe(down));
	pid = fork();
	if (pid == 0)
		target(down[0], up[1], &options);
	open_end(&a, &options);
	fill_random(a.buffer, a.size);
	mine = card_of(&a);
	CHECK(read(up[0], &peer, sizeof(peer)) == sizeof(peer));
	CHECK(write(down[1], &mine, sizeof(mine)) == sizeof(mine));
	CHECK(read(up[0], &byte, 1) == 1);
	connect_end(&a, &peer, &options);
	for (i = -10; i < BATCHES; i++) {
		uint64_t start = now_ns();

		batch(&a, &peer, block);
		if (i >= 0)
			ns[i] = now_ns() - start;
	}
	verbs.wire_name(a.qp, wire);
	report(wire, block, ns);
	for (i = 0; i < BATCHES; i++) {
		struct ibv_sge sge;
		struct ibv_send_wr wr = write_wr(&a, &peer, &sge, 0, 0, 64);
		struct ibv_wc wc;
		uint64_t start = now_ns();

		CHECK(!post_one(&a, &wr));
		reap(&a, &wc, 1);
		ns[i] = now_ns() - start;
	}
	qsort(ns, BATCHES, sizeof(*ns), by_value);
	printf("%-8s one 64 B write: median %.1f us\n", wire,
	       (double)ns[BATCHES / 2] / 1e3);
	CHECK(write(down[1], "x", 1) == 1);
	close_end(&a);
	waitpid(pid, NULL, 0);
	close(up[0]), close(up[1]), close(down[0]), close(down[1]);
}

static void plain(uint32_t block, size_t pool)
{
	uint8_t *a = mmap(NULL, pool, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t *b = mmap(NULL, pool, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t ns[BATCHES];
	int i, j;

	memset(a, 1, pool);
	memset(b, 2, pool);
	for (i = 0; i < BATCHES; i++) {
		uint64_t start = now_ns();

		for (j = 0; j < BLOCKS; j++)
			memcpy(b + (size_t)to[j] * block,
			       a + (size_t)from[j] * block, block);
		ns[i] = now_ns() - start;
	}
	report("memcpy", block, ns);
	munmap(a, pool);
	munmap(b, pool);
}

int main(void)
{
	static const uint32_t blocks[] = { 1024, 65536 };
	size_t pool = 256u << 20, i;

	for (i = 0; i < sizeof(blocks) / sizeof(blocks[0]); i++) {
		scatter(from, (uint32_t)(pool / blocks[i]), 1);
		scatter(to, (uint32_t)(pool / blocks[i]), 2);
		plain(blocks[i], pool);
		setenv("KVXFER_SOFT_WIRE", "cma", 1);
		measure(blocks[i], pool);
		setenv("KVXFER_SOFT_WIRE", "tcp", 1);
		measure(blocks[i], pool);
	}
	return 0;
}
