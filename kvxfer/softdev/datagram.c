/* UD queue pairs: datagram.h has the idea. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "context.h"
#include "cq.h"
#include "datagram.h"
#include "frame.h"
#include "initiator.h"
#include "list.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "wire_shm.h"

#define DATAGRAM_MAGIC 0x4446564bu /* "KVFD" */
#define GRH_BYTES 40
#define GRH_NEXT_HEADER 27 /* what follows is IBA */
#define TAKEN_PER_TURN 64
#define OWN_QKEY 0x80000000u

/* What precedes the payload; little-endian. */
struct head {
	uint32_t magic, flags; /* DESC_IMM, DESC_SOLICITED */
	uint32_t dst_qpn, src_qpn, qkey;
	uint32_t imm; /* as the application gave it */
	union ibv_gid dst_gid, src_gid;
};

_Static_assert(sizeof(struct head) == 56, "layout of a datagram");
_Static_assert(sizeof(struct ibv_grh) == GRH_BYTES, "layout of a GRH");

struct soft_ah {
	struct ibv_ah ibv;
	union ibv_gid dgid;
};

struct ibv_ah *soft_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
	struct soft_ah *ah;

	errno = 0;
	if (soft_orphaned(pd->context))
		errno = ENODEV;
	else if (!attr->is_global || attr->port_num != 1 ||
		 attr->grh.sgid_index != 0) /* as RoCE: no LIDs */
		errno = EINVAL;
	else if (!soft_gid_is_ours(&attr->grh.dgid))
		errno = EHOSTUNREACH;
	if (errno)
		return NULL;
	ah = calloc(1, sizeof(*ah));
	if (!ah) {
		errno = ENOMEM;
		return NULL;
	}
	ah->ibv.context = pd->context;
	ah->ibv.pd = pd;
	ah->dgid = attr->grh.dgid;
	atomic_fetch_add(&to_pd(pd)->users, 1);
	return &ah->ibv;
}

int soft_destroy_ah(struct ibv_ah *ah)
{
	if (soft_orphaned(ah->context))
		return ENODEV;
	atomic_fetch_sub(&to_pd(ah->pd)->users, 1);
	free(soft_of(ah, struct soft_ah, ibv));
	return 0;
}

int soft_open_datagrams(struct soft_context *ctx)
{
	struct epoll_event event = { .events = EPOLLIN,
				     .data.ptr = &ctx->datagram_fd };
	int err, fd;

	if (ctx->datagram_fd >= 0)
		return 0;
	fd = socket(ctx->bound.ss_family,
		    SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return errno;
	if (bind(fd, (struct sockaddr *)&ctx->bound,
		 soft_address_len(&ctx->bound)) ||
	    epoll_ctl(ctx->epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
		err = errno;
		close(fd);
		return err;
	}
	ctx->datagram_fd = fd;
	return 0;
}

/* --- sending ------------------------------------------------------------- */

static struct soft_target *target_in(const struct soft_qp *qp, uint8_t *slot)
{
	return (struct soft_target *)(slot + qp->sq.slot_bytes -
				      sizeof(struct soft_target));
}

static struct soft_target *target_of(const struct soft_qp *qp, uint64_t seq)
{
	return target_in(qp, qp->sq.slots +
				     (seq & qp->sq.mask) * qp->sq.slot_bytes);
}

void soft_fill_target(struct soft_qp *qp, uint8_t *slot,
		      const struct ibv_send_wr *wr)
{
	*target_in(qp, slot) = (struct soft_target){
		.gid = soft_of(wr->wr.ud.ah, struct soft_ah, ibv)->dgid,
		.qpn = wr->wr.ud.remote_qpn,
		.qkey = wr->wr.ud.remote_qkey,
	};
}

static struct soft_failure send_wr(struct soft_qp *qp, uint64_t seq,
				   const struct soft_target *to)
{
	struct soft_context *ctx = qp_context(qp);
	const struct soft_wqe *wqe = &qp->sq.ring[seq & qp->sq.mask];
	struct soft_failure failure = soft_check_wqe(qp, seq);
	struct head head = {
		.magic = htole32(DATAGRAM_MAGIC),
		.dst_qpn = htole32(to->qpn),
		.src_qpn = htole32(qp->ibv.qp_num),
		/* With the high bit the QP's own is meant. */
		.qkey = htole32(to->qkey & OWN_QKEY ? qp->attr.qkey : to->qkey),
		.imm = htole32(wqe->imm),
		.dst_gid = to->gid,
		.src_gid = ctx->gid,
	};
	struct iovec iov[1 + SOFT_MAX_SGE] = { { &head, sizeof(head) } };
	struct sockaddr_storage address;
	struct msghdr message = { .msg_name = &address, .msg_iov = iov };
	const struct ibv_sge *sges;
	uint32_t i, n, flags = 0;
	struct ibv_sge one;

	if (!failure.status && wqe->length > DATAGRAM_BYTES)
		failure = (struct soft_failure){ IBV_WC_LOC_LEN_ERR,
						 KVX_SOFT_TOO_LONG };
	if (failure.status || ctx->port_down ||
	    soft_resolve(ctx, &to->gid, "", &address))
		return failure;
	if (wqe->opcode == IBV_WR_SEND_WITH_IMM)
		flags |= DESC_IMM;
	if (wqe->flags & IBV_SEND_SOLICITED)
		flags |= DESC_SOLICITED;
	head.flags = htole32(flags);
	n = soft_wqe_sges(qp, seq, &one, &sges);
	for (i = 0; i < n; i++)
		iov[1 + i] = (struct iovec){ (void *)(uintptr_t)sges[i].addr,
					     sges[i].length };
	message.msg_iovlen = 1 + n;
	message.msg_namelen = soft_address_len(&address);
	/* All but memory that is not there is the network's loss. */
	if (sendmsg(ctx->datagram_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) <
		    0 &&
	    errno == EFAULT)
		failure = (struct soft_failure){ IBV_WC_LOC_PROT_ERR,
						 KVX_SOFT_LOCAL_MEMORY };
	return failure;
}

void soft_send_datagrams(struct soft_qp *qp)
{
	struct soft_context *ctx = qp_context(qp);
	struct soft_target to = { 0 };
	struct soft_failure failure;
	uint64_t seq = UINT64_MAX;

	soft_lock(ctx);
	while (qp_state(qp) == IBV_QPS_RTS && soft_unsent(qp)) {
		if (seq != qp->sq.next) {
			/* Contexts are looked through without ctx->lock; another
			 * thread that posts may send the WR meanwhile. */
			seq = qp->sq.next;
			to = *target_of(qp, seq);
			soft_unlock(ctx);
			to.gid = soft_adapter_of(ctx, &to.gid, to.qpn);
			soft_lock(ctx);
			continue;
		}
		failure = send_wr(qp, seq, &to);
		if (failure.status) {
			soft_qp_fail(qp, &failure, NULL);
			break;
		}
		qp->sq.next++;
		soft_sends_done(qp, qp->sq.next);
	}
	soft_unlock(ctx);
}

/* --- receiving ----------------------------------------------------------- */

static void complete(struct soft_qp *qp, const struct head *head,
		     uint32_t byte_len)
{
	struct soft_cq *cq = to_cq(qp->ibv.recv_cq);
	struct soft_rq *rq = &qp->rq;
	uint32_t flags = le32toh(head->flags);
	struct soft_cqe cqe = {
		.qp = qp,
		.is_recv = true,
		.free_to = rq->next + 1,
		.wc = {
			.wr_id = rq->ring[rq->next & rq->mask].wr_id,
			.status = IBV_WC_SUCCESS,
			.opcode = IBV_WC_RECV,
			.byte_len = byte_len,
			.qp_num = qp->ibv.qp_num,
			.src_qp = le32toh(head->src_qpn),
			.wc_flags = IBV_WC_GRH,
		},
	};

	if (flags & DESC_IMM) {
		cqe.wc.imm_data = le32toh(head->imm);
		cqe.wc.wc_flags |= IBV_WC_WITH_IMM;
	}
	rq->next++;
	pthread_mutex_lock(&cq->lock);
	soft_cq_push(cq, &cqe, flags & DESC_SOLICITED);
	pthread_mutex_unlock(&cq->lock);
}

/* The receive's ranges for the first bytes, or why it cannot be used. */
static struct soft_failure find_place(struct soft_qp *qp, uint32_t bytes,
				      struct iovec *iov, int *n)
{
	const struct soft_rq *rq = &qp->rq;
	const struct soft_rqe *rqe = &rq->ring[rq->next & rq->mask];
	const struct ibv_sge *sges = rq->sges +
				     (rq->next & rq->mask) * rq->max_sge;
	struct soft_failure failure = { 0 };
	uint32_t i;

	if (bytes > rqe->length)
		return (struct soft_failure){ IBV_WC_LOC_LEN_ERR,
					      KVX_SOFT_TOO_LONG };
	for (i = 0; i < rqe->num_sge && !failure.vendor_err; i++) {
		failure.vendor_err = soft_check_local(qp_context(qp),
						      qp->ibv.pd, &sges[i],
						      IBV_ACCESS_LOCAL_WRITE);
		iov[i] = (struct iovec){ (void *)(uintptr_t)sges[i].addr,
					 sges[i].length };
	}
	*n = (int)rqe->num_sge;
	if (failure.vendor_err)
		failure.status = IBV_WC_LOC_PROT_ERR;
	return failure;
}

static void deliver(struct soft_qp *qp, const struct head *head,
		    uint8_t *payload, size_t length)
{
	const uint32_t bytes = (uint32_t)(GRH_BYTES + length);
	struct ibv_grh grh = {
		.version_tclass_flow = htobe32(6u << 28),
		.paylen = htobe16((uint16_t)length),
		.next_hdr = GRH_NEXT_HEADER,
		.hop_limit = 1,
		.sgid = head->src_gid,
		.dgid = head->dst_gid,
	};
	struct iovec from[2] = { { &grh, sizeof(grh) }, { payload, length } };
	struct iovec to[SOFT_MAX_SGE];
	struct soft_failure failure;
	int n;

	failure = find_place(qp, bytes, to, &n);
	if (!failure.status &&
	    soft_copy_guarded(to, n, from, 2) != (ssize_t)bytes)
		failure = (struct soft_failure){ IBV_WC_LOC_PROT_ERR,
						 KVX_SOFT_LOCAL_MEMORY };
	if (failure.status)
		soft_qp_fail(qp, NULL, &failure);
	else
		complete(qp, head, bytes);
}

/* Whose it is, if it can be taken in now. */
static struct soft_qp *receiver(struct soft_context *ctx,
				const struct head *head)
{
	struct soft_qp *qp = soft_find_qp(ctx, le32toh(head->dst_qpn));
	int state = qp ? qp_state(qp) : IBV_QPS_RESET;

	if (!qp || !soft_is_ud(qp) || ctx->port_down ||
	    (state != IBV_QPS_RTR && state != IBV_QPS_RTS) ||
	    qp->attr.qkey != le32toh(head->qkey) ||
	    qp->rq.next == atomic_load(&qp->rq.head) ||
	    memcmp(&head->dst_gid, &ctx->gid, sizeof(ctx->gid)))
		return NULL;
	return qp;
}

void soft_take_datagrams(struct soft_context *ctx)
{
	uint8_t payload[DATAGRAM_BYTES];
	struct soft_qp *qp;
	struct head head;
	struct iovec iov[2] = { { &head, sizeof(head) },
				{ payload, sizeof(payload) } };
	struct msghdr message;
	ssize_t got;
	int i;

	for (i = 0; i < TAKEN_PER_TURN; i++) {
		message = (struct msghdr){ .msg_iov = iov, .msg_iovlen = 2 };
		got = recvmsg(ctx->datagram_fd, &message, MSG_DONTWAIT);
		if (got < 0)
			return; /* none, or what ICMP said of an earlier one */
		if ((size_t)got < sizeof(head) ||
		    message.msg_flags & MSG_TRUNC ||
		    le32toh(head.magic) != DATAGRAM_MAGIC)
			continue;
		qp = receiver(ctx, &head);
		if (qp)
			deliver(qp, &head, payload, (size_t)got - sizeof(head));
	}
}
