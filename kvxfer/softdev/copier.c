/* A second thread that takes its part of a large copy. copier.h has the idea. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "connection.h"
#include "context.h"
#include "copier.h"
#include "disjoint.h"
#include "wire_shm.h"

/* A copy of so many bytes is worth two threads; one of so many, or with so much in
 * the ring behind it, is worth waking the second. */
#define SHARE_BYTES (16u << 10)
#define CALL_BYTES (256u << 10)
#define CALL_BEHIND 1024
/* The device thread needs less than this between two copies of a stream. */
#define IDLE_LOOKS 400u
#define LOOKS_A_YIELD 16u
/* The copier needs less than this for the parts that it has begun. */
#define PATIENT_LOOKS 500u

/* A number that no two copies in a row share, and the parts that nobody has taken
 * yet: [front, back). The device thread takes from the front, the copier from the
 * back, each a few at a time. */
#define WORD(number, front, back) \
	((uint64_t)(number) << 32 | (uint64_t)(front) << 16 | (back))
#define FRONT(word) ((uint32_t)((word) >> 16 & 0xffff))
#define BACK(word) ((uint32_t)((word) & 0xffff))

struct soft_copier {
	pthread_t thread;
	sem_t wake, ready;
	atomic_bool asleep, idle, stop;
	atomic_bool awaited; /* the device thread sleeps until we are ready */
	/* What to copy. Written by the device thread while nothing is left to be
	 * taken; who has read them and then takes something has read the right
	 * ones. */
	_Atomic(soft_part_fn) copy;
	_Atomic(void *) job;
	atomic_uint step;
	_Alignas(64) atomic_uint_fast64_t word;
	_Alignas(64) atomic_uint done; /* parts that the copier has copied */
	_Alignas(64) struct soft_marks marks; /* the device thread's */
};

static void relax(void)
{
#ifdef __x86_64__
	__builtin_ia32_pause();
#endif
}

/* Some parts to copy. */
struct share {
	soft_part_fn copy;
	void *job;
	uint32_t first, end;
};

/* Take some, if there are any left. */
static bool take(struct soft_copier *copier, bool down, struct share *share)
{
	uint64_t word = atomic_load_explicit(&copier->word,
					     memory_order_acquire);
	uint32_t front, back, n;

	do {
		front = FRONT(word);
		back = BACK(word);
		if (front == back)
			return false;
		share->copy = atomic_load_explicit(&copier->copy,
						   memory_order_relaxed);
		share->job = atomic_load_explicit(&copier->job,
						  memory_order_relaxed);
		n = atomic_load_explicit(&copier->step, memory_order_relaxed);
		if (n > back - front)
			n = back - front;
		share->first = down ? back - n : front;
		share->end = share->first + n;
	} while (!atomic_compare_exchange_weak_explicit(
		&copier->word, &word,
		WORD(word >> 32, down ? front : share->end,
		     down ? share->first : back),
		memory_order_acq_rel, memory_order_acquire));
	return true;
}

/* Copy what there is to take; returns how many parts. */
static uint32_t copy_on(struct soft_copier *copier, bool down)
{
	struct share share;
	uint32_t n = 0;

	while (take(copier, down, &share)) {
		share.copy(share.job, share.first, share.end, down);
		n += share.end - share.first;
		if (!down)
			continue;
		atomic_fetch_add(&copier->done, share.end - share.first);
		if (atomic_load(&copier->awaited) &&
		    atomic_exchange(&copier->awaited, false))
			sem_post(&copier->ready);
	}
	return n;
}

static void wait_for(sem_t *sem)
{
	while (sem_wait(sem) && errno == EINTR)
		;
}

/* Until the copier has copied n parts. It is nearly there, unless it has lost its
 * processor: then it can have ours. */
static void await(struct soft_copier *copier, uint32_t n)
{
	uint32_t looks = 0;

	while (atomic_load(&copier->done) < n) {
		if (++looks < PATIENT_LOOKS) {
			relax();
			continue;
		}
		atomic_store(&copier->awaited, true);
		if (atomic_load(&copier->done) < n ||
		    !atomic_exchange(&copier->awaited, false))
			wait_for(&copier->ready);
	}
}

static void sleep_on(struct soft_copier *copier)
{
	atomic_store(&copier->asleep, true);
	wait_for(&copier->wake);
}

static void *copier_thread(void *arg)
{
	struct soft_copier *copier = arg;
	uint32_t looks = 0;

	pthread_setname_np(pthread_self(), "kvx-copy");
	while (!atomic_load_explicit(&copier->stop, memory_order_relaxed)) {
		if (copy_on(copier, true)) {
			looks = 0;
		} else if (looks > IDLE_LOOKS ||
			   atomic_load_explicit(&copier->idle,
						memory_order_relaxed)) {
			sleep_on(copier);
			looks = 0;
		} else if (++looks % LOOKS_A_YIELD) {
			relax();
		} else { /* for who wants it: it may be the device thread */
			sched_yield();
		}
	}
	return NULL;
}

static bool several_processors(void)
{
	cpu_set_t set;

	return !sched_getaffinity(0, sizeof(set), &set) && CPU_COUNT(&set) > 1;
}

static void discard(struct soft_copier *copier)
{
	sem_destroy(&copier->wake);
	sem_destroy(&copier->ready);
	free(copier);
}

static struct soft_copier *new_copier(void)
{
	struct soft_copier *copier = NULL;
	sigset_t all, before;
	int err;

	if (!several_processors() ||
	    posix_memalign((void **)&copier, 64, sizeof(*copier)))
		return NULL;
	memset(copier, 0, sizeof(*copier));
	sem_init(&copier->wake, 0, 0);
	sem_init(&copier->ready, 0, 0);
	/* The application's signals are for the application's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(&copier->thread, NULL, copier_thread, copier);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err) {
		discard(copier);
		return NULL;
	}
	atomic_fetch_add(&soft_tally.threads, 1);
	return copier;
}

void soft_copier_stop(struct soft_context *ctx)
{
	struct soft_copier *copier = ctx->copier;

	ctx->copier = NULL;
	if (!copier)
		return;
	atomic_store(&copier->stop, true);
	sem_post(&copier->wake);
	pthread_join(copier->thread, NULL);
	discard(copier);
	atomic_fetch_sub(&soft_tally.threads, 1);
}

static void wake(struct soft_copier *copier)
{
	if (atomic_load(&copier->asleep) &&
	    atomic_exchange(&copier->asleep, false))
		sem_post(&copier->wake);
}

bool soft_copier_joins(const struct soft_conn *conn, const struct iovec *to,
		       uint32_t n, size_t bytes)
{
	struct soft_context *ctx = conn->ctx;
	bool worth_waking = bytes >= CALL_BYTES ||
			    (conn->shm &&
			     shm_data(&conn->shm->in) > CALL_BEHIND);

	if (bytes < SHARE_BYTES)
		return false;
	if (worth_waking && !ctx->copier && !ctx->no_copier) {
		ctx->copier = new_copier();
		ctx->no_copier = !ctx->copier;
	}
	if (!ctx->copier ||
	    (!worth_waking && atomic_load_explicit(&ctx->copier->asleep,
						   memory_order_relaxed)) ||
	    !soft_are_disjoint(&ctx->copier->marks, to, n))
		return false;
	wake(ctx->copier);
	return true;
}

void soft_copier_dismiss(struct soft_context *ctx)
{
	if (ctx->copier)
		atomic_store_explicit(&ctx->copier->idle, true,
				      memory_order_relaxed);
}

void soft_copier_share(struct soft_context *ctx, soft_part_fn copy, void *job,
		       uint32_t n, uint32_t step)
{
	struct soft_copier *copier = ctx->copier;
	uint32_t number = (uint32_t)(copier->word >> 32) + 1;

	atomic_store_explicit(&copier->copy, copy, memory_order_relaxed);
	atomic_store_explicit(&copier->job, job, memory_order_relaxed);
	atomic_store_explicit(&copier->step, step, memory_order_relaxed);
	atomic_store_explicit(&copier->done, 0, memory_order_relaxed);
	atomic_store_explicit(&copier->idle, false, memory_order_relaxed);
	atomic_store_explicit(&copier->word, WORD(number, 0, n),
			      memory_order_release);
	await(copier, n - copy_on(copier, false));
}
