/*
 * The software RDMA device: what others may know of it.
 *
 * It is a verbs provider in user space: it fills context->ops like any
 * provider and is reached for the rest through struct kvx_verbs_table
 * (kvx_load_softdev). One device, "soft0", always present; every context is
 * an adapter of its own with its own GID, listener and device thread, and a
 * second thread once there was a copy that is worth two.
 */
#ifndef KVX_SOFTDEV_H
#define KVX_SOFTDEV_H

#include "../native/verbs_table.h"

/* Objects of each kind that are alive in this process, for leak checks. */
struct kvx_soft_counts {
	uint64_t contexts, pds, mrs, cqs, channels, qps, connections, threads;
};

void kvx_soft_counts(struct kvx_soft_counts *counts);

/*
 * What strict mode (KVXFER_SOFT_STRICT) has seen since the last call, one violation
 * a line; size of the text is at least 1. Returns its length.
 */
size_t kvx_soft_take_violations(char *text, size_t size);

/* vendor_err of a failed completion: which check failed. */
enum kvx_soft_vendor_err {
	KVX_SOFT_FLUSHED = 0x1,	       /* the QP was in ERR already */
	KVX_SOFT_NO_LKEY = 0x10,       /* lkey unknown or deregistered */
	KVX_SOFT_LOCAL_PD = 0x11,      /* lkey of another PD */
	KVX_SOFT_LOCAL_BOUNDS = 0x12,  /* outside the local MR */
	KVX_SOFT_LOCAL_ACCESS = 0x13,  /* local MR lacks LOCAL_WRITE */
	KVX_SOFT_LOCAL_MEMORY = 0x14,  /* registered, but no longer mapped */
	KVX_SOFT_TOO_LONG = 0x15,      /* over max_msg_sz, or RECV too short */
	KVX_SOFT_NO_RD_ATOMIC = 0x16,  /* READ with max_rd_atomic 0 */
	KVX_SOFT_NO_WINDOW = 0x17,     /* bind, invalidate: no such window */
	KVX_SOFT_WINDOW_STATE = 0x18,  /* its type or state does not allow it */
	KVX_SOFT_NO_RKEY = 0x20,       /* rkey unknown or deregistered */
	KVX_SOFT_REMOTE_PD = 0x21,     /* rkey of another PD than the QP's */
	KVX_SOFT_REMOTE_BOUNDS = 0x22, /* outside the remote MR */
	KVX_SOFT_REMOTE_ACCESS = 0x23, /* remote MR lacks the access flag */
	KVX_SOFT_REMOTE_QP_ACCESS = 0x24, /* remote QP lacks the access flag */
	KVX_SOFT_REMOTE_MEMORY = 0x25,	  /* registered, but no longer mapped */
	KVX_SOFT_REMOTE_RECV = 0x26,	  /* the RECV it hit is unusable */
	KVX_SOFT_REMOTE_ALIGNMENT = 0x27, /* atomic at no multiple of 8 */
	KVX_SOFT_REMOTE_OTHER_QP = 0x28,  /* a window bound by another QP */
	KVX_SOFT_NO_ANSWER = 0x30, /* no progress within the retry time */
	KVX_SOFT_PEER_GONE = 0x31, /* the established connection broke */
	KVX_SOFT_REFUSED = 0x32,   /* wrong token, or no wire in common */
	KVX_SOFT_BAD_PEER = 0x33,  /* the peer broke the protocol */
	KVX_SOFT_NO_RECV = 0x34,   /* RNR retries used up */
	KVX_SOFT_INJECTED = 0x40,  /* the fault plan wanted it */
};

#endif
