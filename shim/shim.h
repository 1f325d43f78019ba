/*
 * libkvxsoft.so: the software device under the names of libibverbs.
 *
 * Started with LD_PRELOAD, programs that were built against libibverbs find the
 * ibv_* names here first and drive the software device without knowing it. That
 * is for testing: strangers' programs then judge the device. kvxfer itself
 * never needs it.
 */
#ifndef KVX_SHIM_H
#define KVX_SHIM_H

#include "../kvxfer/softdev/internal.h"

/* The header turns these into inline calls or other names. */
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

/* The library is built with hidden visibility; this is what others see. */
#define EXPORT __attribute__((visibility("default")))

/* verbs.c */
extern struct kvx_verbs_table shim_soft;

/* names.c: other names for the device, where the environment has some */
struct ibv_device **shim_get_device_list(int *num_devices);
void shim_rename_port(const struct ibv_context *context,
		      struct ibv_port_attr *attr);

/* cq_ex.c: completions one by one, by ibv_start_poll and its kin */
struct ibv_cq_ex *shim_create_cq_ex(struct ibv_context *context,
				    struct ibv_cq_init_attr_ex *attr);

/* qp_ex.c: work requests by ibv_wr_start and its kin */
struct ibv_qp *shim_create_qp_ex(struct ibv_context *context,
				 struct ibv_qp_init_attr_ex *attr);
/* Free what the QP's builder holds; the QP itself stays. */
void shim_free_builder(struct ibv_qp *qp);

#endif
