/*
 * UD queue pairs: datagrams between adapters, over UDP.
 *
 * kvxfer never makes one; they are for programs that come through the shim. The first
 * UD QP of an adapter opens a UDP socket, with the address and port of its listener, so
 * that a GID leads there as well. A datagram leaves inside ibv_post_send and is
 * complete then. As on a NIC it may be lost: without a receive, with another Q_Key,
 * between states.
 */
#ifndef KVX_SOFT_DATAGRAM_H
#define KVX_SOFT_DATAGRAM_H

#include "qp.h"

#define DATAGRAM_BYTES 4096 /* payload, at most: the port's MTU */

/* Where a WR of a UD QP goes: the end of its slot. */
struct soft_target {
	union ibv_gid gid;
	uint32_t qpn, qkey;
};

static inline bool soft_is_ud(const struct soft_qp *qp)
{
	return qp->ibv.qp_type == IBV_QPT_UD;
}

/* As ibv_create_ah(3) and ibv_destroy_ah(3). */
struct ibv_ah *soft_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr);
int soft_destroy_ah(struct ibv_ah *ah);

/* Open the adapter's socket, unless it is open; ctx->lock held. 0 or an errno. */
int soft_open_datagrams(struct soft_context *ctx);
/* Copy where the WR goes into its slot. */
void soft_fill_target(struct soft_qp *qp, uint8_t *slot,
		      const struct ibv_send_wr *wr);
/* Send all that has been posted; no lock held. */
void soft_send_datagrams(struct soft_qp *qp);
/* Take in some of what has come; ctx->lock held. */
void soft_take_datagrams(struct soft_context *ctx);

#endif
