/*
 * Events of the adapter, its queues and its QPs, and the channels by which an
 * application hears of completions.
 */
#ifndef KVX_SOFT_EVENT_H
#define KVX_SOFT_EVENT_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "list.h"

struct soft_context;
struct soft_cq;
struct soft_qp;

/* Lives inside the object that it is about. Guarded by ctx->event_lock. */
struct soft_event {
	struct soft_list link;
	bool pending;	/* on ctx->events */
	uint32_t taken; /* handed out by get_async_event so far */
	struct ibv_async_event event;
};

struct soft_channel {
	struct ibv_comp_channel
		ibv; /* fd: readable while events is not empty */
	pthread_mutex_t lock;
	struct soft_list events; /* CQs with events to fetch */
	/* The fd is yet to be set: by who takes this back, who may find that it
	 * need not be any more. */
	atomic_bool owed;
	atomic_uint ringing; /* who will yet look at this, without a lock */
};

static inline struct soft_channel *to_channel(struct ibv_comp_channel *channel)
{
	return soft_of(channel, struct soft_channel, ibv);
}

/* event.c */
struct ibv_comp_channel *soft_create_comp_channel(struct ibv_context *context);
int soft_destroy_comp_channel(struct ibv_comp_channel *channel);
int soft_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq,
		      void **cq_context);
void soft_ack_cq_events(struct ibv_cq *cq, unsigned int nevents);
int soft_get_async_event(struct ibv_context *context,
			 struct ibv_async_event *event);
void soft_ack_async_event(struct ibv_async_event *event);
/* cq->lock held. Who holds ctx->lock as well wakes the application when he lets go
 * of it, and not before: it would take his processor, and then want his locks. */
void soft_notify_cq(struct soft_cq *cq);
/* Set the fd if it is owed. No lock needed; channel->ringing keeps it here. */
void soft_ring(struct soft_channel *channel);
void soft_forget_cq_events(struct soft_cq *cq);
void soft_raise_qp(struct soft_qp *qp, enum ibv_event_type type);
void soft_raise_cq(struct soft_cq *cq, enum ibv_event_type type);
void soft_raise_adapter(struct soft_context *ctx, enum ibv_event_type type);
/* Take the event back if it is pending and wait until all taken are acked. */
void soft_settle_qp_events(struct soft_qp *qp);
void soft_settle_cq_events(struct soft_cq *cq);
int soft_event_fd(void);
int soft_blocking_event_fd(void); /* as an application expects it */
void soft_event_fd_set(int fd);
void soft_event_fd_clear(int fd);

#endif
