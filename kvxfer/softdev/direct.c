/*
 * Work of the device that the application's own thread does, while it is there.
 *
 * To hand a few descriptors to another thread costs more than to write them: the
 * other has to be woken, and has to get a CPU, of which there may be as many as
 * threads that are busy already. So where sending means to describe and not to
 * copy, post_send does it at once, and poll_cq looks at what came back through
 * shared memory. Both only if the lock is free; else its holder, or the device
 * thread, does it.
 */
#define _GNU_SOURCE
#include "connection.h"
#include "context.h"
#include "cq.h"
#include "initiator.h"
#include "list.h"
#include "qp.h"
#include "wire_shm.h"

#define TURNS 8 /* frames sent by one post; the rest is the device thread's */

/* Is there anything that the device thread, if it sleeps, would sleep through? */
static void hand_over(struct soft_context *ctx, bool unsent)
{
	if (unsent || ctx->timer_ns < ctx->sleep_ns || !list_empty(&ctx->run) ||
	    !list_empty(&ctx->ready))
		soft_wake(ctx);
}

/* What could not leave now leaves when there is room, or on an answer: for both
 * the device thread has to say, before it sleeps, that it wants to be woken. */
static bool left_behind(const struct soft_qp *qp)
{
	return soft_unsent(qp) || (qp->out && qp->out->tx->busy);
}

bool soft_post_direct(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	bool more = true;
	int i;

	if (!atomic_load_explicit(&qp->direct, memory_order_relaxed) ||
	    !soft_trylock(ctx))
		return false;
	/* It may have gone down meanwhile. */
	if (ctx->port_down || qp->dial != DIAL_UP || !qp->out->writable) {
		soft_unlock(ctx);
		return false;
	}
	ctx->now_ns = soft_now_ns();
	for (i = 0; i < TURNS && more; i++)
		more = soft_initiate(qp);
	if (more)
		soft_run(qp);
	hand_over(ctx, left_behind(qp));
	soft_unlock(ctx);
	return true;
}

void soft_listen_direct(struct soft_context *ctx, const struct soft_cq *cq)
{
	bool late;

	if (!atomic_load_explicit(&ctx->n_rings, memory_order_relaxed))
		return;
	/* Who holds the lock may have seen the CQ unarmed. */
	if (!soft_trylock(ctx)) {
		soft_wake(ctx);
		return;
	}
	late = soft_shm_listen(ctx, cq);
	soft_unlock(ctx);
	if (late)
		soft_wake(ctx);
}

void soft_poll_direct(struct soft_context *ctx)
{
	struct soft_list *at;
	struct soft_shm *shm;
	struct soft_qp *qp;

	if (!atomic_load_explicit(&ctx->n_rings, memory_order_relaxed) ||
	    !soft_trylock(ctx))
		return;
	for (at = ctx->shms.next; at != &ctx->shms && !ctx->port_down;
	     at = at->next) {
		shm = soft_of(at, struct soft_shm, link);
		if (!shm->conn->outgoing || shm->conn->state != CONN_UP ||
		    !shm_data(&shm->in))
			continue;
		ctx->now_ns = soft_now_ns();
		qp = shm->conn->qp;
		shm->conn->readable = true;
		soft_conn_service(shm->conn);
		/* An answer may make way for WRs; where there are none, the
		 * device thread need not wake up to see that. */
		if (!left_behind(qp))
			list_remove(&qp->run_link);
		/* The next look begins with another one. */
		if (shm->conn->state == CONN_UP) {
			list_remove(&shm->link);
			list_append(&ctx->shms, &shm->link);
		}
		break; /* a QP that fails takes two connections off the list */
	}
	hand_over(ctx, false);
	soft_unlock(ctx);
}
