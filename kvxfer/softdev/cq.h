/*
 * Completion queues: a ring of CQEs that queue pairs store and the application
 * polls, and its arming.
 */
#ifndef KVX_SOFT_CQ_H
#define KVX_SOFT_CQ_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "event.h"
#include "list.h"

struct soft_qp;

#define SOFT_MAX_CQE 4194303

struct soft_cqe {
	struct ibv_wc wc;
	/* Polling this entry frees the slots of its queue below free_to. */
	struct soft_qp *qp;
	uint64_t free_to;
	bool is_recv;
};

enum soft_armed { ARMED_NOT = 0, ARMED_SOLICITED, ARMED_NEXT };

struct soft_cq {
	/* One object with two faces, as applications cast one to the other. */
	union {
		struct ibv_cq ibv;
		struct ibv_cq_ex ex;
	};
	pthread_mutex_t lock; /* everything up to users */
	struct soft_cqe *ring;
	uint32_t mask;
	uint64_t head, tail; /* head: next to write; tail: next to poll */
	enum soft_armed armed;
	bool overrun; /* a CQE was lost: nothing more is stored */
	atomic_uint_fast64_t
		ready; /* head - tail, for a lock-free empty poll */
	atomic_int users;
	atomic_uint_fast64_t depths; /* of its queues, all together */

	/* Completion events; by channel->lock. */
	struct soft_list event_link;
	uint32_t events_pending;
	uint32_t events_taken;

	struct soft_event async;
	struct ibv_wc polled; /* of an ibv_start_poll that is under way */
};

static inline struct soft_cq *to_cq(struct ibv_cq *cq)
{
	return soft_of(cq, struct soft_cq, ibv);
}

/* cq.c */
struct ibv_cq *soft_create_cq(struct ibv_context *context, int cqe,
			      void *cq_context,
			      struct ibv_comp_channel *channel,
			      int comp_vector);
/* As ibv_resize_cq(3); EINVAL also where more entries wait to be polled. */
int soft_resize_cq(struct ibv_cq *cq, int cqe);
int soft_destroy_cq(struct ibv_cq *cq);
int soft_poll_cq(struct ibv_cq *cq, int num_entries, struct ibv_wc *wc);
int soft_req_notify_cq(struct ibv_cq *cq, int solicited_only);
/* Store one CQE; cq->lock held. */
void soft_cq_push(struct soft_cq *cq, const struct soft_cqe *cqe,
		  bool solicited);
/* Drop the QP's entries. */
void soft_cq_purge(struct soft_cq *cq, const struct soft_qp *qp);
bool soft_cq_is_overrun(struct soft_cq *cq);
/* Is somebody to hear of the next completion? */
bool soft_cq_is_armed(struct soft_cq *cq);
/* Are its queues deeper than it is? */
bool soft_cq_can_overrun(struct soft_cq *cq);
void soft_cq_overrun(struct soft_cq *cq); /* a CQE is lost; cq->lock held */

#endif
