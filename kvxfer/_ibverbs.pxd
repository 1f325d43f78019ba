"""What kvxfer uses of infiniband/verbs.h and of the table of verbs.

Only the four inline calls of the fast path are declared as functions: they go
through context->ops and leave no undefined symbol. All others are members of
``kvx_verbs_table``.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "infiniband/verbs.h" nogil:
    cdef enum:
        IBV_QPT_RC
        IBV_WR_RDMA_WRITE
        IBV_WR_RDMA_WRITE_WITH_IMM
        IBV_WR_SEND
        IBV_WR_SEND_WITH_IMM
        IBV_WR_RDMA_READ
        IBV_SEND_SIGNALED
        IBV_SEND_INLINE
        IBV_SEND_SOLICITED
        IBV_SEND_FENCE
        IBV_QPS_RESET
        IBV_QPS_INIT
        IBV_QPS_RTR
        IBV_QPS_RTS
        IBV_QPS_ERR
        IBV_QP_STATE
        IBV_QP_ACCESS_FLAGS
        IBV_QP_PKEY_INDEX
        IBV_QP_PORT
        IBV_QP_AV
        IBV_QP_PATH_MTU
        IBV_QP_TIMEOUT
        IBV_QP_RETRY_CNT
        IBV_QP_RNR_RETRY
        IBV_QP_RQ_PSN
        IBV_QP_MAX_QP_RD_ATOMIC
        IBV_QP_MIN_RNR_TIMER
        IBV_QP_SQ_PSN
        IBV_QP_MAX_DEST_RD_ATOMIC
        IBV_QP_DEST_QPN
        IBV_WC_SUCCESS
        IBV_WC_WR_FLUSH_ERR
        IBV_WC_GENERAL_ERR
        IBV_WC_RECV
        IBV_WC_RECV_RDMA_WITH_IMM
        IBV_WC_WITH_IMM

    union ibv_gid:
        uint8_t raw[16]

    struct ibv_device:
        pass

    struct ibv_context:
        int async_fd

    struct ibv_pd:
        pass

    struct ibv_mr:
        uint32_t lkey
        uint32_t rkey

    struct ibv_comp_channel:
        int fd

    struct ibv_cq:
        int cqe

    struct ibv_qp:
        uint32_t qp_num

    struct ibv_device_attr:
        char fw_ver[64]
        uint64_t max_mr_size
        uint32_t vendor_id
        int max_qp
        int max_qp_wr
        int max_sge
        int max_cq
        int max_cqe
        int max_mr
        int max_qp_rd_atom
        int max_qp_init_rd_atom
        uint8_t phys_port_cnt

    struct ibv_port_attr:
        int state
        int max_mtu
        int active_mtu
        int gid_tbl_len
        uint32_t max_msg_sz
        uint16_t lid
        uint8_t link_layer
        uint8_t active_width
        uint8_t active_speed

    struct ibv_sge:
        uint64_t addr
        uint32_t length
        uint32_t lkey

    struct _wr_rdma:
        uint64_t remote_addr
        uint32_t rkey

    union _wr_wr:
        _wr_rdma rdma

    struct ibv_send_wr:
        uint64_t wr_id
        ibv_send_wr *next
        ibv_sge *sg_list
        int num_sge
        int opcode
        unsigned int send_flags
        uint32_t imm_data
        _wr_wr wr

    struct ibv_recv_wr:
        uint64_t wr_id
        ibv_recv_wr *next
        ibv_sge *sg_list
        int num_sge

    struct ibv_wc:
        uint64_t wr_id
        int status
        int opcode
        uint32_t vendor_err
        uint32_t byte_len
        uint32_t imm_data
        uint32_t qp_num
        unsigned int wc_flags

    struct ibv_qp_cap:
        uint32_t max_send_wr
        uint32_t max_recv_wr
        uint32_t max_send_sge
        uint32_t max_recv_sge
        uint32_t max_inline_data

    struct ibv_qp_init_attr:
        void *qp_context
        ibv_cq *send_cq
        ibv_cq *recv_cq
        ibv_qp_cap cap
        int qp_type
        int sq_sig_all

    struct ibv_global_route:
        ibv_gid dgid
        uint32_t flow_label
        uint8_t sgid_index
        uint8_t hop_limit
        uint8_t traffic_class

    struct ibv_ah_attr:
        ibv_global_route grh
        uint16_t dlid
        uint8_t sl
        uint8_t is_global
        uint8_t port_num

    struct ibv_qp_attr:
        int qp_state
        int path_mtu
        uint32_t rq_psn
        uint32_t sq_psn
        uint32_t dest_qp_num
        unsigned int qp_access_flags
        ibv_ah_attr ah_attr
        uint16_t pkey_index
        uint8_t max_rd_atomic
        uint8_t max_dest_rd_atomic
        uint8_t min_rnr_timer
        uint8_t port_num
        uint8_t timeout
        uint8_t retry_cnt
        uint8_t rnr_retry

    # Anonymous in C: only for reaching through ``element``.
    ctypedef union _async_element:
        ibv_qp *qp
        int port_num

    struct ibv_async_event:
        _async_element element
        int event_type

    int ibv_post_send(ibv_qp *qp, ibv_send_wr *wr, ibv_send_wr **bad_wr)
    int ibv_post_recv(ibv_qp *qp, ibv_recv_wr *wr, ibv_recv_wr **bad_wr)
    int ibv_poll_cq(ibv_cq *cq, int num_entries, ibv_wc *wc)
    int ibv_req_notify_cq(ibv_cq *cq, int solicited_only)

cdef extern from "verbs_table.h" nogil:
    enum:
        KVX_TOKEN_BYTES
        KVX_ADDRESS_BYTES
        KVX_WIRE_NAME_BYTES

    struct kvx_peer_hint:
        char address[64]
        uint8_t local_token[32]
        uint8_t remote_token[32]
        char wire[16]

    struct kvx_verbs_table:
        const char *name
        ibv_device **(*get_device_list)(int *) noexcept nogil
        void (*free_device_list)(ibv_device **) noexcept nogil
        const char *(*get_device_name)(ibv_device *) noexcept nogil
        uint64_t (*get_device_guid)(ibv_device *) noexcept nogil
        ibv_context *(*open_device)(
            ibv_device *, const char *, const char *) noexcept nogil
        int (*close_device)(ibv_context *) noexcept nogil
        int (*query_device)(ibv_context *, ibv_device_attr *) noexcept nogil
        int (*query_port)(ibv_context *, uint8_t, ibv_port_attr *) noexcept nogil
        int (*query_gid)(ibv_context *, uint8_t, int, ibv_gid *) noexcept nogil
        int (*query_pkey)(ibv_context *, uint8_t, int, uint16_t *) noexcept nogil
        ibv_pd *(*alloc_pd)(ibv_context *) noexcept nogil
        int (*dealloc_pd)(ibv_pd *) noexcept nogil
        ibv_mr *(*reg_mr)(ibv_pd *, void *, size_t, unsigned int) noexcept nogil
        ibv_mr *(*reg_dmabuf_mr)(
            ibv_pd *, uint64_t, size_t, uint64_t, int, unsigned int) noexcept nogil
        ibv_mr *(*reg_mr_fd)(
            ibv_pd *, int, uint64_t, void *, size_t, unsigned int) noexcept nogil
        int (*dereg_mr)(ibv_mr *) noexcept nogil
        ibv_comp_channel *(*create_comp_channel)(ibv_context *) noexcept nogil
        int (*destroy_comp_channel)(ibv_comp_channel *) noexcept nogil
        ibv_cq *(*create_cq)(
            ibv_context *, int, void *, ibv_comp_channel *, int) noexcept nogil
        int (*destroy_cq)(ibv_cq *) noexcept nogil
        int (*get_cq_event)(ibv_comp_channel *, ibv_cq **, void **) noexcept nogil
        void (*ack_cq_events)(ibv_cq *, unsigned int) noexcept nogil
        int (*get_async_event)(ibv_context *, ibv_async_event *) noexcept nogil
        void (*ack_async_event)(ibv_async_event *) noexcept nogil
        ibv_qp *(*create_qp)(ibv_pd *, ibv_qp_init_attr *) noexcept nogil
        int (*modify_qp)(ibv_qp *, ibv_qp_attr *, int) noexcept nogil
        int (*query_qp)(ibv_qp *, ibv_qp_attr *, int, ibv_qp_init_attr *) noexcept nogil
        int (*destroy_qp)(ibv_qp *) noexcept nogil
        int (*bind_peer)(ibv_qp *, const kvx_peer_hint *) noexcept nogil
        int (*wire_name)(ibv_qp *, char *) noexcept nogil
        int (*set_faults)(ibv_context *, const char *, size_t *) noexcept nogil

    int kvx_load_libibverbs(
        const char *path, kvx_verbs_table *table, char *error, size_t size)
    void kvx_load_softdev(kvx_verbs_table *table)
    void kvx_load_nulldev(kvx_verbs_table *table)
