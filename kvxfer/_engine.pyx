# cython: language_level=3, embedsignature=True, cdivision=True
"""Operations in, chained WRs out; completions in, finished operations out.

An *operation* moves the blocks of one layer to one peer: a list of local and a
list of remote block ids, applied to every plane of the layer. WRs are made from
the ids straight into one reused template; there is no table of extents and no
Python object a block. One engine has one CQ and any number of queues, a queue
being the QP to one peer with what is known of that peer's memory.

Send-queue accounting. A slot of the send queue is free again only when a CQE at
or after it has been polled. Per queue, in WRs since the beginning::

    posted  accepted by ibv_post_send
    retired known to be complete
    free    = depth - (posted - retired)

The last WR of every chain is signaled and a chain is at most ``chain`` long, so
each posted WR has a signaled one close behind it and the queue cannot fill up
with WRs of which nothing will ever be heard. RC completes in order: a CQE retires
all WRs up to its own. The sum of unretired WRs and posted receives of all queues
never exceeds the CQ, since each of them may end in a CQE.

Failure. The first failed WR of a queue stops all posting on it; its operations
end when every posted WR has been flushed, and not before: then the device is done
with their blocks. An operation that is cancelled posts nothing further and ends
when what it had posted is retired.

Nothing here waits, and nothing knows asyncio. Whoever owns the engine calls
:meth:`Engine.progress` when :attr:`Engine.fd` is readable. All state is behind one
lock, so that a progress thread can take the place of that call.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvxfer._ibverbs cimport *
from kvxfer._verbs cimport CompletionQueue, Device, QueuePair

from typing import NamedTuple

from kvxfer.errors import (
    ClosedResourceError,
    LayoutError,
    ProtocolError,
    UsageError,
    verbs_error,
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
    uint64_t kvx_pad(uint64_t length, uint64_t to)
    uint64_t kvx_notify_length(uint64_t request_bytes, uint64_t n_ids)
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

cdef uint64_t RECEIVE_BIT = <uint64_t>1 << 39
cdef uint64_t SEQUENCE_MASK = (<uint64_t>1 << 39) - 1

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
    uint64_t end                # value of queue.posted behind its last WR
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
    uint32_t receives           # posted receives
    bint failed
    bint reported               # the failure has been handed to Python
    bint flushing               # an error CQE was seen: no success comes after it
    bint tail_unsignaled        # the last accepted WR will not speak for itself
    int status                  # first failure: a WC status, or -errno of a post
    uint32_t vendor_err
    uint64_t failed_wr_id
    kvx_heap ready              # of Op: something left to post
    Op *first_posted            # FIFO: nothing left to post
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


class Finished(NamedTuple):
    """One finished operation.

    ``status`` is 0, :data:`CANCELLED_STATUS`, a WC status, or the negative errno
    that posting gave. On failure ``culprit`` says whether one of this operation's
    own WRs failed first; the other operations of the queue went down with it.
    """

    op_id: int
    status: int
    culprit: bool
    n_bytes: int
    n_wrs: int
    seconds: float
    wr_id: int
    qp_num: int
    vendor_err: int


class RingArrival(NamedTuple):
    """One notification: the record as the peer wrote it, already copied.

    With ``error`` set the peer broke the rules of the ring and there is no record.
    ``head`` is the ring position that may be given back as credit.
    """

    slot: int
    record: bytes
    head: int
    error: str | None


class Progress(NamedTuple):
    """What one call of :meth:`Engine.progress` found."""

    finished: list
    arrivals: list
    failed: list
    """Slots of queues that failed since the last call: move their QPs to ERR."""
    more: bool
    """The budget was used up: call again soon, no event may come."""


CANCELLED_STATUS = CANCELLED

_RING_ERRORS = {
    1: "an immediate points outside the ring or not at the next record",
    2: "a record's header is not valid",
    3: "a receive completed that carries no immediate",
}


cdef uint64_t _now_ns() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return <uint64_t>ts.tv_sec * 1000000000 + ts.tv_nsec


cdef uint64_t _wr_id(Queue *queue, uint64_t sequence) noexcept nogil:
    return (
        (<uint64_t>queue.slot << SLOT_SHIFT)
        | (<uint64_t>queue.generation << GENERATION_SHIFT)
        | (sequence & SEQUENCE_MASK)
    )


cdef int _find_bad_id(
    const int64_t *ids, uint32_t n, uint64_t limit, uint32_t *position
) noexcept nogil:
    """Return 1 and the position of the first id outside ``[0, limit)``, or 0."""
    cdef uint32_t i
    for i in range(n):
        if <uint64_t>ids[i] >= limit:    # a negative id is huge here
            position[0] = i
            return 1
    return 0


cdef int _find_duplicate(
    uint8_t *seen, const int64_t *ids, uint32_t n, uint32_t *position
) noexcept nogil:
    """Return 1 and the position of an id that came before, or 0.

    ``seen`` is all zero before and after.
    """
    cdef:
        uint32_t i
        uint32_t marked = n
        int found = 0
    for i in range(n):
        if seen[ids[i] >> 3] & (1 << (ids[i] & 7)):
            position[0] = i
            marked = i
            found = 1
            break
        seen[ids[i] >> 3] |= 1 << (ids[i] & 7)
    for i in range(marked):
        seen[ids[i] >> 3] = 0
    return found


cdef void _release_ids(Ids *ids) noexcept nogil:
    ids.refs -= 1
    if ids.refs == 0:
        free(ids)


cdef int _fill_pair(Pair *slot, tuple pair) except -1:
    (slot.local_base, slot.local_stride, slot.remote_base, slot.remote_stride,
     slot.block_bytes, slot.lkey, slot.rkey) = pair
    if slot.block_bytes == 0:
        raise LayoutError("a block has no bytes")
    return 0


cdef class Engine:
    """Drives the QPs of one device over one CQ.

    Args:
      device: Open device; the CQ is made on it.
      cq_depth: WCs that the CQ holds; bounds all that is in flight.
      chain: WRs a doorbell at most, 1 to 64.
      max_sge: SGEs a WR at most (further bounded by each QP), 1 to 16.
      merge_bytes: Neighbouring blocks merge into WRs of up to so many bytes.
      max_wr_bytes: Longest WR that the port carries; longer blocks are split.
    """

    cdef:
        readonly CompletionQueue cq
        dict _qps                 # slot -> QueuePair, kept alive while in use
        pthread_mutex_t lock      # guards everything below
        bint has_lock
        Queue **queues            # by slot; NULL: free
        uint32_t n_slots
        uint32_t next_generation
        uint64_t outstanding      # unretired WRs and posted receives
        uint64_t cq_limit
        Op **ops                  # by index of the operation's id; NULL: free
        uint32_t *op_generation
        uint32_t *op_free         # stack of free indices
        uint32_t n_op_free
        uint32_t n_op_slots
        uint64_t op_order
        uint32_t n_ops
        Op *finished              # FIFO, not yet handed to Python
        Op **finished_tail
        Arrival *arrivals         # FIFO, not yet handed to Python
        Arrival **arrivals_tail
        uint32_t n_unreported     # failed queues not yet handed to Python
        uint32_t chain
        uint32_t max_sge
        uint64_t merge_bytes
        uint64_t max_wr_bytes
        ibv_send_wr wrs[MAX_CHAIN]
        ibv_sge sges[MAX_CHAIN * MAX_SGE]
        Cursor before             # the operation's cursor before the template
        Cursor after[MAX_CHAIN]   # and behind each of its WRs
        uint64_t bytes_after[MAX_CHAIN]

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        self.has_lock = True
        self.finished_tail = &self.finished
        self.arrivals_tail = &self.arrivals

    def __init__(self, Device device not None, *, cq_depth, chain=64, max_sge=8,
                 merge_bytes=1 << 20, max_wr_bytes=1 << 30):
        cdef uint32_t i
        if not 1 <= chain <= MAX_CHAIN:
            raise UsageError(f"chain is {chain}, not 1 to {MAX_CHAIN}")
        if not 1 <= max_sge <= MAX_SGE:
            raise UsageError(f"max_sge is {max_sge}, not 1 to {MAX_SGE}")
        self.chain = chain
        self.max_sge = max_sge
        self.max_wr_bytes = min(max_wr_bytes, 1 << 30)
        self.merge_bytes = min(merge_bytes, self.max_wr_bytes)
        self._qps = {}
        self.cq = CompletionQueue(device, cq_depth)
        self.cq_limit = self.cq.cq.cqe
        self.cq.arm()
        for i in range(MAX_CHAIN):
            memset(&self.wrs[i], 0, sizeof(ibv_send_wr))
            self.wrs[i].next = &self.wrs[i + 1] if i + 1 < MAX_CHAIN else NULL
            self.wrs[i].sg_list = &self.sges[i * MAX_SGE]

    def __dealloc__(self):
        cdef:
            uint32_t i
            Op *op
            Arrival *arrival
        for i in range(self.n_slots):
            if self.queues[i] is not NULL:
                _free_queue(self.queues[i])
        for i in range(self.n_op_slots):
            if self.ops[i] is not NULL:
                _release_ids(self.ops[i].ids)
                free(self.ops[i])
        while self.finished is not NULL:
            op = self.finished
            self.finished = op.next
            _release_ids(op.ids)
            free(op)
        while self.arrivals is not NULL:
            arrival = self.arrivals
            self.arrivals = arrival.next
            free(arrival.record)
            free(arrival)
        free(self.queues)
        free(self.ops)
        free(self.op_generation)
        free(self.op_free)
        if self.has_lock:
            pthread_mutex_destroy(&self.lock)

    def close(self):
        """Close the CQ; all queues must have been removed. Twice is fine."""
        if self.cq is None or self.cq.closed:
            return
        if self._qps:
            raise UsageError(f"{len(self._qps)} queues are still in the engine")
        self.cq.close()

    @property
    def fd(self):
        """Readable when :meth:`progress` should be called."""
        return self.cq.fd

    @property
    def in_flight(self):
        """Operations that have not ended yet."""
        return self.n_ops

    @property
    def attention(self):
        """Whether something has ended without an event: call :meth:`progress`."""
        return self.finished is not NULL or self.n_unreported != 0

    # -- queues ----------------------------------------------------------------

    cdef Queue *_new_queue(self, QueuePair qp, uint32_t receives) except NULL:
        """Make a queue in a free slot; the caller fills in its route or ring."""
        cdef:
            Queue *queue
            Queue **grown
            uint32_t slot = 0
            uint32_t room = self.n_slots * 2 + 8
        self.cq._ensure_open()
        qp._ensure_open()
        if qp.cq is not self.cq:
            raise UsageError("the QP completes into another CQ than the engine's")
        if self.outstanding + receives >= self.cq_limit:
            raise UsageError(
                f"no room in the CQ for {receives} more receives: {self.outstanding} "
                f"of {self.cq_limit} entries are spoken for"
            )
        while slot < self.n_slots and self.queues[slot] is not NULL:
            slot += 1
        if slot > FIELD_MASK:
            raise UsageError(f"more than {FIELD_MASK + 1} connections on one engine")
        queue = <Queue *>calloc(1, sizeof(Queue))
        if queue is NULL:
            raise MemoryError
        if slot == self.n_slots:
            grown = <Queue **>calloc(room, sizeof(Queue *))
            if grown is NULL:
                free(queue)
                raise MemoryError
            if self.n_slots:
                memcpy(grown, self.queues, self.n_slots * sizeof(Queue *))
            free(self.queues)
            self.queues = grown
            self.n_slots = room
        self.next_generation = (self.next_generation + 1) & FIELD_MASK
        queue.qp = qp.qp
        queue.qp_num = qp.qp.qp_num
        queue.slot = slot
        queue.generation = self.next_generation
        queue.depth = qp.max_send_wr
        queue.max_sge = min(self.max_sge, qp.max_send_sge)
        self.queues[slot] = queue
        self._qps[slot] = qp
        return queue

    cdef Queue *_queue(self, uint32_t slot) except NULL:
        if slot >= self.n_slots or self.queues[slot] is NULL:
            raise ClosedResourceError(f"there is no queue {slot}")
        return self.queues[slot]

    def add_initiator(self, QueuePair qp not None, rows, ring=None):
        """Add the QP to a peer whose memory this side writes; return its slot.

        Args:
          qp: In RTS, made with this engine's CQ.
          rows: One a layer and group: ``(layer, group, n_local, n_remote, pairs)``
            with a pair for each plane: ``(local_base, local_stride, remote_base,
            remote_stride, block_bytes, lkey, rkey)``. Operations name rows by
            their position.
          ring: The peer's notify ring and our copy of it: ``(local_addr, lkey,
            remote_addr, rkey, length, max_records)``; None: no notifications.
        """
        cdef:
            Queue *queue
            uint32_t n_rows = len(rows)
            uint32_t n_pairs = sum(len(row[4]) for row in rows)
            uint64_t n_blocks = max((row[3] for row in rows), default=0)
            uint32_t at = 0
        queue = self._new_queue(qp, 0)
        try:
            queue.rows = <Row *>calloc(n_rows + 1, sizeof(Row))
            queue.pairs = <Pair *>calloc(n_pairs + 1, sizeof(Pair))
            queue.seen = <uint8_t *>calloc(n_blocks // 8 + 1, 1)
            if queue.rows is NULL or queue.pairs is NULL or queue.seen is NULL:
                raise MemoryError
            for i, (layer, group, n_local, n_remote, pairs) in enumerate(rows):
                queue.rows[i] = Row(at, len(pairs), n_local, n_remote, layer, group)
                for pair in pairs:
                    _fill_pair(&queue.pairs[at], pair)
                    at += 1
            queue.n_rows = n_rows
            if ring is not None:
                address, lkey, remote, rkey, length, max_records = ring
                queue.ring = <char *><uintptr_t>address
                queue.ring_lkey = lkey
                queue.ring_remote = remote
                queue.ring_rkey = rkey
                queue.ring_bytes = length
                queue.max_records = max_records
        except BaseException:
            self._drop_queue(queue)
            raise
        return queue.slot

    def add_target(self, QueuePair qp not None, ring_addr, ring_bytes, receives):
        """Add the QP of a peer that writes into our memory; return its slot.

        Posts ``receives`` receive WRs at once (INIT or later) and keeps them
        posted. ``ring_addr`` is the notify ring that the peer writes.
        """
        cdef:
            Queue *queue = self._new_queue(qp, receives)
            uint32_t i
            int err = 0
        queue.own_ring = <const char *><uintptr_t>ring_addr
        queue.own_bytes = ring_bytes
        for i in range(receives):
            err = self._post_receive(queue)
            if err:
                self._drop_queue(queue)
                raise verbs_error(err, "ibv_post_recv", f"receive {i} of {receives}")
        return queue.slot

    cdef int _post_receive(self, Queue *queue) noexcept nogil:
        """Post one receive without memory. Return 0 or an errno. Lock held."""
        cdef:
            ibv_recv_wr wr
            ibv_recv_wr *bad = NULL
            int err
        memset(&wr, 0, sizeof(wr))
        wr.wr_id = _wr_id(queue, 0) | RECEIVE_BIT
        err = ibv_post_recv(queue.qp, &wr, &bad)
        if err == 0:
            queue.receives += 1
            self.outstanding += 1
        return err

    cdef void _drop_queue(self, Queue *queue) noexcept:
        self.outstanding -= queue.posted - queue.retired + queue.receives
        self.queues[queue.slot] = NULL
        del self._qps[queue.slot]
        _free_queue(queue)

    def remove(self, slot):
        """Take a queue out, before its QP is closed.

        Its operations must have ended: see :meth:`abort`.
        """
        cdef Queue *queue = self._queue(slot)
        if queue.n_ops:
            raise UsageError(f"queue {slot} still has {queue.n_ops} operations")
        pthread_mutex_lock(&self.lock)
        if queue.failed and not queue.reported:
            self.n_unreported -= 1
        self._drop_queue(queue)
        pthread_mutex_unlock(&self.lock)

    def abort(self, slot):
        """Stop posting on a queue; its operations end as flushed once it is drained.

        The caller then moves the QP to ERR and calls :meth:`flush`.
        """
        cdef Queue *queue = self._queue(slot)
        with nogil:
            pthread_mutex_lock(&self.lock)
            if not queue.failed:
                queue.reported = True     # the caller knows
                queue.failed = True
                queue.status = IBV_WC_WR_FLUSH_ERR
            self._end_if_drained(queue)
            pthread_mutex_unlock(&self.lock)

    def flush(self, slot):
        """Make sure that a failed queue, its QP in ERR, reports its last WR.

        A WR posted in ERR is flushed behind all others, so it speaks for the
        unsignaled ones that were executed before.
        """
        cdef:
            Queue *queue = self._queue(slot)
            ibv_send_wr *bad = NULL
            ibv_send_wr wr
        if not queue.failed:
            raise UsageError(f"queue {slot} has not failed")
        with nogil:
            pthread_mutex_lock(&self.lock)
            if queue.tail_unsignaled and queue.posted != queue.retired:
                memset(&wr, 0, sizeof(wr))
                wr.wr_id = _wr_id(queue, queue.posted)
                wr.opcode = IBV_WR_RDMA_WRITE
                wr.send_flags = IBV_SEND_SIGNALED
                if ibv_post_send(queue.qp, &wr, &bad) == 0:
                    queue.posted += 1
                    self.outstanding += 1
                    queue.tail_unsignaled = False
            pthread_mutex_unlock(&self.lock)

    def forget(self, slot):
        """End the operations of a queue whose QP has been destroyed.

        A destroyed QP touches no memory, whatever its completions said.
        """
        cdef Queue *queue = self._queue(slot)
        if not self._qps[slot].closed:
            raise UsageError(f"the QP of queue {slot} is still open")
        with nogil:
            pthread_mutex_lock(&self.lock)
            self._fail(queue, IBV_WC_WR_FLUSH_ERR)
            self.outstanding -= queue.posted - queue.retired
            queue.retired = queue.posted
            self._end_if_drained(queue)
            pthread_mutex_unlock(&self.lock)

    def unretired(self, slot):
        """Return how many posted WRs of a queue have not come back yet."""
        cdef Queue *queue = self._queue(slot)
        return queue.posted - queue.retired

    def grant(self, slot, consumed_bytes, consumed_records):
        """Take the peer's credit: ring positions and records it is done with."""
        cdef:
            Queue *queue = self._queue(slot)
            uint64_t ring_bytes = consumed_bytes
            uint64_t records = consumed_records
        if ring_bytes > queue.ring_head or records > queue.records_sent:
            raise ProtocolError(
                f"credit for {records} records up to {ring_bytes}, of which only "
                f"{queue.records_sent} up to {queue.ring_head} were sent"
            )
        with nogil:
            pthread_mutex_lock(&self.lock)
            queue.ring_tail = max(queue.ring_tail, ring_bytes)
            queue.records_consumed = max(queue.records_consumed, records)
            self._pump(queue)
            pthread_mutex_unlock(&self.lock)

    # -- operations ------------------------------------------------------------

    def submit(self, slot, rows, const int64_t[::1] local_ids not None,
               const int64_t[::1] remote_ids not None, bytes request_id=b"",
               uint64_t key=0):
        """Start one operation a row and post what the send queue has room for.

        Args:
          slot: A queue that :meth:`add_initiator` returned.
          rows: Positions of rows; each becomes an operation of its own.
          local_ids: Blocks to read, each in range for the row.
          remote_ids: Where they go, as many, in range, no two the same.
          request_id: Travels with the notification, up to 256 bytes.
          key: Among operations that wait on a queue the smallest key goes first,
            then the oldest.

        Returns:
          The ids of the operations, in the order of ``rows``.

        Raises:
          LayoutError: An id is out of range or twice; nothing was posted.
          ClosedResourceError: The queue has failed or is gone.
        """
        cdef:
            Queue *queue = self._queue(slot)
            uint32_t n = local_ids.shape[0]
            uint32_t n_rows = len(rows)
            uint32_t i
            uint32_t index
            Ids *ids
            list result = []
        if local_ids.shape[0] != remote_ids.shape[0]:
            raise LayoutError(
                f"{local_ids.shape[0]} local ids, {remote_ids.shape[0]} remote ids"
            )
        if n == 0 or n_rows == 0:
            return result
        if len(request_id) > KVX_NOTIFY_MAX_REQUEST:
            raise UsageError(
                f"a request id of {len(request_id)} bytes is longer than "
                f"{KVX_NOTIFY_MAX_REQUEST}"
            )
        if queue.ring is not NULL and (
                kvx_notify_length(len(request_id), n) > queue.ring_bytes // 2):
            raise UsageError(
                f"{n} blocks in one operation do not fit the notify ring of "
                f"{queue.ring_bytes} bytes; split the list"
            )
        if queue.failed:
            raise ClosedResourceError(f"queue {slot} has failed")
        ids = <Ids *>malloc(sizeof(Ids) + 2 * <size_t>n * sizeof(int64_t))
        if ids is NULL:
            raise MemoryError
        ids.refs = 1
        ids.n = n
        ids.request_bytes = len(request_id)
        memcpy(ids.request, PyBytes_AS_STRING(request_id), len(request_id))
        ids.local = <int64_t *>(ids + 1)
        memcpy(ids.local, &local_ids[0], n * sizeof(int64_t))
        memcpy(ids.local + n, &remote_ids[0], n * sizeof(int64_t))
        try:
            self._check(queue, rows, ids)
            self._reserve_ops(queue, n_rows)
            # From here on nothing can fail.
            for i in range(n_rows):
                index = rows[i]
                result.append(self._new_op(queue, &queue.rows[index], ids, key))
        finally:
            _release_ids(ids)
        with nogil:
            pthread_mutex_lock(&self.lock)
            self._pump(queue)
            pthread_mutex_unlock(&self.lock)
        return result

    cdef int _check(self, Queue *queue, rows, Ids *ids) except -1:
        """Raise LayoutError unless the copied ids fit all rows."""
        cdef:
            uint64_t n_local = <uint64_t>-1
            uint64_t n_remote = <uint64_t>-1
            uint32_t position = 0
            uint32_t n = ids.n
            Row *row
            int wrong
        for index in rows:
            if not 0 <= index < queue.n_rows:
                raise LayoutError(f"row {index} is not in [0, {queue.n_rows})")
            row = &queue.rows[<uint32_t>index]
            n_local = min(n_local, row.n_local)
            n_remote = min(n_remote, row.n_remote)
        with nogil:
            wrong = _find_bad_id(ids.local, n, n_local, &position)
        if wrong:
            raise LayoutError(
                f"local_block_ids[{position}] is {ids.local[position]}, "
                f"not in [0, {n_local})"
            )
        with nogil:
            wrong = _find_bad_id(ids.local + n, n, n_remote, &position)
        if wrong:
            raise LayoutError(
                f"remote_block_ids[{position}] is {ids.local[n + position]}, "
                f"not in [0, {n_remote}) of the peer"
            )
        with nogil:
            wrong = _find_duplicate(queue.seen, ids.local + n, n, &position)
        if wrong:
            raise LayoutError(
                f"remote_block_ids[{position}] is {ids.local[n + position]}, which "
                "the list names twice; each remote block is written once"
            )
        return 0

    cdef int _reserve_ops(self, Queue *queue, uint32_t n) except -1:
        """Make sure that ``n`` operations can be made without failing."""
        cdef:
            uint32_t room
            uint32_t i
            Op **ops
            uint32_t *generation
            uint32_t *stack
        if kvx_heap_reserve(&queue.ready, n):
            raise MemoryError
        if self.n_op_free >= n:
            return 0
        room = self.n_op_slots * 2 + n + 16
        ops = <Op **>calloc(room, sizeof(Op *))
        generation = <uint32_t *>calloc(room, sizeof(uint32_t))
        stack = <uint32_t *>calloc(room, sizeof(uint32_t))
        if ops is NULL or generation is NULL or stack is NULL:
            free(ops)
            free(generation)
            free(stack)
            raise MemoryError
        if self.n_op_slots:
            memcpy(ops, self.ops, self.n_op_slots * sizeof(Op *))
            memcpy(generation, self.op_generation, self.n_op_slots * sizeof(uint32_t))
            memcpy(stack, self.op_free, self.n_op_free * sizeof(uint32_t))
        for i in range(self.n_op_slots, room):
            stack[self.n_op_free] = room - 1 - (i - self.n_op_slots)
            self.n_op_free += 1
        free(self.ops)
        free(self.op_generation)
        free(self.op_free)
        self.ops = ops
        self.op_generation = generation
        self.op_free = stack
        self.n_op_slots = room
        return 0

    cdef uint64_t _new_op(self, Queue *queue, Row *row, Ids *ids,
                          uint64_t key) except 0:
        """Make an operation and put it among the ready ones; return its id."""
        cdef:
            Op *op = <Op *>calloc(1, sizeof(Op))
            uint32_t index
        if op is NULL:
            raise MemoryError
        pthread_mutex_lock(&self.lock)
        self.n_op_free -= 1
        index = self.op_free[self.n_op_free]
        self.op_generation[index] += 1
        self.ops[index] = op
        self.op_order += 1
        op.id = (<uint64_t>self.op_generation[index] << 32) | index
        op.queue = queue
        op.row = row
        op.ids = ids
        op.born_ns = _now_ns()
        ids.refs += 1
        queue.n_ops += 1
        self.n_ops += 1
        kvx_heap_push(&queue.ready, key, self.op_order, op)
        pthread_mutex_unlock(&self.lock)
        return op.id

    def cancel(self, uint64_t op_id):
        """Post nothing further of an operation; it ends when what is posted has.

        An operation that is unknown, ended, or wholly posted is left alone.
        """
        cdef:
            uint32_t index = <uint32_t>op_id
            Op *op
        with nogil:
            pthread_mutex_lock(&self.lock)
            op = self.ops[index] if index < self.n_op_slots else NULL
            # Once its place in the ring is taken, the record has to follow.
            if (op is not NULL and op.id == op_id and op.cursor.stage != POSTED
                    and not op.reserved and not op.cancelled
                    and not op.queue.failed):
                op.cancelled = True
                kvx_heap_remove(&op.queue.ready, op)
                self._append_posted(op)
                self._retire_ops(op.queue)
                # Others may have waited behind it.
                self._pump(op.queue)
            pthread_mutex_unlock(&self.lock)

    # -- without the GIL, lock held --------------------------------------------

    cdef void _append_posted(self, Op *op) noexcept nogil:
        """Nothing of this operation is left to post."""
        op.cursor.stage = POSTED
        op.next = NULL
        op.end = op.queue.posted
        if op.queue.last_posted is NULL:
            op.queue.first_posted = op
        else:
            op.queue.last_posted.next = op
        op.queue.last_posted = op

    cdef void _finish(self, Op *op, int status) noexcept nogil:
        """Move an operation that is in no list any more to the finished ones."""
        cdef uint32_t index = <uint32_t>op.id
        op.status = status
        op.died_ns = _now_ns()
        op.qp_num = op.queue.qp_num
        if status:
            op.wr_id = op.queue.failed_wr_id
            op.vendor_err = op.queue.vendor_err
        op.next = NULL
        self.finished_tail[0] = op
        self.finished_tail = &op.next
        self.ops[index] = NULL
        self.op_free[self.n_op_free] = index
        self.n_op_free += 1
        op.queue.n_ops -= 1
        self.n_ops -= 1

    cdef void _retire_ops(self, Queue *queue) noexcept nogil:
        """Finish the operations whose last WR is known to be complete."""
        cdef Op *op = queue.first_posted
        while op is not NULL and op.end <= queue.retired:
            queue.first_posted = op.next
            if op.next is NULL:
                queue.last_posted = NULL
            self._finish(op, CANCELLED if op.cancelled else 0)
            op = queue.first_posted

    cdef void _end_if_drained(self, Queue *queue) noexcept nogil:
        """Once a failed queue has nothing in flight, end all its operations."""
        cdef Op *op
        if not queue.failed or queue.retired != queue.posted:
            return
        while queue.first_posted is not NULL:
            op = queue.first_posted
            queue.first_posted = op.next
            self._finish(op, queue.status)
        queue.last_posted = NULL
        while queue.ready.n:
            op = <Op *>kvx_heap_top(&queue.ready)
            kvx_heap_pop(&queue.ready)
            self._finish(op, queue.status)

    cdef void _fail(self, Queue *queue, int status) noexcept nogil:
        """Note the first failure of a queue."""
        if queue.failed:
            return
        queue.failed = True
        queue.status = status
        self.n_unreported += 1

    cdef void _pump(self, Queue *queue) noexcept nogil:
        """Post while there is something to post and room for it."""
        cdef:
            Op *op
            uint64_t room
            uint32_t n
        while queue.ready.n and not queue.failed:
            op = <Op *>kvx_heap_top(&queue.ready)
            if (op.cursor.stage == RECORD and not op.reserved
                    and not self._reserve_record(op)):
                return
            room = min(queue.depth - (queue.posted - queue.retired),
                       self.cq_limit - self.outstanding)
            if room == 0:
                return
            n = self._build(op, <uint32_t>min(
                room, min(self.chain, FIRST_CHAIN) if op.n_wrs == 0 else self.chain))
            if n and not self._post(queue, op, n):
                return
            if op.cursor.stage == POSTED:
                kvx_heap_pop(&queue.ready)
                self._append_posted(op)

    cdef bint _reserve_record(self, Op *op) noexcept nogil:
        """Take a place in the peer's ring and write the record into our copy."""
        cdef:
            Queue *queue = op.queue
            uint64_t length = kvx_notify_length(op.ids.request_bytes, op.ids.n)
            uint64_t start
            uint64_t head = kvx_notify_place(
                queue.ring_head, length, queue.ring_bytes, &start)
            kvx_notify_record *record
            uint32_t *ids
            uint32_t i
        if (head - queue.ring_tail > queue.ring_bytes
                or queue.records_sent - queue.records_consumed >= queue.max_records):
            return False
        record = <kvx_notify_record *>(queue.ring + start % queue.ring_bytes)
        memset(record, 0, sizeof(kvx_notify_record))
        record.magic = KVX_NOTIFY_MAGIC
        record.length = <uint32_t>length
        record.sequence = queue.records_sent
        record.n_bytes = op.n_bytes
        record.layer = op.row.layer
        record.group = <uint16_t>op.row.group
        record.n_ids = op.ids.n
        record.n_qps = 1
        record.request_bytes = <uint16_t>op.ids.request_bytes
        memcpy(record + 1, op.ids.request, op.ids.request_bytes)
        ids = <uint32_t *>(
            <char *>(record + 1) + kvx_pad(op.ids.request_bytes, 8))
        for i in range(op.ids.n):
            ids[i] = <uint32_t>op.ids.local[op.ids.n + i]
        op.ring_start = start
        op.reserved = True
        queue.ring_head = head
        queue.records_sent += 1
        return True

    cdef uint32_t _build(self, Op *op, uint32_t limit) noexcept nogil:
        """Write up to ``limit`` WRs of an operation into the template.

        Moves the operation's cursor; ``after[i]`` is where it stood behind WR i.
        Stops before the record if its place in the ring is not taken yet.
        """
        cdef:
            uint32_t n = 0
            Cursor *cursor = &op.cursor
            Queue *queue = op.queue
            uint64_t n_bytes = op.n_bytes
            ibv_send_wr *wr
        self.before = cursor[0]
        while n < limit and cursor.stage != POSTED:
            wr = &self.wrs[n]
            if cursor.stage == DATA:
                n_bytes += self._build_data(op, wr)
            elif cursor.stage == RECORD:
                if not op.reserved:
                    break
                wr.opcode = IBV_WR_RDMA_WRITE
                wr.num_sge = 1
                wr.sg_list[0].addr = <uint64_t><uintptr_t>(
                    queue.ring + op.ring_start % queue.ring_bytes)
                wr.sg_list[0].length = <uint32_t>kvx_notify_length(
                    op.ids.request_bytes, op.ids.n)
                wr.sg_list[0].lkey = queue.ring_lkey
                wr.wr.rdma.remote_addr = (
                    queue.ring_remote + op.ring_start % queue.ring_bytes)
                wr.wr.rdma.rkey = queue.ring_rkey
                cursor.stage = IMMEDIATE
            else:
                wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM
                wr.num_sge = 0
                wr.wr.rdma.remote_addr = queue.ring_remote
                wr.wr.rdma.rkey = queue.ring_rkey
                wr.imm_data = htonl(<uint32_t>(
                    op.ring_start % queue.ring_bytes // KVX_NOTIFY_ALIGN))
                cursor.stage = POSTED
            self.after[n] = cursor[0]
            self.bytes_after[n] = n_bytes
            n += 1
        return n

    cdef uint64_t _build_data(self, Op *op, ibv_send_wr *wr) noexcept nogil:
        """Write the next WR of blocks; return its bytes.

        Blocks that are neighbours on both sides lengthen the SGE, blocks that are
        neighbours on the remote side alone become further SGEs of the same WR.
        """
        cdef:
            Cursor *cursor = &op.cursor
            Pair *pair = &op.queue.pairs[op.row.first_pair + cursor.pair]
            uint32_t n_ids = op.ids.n
            const int64_t *local = op.ids.local
            const int64_t *remote = op.ids.local + n_ids
            uint64_t length
            uint64_t total
            uint64_t from_addr
            uint64_t remote_end
            ibv_sge *sge = wr.sg_list
        from_addr = (pair.local_base + <uint64_t>local[cursor.index]
                     * pair.local_stride + cursor.offset)
        length = min(pair.block_bytes - cursor.offset, self.max_wr_bytes)
        wr.opcode = IBV_WR_RDMA_WRITE
        wr.num_sge = 1
        wr.wr.rdma.remote_addr = (
            pair.remote_base + <uint64_t>remote[cursor.index] * pair.remote_stride
            + cursor.offset)
        wr.wr.rdma.rkey = pair.rkey
        sge.addr = from_addr
        sge.length = <uint32_t>length
        sge.lkey = pair.lkey
        total = length
        if cursor.offset + length < pair.block_bytes:
            cursor.offset += length
            return total
        cursor.offset = 0
        cursor.index += 1
        remote_end = wr.wr.rdma.remote_addr + length
        while (cursor.index < n_ids
               and total + pair.block_bytes <= self.merge_bytes
               and pair.remote_base + <uint64_t>remote[cursor.index]
               * pair.remote_stride == remote_end):
            from_addr = (pair.local_base
                         + <uint64_t>local[cursor.index] * pair.local_stride)
            if from_addr == sge.addr + sge.length:
                sge.length += <uint32_t>pair.block_bytes
            elif <uint32_t>wr.num_sge < op.queue.max_sge:
                sge += 1
                sge.addr = from_addr
                sge.length = <uint32_t>pair.block_bytes
                sge.lkey = pair.lkey
                wr.num_sge += 1
            else:
                break
            total += pair.block_bytes
            remote_end += pair.block_bytes
            cursor.index += 1
        if cursor.index == n_ids:
            cursor.index = 0
            cursor.pair += 1
            if cursor.pair == op.row.n_pairs:
                cursor.stage = POSTED if op.queue.ring is NULL else RECORD
        return total

    cdef bint _post(self, Queue *queue, Op *op, uint32_t n) noexcept nogil:
        """Post the first ``n`` WRs of the template as one chain: one doorbell.

        The operation's cursor ends behind the last accepted WR. Returns whether
        to go on; if not, either a completion is due that will pump again, or the
        queue has failed.
        """
        cdef:
            uint32_t i
            uint32_t n_posted = n
            ibv_send_wr *bad = NULL
            bint was_empty = queue.posted == queue.retired
            int err
        for i in range(n):
            self.wrs[i].wr_id = _wr_id(queue, queue.posted + i)
            self.wrs[i].send_flags = 0
        # RC completes in order: the tail's CQE retires the whole chain.
        self.wrs[n - 1].send_flags = IBV_SEND_SIGNALED
        self.wrs[n - 1].next = NULL
        err = ibv_post_send(queue.qp, self.wrs, &bad)
        if n < MAX_CHAIN:
            self.wrs[n - 1].next = &self.wrs[n]
        if err:
            n_posted = <uint32_t>(bad - self.wrs) if bad is not NULL else 0
        queue.posted += n_posted
        self.outstanding += n_posted
        op.n_wrs += n_posted
        if n_posted:
            op.n_bytes = self.bytes_after[n_posted - 1]
            queue.tail_unsignaled = err != 0
        if err == 0:
            return True
        op.cursor = self.after[n_posted - 1] if n_posted else self.before
        if err == ENOMEM and n_posted:
            return True     # the rest is tried at once, with a signaled tail
        # Only a signaled WR that is on its way can tell when there is room again.
        if err != ENOMEM or was_empty or queue.tail_unsignaled:
            self._fail(queue, -err)
        return False

    cdef int _drain(self, uint32_t budget) noexcept nogil:
        """Poll until the CQ is empty or the budget is used; return if it was."""
        cdef:
            ibv_wc wcs[POLL_BATCH]
            int n
            int i
            uint32_t done = 0
        while done < budget:
            n = ibv_poll_cq(self.cq.cq, POLL_BATCH, wcs)
            if n <= 0:
                return 0
            for i in range(n):
                self._completed(&wcs[i])
            done += n
            # Free slots are filled at once, before the rest is polled.
            self._pump_all()
        return 1

    cdef void _pump_all(self) noexcept nogil:
        cdef uint32_t slot
        for slot in range(self.n_slots):
            if self.queues[slot] is not NULL and self.queues[slot].ready.n:
                self._pump(self.queues[slot])

    cdef void _completed(self, ibv_wc *wc) noexcept nogil:
        """Account for one WC."""
        cdef:
            uint32_t slot = (wc.wr_id >> SLOT_SHIFT) & FIELD_MASK
            uint32_t generation = (wc.wr_id >> GENERATION_SHIFT) & FIELD_MASK
            Queue *queue = self.queues[slot] if slot < self.n_slots else NULL
            uint64_t sequence
            uint64_t before
        # Some devices keep the CQEs of a QP that is gone.
        if queue is NULL or queue.generation != generation:
            return
        if wc.wr_id & RECEIVE_BIT:
            self._received(queue, wc)
            return
        # Undo the wrapping of the sequence: it is never behind ``retired``.
        sequence = queue.retired + (
            ((wc.wr_id & SEQUENCE_MASK) - (queue.retired & SEQUENCE_MASK))
            & SEQUENCE_MASK)
        before = queue.retired
        if wc.status != IBV_WC_SUCCESS and not queue.flushing:
            # All WRs before this one were executed: their operations may be done.
            queue.flushing = True
            queue.retired = sequence
            self._retire_ops(queue)
            if not queue.failed:
                self._fail(queue, wc.status)
                queue.vendor_err = wc.vendor_err
                queue.failed_wr_id = wc.wr_id
                self._blame(queue, sequence)
        queue.retired = sequence + 1
        self.outstanding -= queue.retired - before
        if not queue.flushing:
            self._retire_ops(queue)
        self._end_if_drained(queue)

    cdef void _blame(self, Queue *queue, uint64_t sequence) noexcept nogil:
        """Mark the operation that the failed WR belongs to."""
        cdef Op *op = queue.first_posted
        while op is not NULL and op.end <= sequence:
            op = op.next
        if op is NULL:
            op = <Op *>kvx_heap_top(&queue.ready)
        if op is not NULL:
            op.culprit = True

    cdef void _received(self, Queue *queue, ibv_wc *wc) noexcept nogil:
        """Take the record that an immediate announces and repost the receive."""
        cdef:
            Arrival *arrival
            uint64_t offset
        queue.receives -= 1
        self.outstanding -= 1
        if wc.status != IBV_WC_SUCCESS:
            self._fail(queue, wc.status)
            self._end_if_drained(queue)
            return
        arrival = <Arrival *>calloc(1, sizeof(Arrival))
        if arrival is NULL:
            self._fail(queue, -ENOMEM)
            return
        arrival.slot = queue.slot
        if wc.opcode != IBV_WC_RECV_RDMA_WITH_IMM:
            arrival.error = 3
        else:
            offset = <uint64_t>ntohl(wc.imm_data) * KVX_NOTIFY_ALIGN
            arrival.error = self._take_record(queue, offset, arrival)
        self.arrivals_tail[0] = arrival
        self.arrivals_tail = &arrival.next
        if arrival.error == 0 and self._post_receive(queue):
            self._fail(queue, -ENOMEM)

    cdef int _take_record(
            self, Queue *queue, uint64_t offset, Arrival *arrival) noexcept nogil:
        """Copy the record at ``offset``; return 0 or why it is refused."""
        cdef:
            kvx_notify_record header
            uint64_t start
            uint64_t head
        if (offset >= queue.own_bytes
                or queue.own_bytes - offset < sizeof(kvx_notify_record)):
            return 1
        # Copied before it is looked at: the peer could still write here.
        memcpy(&header, queue.own_ring + offset, sizeof(header))
        if (header.magic != KVX_NOTIFY_MAGIC
                or header.length > queue.own_bytes - offset
                or header.length > queue.own_bytes // 2
                or header.request_bytes > KVX_NOTIFY_MAX_REQUEST
                or header.length != kvx_notify_length(
                    header.request_bytes, header.n_ids)
                or header.sequence != queue.own_records):
            return 2
        head = kvx_notify_place(
            queue.own_head, header.length, queue.own_bytes, &start)
        if start % queue.own_bytes != offset:
            return 1
        arrival.record = <char *>malloc(header.length)
        if arrival.record is NULL:
            return 2
        memcpy(arrival.record, &header, sizeof(header))
        memcpy(arrival.record + sizeof(header),
               queue.own_ring + offset + sizeof(header),
               header.length - sizeof(header))
        arrival.length = header.length
        arrival.head = head
        queue.own_head = head
        queue.own_records += 1
        return 0

    # -- progress --------------------------------------------------------------

    def progress(self):
        """Take completions, post what has become possible, return what has ended.

        Takes the events of the completion channel, arms it and then looks at the
        CQ, in this order, so that no completion is missed.
        """
        cdef:
            int more
            int err
            Op *finished
            Arrival *arrivals
            list failed = []
            uint32_t slot
        self.cq._ensure_open()
        with nogil:
            self.cq.take_events()
            err = ibv_req_notify_cq(self.cq.cq, 0)
            pthread_mutex_lock(&self.lock)
            more = self._drain(PROGRESS_BUDGET)
            finished = self.finished
            self.finished = NULL
            self.finished_tail = &self.finished
            arrivals = self.arrivals
            self.arrivals = NULL
            self.arrivals_tail = &self.arrivals
            pthread_mutex_unlock(&self.lock)
        if self.n_unreported:
            for slot in range(self.n_slots):
                if (self.queues[slot] is not NULL and self.queues[slot].failed
                        and not self.queues[slot].reported):
                    self.queues[slot].reported = True
                    failed.append(slot)
            self.n_unreported = 0
        result = Progress(
            _take_finished(finished), _take_arrivals(arrivals), failed, bool(more))
        if err:
            raise verbs_error(err, "ibv_req_notify_cq")
        return result


cdef list _take_finished(Op *op):
    """Turn finished operations into Python records and free them."""
    cdef:
        list result = []
        Op *following
    while op is not NULL:
        following = op.next
        result.append(Finished(
            op.id,
            op.status,
            op.culprit,
            op.n_bytes,
            op.n_wrs,
            (op.died_ns - op.born_ns) * 1e-9,
            op.wr_id,
            op.qp_num,
            op.vendor_err,
        ))
        _release_ids(op.ids)
        free(op)
        op = following
    return result


cdef list _take_arrivals(Arrival *arrival):
    """Turn arrivals into Python records and free them."""
    cdef:
        list result = []
        Arrival *following
    while arrival is not NULL:
        following = arrival.next
        result.append(RingArrival(
            arrival.slot,
            PyBytes_FromStringAndSize(arrival.record, arrival.length)
            if arrival.record is not NULL else b"",
            arrival.head,
            _RING_ERRORS.get(arrival.error),
        ))
        free(arrival.record)
        free(arrival)
        arrival = following
    return result


cdef void _free_queue(Queue *queue) noexcept:
    kvx_heap_free(&queue.ready)
    free(queue.rows)
    free(queue.pairs)
    free(queue.seen)
    free(queue)
