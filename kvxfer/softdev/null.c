/*
 * The null device: a measuring aid. Every WR is complete when it is posted, and
 * not one byte moves. What is left of the time of a write is the library's own.
 *
 * An adapter like the software device's, with its memory regions, queues, state
 * machine and events, but without listener, wire and device thread. The send
 * queue is as strict as a NIC's: a slot is free when a completion at or after
 * it has been polled. Keys are not looked at, receives stay posted until the QP
 * goes to ERR: nobody is told of anything.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "context.h"
#include "cq.h"
#include "qp.h"
#include "softdev.h"

static struct ibv_device null0 = {
	.node_type = IBV_NODE_CA,
	.transport_type = IBV_TRANSPORT_IB,
	.name = "null0",
	.dev_name = "null0",
};

static struct ibv_device **get_device_list(int *num_devices)
{
	struct ibv_device **list = calloc(2, sizeof(*list));

	if (!list) {
		errno = ENOMEM;
		return NULL;
	}
	list[0] = &null0;
	if (num_devices)
		*num_devices = 1;
	return list;
}

static struct ibv_context *open_device(struct ibv_device *device,
				       const char *address, const char *wire)
{
	(void)address; /* nobody dials, nothing travels */
	(void)wire;
	return soft_open_null(device);
}

static int wire_name(struct ibv_qp *qp, char name[KVX_WIRE_NAME_BYTES])
{
	(void)qp;
	snprintf(name, KVX_WIRE_NAME_BYTES, "null");
	return 0;
}

static int set_faults(struct ibv_context *context, const char *plan, size_t *at)
{
	(void)context;
	(void)plan;
	(void)at;
	return EOPNOTSUPP;
}

static inline int check_wr(const struct soft_qp *qp,
			   const struct ibv_send_wr *wr)
{
	/* A negative number is a huge one. */
	if ((uint32_t)wr->num_sge > qp->cap.max_send_sge)
		return ENOMEM;
	switch (wr->opcode) {
	case IBV_WR_RDMA_WRITE:
	case IBV_WR_RDMA_WRITE_WITH_IMM:
	case IBV_WR_RDMA_READ:
		return 0;
	default:
		return EINVAL;
	}
}

/* The WR is done; sq_lock held. */
static void complete(struct soft_qp *qp, const struct ibv_send_wr *wr,
		     uint64_t seq)
{
	struct soft_cq *cq = to_cq(qp->ibv.send_cq);
	const struct soft_cqe cqe = {
		.qp = qp,
		.free_to = seq + 1,
		.wc = {
			.wr_id = wr->wr_id,
			.status = IBV_WC_SUCCESS,
			.opcode = wr->opcode == IBV_WR_RDMA_READ ?
					  IBV_WC_RDMA_READ :
					  IBV_WC_RDMA_WRITE,
			.qp_num = qp->ibv.qp_num,
		},
	};

	pthread_mutex_lock(&cq->lock);
	soft_cq_push(cq, &cqe, false);
	pthread_mutex_unlock(&cq->lock);
}

int soft_null_post_send(struct ibv_qp *ibqp, struct ibv_send_wr *wr,
			struct ibv_send_wr **bad_wr)
{
	struct soft_qp *qp = to_qp(ibqp);
	uint64_t head, limit;
	int state, err = 0;

	if (soft_orphaned(ibqp->context)) {
		*bad_wr = wr;
		return ENODEV;
	}
	pthread_mutex_lock(&qp->sq_lock);
	state = qp_state(qp);
	head = atomic_load_explicit(&qp->sq.head, memory_order_relaxed);
	limit = atomic_load_explicit(&qp->sq.tail, memory_order_acquire) +
		qp->sq.depth;
	for (; wr; wr = wr->next, head++) {
		if (head >= limit ||
		    (state != IBV_QPS_RTS && state != IBV_QPS_ERR))
			err = ENOMEM;
		else
			err = check_wr(qp, wr);
		if (err) {
			*bad_wr = wr;
			break;
		}
		if (state == IBV_QPS_ERR)
			soft_send_failed(qp, head, wr->wr_id,
					 IBV_WC_WR_FLUSH_ERR, KVX_SOFT_FLUSHED);
		else if (qp->sq_sig_all || wr->send_flags & IBV_SEND_SIGNALED)
			complete(qp, wr, head);
	}
	atomic_store_explicit(&qp->sq.head, head, memory_order_release);
	qp->sq.done = head; /* so nothing is left to be flushed */
	pthread_mutex_unlock(&qp->sq_lock);
	return err;
}

void kvx_load_nulldev(struct kvx_verbs_table *table)
{
	kvx_load_softdev(table);
	table->name = "null";
	table->get_device_list = get_device_list;
	table->open_device = open_device;
	table->wire_name = wire_name;
	table->set_faults = set_faults;
}
