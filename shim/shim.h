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

#include "../kvxfer/softdev/context.h"
#include "../kvxfer/softdev/cq.h"
#include "../kvxfer/softdev/datagram.h"
#include "../kvxfer/softdev/qp.h"

/* The header turns these into inline calls or other names. */
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

/* The library is built with hidden visibility; this is what others see. */
#define EXPORT __attribute__((visibility("default")))

/* verbs.c */
extern struct kvx_verbs_table shim_soft;

/*
 * nics.c: what a machine's sysfs says of its NICs, where the environment names
 * one. The device is then listed under their names, with their ports and GIDs.
 * Read once, and constant from then on.
 */
struct shim_gid {
	union ibv_gid gid; /* zeros: the entry is empty */
	enum ibv_gid_type type;
	bool in_force; /* its netdev is in this namespace, and up */
};

struct shim_port {
	enum ibv_port_state state;
	uint8_t phys_state;
	uint8_t link_layer; /* IBV_LINK_LAYER_... */
	uint16_t lid;
	int n_gids;
	struct shim_gid *gids; /* n_gids, empty ones too */
};

struct ibv_device **shim_get_device_list(int *num_devices);
bool shim_is_nic(const struct ibv_context *context);
/* NULL where a NIC has no such port, and where the context is none of a NIC. */
const struct shim_port *shim_port(const struct ibv_context *context,
				  uint32_t port_num);
bool shim_gid_is_empty(const union ibv_gid *gid);

/* As the device answers, or as the NIC that it stands for. Errno, or 0. */
int shim_query_device(struct ibv_context *context,
		      struct ibv_device_attr *attr);
int shim_query_port(struct ibv_context *context, uint8_t port_num,
		    struct ibv_port_attr *attr);
int shim_query_gid(struct ibv_context *context, uint32_t port_num,
		   uint32_t index, struct ibv_gid_entry *entry);
int shim_query_pkey(struct ibv_context *context, uint8_t port_num, int index,
		    __be16 *pkey);

/*
 * network.c: between NICs. A packet reaches the QP that is behind its
 * destination's LID, or GID and type of GID; the device knows neither.
 */
int shim_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask);
/* Before the QP is destroyed. */
void shim_leave_network(struct ibv_qp *qp);

/* cq_ex.c: completions one by one, by ibv_start_poll and its kin */
struct ibv_cq_ex *shim_create_cq_ex(struct ibv_context *context,
				    struct ibv_cq_init_attr_ex *attr);

/* qp_ex.c: work requests by ibv_wr_start and its kin */
struct ibv_qp *shim_create_qp_ex(struct ibv_context *context,
				 struct ibv_qp_init_attr_ex *attr);
/* Free what the QP's builder holds; the QP itself stays. */
void shim_free_builder(struct ibv_qp *qp);

#endif
