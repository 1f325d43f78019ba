/*
 * Strict mode: wrong use that no status reports is seen, and reported or made
 * the end of the process.
 */
#ifndef KVX_SOFT_STRICT_H
#define KVX_SOFT_STRICT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct soft_context;
struct soft_qp;

/* KVXFER_SOFT_STRICT: what happens when wrong use is seen. */
enum soft_strict { STRICT_OFF = 0, STRICT_REPORT, STRICT_ABORT };

/* strict.c: wrong use that no status reports */
/* False: the text means nothing. */
bool soft_strict_parse(const char *text, enum soft_strict *strict);
/* Around what post_send does. */
void soft_strict_enter(struct soft_qp *qp);
void soft_strict_leave(struct soft_qp *qp);
/* WRs up to head are posted, WR seq is; sq_lock held. */
void soft_strict_full(struct soft_qp *qp, uint64_t head);
void soft_strict_posted(struct soft_qp *qp, uint64_t seq);
/* WR seq is about to complete; ctx->lock held. */
void soft_strict_done(struct soft_qp *qp, uint64_t seq);
/* The device is closed although it has children. */
void soft_strict_close(struct soft_context *ctx);
/* Wait until all events that were taken are acknowledged; *acked by mutex. */
void soft_await_acks(struct soft_context *ctx, pthread_mutex_t *mutex,
		     pthread_cond_t *cond, const uint32_t *acked,
		     uint32_t taken, const char *what);

#endif
