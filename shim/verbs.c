/* The verbs that the software device has, under the names of libibverbs. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

struct kvx_verbs_table shim_soft;

__attribute__((constructor)) static void load(void)
{
	kvx_load_softdev(&shim_soft);
}

/* --- devices ------------------------------------------------------------- */

EXPORT struct ibv_device **ibv_get_device_list(int *num_devices)
{
	return shim_get_device_list(num_devices);
}

EXPORT void ibv_free_device_list(struct ibv_device **list)
{
	shim_soft.free_device_list(list);
}

EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
	return shim_soft.get_device_name(device);
}

EXPORT __be64 ibv_get_device_guid(struct ibv_device *device)
{
	return shim_soft.get_device_guid(device);
}

EXPORT int ibv_get_device_index(struct ibv_device *device)
{
	(void)device;
	return -1; /* the kernel does not know it */
}

static int query_device_ex(struct ibv_context *context,
			   const struct ibv_query_device_ex_input *input,
			   struct ibv_device_attr_ex *attr, size_t size)
{
	int err;

	if (input && input->comp_mask)
		return EINVAL;
	if (size < sizeof(attr->orig_attr))
		return EINVAL;
	memset(attr, 0, size);
	err = shim_query_device(context, &attr->orig_attr);
	if (!err &&
	    vext_field_avail(struct ibv_device_attr_ex, phys_port_cnt_ex, size))
		attr->phys_port_cnt_ex = attr->orig_attr.phys_port_cnt;
	return err;
}

static int query_port_ex(struct ibv_context *context, uint8_t port_num,
			 struct ibv_port_attr *attr, size_t size)
{
	struct ibv_port_attr all;
	int err = shim_query_port(context, port_num, &all);

	if (!err)
		memcpy(attr, &all, size < sizeof(all) ? size : sizeof(all));
	return err;
}

EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	struct ibv_context *context = shim_soft.open_device(
		device, getenv("KVXFER_SOFT_ADDRESS"), NULL);
	struct verbs_context *extended;

	if (!context)
		return NULL;
	extended = verbs_get_ctx(context);
	extended->query_device_ex = query_device_ex;
	extended->query_port = query_port_ex;
	extended->create_cq_ex = shim_create_cq_ex;
	extended->create_qp_ex = shim_create_qp_ex;
	return context;
}

EXPORT int ibv_close_device(struct ibv_context *context)
{
	return shim_soft.close_device(context);
}

EXPORT int ibv_query_device(struct ibv_context *context,
			    struct ibv_device_attr *attr)
{
	return shim_query_device(context, attr);
}

/* The struct of this symbol ends before port_cap_flags2; newer programs come
 * through the context and get all of it. */
EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port_num,
			  struct _compat_ibv_port_attr *attr)
{
	struct ibv_port_attr all;
	int err = shim_query_port(context, port_num, &all);

	if (!err)
		memcpy(attr, &all,
		       offsetof(struct ibv_port_attr, port_cap_flags2));
	return err;
}

EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port_num,
			 int index, union ibv_gid *gid)
{
	struct ibv_gid_entry entry;
	int err = shim_query_gid(context, port_num, (uint32_t)index, &entry);

	if (err == ENODATA) /* this call, as ever, gives zeros for it */
		err = 0;
	if (!err)
		*gid = entry.gid;
	errno = err;
	return err ? -1 : 0;
}

EXPORT int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port_num,
			     uint32_t gid_index, struct ibv_gid_entry *entry,
			     uint32_t flags, size_t entry_size)
{
	struct ibv_gid_entry found;
	int err;

	if (flags || entry_size < sizeof(found))
		return EINVAL;
	err = shim_query_gid(context, port_num, gid_index, &found);
	if (err)
		return err;
	memset(entry, 0, entry_size);
	*entry = found;
	return 0;
}

/* Fill entries with what is not empty. Their number, or -EINVAL: too few. */
EXPORT ssize_t _ibv_query_gid_table(struct ibv_context *context,
				    struct ibv_gid_entry *entries,
				    size_t max_entries, uint32_t flags,
				    size_t entry_size)
{
	struct ibv_device_attr device;
	struct ibv_gid_entry found;
	struct ibv_port_attr port;
	uint32_t number, index;
	size_t n = 0;
	int err;

	if (flags || entry_size < sizeof(found))
		return -EINVAL;
	err = shim_query_device(context, &device);
	for (number = 1; !err && number <= device.phys_port_cnt; number++) {
		err = shim_query_port(context, (uint8_t)number, &port);
		for (index = 0; !err && index < (uint32_t)port.gid_tbl_len;
		     index++) {
			if (shim_query_gid(context, number, index, &found))
				continue;
			if (n == max_entries)
				return -EINVAL;
			memset((char *)entries + n * entry_size, 0, entry_size);
			memcpy((char *)entries + n++ * entry_size, &found,
			       sizeof(found));
		}
	}
	return err ? -err : (ssize_t)n;
}

/* Not in the headers: the provider interface's name for RoCE v2 is 1, and 0 for
 * all else. */
EXPORT int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num,
			      unsigned int index, unsigned int *type);
EXPORT int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num,
			      unsigned int index, unsigned int *type)
{
	struct ibv_gid_entry entry;

	errno = shim_query_gid(context, port_num, index, &entry);
	if (errno)
		return -1;
	*type = entry.gid_type == IBV_GID_TYPE_ROCE_V2;
	return 0;
}

EXPORT int ibv_query_pkey(struct ibv_context *context, uint8_t port_num,
			  int index, __be16 *pkey)
{
	int err = shim_query_pkey(context, port_num, index, pkey);

	errno = err;
	return err ? -1 : 0;
}

EXPORT int ibv_get_pkey_index(struct ibv_context *context, uint8_t port_num,
			      __be16 pkey)
{
	__be16 only;

	if (ibv_query_pkey(context, port_num, 0, &only))
		return -1;
	return only == pkey ? 0 : -1;
}

/* --- memory -------------------------------------------------------------- */

EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
	return shim_soft.alloc_pd(context);
}

EXPORT int ibv_dealloc_pd(struct ibv_pd *pd)
{
	return shim_soft.dealloc_pd(pd);
}

EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length,
				 int access)
{
	return shim_soft.reg_mr(pd, addr, length, (unsigned int)access);
}

/* Regions are addressed by where they are. */
EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr,
				       size_t length, uint64_t iova,
				       unsigned int access)
{
	if (iova != (uintptr_t)addr) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	return shim_soft.reg_mr(pd, addr, length, access);
}

EXPORT struct ibv_mr *ibv_reg_mr_iova(struct ibv_pd *pd, void *addr,
				      size_t length, uint64_t iova, int access)
{
	return ibv_reg_mr_iova2(pd, addr, length, iova, (unsigned int)access);
}

EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
	return shim_soft.dereg_mr(mr);
}

/*
 * The device moves bytes by the owner's own addresses, never by physical pages,
 * so a fork that copies pages on write cannot take them from under it.
 */
EXPORT int ibv_fork_init(void)
{
	return 0;
}

EXPORT enum ibv_fork_status ibv_is_fork_initialized(void)
{
	return IBV_FORK_UNNEEDED;
}

/* --- completions and events ---------------------------------------------- */

EXPORT struct ibv_comp_channel *ibv_create_comp_channel(
	struct ibv_context *context)
{
	return shim_soft.create_comp_channel(context);
}

EXPORT int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
	return shim_soft.destroy_comp_channel(channel);
}

EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe,
				    void *cq_context,
				    struct ibv_comp_channel *channel,
				    int comp_vector)
{
	return shim_soft.create_cq(context, cqe, cq_context, channel,
				   comp_vector);
}

EXPORT int ibv_destroy_cq(struct ibv_cq *cq)
{
	return shim_soft.destroy_cq(cq);
}

EXPORT int ibv_resize_cq(struct ibv_cq *cq, int cqe)
{
	return soft_resize_cq(cq, cqe);
}

EXPORT int ibv_get_cq_event(struct ibv_comp_channel *channel,
			    struct ibv_cq **cq, void **cq_context)
{
	return shim_soft.get_cq_event(channel, cq, cq_context);
}

EXPORT void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int nevents)
{
	shim_soft.ack_cq_events(cq, nevents);
}

EXPORT int ibv_get_async_event(struct ibv_context *context,
			       struct ibv_async_event *event)
{
	return shim_soft.get_async_event(context, event);
}

EXPORT void ibv_ack_async_event(struct ibv_async_event *event)
{
	shim_soft.ack_async_event(event);
}

/* --- queue pairs --------------------------------------------------------- */

EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd,
				    struct ibv_qp_init_attr *attr)
{
	return shim_soft.create_qp(pd, attr);
}

EXPORT int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr,
			 int attr_mask)
{
	return shim_modify_qp(qp, attr, attr_mask);
}

EXPORT int ibv_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr,
			int attr_mask, struct ibv_qp_init_attr *init_attr)
{
	return shim_soft.query_qp(qp, attr, attr_mask, init_attr);
}

EXPORT int ibv_destroy_qp(struct ibv_qp *qp)
{
	shim_leave_network(qp);
	shim_free_builder(qp);
	return shim_soft.destroy_qp(qp);
}

/* --- datagrams ----------------------------------------------------------- */

EXPORT struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
	return soft_create_ah(pd, attr);
}

EXPORT int ibv_init_ah_from_wc(struct ibv_context *context, uint8_t port_num,
			       struct ibv_wc *wc, struct ibv_grh *grh,
			       struct ibv_ah_attr *attr)
{
	(void)context;
	if (!(wc->wc_flags & IBV_WC_GRH)) {
		errno = EINVAL;
		return -1;
	}
	*attr = (struct ibv_ah_attr){ .is_global = 1, .port_num = port_num };
	attr->grh.dgid = grh->sgid;
	return 0;
}

EXPORT struct ibv_ah *ibv_create_ah_from_wc(struct ibv_pd *pd,
					    struct ibv_wc *wc,
					    struct ibv_grh *grh,
					    uint8_t port_num)
{
	struct ibv_ah_attr attr;

	if (ibv_init_ah_from_wc(pd->context, port_num, wc, grh, &attr))
		return NULL;
	return soft_create_ah(pd, &attr);
}

EXPORT int ibv_destroy_ah(struct ibv_ah *ah)
{
	return soft_destroy_ah(ah);
}

/* No promise about the order in which the bytes of one message land. */
EXPORT int ibv_query_qp_data_in_order(struct ibv_qp *qp, enum ibv_wr_opcode op,
				      uint32_t flags)
{
	(void)qp;
	(void)op;
	(void)flags;
	return 0;
}
