/* The second thread for large copies: everything is copied once, in any order that
 * does no harm, and both threads are done when it is said to be. */
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../kvxfer/softdev/connection.h"
#include "../../kvxfer/softdev/context.h"
#include "../../kvxfer/softdev/copier.h"
#include "../../kvxfer/softdev/disjoint.h"
#include "../../kvxfer/softdev/wire_shm.h"
#include "harness.h"

#define MANY (1u << 20) /* bytes that the copier is woken for */

/* --- are ranges disjoint? -------------------------------------------------- */

static struct soft_marks marks;

static bool overlap(const struct iovec *ranges, uint32_t n)
{
	uint32_t i, j;

	for (i = 0; i < n; i++)
		for (j = 0; j < i; j++)
			if ((char *)ranges[i].iov_base <
				    (char *)ranges[j].iov_base +
					    ranges[j].iov_len &&
			    (char *)ranges[j].iov_base <
				    (char *)ranges[i].iov_base +
					    ranges[i].iov_len)
				return true;
	return false;
}

static uint32_t below(uint32_t n)
{
	return (uint32_t)rand() % n;
}

/* Runs of blocks of one size, somewhere; sometimes one lies elsewhere. */
static uint32_t some_ranges(struct iovec *ranges, uint64_t block)
{
	uint32_t n = 2 + below(60), i;
	uint64_t base = (uint64_t)1 << 40 | below(4096);

	for (i = 0; i < n; i++) {
		ranges[i].iov_base = (void *)(uintptr_t)(base +
							 block * below(20 * n));
		ranges[i].iov_len = block * (1 + below(3));
	}
	if (below(4) == 0)
		ranges[below(n)].iov_base = (void *)(uintptr_t)(base - 1 -
								below(1000));
	return n;
}

static void disjoint(void)
{
	static const uint64_t blocks[] = { 256, 1000, 1024, 12288, 65536 };
	uint32_t i, n, yes = 0, no = 0;
	struct iovec ranges[64];

	for (i = 0; i < 50000; i++) {
		n = some_ranges(ranges, blocks[i % 5]);
		if (soft_are_disjoint(&marks, ranges, n)) {
			CHECK(!overlap(ranges, n));
			yes++;
		} else {
			no++;
		}
	}
	CHECK(yes > 1000 && no > 1000);
}

/* Blocks of one size that are all different are always known to be. */
static void blocks_of_one_size(void)
{
	struct iovec ranges[1000];
	uint32_t i, at, round;

	for (round = 0; round < 200; round++) {
		uint64_t size = 256 + 8 * (uint64_t)below(4000);

		for (i = 0; i < 1000; i++)
			ranges[i] = (struct iovec){
				(void *)(uintptr_t)(4096 +
						    size * (i * 7919 % 10007)),
				size
			};
		CHECK(soft_are_disjoint(&marks, ranges, 1000));
		at = below(999);
		ranges[at].iov_base = ranges[at + 1].iov_base;
		CHECK(!soft_are_disjoint(&marks, ranges, 1000));
		ranges[at].iov_base = (char *)ranges[at + 1].iov_base + 1;
		CHECK(!soft_are_disjoint(&marks, ranges, 1000));
	}
}

/* Blocks with something of another size behind them, before, behind and among them. */
static void a_record_behind_blocks(void)
{
	struct iovec ranges[101];
	char *const pool = (char *)((uintptr_t)1 << 40);
	uint32_t i;

	for (i = 0; i < 100; i++)
		ranges[i] = (struct iovec){ pool + 1024 * (i * 7 % 101), 1024 };
	ranges[100] = (struct iovec){ pool - 5008, 5008 };
	CHECK(soft_are_disjoint(&marks, ranges, 101));
	ranges[100].iov_base = pool + 1024 * 101 + 8;
	CHECK(soft_are_disjoint(&marks, ranges, 101));
	ranges[100].iov_base = pool - 5007;
	CHECK(!soft_are_disjoint(&marks, ranges, 101));
	ranges[100].iov_base = pool + 1024 * 101 - 1;
	CHECK(!soft_are_disjoint(&marks, ranges, 101));
	ranges[100].iov_base = pool + 50008;
	CHECK(!soft_are_disjoint(&marks, ranges, 101));
	ranges[100].iov_base = pool - 5008;
	ranges[3].iov_base = ranges[4].iov_base;
	CHECK(!soft_are_disjoint(&marks, ranges, 101));
	/* Two of which one could be called the last: alone there is no overlap. */
	ranges[1] = (struct iovec){ (char *)ranges[0].iov_base + 1, 512 };
	CHECK(!soft_are_disjoint(&marks, ranges, 2));
}

/* The marks of the last round of 2^24 are not those of the first. */
static void rounds_begin_again(void)
{
	struct iovec pair[2] = { { (void *)4096, 512 }, { (void *)8192, 512 } };

	memset(&marks, 0, sizeof(marks));
	CHECK(soft_are_disjoint(&marks, pair, 2)); /* of round 1 */
	marks.round = (1u << 24) - 1;
	CHECK(soft_are_disjoint(&marks, pair, 2));
	CHECK(marks.round == 1);
}

/* --- sharing ---------------------------------------------------------------- */

struct job {
	uint32_t n, number;
	uint32_t *times; /* how often each part was copied, and in which job */
	uint32_t slow;	 /* ms that the copier takes for a share */
	uint32_t by_copier;
};

static void copy(void *arg, uint32_t first, uint32_t end, bool down)
{
	struct job *job = arg;

	CHECK(first < end && end <= job->n);
	if (down) {
		job->by_copier += end - first;
		if (job->slow)
			usleep(1000 * job->slow);
	}
	for (; first < end; first++)
		job->times[first] += job->number;
}

static void share(struct soft_conn *conn, uint32_t rounds)
{
	struct iovec to = { conn, MANY };
	uint32_t *times = calloc(2000, sizeof(*times)), i, round;
	struct job job = { .times = times };

	for (round = 1; round <= rounds; round++) {
		/* Asleep, or still awake from the last one. */
		if (below(50) == 0)
			soft_copier_dismiss(conn->ctx);
		if (!soft_copier_joins(conn, &to, 1, MANY)) {
			CHECK(conn->ctx->no_copier);
			break;
		}
		job.n = 1 + below(2000);
		job.number = round;
		job.slow = round % 100 == 0; /* we sleep until it is done */
		memset(times, 0, 2000 * sizeof(*times));
		soft_copier_share(conn->ctx, copy, &job, job.n, 1 + below(20));
		for (i = 0; i < job.n; i++)
			CHECK(times[i] == round);
	}
	CHECK(conn->ctx->no_copier || job.by_copier > 0);
	free(times);
}

static void everything_once(void)
{
	struct soft_context *ctx = calloc(1, sizeof(*ctx));
	struct soft_conn *conn = calloc(1, sizeof(*conn));
	struct kvx_soft_counts counts;

	conn->ctx = ctx;
	soft_copier_stop(ctx); /* there was none */
	share(conn, 5000);
	kvx_soft_counts(&counts);
	CHECK(ctx->no_copier ? !counts.threads : counts.threads == 1);
	soft_copier_stop(ctx);
	soft_copier_stop(ctx);
	no_objects_left();
	free(conn);
	free(ctx);
}

static void small_ones_alone(void)
{
	struct soft_context *ctx = calloc(1, sizeof(*ctx));
	struct soft_conn *conn = calloc(1, sizeof(*conn));
	struct iovec to = { conn, 65536 };

	conn->ctx = ctx;
	CHECK(!soft_copier_joins(conn, &to, 1, 65536));
	CHECK(!ctx->copier && !ctx->no_copier);
	free(conn);
	free(ctx);
}

/* --- through verbs ----------------------------------------------------------- */

static bool two_threads_copy(void)
{
	const char *wire = getenv("KVXFER_SOFT_WIRE");
	cpu_set_t set;

	CHECK(!sched_getaffinity(0, sizeof(set), &set));
	return CPU_COUNT(&set) > 1 && (!wire || strcmp(wire, "tcp"));
}

/* Chains of large WRITEs to the same place, by one key or two: the last one counts. */
static void the_last_one_counts(void)
{
	const struct options options = { .size = 8 << 20, .sig_all = true };
	const uint32_t size = 128 << 10;
	struct ibv_send_wr wrs[8];
	struct ibv_sge sges[8];
	struct kvx_soft_counts counts;
	struct ibv_mr *again;
	struct ibv_wc wc[8];
	struct end a, b;
	struct card to;
	int i, n, round;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	again = verbs.reg_mr_fd(b.pd, b.fd, 0, b.buffer, b.size, ALL_ACCESS);
	CHECK(again);
	fill_random(a.buffer, a.size);
	for (round = 0; round < 200; round++) {
		n = round % 2 ? 2 : 8;
		for (i = 0; i < n; i++) {
			wrs[i] = write_wr(&a, &to, &sges[i],
					  (size_t)(round + i) % 64 * size, 0,
					  size);
			wrs[i].next = i < n - 1 ? &wrs[i + 1] : NULL;
		}
		if (n == 2)
			wrs[1].wr.rdma.rkey = again->rkey;
		CHECK(!post_one(&a, wrs));
		reap(&a, wc, n);
		CHECK(!memcmp(b.buffer,
			      a.buffer + (size_t)(round + n - 1) % 64 * size,
			      size));
	}
	kvx_soft_counts(&counts);
	CHECK(counts.threads == 2u + two_threads_copy());
	CHECK(!verbs.dereg_mr(again));
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* Private memory of which a page is gone, read by cma: whichever thread comes to it,
 * the WR fails that it belongs to, and the one before has succeeded. (In a stream it
 * is the oldest one on its way that fails.) */
static void holes(bool source)
{
	const struct options options = { .size = 2 << 20,
					 .plain = true,
					 .sig_all = true };
	const size_t half = 512 << 10, page = 4096;
	const size_t places[] = { 0,	page,	      half - page,
				  half, half * 3 / 2, 2 * half - page };
	struct end a, b, *victim = source ? &a : &b;
	struct ibv_send_wr wrs[2];
	struct ibv_sge sges[2];
	struct ibv_wc wc[2];
	struct card to;
	size_t i;

	for (i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
		const int bad = places[i] >= half;

		make_pair(&a, &b, &options);
		to = card_of(&b);
		fill_random(a.buffer, a.size);
		CHECK(mmap(victim->buffer + places[i], page, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
			   0) == victim->buffer + places[i]);
		wrs[0] = write_wr(&a, &to, &sges[0], 0, 0, (uint32_t)half);
		wrs[1] = write_wr(&a, &to, &sges[1], half, half,
				  (uint32_t)half);
		wrs[0].next = &wrs[1];
		CHECK(!post_one(&a, wrs));
		reap(&a, wc, 2);
		CHECK(wc[bad].status ==
		      (source ? IBV_WC_LOC_PROT_ERR : IBV_WC_REM_OP_ERR));
		CHECK(!bad || wc[0].status == IBV_WC_SUCCESS);
		close_end(&a);
		close_end(&b);
		no_objects_left();
	}
}

int main(void)
{
	disjoint();
	a_record_behind_blocks();
	blocks_of_one_size();
	rounds_begin_again();
	everything_once();
	small_ones_alone();
	the_last_one_counts();
	if (!strcmp(getenv("KVXFER_SOFT_WIRE") ?: "", "cma")) {
		holes(true);
		holes(false);
	}
	puts("copier: ok");
	return 0;
}
