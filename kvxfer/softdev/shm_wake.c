/* Who sleeps and who is awake on the two ends of a ring. */
#define _GNU_SOURCE
#include "connection.h"
#include "context.h"
#include "cq.h"
#include "list.h"
#include "qp.h"
#include "wire_shm.h"

void soft_shm_wake_peer(struct soft_shm *shm)
{
	char byte = 0;
	struct iovec iov = { &byte, 1 };

	/* A socket that is full has enough in it to wake anybody. */
	(void)soft_local_send(shm->conn->fd, &iov, 1, -1);
}

/* What has changed since we saw nothing to read, or no room? An impossible
 * position is a change as well: whoever looks closely will find it. */
static bool look(struct soft_shm *shm)
{
	struct soft_conn *conn = shm->conn;
	bool found = false;

	if (!conn->readable && (shm_data(&shm->in) || shm->packets))
		found = conn->readable = true;
	if (!conn->writable && shm_room(&shm->out))
		found = conn->writable = true;
	if (found)
		soft_ready(conn);
	return found;
}

bool soft_shm_poll(struct soft_context *ctx)
{
	struct soft_list *at;
	bool found = false;

	for (at = ctx->shms.next; at != &ctx->shms; at = at->next)
		found |= look(soft_of(at, struct soft_shm, link));
	return found;
}

/* An initiator with WRs that could not leave waits for any sign of those before;
 * else for those that complete aloud, if somebody is to hear of it: who polls the
 * CQ looks into the ring himself. An overrun is noticed when it happens, and not
 * when somebody polls. A responder waits for all that comes. */
static enum shm_wish wish(const struct soft_conn *conn)
{
	const struct soft_qp *qp = conn->qp;
	struct soft_cq *cq;

	if (!conn->outgoing || !qp || soft_unsent(qp))
		return SHM_ANYTHING;
	cq = to_cq(qp->ibv.send_cq);
	if (soft_cq_is_armed(cq) || soft_cq_can_overrun(cq))
		return SHM_AWAITED;
	return SHM_NEWS;
}

bool soft_shm_sleep(struct soft_context *ctx)
{
	struct soft_list *at;
	struct soft_shm *shm;

	for (at = ctx->shms.next; at != &ctx->shms; at = at->next) {
		shm = soft_of(at, struct soft_shm, link);
		shm->wants = true;
		shm_want(&shm->in.pipe->data_wanted, wish(shm->conn));
		if (!shm->conn->writable)
			shm_want(&shm->out.pipe->room_wanted, SHM_ANYTHING);
	}
	return !soft_shm_poll(ctx);
}

bool soft_shm_listen(struct soft_context *ctx, const struct soft_cq *cq)
{
	struct soft_list *at;
	struct soft_shm *shm;
	bool late = false;

	for (at = ctx->shms.next; at != &ctx->shms; at = at->next) {
		shm = soft_of(at, struct soft_shm, link);
		if (!shm->wants || !shm->conn->outgoing || !shm->conn->qp ||
		    to_cq(shm->conn->qp->ibv.send_cq) != cq)
			continue;
		shm_want(&shm->in.pipe->data_wanted, wish(shm->conn));
		late |= shm_data(&shm->in) != 0;
	}
	return late;
}

void soft_shm_awake(struct soft_context *ctx)
{
	struct soft_list *at;
	struct soft_shm *shm;

	for (at = ctx->shms.next; at != &ctx->shms; at = at->next) {
		shm = soft_of(at, struct soft_shm, link);
		if (!shm->wants)
			continue;
		shm->wants = false;
		atomic_store_explicit(&shm->in.pipe->data_wanted, SHM_NOTHING,
				      memory_order_relaxed);
		atomic_store_explicit(&shm->out.pipe->room_wanted, SHM_NOTHING,
				      memory_order_relaxed);
	}
}
