"""The engine's core: its structs, and what the engine calls of it."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kvxfer._ibverbs cimport ibv_cq, ibv_qp, ibv_send_wr, ibv_sge

cdef extern from "arpa/inet.h" nogil:
    uint32_t htonl(uint32_t)
    uint32_t ntohl(uint32_t)

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)

cdef extern from "heap.h" nogil:
    struct kvx_heap:
        size_t n
    int kvx_heap_reserve(kvx_heap *, size_t)
    void kvx_heap_push(kvx_heap *, uint64_t, uint64_t, void *)
    void *kvx_heap_top(const kvx_heap *)
    void kvx_heap_pop(kvx_heap *)
    void kvx_heap_remove(kvx_heap *, const void *)
    void kvx_heap_free(kvx_heap *)

cdef extern from "notify.h" nogil:
    enum:
        KVX_NOTIFY_ALIGN
        KVX_NOTIFY_MAGIC
        KVX_NOTIFY_MAX_REQUEST
    struct kvx_notify_record:
        uint32_t magic
        uint32_t length
        uint64_t sequence
        uint64_t n_bytes
        uint32_t layer
        uint32_t n_ids
        uint16_t group
        uint16_t n_qps
        uint16_t request_bytes
        uint16_t flags
        uint64_t digest
        uint64_t generation
        uint64_t total
    uint64_t kvx_pad(uint64_t length, uint64_t to)
    uint64_t kvx_notify_length(uint64_t request_bytes, uint64_t n_ids)
    uint64_t kvx_notify_limit(uint64_t ring_bytes)
    uint64_t kvx_notify_place(
        uint64_t head, uint64_t length, uint64_t ring_bytes, uint64_t *start)

cdef enum:
    MAX_CHAIN = 64         # WRs of the template
    FIRST_CHAIN = 16       # the device starts early on the first of an operation
    MAX_SGE = 16
    POLL_BATCH = 32
    PROGRESS_BUDGET = 512  # CQEs a call of progress; then others get their turn
    CANCELLED = -1000      # status of an operation that was cancelled
    # wr_id: queue slot (12 bits) | generation (12) | receive (1) | sequence (39)
    SLOT_SHIFT = 52
    GENERATION_SHIFT = 40
    FIELD_MASK = 0xfff


cdef enum Stage:
    DATA       # WRs of blocks are still to be posted
    RECORD     # all data is posted; waits for credit, then record and immediate
    IMMEDIATE  # the record is posted
    POSTED     # nothing left to post

cdef struct Pair:               # one plane of one layer, both ends
    uint64_t local_base
    uint64_t local_stride
    uint64_t remote_base
    uint64_t remote_stride
    uint64_t block_bytes
    uint32_t lkey
    uint32_t rkey

cdef struct Row:                # one layer of one group
    uint32_t first_pair
    uint32_t n_pairs
    uint64_t n_local            # blocks that every local plane has
    uint64_t n_remote           # blocks that every remote plane has
    uint32_t layer
    uint32_t group

cdef struct Ids:                # shared by the operations of one submission
    uint32_t refs
    uint32_t n
    uint32_t request_bytes
    char request[256]
    uint64_t generation
    uint64_t total
    uint64_t digest
    int64_t *local              # n local and, behind them, n remote ids

cdef struct Cursor:             # what is to be posted next
    uint32_t pair
    uint32_t index
    uint64_t offset             # bytes of the block that are posted already
    Stage stage

cdef struct Op:
    Op *next
    uint64_t id
    Queue *queue
    Ids *ids
    Row *row
    Cursor cursor
    bint cancelled
    bint reserved               # its place in the notify ring is taken
    bint culprit                # the queue's first failure was one of its WRs
    uint64_t ring_start
    uint64_t end                # value of queue.posted behind its last WR so far
    uint64_t n_wrs
    uint64_t n_bytes
    uint64_t born_ns
    uint64_t died_ns            # this and the rest: when it ends
    uint64_t wr_id
    uint32_t qp_num
    uint32_t vendor_err
    int status

cdef struct Arrival:
    Arrival *next
    uint32_t slot
    int error                   # 0, or why the record was refused
    uint64_t head               # ring position to report as consumed
    uint32_t length
    char *record                # owned copy

cdef struct Queue:
    ibv_qp *qp                  # owned by the QueuePair kept in Engine._qps
    uint32_t slot
    uint32_t generation
    uint32_t qp_num
    uint64_t depth
    uint32_t max_sge
    uint64_t posted
    uint64_t retired
    uint32_t *owners            # by sequence % depth: index of the WR's operation
    uint32_t receives           # posted receives
    bint failed
    bint reported               # the failure has been handed to Python
    bint flushing               # an error CQE was seen: no success comes after it
    bint tail_unsignaled        # the last accepted WR will not speak for itself
    int status                  # first failure: a WC status, or -errno of a post
    uint32_t vendor_err
    uint64_t failed_wr_id
    kvx_heap ready              # of Op: something left to post
    Op *first_posted            # nothing left to post; by the last WR of each
    Op *last_posted
    uint32_t n_ops
    # The route: whose blocks they are.
    Pair *pairs
    Row *rows
    uint32_t n_rows
    uint8_t *seen               # one scratch bit a remote block: duplicates
    # Notify ring of the peer, where this side writes.
    char *ring
    uint32_t ring_lkey
    uint64_t ring_remote
    uint32_t ring_rkey
    uint64_t ring_bytes
    uint64_t ring_head
    uint64_t ring_tail          # by the peer's credit
    uint64_t max_records
    uint64_t records_sent
    uint64_t records_consumed
    # Notify ring of this side, where the peer writes.
    const char *own_ring
    uint64_t own_bytes
    uint64_t own_head
    uint64_t own_records

cdef struct Core:               # all that an engine has but its Python objects
    ibv_cq *cq                  # owned by the engine's CompletionQueue
    pthread_mutex_t lock        # guards everything below
    uint64_t cq_limit
    uint64_t outstanding        # unretired WRs and posted receives of all queues
    Queue **queues              # by slot; NULL: free
    uint32_t n_slots
    uint32_t next_generation
    Op **ops                    # by index of the operation's id; NULL: free
    uint32_t *op_generation
    uint32_t *op_free           # stack of free indices
    uint32_t n_op_free
    uint32_t n_op_slots
    uint32_t n_ops
    uint64_t op_order
    Op *finished                # FIFO, not yet handed to Python
    Op **finished_tail
    Arrival *arrivals           # FIFO, not yet handed to Python
    Arrival **arrivals_tail
    uint32_t n_unreported       # failed queues not yet handed to Python
    uint32_t chain
    uint32_t max_sge
    uint64_t merge_bytes
    uint64_t max_wr_bytes
    # The template: WRs linked once, of which only the changing fields are written.
    ibv_send_wr wrs[64]         # MAX_CHAIN
    ibv_sge sges[1024]          # MAX_CHAIN * MAX_SGE
    Cursor before               # the operation's cursor before the template
    Cursor after[64]            # and behind each of its WRs
    uint64_t bytes_after[64]


cdef int core_init(
    Core *core, ibv_cq *cq, uint32_t chain, uint32_t max_sge,
    uint64_t merge_bytes, uint64_t max_wr_bytes) noexcept nogil
cdef void core_free(Core *core) noexcept nogil
cdef uint64_t now_ns() noexcept nogil
cdef uint64_t make_wr_id(Queue *queue, uint64_t sequence) noexcept nogil
cdef int find_bad_id(
    const int64_t *ids, uint32_t n, uint64_t limit, uint32_t *position) noexcept nogil
cdef int find_duplicate(
    uint8_t *seen, const int64_t *ids, uint32_t n, uint32_t *position) noexcept nogil
cdef void release_ids(Ids *ids) noexcept nogil
cdef void free_queue(Queue *queue) noexcept nogil
cdef int post_receive(Core *core, Queue *queue) noexcept nogil
cdef Op *admit(
    Core *core, Queue *queue, Row *row, Ids *ids, uint64_t key) noexcept nogil
cdef void cancel(Core *core, uint64_t op_id) noexcept nogil
cdef void stop(Core *core, Queue *queue) noexcept nogil
cdef void flush(Core *core, Queue *queue) noexcept nogil
cdef void forget(Core *core, Queue *queue) noexcept nogil
cdef void pump(Core *core, Queue *queue) noexcept nogil
cdef void pump_all(Core *core) noexcept nogil
cdef void fail_all(Core *core, int status) noexcept nogil
cdef int drain(Core *core, uint32_t budget) noexcept nogil
