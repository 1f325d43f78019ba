"""The engine's core: its structs, and what the other rooms of it call."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.time cimport itimerspec

from kvxfer._ibverbs cimport (
    ibv_comp_channel,
    ibv_cq,
    ibv_qp,
    ibv_send_wr,
    ibv_sge,
    kvx_verbs_table,
)

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
    ctypedef unsigned long pthread_t

cdef extern from "sys/eventfd.h" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK
    int eventfd(unsigned int, int)
    int eventfd_write(int, uint64_t)
    int eventfd_read(int, uint64_t *)

cdef extern from "sys/timerfd.h" nogil:
    enum:
        TFD_CLOEXEC
        TFD_NONBLOCK
    int timerfd_create(int, int)
    int timerfd_settime(int, int, const itimerspec *, itimerspec *)

cdef extern from "sys/epoll.h" nogil:
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_MOD
        EPOLLIN
    union epoll_data_t:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)

cdef extern from "heap.h" nogil:
    struct kvx_heap_item:
        uint64_t key
        uint64_t order
        void *value
    struct kvx_heap:
        kvx_heap_item *items
        size_t n
    int kvx_heap_reserve(kvx_heap *, size_t)
    void kvx_heap_push(kvx_heap *, uint64_t, uint64_t, void *)
    void *kvx_heap_top(const kvx_heap *)
    void kvx_heap_pop(kvx_heap *)
    void kvx_heap_remove(kvx_heap *, const void *)
    void kvx_heap_free(kvx_heap *)

cdef extern from "ids.h" nogil:
    uint32_t kvx_take_ids64(uint32_t *, const int64_t *, uint32_t, uint64_t)
    uint32_t kvx_take_ids32(uint32_t *, const int32_t *, uint32_t, uint64_t)
    uint32_t kvx_find_duplicate(uint64_t *, const uint32_t *, uint32_t)

cdef extern from "fill.h" nogil:
    enum:
        KVX_MAX_CHAIN
        KVX_MAX_SGE
    struct kvx_plane:
        uint64_t local_base
        uint64_t local_stride
        uint64_t remote_base
        uint64_t remote_stride
        uint64_t block_bytes
        uint32_t lkey
        uint32_t rkey
        const uint32_t *lkeys
        const uint32_t *rkeys
        uint32_t local_slice
        uint32_t remote_slice
    struct kvx_template:
        ibv_send_wr *wrs        # an array
        const kvx_plane **planes
    struct kvx_limits:
        uint32_t max_sge
        uint64_t merge_bytes
        uint64_t max_wr_bytes
    struct kvx_blocks:
        const kvx_plane *plane
        const uint32_t *local
        const uint32_t *remote
        uint32_t n
        uint32_t at
        uint64_t offset
    uint32_t kvx_rkey(const kvx_plane *, uint32_t)
    void kvx_template_init(kvx_template *)
    void kvx_template_forget(kvx_template *)
    uint32_t kvx_fill(
        kvx_template *, kvx_blocks *, const kvx_limits *, uint32_t, uint32_t,
        uint64_t, uint64_t, uint64_t *)

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
    MAX_LANES = 4          # QPs of one connection
    MAX_ROADS = 2          # sets of them that rows are restricted to
    CANCELLED = -1000      # status of an operation that was cancelled
    # wr_id: queue (12 bits) | lane (2) | generation (12) | receive (1) | sequence (37)
    SLOT_SHIFT = 52
    LANE_SHIFT = 50
    GENERATION_SHIFT = 38
    FIELD_MASK = 0xfff


cdef enum Mode:
    EVENT      # whoever owns the engine drives it, at events
    ADAPTIVE   # so it is while little is in flight, else a thread does
    SPIN       # a thread does, and looks all the time

cdef enum Stage:
    DATA       # WRs of blocks are still to be posted
    FLUSH      # a small READ behind all planes, on each lane that needs one
    RECORD     # all data is posted; waits for credit, then record and immediate
    IMMEDIATE  # the record is posted
    OTHERS     # an immediate on each further QP that carried data
    POSTED     # nothing left to post

cdef struct Row:                # one layer of one group
    uint32_t first_plane
    uint32_t n_planes
    uint64_t n_local            # blocks that every local plane has
    uint64_t n_remote           # blocks that every remote plane has
    uint32_t layer
    uint32_t group
    uint32_t road               # by which of the queue's its data goes

cdef struct Cursor:             # what is to be posted next
    Stage stage
    uint32_t plane
    uint32_t index
    uint64_t offset             # bytes of the block that are posted already
    uint32_t lanes              # bit mask: lanes that carried data
    uint32_t due                # of those, the ones that still get an immediate
    uint32_t reads              # lanes that still get a READ
    bint gap                    # data may go between its READ and its record
    uint64_t n_bytes            # posted so far

cdef struct Op:                 # one layer of a submission
    Op *next
    uint64_t id
    Batch *batch
    Row *row
    Cursor cursor
    bint cancelled
    bint reserved               # its place in the notify ring is taken
    bint culprit                # the queue's first failure was one of its WRs
    uint64_t ring_start
    uint64_t ends[MAX_LANES]    # lane.posted behind its last WR so far
    uint64_t n_wrs
    uint64_t died_ns            # this and the rest: when it ends
    uint64_t wr_id
    uint32_t qp_num
    uint32_t vendor_err
    int status

cdef struct Batch:              # one submission; its operations go one by one
    uint32_t refs               # operations that Python has not taken, and itself
    uint32_t n_open             # operations that have not ended
    Queue *queue
    uint64_t key
    uint64_t order              # among equal keys; moves back when a turn is over
    uint64_t turn_bytes         # of the present turn
    uint64_t turn_wrs
    uint64_t born_ns
    uint32_t n_ids
    uint32_t n_ops
    uint32_t at                 # operation whose data is posted next
    uint32_t road               # of that operation: whose heap this is in
    uint64_t generation         # these three: what the record says of it
    uint64_t total
    uint64_t digest
    uint32_t request_bytes
    char request[256]
    Op *ops                     # behind this struct, in one piece with it
    uint32_t *local             # behind the operations
    uint32_t *remote            # behind those

cdef struct Arrival:
    Arrival *next
    uint32_t slot
    int error                   # 0, or why the record was refused
    uint64_t head               # ring position to report as consumed
    uint32_t length
    uint32_t offset             # of the record, in units of KVX_NOTIFY_ALIGN
    uint32_t missing            # immediates of further QPs, not here yet
    char *record                # owned copy

cdef struct Chain:              # WRs posted with one doorbell
    uint64_t end                # sequence behind the last of them
    uint64_t n_bytes
    uint32_t op                 # index of the operation

cdef struct Lane:               # one QP of a queue
    ibv_qp *qp                  # owned by the QueuePair kept in Engine._qps
    uint32_t qp_num
    uint64_t depth
    uint64_t posted
    uint64_t retired
    uint64_t good               # retired with success: all WRs before the first bad
    Chain *chains               # ring of `depth`, each chain has a WR at least
    uint64_t first_chain
    uint64_t next_chain
    uint32_t receives           # posted receives
    bint flushing               # an error CQE was seen: no success comes after it
    bint tail_unsignaled        # the last accepted WR will not speak for itself

cdef struct Road:               # lanes that data of some rows may go by
    uint32_t lanes              # bit mask
    uint32_t lane               # where data goes
    uint64_t stripe             # bytes until the next lane has its turn
    kvx_heap ready              # of Batch: whose next data to post goes by it

cdef struct Queue:              # one connection
    uint32_t slot
    uint32_t generation
    uint32_t n_lanes
    Lane lanes[MAX_LANES]
    uint32_t n_roads
    Road roads[MAX_ROADS]
    uint64_t flying_bytes       # posted and not retired
    kvx_limits limits
    bint failed
    bint reported               # the failure has been handed to Python
    int status                  # first failure: a WC status, or -errno of a post
    uint32_t vendor_err
    uint64_t failed_wr_id
    uint32_t failed_qp_num
    Op *first_closing           # all data is posted, the notification is not
    Op *last_closing
    Op *first_posted            # nothing left to post; by the last WR of each
    Op *last_posted
    uint32_t n_ops
    bint listed                 # is in core.runnable, by:
    uint64_t listed_key
    uint64_t listed_order
    # The route: whose blocks they are.
    kvx_plane *planes
    uint32_t *keys              # of the planes that are in slices
    Row *rows
    uint32_t n_rows
    uint64_t *seen              # one scratch bit a remote block: duplicates
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
    uint64_t flush_addr         # where READs that flush put what they read; 0: none
    uint32_t flush_lkey
    # Notify ring of this side, where the peer writes.
    const char *own_ring
    uint64_t own_bytes
    uint64_t own_head
    uint64_t own_records
    Arrival *first_partial      # records that miss immediates, in ring order
    Arrival *last_partial
    uint8_t *early              # immediates that came before their record

cdef struct Core:               # all that an engine has but its Python objects
    ibv_cq *cq                  # owned by the engine's CompletionQueue, as are these
    ibv_comp_channel *channel
    kvx_verbs_table *table
    unsigned int *unacked       # events taken and not acknowledged
    Mode mode
    pthread_mutex_t lock        # guards everything below
    uint64_t cq_limit
    uint64_t outstanding        # unretired WRs and posted receives of all queues
    uint64_t flying_bytes       # posted and not retired, of all queues
    uint64_t window_bytes       # most of that for one queue
    uint64_t device_window_bytes    # and for all
    uint64_t stripe_bytes
    uint64_t spin_ns            # that the thread looks on after the last completion
    bint may_linger             # something can end while who submits looks for it
    pthread_t thread
    bint threaded               # it runs
    bint thread_drives          # it sees to completions; else Python does
    bint thread_sleeps          # and is to be woken by wake_fd
    bint wants_wake             # by whoever has the lock, when he lets go of it
    bint stopping               # it is to end
    int wake_fd                 # eventfd: there is something for the thread
    int loop_fd                 # epoll: these two; the channel while Python drives
    int news_fd                 # eventfd: there is something for Python
    int rest_fd                 # timerfd: Python has rested from arrivals
    bint rests                  # the timer runs, or Python has not seen its end
    uint64_t took_ns            # when Python last took arrivals
    bint waits                  # Python wants to be told; it has taken all there was
    bint armed                  # the next completion makes an event, or has made one
    bint behind                 # CQEs are left of which no event may tell Python
    Queue **queues              # by slot; NULL: free
    uint32_t n_slots
    uint32_t n_queues
    uint32_t n_ready            # submissions with data to post, of all queues
    uint32_t n_chains           # posted and not retired, of all queues
    uint64_t n_polled           # CQEs since the beginning
    uint32_t next_generation
    kvx_heap runnable           # of Queue: has something to post and room for it
    Op **ops                    # by index of the operation's id; NULL: free
    uint32_t *op_generation
    uint32_t *op_free           # stack of free indices
    uint32_t n_op_free
    uint32_t n_op_slots
    uint32_t n_ops
    uint64_t order
    Op *finished                # FIFO, not yet handed to Python
    Op **finished_tail
    Arrival *arrivals           # FIFO, not yet handed to Python
    Arrival **arrivals_tail
    uint32_t n_unreported       # failed queues not yet handed to Python
    uint32_t chain
    kvx_limits limits
    kvx_template template


cdef int core_init(Core *core) noexcept nogil
cdef void core_free(Core *core) noexcept nogil
cdef void core_close(Core *core) noexcept nogil
cdef uint64_t now_ns() noexcept nogil
cdef uint64_t make_wr_id(Queue *queue, uint32_t lane, uint64_t sequence) noexcept nogil
cdef void release_batch(Batch *batch) noexcept nogil
cdef void free_queue(Queue *queue) noexcept nogil
cdef Batch *new_batch(uint32_t n_ops, uint32_t n_ids) noexcept nogil
cdef bint reserve(Core *core, Queue *queue, uint32_t n) noexcept nogil
cdef void admit(Core *core, Batch *batch) noexcept nogil
cdef void append_posted(Core *core, Op *op) noexcept nogil
cdef void finish(Core *core, Op *op, int status) noexcept nogil
cdef void retire_ops(Core *core, Queue *queue) noexcept nogil
cdef void retire_bytes(Core *core, Queue *queue, Lane *lane) noexcept nogil
cdef bint is_drained(Queue *queue) noexcept nogil
cdef void end_if_drained(Core *core, Queue *queue) noexcept nogil
cdef bint has_news(Core *core) noexcept nogil
cdef void let_go(Core *core) noexcept nogil
cdef void leave(Core *core) noexcept nogil
cdef void fail(Core *core, Queue *queue, int status) noexcept nogil
cdef void fail_all(Core *core, int status) noexcept nogil
