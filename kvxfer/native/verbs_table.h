/*
 * The one table of verbs that kvxfer calls by pointer.
 *
 * The calls of the fast path (ibv_post_send, ibv_post_recv, ibv_poll_cq,
 * ibv_req_notify_cq) are inline in infiniband/verbs.h and go through
 * context->ops, so they need no entry here. Everything else goes through a
 * table of which there are two instances: one filled from libibverbs.so.1 at
 * run time, one by the software device. Nothing above the table asks which of
 * the two it holds.
 *
 * Members carry no ibv_ prefix, because several of those names are macros.
 * Return values are those of the verbs man pages: functions that return int
 * return 0 or a positive errno unless said otherwise; functions that return a
 * pointer return NULL with errno set.
 */
#ifndef KVX_VERBS_TABLE_H
#define KVX_VERBS_TABLE_H

#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdint.h>

#define KVX_TOKEN_BYTES 32
#define KVX_ADDRESS_BYTES 64
#define KVX_WIRE_NAME_BYTES 16

/*
 * What the control plane knows about a peer's QP and verbs have no word for.
 * Only the software device reads it; for others bind_peer does nothing.
 */
struct kvx_peer_hint {
	/* Numeric IPv4 or IPv6 address to reach the peer's device at, NUL
	 * terminated. Empty: take it from the GID. */
	char address[KVX_ADDRESS_BYTES];
	/* What a connection to our QP must present (0..0: nothing). */
	uint8_t local_token[KVX_TOKEN_BYTES];
	/* What we present to the peer's QP (0..0: nothing). */
	uint8_t remote_token[KVX_TOKEN_BYTES];
	/* What our QP's bytes may travel by, NUL terminated, of what the device
	 * was opened for. Empty: all of that. */
	char wire[KVX_WIRE_NAME_BYTES];
};

struct kvx_verbs_table {
	const char *name; /* "libibverbs", "soft" or "null" */

	struct ibv_device **(*get_device_list)(int *num_devices);
	void (*free_device_list)(struct ibv_device **list);
	const char *(*get_device_name)(struct ibv_device *device);
	uint64_t (*get_device_guid)(
		struct ibv_device *device); /* network order */

	/*
	 * A NIC ignores what follows the device. address: numeric address that
	 * peers reach this process at, where the software device listens; NULL:
	 * loopback. wire: "auto", "shm", "cma" or "tcp"; NULL: as
	 * KVXFER_SOFT_WIRE says.
	 */
	struct ibv_context *(*open_device)(struct ibv_device *device,
					   const char *address,
					   const char *wire);
	int (*close_device)(struct ibv_context *context);

	int (*query_device)(struct ibv_context *context,
			    struct ibv_device_attr *attr);
	int (*query_port)(struct ibv_context *context, uint8_t port_num,
			  struct ibv_port_attr *attr);
	int (*query_gid)(struct ibv_context *context, uint8_t port_num,
			 int index, union ibv_gid *gid);
	int (*query_pkey)(struct ibv_context *context, uint8_t port_num,
			  int index, uint16_t *pkey);

	struct ibv_pd *(*alloc_pd)(struct ibv_context *context);
	int (*dealloc_pd)(struct ibv_pd *pd);

	/* Optional access flags (relaxed ordering) are honoured. */
	struct ibv_mr *(*reg_mr)(struct ibv_pd *pd, void *addr, size_t length,
				 unsigned int access);
	/* Of a dma-buf, as ibv_reg_dmabuf_mr(3); EOPNOTSUPP where the library
	 * or the device has none. fd stays the caller's. */
	struct ibv_mr *(*reg_dmabuf_mr)(struct ibv_pd *pd, uint64_t offset,
					size_t length, uint64_t iova, int fd,
					unsigned int access);
	/*
	 * The same of memory that is a file: fd from offset on, mapped shared at
	 * addr, as ibv_reg_dmabuf_mr has it. The software device lets peers on
	 * this host map the file, if it is a memfd that is sealed against
	 * shrinking; for others fd is not looked at. -1: no file. fd stays the
	 * caller's and may be closed.
	 */
	struct ibv_mr *(*reg_mr_fd)(struct ibv_pd *pd, int fd, uint64_t offset,
				    void *addr, size_t length,
				    unsigned int access);
	/* After this has returned, no remote write lands in the region. */
	int (*dereg_mr)(struct ibv_mr *mr);

	struct ibv_comp_channel *(*create_comp_channel)(
		struct ibv_context *context);
	int (*destroy_comp_channel)(struct ibv_comp_channel *channel);
	struct ibv_cq *(*create_cq)(struct ibv_context *context, int cqe,
				    void *cq_context,
				    struct ibv_comp_channel *channel,
				    int comp_vector);
	int (*destroy_cq)(struct ibv_cq *cq);
	/* 0, or -1 with errno (EAGAIN on an empty non-blocking channel). */
	int (*get_cq_event)(struct ibv_comp_channel *channel,
			    struct ibv_cq **cq, void **cq_context);
	void (*ack_cq_events)(struct ibv_cq *cq, unsigned int nevents);
	/* 0, or -1 with errno. */
	int (*get_async_event)(struct ibv_context *context,
			       struct ibv_async_event *event);
	void (*ack_async_event)(struct ibv_async_event *event);

	struct ibv_qp *(*create_qp)(struct ibv_pd *pd,
				    struct ibv_qp_init_attr *attr);
	int (*modify_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr,
			 int attr_mask);
	int (*query_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr,
			int attr_mask, struct ibv_qp_init_attr *init_attr);
	int (*destroy_qp)(struct ibv_qp *qp);

	/* Say what else is known of the peer; before RTR. */
	int (*bind_peer)(struct ibv_qp *qp, const struct kvx_peer_hint *hint);
	/* How the QP's bytes travel: "rdma" on a NIC; "shm", "cma", "tcp" or,
	 * before the first contact with the peer, "none" on the software
	 * device; "null" on the null device. Returns the errno for which the
	 * peer, a process of this host, cannot read this one's memory, or 0. */
	int (*wire_name)(struct ibv_qp *qp, char name[KVX_WIRE_NAME_BYTES]);

	/*
	 * Have the device fail on purpose as the text says ("" ends it): see
	 * softdev/fault.h. EINVAL with *at the offset of what is wrong in it;
	 * EOPNOTSUPP on a NIC, which fails in its own ways.
	 */
	int (*set_faults)(struct ibv_context *context, const char *plan,
			  size_t *at);
};

/*
 * Fill *table from the libibverbs at path, or where path is NULL from
 * libibverbs.so.1. Returns 0, or ELIBACC with a sentence in error[0..size)
 * when the library or one of its symbols is missing. The library stays loaded.
 */
int kvx_load_libibverbs(const char *path, struct kvx_verbs_table *table,
			char *error, size_t size);

/* Fill *table with the software device. */
void kvx_load_softdev(struct kvx_verbs_table *table);

/*
 * Fill *table with the null device, which completes every WR at once and moves
 * nothing: for measuring what is left.
 */
void kvx_load_nulldev(struct kvx_verbs_table *table);

#endif
