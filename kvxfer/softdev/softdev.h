/*
 * The software RDMA device: what others may know of it.
 *
 * It is a verbs provider in user space: it fills context->ops like any
 * provider and is reached for the rest through struct kvx_verbs_table
 * (kvx_load_softdev). One device, "soft0", always present; every context is
 * an adapter of its own with its own GID, listener and device thread.
 */
#ifndef KVX_SOFTDEV_H
#define KVX_SOFTDEV_H

#include "../native/verbs_table.h"

/* Objects of each kind that are alive in this process, for leak checks. */
struct kvx_soft_counts {
	uint64_t contexts, pds, mrs, cqs, channels, qps, connections, threads;
};

void kvx_soft_counts(struct kvx_soft_counts *counts);

#endif
