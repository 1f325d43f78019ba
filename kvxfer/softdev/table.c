/* The software device as a table of verbs, and what its queries say. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"
#include "cq.h"
#include "event.h"
#include "frame.h"
#include "inject.h"
#include "mr.h"
#include "qp.h"
#include "softdev.h"
#include "windows.h"

#define PKEY_DEFAULT 0xffff
#define VENDOR_ID 0xffffff /* nobody's; 0 would read as "not known" */
#define LINK_WIDTH_4X 2
#define LINK_SPEED_EDR 32
#define PHYS_LINK_UP 5
#define PHYS_DISABLED 3
/* The last of them: SEND_WITH_INV and LOCAL_INV. */
#define WINDOW_FLAGS                                             \
	(IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B | \
	 IBV_DEVICE_MEM_MGT_EXTENSIONS)

static struct ibv_device soft0 = {
	.node_type = IBV_NODE_CA,
	.transport_type = IBV_TRANSPORT_IB,
	.name = "soft0",
	.dev_name = "soft0",
};

static struct ibv_device **get_device_list(int *num_devices)
{
	struct ibv_device **list = calloc(2, sizeof(*list));

	if (!list) {
		errno = ENOMEM;
		return NULL;
	}
	list[0] = &soft0;
	if (num_devices)
		*num_devices = 1;
	return list;
}

static void free_device_list(struct ibv_device **list)
{
	free(list);
}

static const char *get_device_name(struct ibv_device *device)
{
	return device->name;
}

static uint64_t get_device_guid(struct ibv_device *device)
{
	(void)device;
	return htobe64(0x6b76736f66743000u); /* "kvsoft0" */
}

static int query_device(struct ibv_context *context,
			struct ibv_device_attr *attr)
{
	const uint64_t guid = get_device_guid(context->device);
	const bool windows = context->ops.alloc_mw; /* the null device: no */

	if (soft_orphaned(context))
		return ENODEV;
	*attr = (struct ibv_device_attr){
		.device_cap_flags = windows ? WINDOW_FLAGS : 0,
		.fw_ver = "1.0",
		.node_guid = guid,
		.sys_image_guid = guid,
		.vendor_id = VENDOR_ID,
		.max_mr_size = UINT64_MAX >> 1,
		.page_size_cap = 0xfffffffffffff000u,
		.max_qp = SOFT_MAX_QP,
		.max_qp_wr = SOFT_MAX_QP_WR,
		.max_sge = SOFT_MAX_SGE,
		.max_sge_rd = SOFT_MAX_SGE,
		.max_cq = SOFT_MAX_QP,
		.max_cqe = SOFT_MAX_CQE,
		.max_mr = 1 << 20,
		.max_mw = windows ? SOFT_MAX_MW : 0,
		.max_pd = 1 << 20,
		.max_ah = 1 << 20,
		.max_qp_rd_atom = SOFT_MAX_RD_ATOMIC,
		.max_res_rd_atom = SOFT_MAX_RD_ATOMIC * SOFT_MAX_QP,
		.max_qp_init_rd_atom = SOFT_MAX_RD_ATOMIC,
		.atomic_cap = IBV_ATOMIC_GLOB /* by the CPU */,
		.max_pkeys = 1,
		.phys_port_cnt = 1,
	};
	return 0;
}

int soft_query_port(struct ibv_context *context, uint8_t port_num,
		    struct ibv_port_attr *attr)
{
	struct soft_context *ctx = to_context(context);
	bool down;

	if (soft_orphaned(context))
		return ENODEV;
	if (port_num != 1)
		return EINVAL;
	soft_lock(ctx);
	down = ctx->port_down || ctx->lost;
	soft_unlock(ctx);
	*attr = (struct ibv_port_attr){
		.state = down ? IBV_PORT_DOWN : IBV_PORT_ACTIVE,
		.max_mtu = IBV_MTU_4096,
		.active_mtu = IBV_MTU_4096,
		.gid_tbl_len = 1,
		.max_msg_sz = FRAME_MAX_MESSAGE,
		.pkey_tbl_len = 1,
		.max_vl_num = 1,
		.active_width = LINK_WIDTH_4X,
		.active_speed = LINK_SPEED_EDR,
		.phys_state = down ? PHYS_DISABLED : PHYS_LINK_UP,
		.link_layer = IBV_LINK_LAYER_ETHERNET,
	};
	return 0;
}

static int query_gid(struct ibv_context *context, uint8_t port_num, int index,
		     union ibv_gid *gid)
{
	if (soft_orphaned(context))
		return ENODEV;
	if (port_num != 1 || index != 0)
		return EINVAL;
	*gid = to_context(context)->gid;
	return 0;
}

static int query_pkey(struct ibv_context *context, uint8_t port_num, int index,
		      uint16_t *pkey)
{
	if (soft_orphaned(context))
		return ENODEV;
	if (port_num != 1 || index != 0)
		return EINVAL;
	*pkey = PKEY_DEFAULT;
	return 0;
}

void kvx_load_softdev(struct kvx_verbs_table *table)
{
	*table = (struct kvx_verbs_table){
		.name = "soft",
		.get_device_list = get_device_list,
		.free_device_list = free_device_list,
		.get_device_name = get_device_name,
		.get_device_guid = get_device_guid,
		.open_device = soft_open_device,
		.close_device = soft_close_device,
		.query_device = query_device,
		.query_port = soft_query_port,
		.query_gid = query_gid,
		.query_pkey = query_pkey,
		.alloc_pd = soft_alloc_pd,
		.dealloc_pd = soft_dealloc_pd,
		.reg_mr = soft_reg_mr,
		.reg_dmabuf_mr = soft_reg_dmabuf_mr,
		.reg_mr_fd = soft_reg_mr_fd,
		.dereg_mr = soft_dereg_mr,
		.create_comp_channel = soft_create_comp_channel,
		.destroy_comp_channel = soft_destroy_comp_channel,
		.create_cq = soft_create_cq,
		.destroy_cq = soft_destroy_cq,
		.get_cq_event = soft_get_cq_event,
		.ack_cq_events = soft_ack_cq_events,
		.get_async_event = soft_get_async_event,
		.ack_async_event = soft_ack_async_event,
		.create_qp = soft_create_qp,
		.modify_qp = soft_modify_qp,
		.query_qp = soft_query_qp,
		.destroy_qp = soft_destroy_qp,
		.bind_peer = soft_bind_peer,
		.wire_name = soft_wire_name,
		.set_faults = soft_set_faults,
	};
}
