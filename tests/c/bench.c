/*
 * How fast the device is: 1538 scattered blocks from one process to another,
 * one batch after the other, in turns with a memcpy of the same blocks between
 * the same memory in one process.
 *
 *	bench [WIRE [BLOCK...]]     shm, cma or tcp
 *
 * Build with -O2, not with sanitizers. The pools are larger than any cache and
 * each batch has blocks of its own. Prints the medians and that of the ratios.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../../kvxfer/softdev/wire_shm.h"
#include "harness.h"

enum { BLOCKS = 1538, CHAIN = 64, WARM = 4, ROUNDS = 60 };
#define POOL ((size_t)1 << 30)

static uint32_t *from, *to;

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint32_t *scatter(uint32_t n_blocks, unsigned int seed)
{
	uint32_t *all = malloc(n_blocks * sizeof(*all)), i, j, swap;

	for (i = 0; i < n_blocks; i++)
		all[i] = i;
	srandom(seed);
	for (i = 0; i < n_blocks; i++) {
		j = i + (uint32_t)random() % (n_blocks - i);
		swap = all[i];
		all[i] = all[j];
		all[j] = swap;
	}
	return all;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(double *values, int n)
{
	qsort(values, (size_t)n, sizeof(*values), by_value);
	return values[n / 2];
}

static void batch(struct end *a, const struct card *peer, uint32_t block,
		  uint32_t first)
{
	static struct ibv_send_wr wrs[CHAIN], *bad;
	static struct ibv_sge sges[CHAIN];
	struct ibv_wc wc;
	int i, j, n;

	for (i = 0; i < BLOCKS; i += n) {
		n = BLOCKS - i < CHAIN ? BLOCKS - i : CHAIN;
		for (j = 0; j < n; j++) {
			uint32_t at = first + (uint32_t)(i + j);

			wrs[j] = write_wr(a, peer, &sges[j],
					  (size_t)from[at] * block,
					  (size_t)to[at] * block, block);
			wrs[j].send_flags = 0;
			wrs[j].next = j + 1 < n ? &wrs[j + 1] : NULL;
		}
		if (i + n == BLOCKS)
			wrs[n - 1].send_flags = IBV_SEND_SIGNALED;
		CHECK(!ibv_post_send(a->qp, wrs, &bad));
	}
	while (ibv_poll_cq(a->cq, 1, &wc) == 0)
		;
	CHECK(wc.status == IBV_WC_SUCCESS);
}

static void copy(uint8_t *target, const uint8_t *source, uint32_t block,
		 uint32_t first)
{
	uint32_t i;

	for (i = first; i < first + BLOCKS; i++)
		memcpy(target + (size_t)to[i] * block,
		       source + (size_t)from[i] * block, block);
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

static void measure(uint32_t block, struct end *a, const struct card *peer)
{
	static double plain[ROUNDS], ours[ROUNDS], ratios[ROUNDS];
	uint32_t n_blocks = (uint32_t)(POOL / block), first = 0;
	int fd = sealed_memory(POOL);
	uint8_t *other = map_aligned(fd, POOL);
	double bytes = (double)BLOCKS * block;
	uint64_t start, between;
	int i;

	soft_make_huge(other, POOL);
	memset(other, 3, POOL);
	from = scatter(n_blocks, 1);
	to = scatter(n_blocks, 2);
	for (i = -WARM; i < ROUNDS; i++) {
		start = now_ns();
		copy(other, a->buffer, block, first);
		between = now_ns();
		first = first + 2 * BLOCKS <= n_blocks ? first + BLOCKS : 0;
		if (i >= 0)
			plain[i] = (double)(between - start);
		start = now_ns();
		batch(a, peer, block, first);
		between = now_ns();
		first = first + 2 * BLOCKS <= n_blocks ? first + BLOCKS : 0;
		if (i >= 0) {
			ours[i] = (double)(between - start);
			ratios[i] = plain[i] / ours[i];
		}
	}
	munmap(other, POOL);
	close(fd);
	free(from), free(to);
	printf("%7u B: memcpy %8.1f us %6.2f GB/s   device %8.1f us %6.2f "
	       "GB/s   ratio %.2f",
	       block, median(plain, ROUNDS) / 1e3,
	       bytes / median(plain, ROUNDS), median(ours, ROUNDS) / 1e3,
	       bytes / median(ours, ROUNDS), median(ratios, ROUNDS));
	printf(" (%.2f to %.2f)\n", ratios[ROUNDS / 10],
	       ratios[ROUNDS - 1 - ROUNDS / 10]);
}

int main(int argc, char **argv)
{
	static const uint32_t usual[] = { 1024, 4096, 16384, 65536, 262144 };
	struct options options = { .size = POOL, .send_wr = 2048 };
	struct card mine, peer;
	int up[2], down[2], i;
	struct end a;
	char byte;
	pid_t pid;

	setenv("KVXFER_SOFT_WIRE", argc > 1 ? argv[1] : "shm", 1);
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
	for (i = 0; i < 5 && argc < 3; i++)
		measure(usual[i], &a, &peer);
	for (i = 2; i < argc; i++)
		measure((uint32_t)atoi(argv[i]), &a, &peer);
	CHECK(write(down[1], "x", 1) == 1);
	close_end(&a);
	waitpid(pid, NULL, 0);
	return 0;
}
