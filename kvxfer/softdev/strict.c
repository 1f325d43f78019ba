/*
 * Strict mode: say aloud what a NIC would only punish some day.
 *
 * Wrong use that no status reports: a device need not notice it, and a program may
 * go on for long before it matters. A context that was opened with
 * KVXFER_SOFT_STRICT set watches for it; what it sees goes to standard error and
 * into a list that kvx_soft_take_violations() empties.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "context.h"
#include "initiator.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "strict.h"

#define PATIENCE_S 1 /* for acknowledgements that another thread may owe */

/* What was seen, one violation a line. */
static struct {
	pthread_mutex_t lock;
	size_t length;
	char text[8192];
} seen = { .lock = PTHREAD_MUTEX_INITIALIZER };

bool soft_strict_parse(const char *text, enum soft_strict *strict)
{
	if (!text || !*text || !strcmp(text, "0") || !strcmp(text, "off"))
		*strict = STRICT_OFF;
	else if (!strcmp(text, "1") || !strcmp(text, "report"))
		*strict = STRICT_REPORT;
	else if (!strcmp(text, "abort"))
		*strict = STRICT_ABORT;
	else
		return false;
	return true;
}

static void violation(struct soft_context *ctx, const char *format, ...)
{
	char line[256];
	va_list args;
	size_t length;

	va_start(args, format);
	vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	fprintf(stderr, "soft0: strict: %s\n", line);
	if (ctx->strict == STRICT_ABORT)
		abort();
	length = strlen(line);
	pthread_mutex_lock(&seen.lock);
	/* Of thousands the first ones say enough. */
	if (seen.length + length + 2 <= sizeof(seen.text)) {
		memcpy(seen.text + seen.length, line, length);
		seen.length += length;
		seen.text[seen.length++] = '\n';
		seen.text[seen.length] = '\0';
	}
	pthread_mutex_unlock(&seen.lock);
}

size_t kvx_soft_take_violations(char *text, size_t size)
{
	size_t length;

	pthread_mutex_lock(&seen.lock);
	length = seen.length < size ? seen.length : size - 1;
	memcpy(text, seen.text, length);
	text[length] = '\0';
	seen.length = 0;
	pthread_mutex_unlock(&seen.lock);
	return length;
}

void soft_strict_enter(struct soft_qp *qp)
{
	if (atomic_exchange(&qp->posting, true))
		violation(
			qp_context(qp),
			"two threads post to the send queue of QP 0x%x at the "
			"same time",
			qp->ibv.qp_num);
}

void soft_strict_leave(struct soft_qp *qp)
{
	atomic_store(&qp->posting, false);
}

/* Slots come back with the completion of a signaled WR: is there one? */
void soft_strict_full(struct soft_qp *qp, uint64_t head)
{
	struct soft_sq *sq = &qp->sq;
	uint64_t at = atomic_load_explicit(&sq->tail, memory_order_acquire);

	if (head - at < sq->depth || sq->told_full)
		return;
	for (; at != head; at++)
		if (sq->ring[at & sq->mask].signaled)
			return;
	sq->told_full = true;
	violation(qp_context(qp),
		  "the send queue of QP 0x%x is full and none of its %u WRs is "
		  "signaled: no slot will ever be free again",
		  qp->ibv.qp_num, sq->depth);
}

static uint64_t sum_of(uint64_t sum, const uint8_t *at, size_t length)
{
	uint64_t word;

	for (; length >= sizeof(word); length -= sizeof(word)) {
		memcpy(&word, at, sizeof(word));
		sum = (sum ^ word) * 0x100000001b3u;
		sum ^= sum >> 29;
		at += sizeof(word);
	}
	while (length--)
		sum = (sum ^ *at++) * 0x100000001b3u;
	return sum;
}

/* Of the bytes that the WR sends and the device reads when it pleases. */
static uint64_t sum_wr(struct soft_qp *qp, uint64_t seq)
{
	const struct soft_wqe *wqe = &qp->sq.ring[seq & qp->sq.mask];
	uint64_t sum = 0xcbf29ce484222325u;
	const struct ibv_sge *sges;
	struct ibv_sge one;
	uint32_t i, n;

	if (soft_fetches(wqe) || wqe->flags & IBV_SEND_INLINE)
		return 0;
	n = soft_wqe_sges(qp, seq, &one, &sges);
	for (i = 0; i < n; i++) {
		/* What is not there fails the WR, in its turn. */
		if (soft_check_mapped(sges[i].addr, sges[i].length, false))
			return 0;
		sum = sum_of(sum, (const uint8_t *)(uintptr_t)sges[i].addr,
			     sges[i].length);
	}
	return sum;
}

void soft_strict_posted(struct soft_qp *qp, uint64_t seq)
{
	qp->sq.sums[seq & qp->sq.mask] = sum_wr(qp, seq);
}

void soft_strict_done(struct soft_qp *qp, uint64_t seq)
{
	const struct soft_wqe *wqe = &qp->sq.ring[seq & qp->sq.mask];

	if (qp->sq.sums[seq & qp->sq.mask] != sum_wr(qp, seq))
		violation(qp_context(qp),
			  "the %llu bytes of a WR (wr_id 0x%llx, QP 0x%x) "
			  "changed between its post and its completion",
			  (unsigned long long)wqe->length,
			  (unsigned long long)wqe->wr_id, qp->ibv.qp_num);
}

void soft_strict_close(struct soft_context *ctx)
{
	if (ctx->strict)
		violation(ctx,
			  "the device is closed with %d of its PDs, CQs and "
			  "channels alive",
			  atomic_load(&ctx->children));
}

void soft_await_acks(struct soft_context *ctx, pthread_mutex_t *mutex,
		     pthread_cond_t *cond, const uint32_t *acked,
		     uint32_t taken, const char *what)
{
	struct timespec until;
	uint32_t missing = 0;

	pthread_mutex_lock(mutex);
	if (ctx->strict && *acked != taken) {
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += PATIENCE_S;
		while (*acked != taken &&
		       pthread_cond_timedwait(cond, mutex, &until) != ETIMEDOUT)
			;
		missing = taken - *acked;
	}
	if (missing)
		violation(ctx, "%s is destroyed with %u events unacknowledged",
			  what, missing);
	/* Without end, as the man page has it. */
	while (*acked != taken)
		pthread_cond_wait(cond, mutex);
	pthread_mutex_unlock(mutex);
}
