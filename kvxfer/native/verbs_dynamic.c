/* Fill the table of verbs from the libibverbs that this machine has. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "verbs_table.h"

_Static_assert(sizeof(struct ibv_send_wr) == 128, "ibv_send_wr changed");
_Static_assert(sizeof(struct ibv_wc) == 48, "ibv_wc changed");
_Static_assert(sizeof(struct ibv_sge) == 16, "ibv_sge changed");

enum need { REQUIRED, OPTIONAL };

/* What the entries below need and the table does not show. */
static struct {
	struct ibv_context *(*open_device)(struct ibv_device *);
	int (*query_port)(struct ibv_context *, uint8_t,
			  struct ibv_port_attr *);
	struct ibv_mr *(*reg_mr)(struct ibv_pd *, void *, size_t, int);
	struct ibv_mr *(*reg_mr_iova2)(struct ibv_pd *, void *, size_t,
				       uint64_t, unsigned int);
	struct ibv_mr *(*reg_dmabuf_mr)(struct ibv_pd *, uint64_t, size_t,
					uint64_t, int, int);
} lib;

static struct ibv_context *open_device(struct ibv_device *device,
				       const char *address, const char *wire)
{
	(void)address;
	(void)wire;
	return lib.open_device(device);
}

static int query_port(struct ibv_context *context, uint8_t port_num,
		      struct ibv_port_attr *attr)
{
	struct verbs_context *extended = verbs_get_ctx_op(context, query_port);

	/* The exported symbol fills an older, shorter struct: whatever it does
	 * not know must read as zero. */
	memset(attr, 0, sizeof(*attr));
	if (extended)
		return extended->query_port(context, port_num, attr,
					    sizeof(*attr));
	return lib.query_port(context, port_num, attr);
}

static struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t length,
			     unsigned int access)
{
	/* The kernel counts pages, so for some devices nothing at an address
	 * inside a page is a region of one page. */
	if (length == 0) {
		errno = EINVAL;
		return NULL;
	}
	/* The plain symbol refuses optional flags such as relaxed ordering. */
	if (lib.reg_mr_iova2 && (access & IBV_ACCESS_OPTIONAL_RANGE))
		return lib.reg_mr_iova2(pd, addr, length, (uintptr_t)addr,
					access);
	return lib.reg_mr(pd, addr, length,
			  (int)(access & ~IBV_ACCESS_OPTIONAL_RANGE));
}

static struct ibv_mr *reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset,
				    size_t length, uint64_t iova, int fd,
				    unsigned int access)
{
	if (!lib.reg_dmabuf_mr) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	return lib.reg_dmabuf_mr(pd, offset, length, iova, fd, (int)access);
}

static struct ibv_mr *reg_mr_fd(struct ibv_pd *pd, int fd, uint64_t offset,
				void *addr, size_t length, unsigned int access)
{
	(void)fd;
	(void)offset;
	return reg_mr(pd, addr, length, access);
}

static int bind_peer(struct ibv_qp *qp, const struct kvx_peer_hint *hint)
{
	(void)qp;
	(void)hint;
	return 0;
}

static int set_faults(struct ibv_context *context, const char *plan, size_t *at)
{
	(void)context;
	(void)plan;
	*at = 0;
	return EOPNOTSUPP;
}

static int wire_name(struct ibv_qp *qp, char name[KVX_WIRE_NAME_BYTES])
{
	(void)qp;
	snprintf(name, KVX_WIRE_NAME_BYTES, "rdma");
	return 0;
}

static void say(char *error, size_t size, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(error, size, format, args);
	va_end(args);
}

static void *find(void *handle, const char *symbol, const char *version)
{
	void *found = dlvsym(handle, symbol, version);

	/* A library put in place of rdma-core's may export plain names. */
	return found ? found : dlsym(handle, symbol);
}

int kvx_load_libibverbs(const char *path, struct kvx_verbs_table *table,
			char *error, size_t size)
{
	void *handle;

	if (path) {
		handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	} else {
		handle = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
		if (!handle)
			handle = dlopen("libibverbs.so", RTLD_NOW | RTLD_LOCAL);
	}
	if (!handle) {
		say(error, size, "%s", dlerror());
		return ELIBACC;
	}

	memset(table, 0, sizeof(*table));
	table->name = "libibverbs";
	table->open_device = open_device;
	table->query_port = query_port;
	table->reg_mr = reg_mr;
	table->reg_dmabuf_mr = reg_dmabuf_mr;
	table->reg_mr_fd = reg_mr_fd;
	table->bind_peer = bind_peer;
	table->wire_name = wire_name;
	table->set_faults = set_faults;

	const struct {
		void *slot;
		const char *symbol;
		const char *version;
		enum need need;
	} wanted[] = {
		{ &table->get_device_list, "ibv_get_device_list", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->free_device_list, "ibv_free_device_list",
		  "IBVERBS_1.1", REQUIRED },
		{ &table->get_device_name, "ibv_get_device_name", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->get_device_guid, "ibv_get_device_guid", "IBVERBS_1.1",
		  REQUIRED },
		{ &lib.open_device, "ibv_open_device", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->close_device, "ibv_close_device", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->query_device, "ibv_query_device", "IBVERBS_1.1",
		  REQUIRED },
		{ &lib.query_port, "ibv_query_port", "IBVERBS_1.1", REQUIRED },
		{ &table->query_gid, "ibv_query_gid", "IBVERBS_1.1", REQUIRED },
		{ &table->query_pkey, "ibv_query_pkey", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->alloc_pd, "ibv_alloc_pd", "IBVERBS_1.1", REQUIRED },
		{ &table->dealloc_pd, "ibv_dealloc_pd", "IBVERBS_1.1",
		  REQUIRED },
		{ &lib.reg_mr, "ibv_reg_mr", "IBVERBS_1.1", REQUIRED },
		{ &lib.reg_mr_iova2, "ibv_reg_mr_iova2", "IBVERBS_1.8",
		  OPTIONAL },
		{ &lib.reg_dmabuf_mr, "ibv_reg_dmabuf_mr", "IBVERBS_1.12",
		  OPTIONAL },
		{ &table->dereg_mr, "ibv_dereg_mr", "IBVERBS_1.1", REQUIRED },
		{ &table->create_comp_channel, "ibv_create_comp_channel",
		  "IBVERBS_1.0", REQUIRED },
		{ &table->destroy_comp_channel, "ibv_destroy_comp_channel",
		  "IBVERBS_1.0", REQUIRED },
		{ &table->create_cq, "ibv_create_cq", "IBVERBS_1.1", REQUIRED },
		{ &table->destroy_cq, "ibv_destroy_cq", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->get_cq_event, "ibv_get_cq_event", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->ack_cq_events, "ibv_ack_cq_events", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->get_async_event, "ibv_get_async_event", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->ack_async_event, "ibv_ack_async_event", "IBVERBS_1.1",
		  REQUIRED },
		{ &table->create_qp, "ibv_create_qp", "IBVERBS_1.1", REQUIRED },
		{ &table->modify_qp, "ibv_modify_qp", "IBVERBS_1.1", REQUIRED },
		{ &table->query_qp, "ibv_query_qp", "IBVERBS_1.1", REQUIRED },
		{ &table->destroy_qp, "ibv_destroy_qp", "IBVERBS_1.1",
		  REQUIRED },
	};

	for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
		void *found = find(handle, wanted[i].symbol, wanted[i].version);

		if (!found && wanted[i].need == REQUIRED) {
			say(error, size, "%s has no symbol %s",
			    path ? path : "libibverbs.so.1", wanted[i].symbol);
			return ELIBACC;
		}
		/* A data pointer from dlsym into a function pointer: POSIX
		 * allows it, ISO C needs the copy. */
		memcpy(wanted[i].slot, &found, sizeof(found));
	}
	return 0;
}
