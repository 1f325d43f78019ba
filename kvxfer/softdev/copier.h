/*
 * A second thread of an adapter, for copies that are worth two.
 *
 * It has no lock and knows no queue: the device thread, which holds ctx->lock,
 * gives it a part of what it is about to copy itself, and goes on when both are
 * done. So whoever takes ctx->lock still knows that no byte is moving. It takes
 * only what the device thread has not come to yet: where it gets no processor,
 * the device thread copies all of it. If it loses its processor in the middle of
 * a part, the device thread has to wait for it, and sleeps meanwhile.
 */
#ifndef KVX_SOFT_COPIER_H
#define KVX_SOFT_COPIER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct soft_context;
struct soft_conn;

/* Copy the parts [first, end) of a job; down: those before them come next. */
typedef void (*soft_part_fn)(void *job, uint32_t first, uint32_t end,
			     bool down);

/* All by the device thread, ctx->lock held. */
/* Is a copy of so many bytes to n ranges worth two threads, and their order of no
 * matter? Then the copier is awake. It is woken for a large one, and for a smaller one
 * that others follow. */
bool soft_copier_joins(const struct soft_conn *conn, const struct iovec *to,
		       uint32_t n, size_t bytes);
/* Copy n parts, it from the end and we from the beginning, step at a time. */
void soft_copier_share(struct soft_context *ctx, soft_part_fn copy, void *job,
		       uint32_t n, uint32_t step);
/* Nothing more comes for now: it need not look on. */
void soft_copier_dismiss(struct soft_context *ctx);
/* The end of the thread; no copy is under way. ctx->lock not needed. */
void soft_copier_stop(struct soft_context *ctx);

#endif
