# cython: language_level=3, embedsignature=True, cdivision=True
"""The engine as Python sees it: queues, operations, progress.

An *operation* moves the blocks of one layer to one peer: a list of local and a
list of remote block ids, applied to every plane of the layer. One engine has one
CQ and any number of queues, a queue being the QP to one peer with what is known
of that peer's memory. The work is done by ``_core.pyx``, without the GIL: one
release of it for a submission, one for a look at what has completed.

Nothing here waits, and nothing knows asyncio. Whoever owns the engine calls
:meth:`Engine.progress` when :attr:`Engine.fd` is readable. All state is behind one
lock, so that a progress thread can take the place of that call.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from kvxfer._core cimport *
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
    """What one call of :meth:`Engine.progress` found.

    ``failed`` has the slots of queues that failed since the last call: their QPs
    want to be moved to ERR. With ``more`` the budget was used up: call again soon,
    no event may come.
    """

    finished: list
    arrivals: list
    failed: list
    more: bool


CANCELLED_STATUS = CANCELLED

_RING_ERRORS = {
    1: "an immediate points outside the ring or not at the next record",
    2: "a record's header is not valid",
    3: "a receive completed that carries no immediate",
}


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
        dict _qps      # slot -> QueuePair, kept alive while in use
        Core *core     # owned

    def __cinit__(self):
        self.core = <Core *>calloc(1, sizeof(Core))
        if self.core is NULL:
            raise MemoryError

    def __init__(self, Device device not None, *, cq_depth, chain=64, max_sge=8,
                 merge_bytes=1 << 20, max_wr_bytes=1 << 30):
        cdef int err
        if self.cq is not None:
            raise UsageError("an Engine is made once")
        if not 1 <= chain <= MAX_CHAIN:
            raise UsageError(f"chain is {chain}, not 1 to {MAX_CHAIN}")
        if not 1 <= max_sge <= MAX_SGE:
            raise UsageError(f"max_sge is {max_sge}, not 1 to {MAX_SGE}")
        # An SGE's length has 32 bits.
        max_wr_bytes = min(max_wr_bytes, 1 << 30)
        merge_bytes = min(merge_bytes, max_wr_bytes)
        self._qps = {}
        self.cq = CompletionQueue(device, cq_depth)
        err = core_init(
            self.core, self.cq.cq, chain, max_sge, merge_bytes, max_wr_bytes)
        if err:
            self.cq.close()
            raise verbs_error(err, "pthread_mutex_init")
        self.cq.arm()

    def __dealloc__(self):
        if self.core is not NULL:
            core_free(self.core)

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
        return self.core.n_ops

    @property
    def attention(self):
        """Whether something has ended without an event: call :meth:`progress`."""
        return self.core.finished is not NULL or self.core.n_unreported != 0

    # -- queues ----------------------------------------------------------------

    cdef Queue *_new_queue(self, QueuePair qp, uint32_t receives) except NULL:
        """Make a queue in a free slot; the caller fills in its route or ring."""
        cdef:
            Queue *queue
            Queue **grown
            uint32_t slot = 0
            uint32_t room = self.core.n_slots * 2 + 8
        self.cq._ensure_open()
        qp._ensure_open()
        if qp.cq is not self.cq:
            raise UsageError("the QP completes into another CQ than the engine's")
        if self.core.outstanding + receives >= self.core.cq_limit:
            raise UsageError(
                f"no room in the CQ for {receives} more receives: of its "
                f"{self.core.cq_limit} entries {self.core.outstanding} are spoken for"
            )
        while slot < self.core.n_slots and self.core.queues[slot] is not NULL:
            slot += 1
        if slot > FIELD_MASK:
            raise UsageError(f"more than {FIELD_MASK + 1} connections on one engine")
        queue = <Queue *>calloc(1, sizeof(Queue))
        if queue is NULL:
            raise MemoryError
        if slot == self.core.n_slots:
            grown = <Queue **>calloc(room, sizeof(Queue *))
            if grown is NULL:
                free(queue)
                raise MemoryError
            if self.core.n_slots:
                memcpy(grown, self.core.queues, self.core.n_slots * sizeof(Queue *))
            free(self.core.queues)
            self.core.queues = grown
            self.core.n_slots = room
        self.core.next_generation = (self.core.next_generation + 1) & FIELD_MASK
        queue.qp = qp.qp
        queue.qp_num = qp.qp.qp_num
        queue.slot = slot
        queue.generation = self.core.next_generation
        queue.depth = qp.max_send_wr
        queue.max_sge = min(self.core.max_sge, qp.max_send_sge)
        self.core.queues[slot] = queue
        self._qps[slot] = qp
        return queue

    cdef int _ensure_open(self) except -1:
        if self.cq is None:
            raise ClosedResourceError("this Engine was never made")
        return self.cq._ensure_open()

    cdef Queue *_queue(self, uint32_t slot) except NULL:
        self._ensure_open()
        if slot >= self.core.n_slots or self.core.queues[slot] is NULL:
            raise ClosedResourceError(f"there is no queue {slot}")
        return self.core.queues[slot]

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
            queue.owners = <uint32_t *>calloc(queue.depth, sizeof(uint32_t))
            if (queue.rows is NULL or queue.pairs is NULL or queue.seen is NULL
                    or queue.owners is NULL):
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
            err = post_receive(self.core, queue)
            if err:
                self._drop_queue(queue)
                raise verbs_error(err, "ibv_post_recv", f"receive {i} of {receives}")
        return queue.slot

    cdef void _drop_queue(self, Queue *queue) noexcept:
        self.core.outstanding -= queue.posted - queue.retired + queue.receives
        self.core.queues[queue.slot] = NULL
        del self._qps[queue.slot]
        free_queue(queue)

    def remove(self, slot):
        """Take a queue out, before its QP is closed.

        Its operations must have ended: see :meth:`abort`.
        """
        cdef Queue *queue = self._queue(slot)
        if queue.n_ops:
            raise UsageError(f"queue {slot} still has {queue.n_ops} operations")
        pthread_mutex_lock(&self.core.lock)
        if queue.failed and not queue.reported:
            self.core.n_unreported -= 1
        self._drop_queue(queue)
        pthread_mutex_unlock(&self.core.lock)

    def abort(self, slot):
        """Stop posting on a queue; its operations end as flushed once it is drained.

        The caller then moves the QP to ERR and calls :meth:`flush`.
        """
        cdef Queue *queue = self._queue(slot)
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            stop(self.core, queue)
            pthread_mutex_unlock(&self.core.lock)

    def flush(self, slot):
        """Make sure that a failed queue, its QP in ERR, reports its last WR."""
        cdef Queue *queue = self._queue(slot)
        if not queue.failed:
            raise UsageError(f"queue {slot} has not failed")
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            flush(self.core, queue)
            pthread_mutex_unlock(&self.core.lock)

    def forget(self, slot):
        """End the operations of a queue whose QP has been destroyed.

        A destroyed QP touches no memory, whatever its completions said.
        """
        cdef Queue *queue = self._queue(slot)
        if not self._qps[slot].closed:
            raise UsageError(f"the QP of queue {slot} is still open")
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            forget(self.core, queue)
            pthread_mutex_unlock(&self.core.lock)

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
            pthread_mutex_lock(&self.core.lock)
            queue.ring_tail = max(queue.ring_tail, ring_bytes)
            queue.records_consumed = max(queue.records_consumed, records)
            pump(self.core, queue)
            pthread_mutex_unlock(&self.core.lock)

    # -- operations ------------------------------------------------------------

    def submit(self, slot, rows, const int64_t[::1] local_ids not None,
               const int64_t[::1] remote_ids not None, bytes request_id=b"",
               uint64_t key=0, tag=(0, 0, 0)):
        """Start one operation a row and post what the send queue has room for.

        Args:
          slot: A queue that :meth:`add_initiator` returned.
          rows: Positions of rows; each becomes an operation of its own.
          local_ids: Blocks to read, each in range for the row.
          remote_ids: Where they go, as many, in range, no two the same.
          request_id: Travels with the notification, up to 256 bytes.
          key: Among operations that wait on a queue the smallest key goes first,
            then the oldest.
          tag: Travels with the notification: generation, total, digest; see
            ``native/notify.h``.

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
            Op *op
            uint64_t generation = tag[0]
            uint64_t total = tag[1]
            uint64_t digest = tag[2]
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
                kvx_notify_length(len(request_id), n)
                > kvx_notify_limit(queue.ring_bytes)):
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
        ids.generation = generation
        ids.total = total
        ids.digest = digest
        ids.local = <int64_t *>(ids + 1)
        memcpy(ids.local, &local_ids[0], n * sizeof(int64_t))
        memcpy(ids.local + n, &remote_ids[0], n * sizeof(int64_t))
        try:
            self._check(queue, rows, ids)
            self._reserve_ops(queue, n_rows)
            for i in range(n_rows):
                index = rows[i]
                pthread_mutex_lock(&self.core.lock)
                op = admit(self.core, queue, &queue.rows[index], ids, key)
                pthread_mutex_unlock(&self.core.lock)
                if op is NULL:
                    raise MemoryError
                result.append(op.id)
        finally:
            release_ids(ids)
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            pump(self.core, queue)
            pthread_mutex_unlock(&self.core.lock)
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
            wrong = find_bad_id(ids.local, n, n_local, &position)
        if wrong:
            raise LayoutError(
                f"local_block_ids[{position}] is {ids.local[position]}, "
                f"not in [0, {n_local})"
            )
        with nogil:
            wrong = find_bad_id(ids.local + n, n, n_remote, &position)
        if wrong:
            raise LayoutError(
                f"remote_block_ids[{position}] is {ids.local[n + position]}, "
                f"not in [0, {n_remote}) of the peer"
            )
        with nogil:
            wrong = find_duplicate(queue.seen, ids.local + n, n, &position)
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
        if self.core.n_op_free >= n:
            return 0
        room = self.core.n_op_slots * 2 + n + 16
        ops = <Op **>calloc(room, sizeof(Op *))
        generation = <uint32_t *>calloc(room, sizeof(uint32_t))
        stack = <uint32_t *>calloc(room, sizeof(uint32_t))
        if ops is NULL or generation is NULL or stack is NULL:
            free(ops)
            free(generation)
            free(stack)
            raise MemoryError
        if self.core.n_op_slots:
            memcpy(ops, self.core.ops, self.core.n_op_slots * sizeof(Op *))
            memcpy(generation, self.core.op_generation,
                   self.core.n_op_slots * sizeof(uint32_t))
            memcpy(stack, self.core.op_free, self.core.n_op_free * sizeof(uint32_t))
        for i in range(self.core.n_op_slots, room):
            stack[self.core.n_op_free] = room - 1 - (i - self.core.n_op_slots)
            self.core.n_op_free += 1
        free(self.core.ops)
        free(self.core.op_generation)
        free(self.core.op_free)
        self.core.ops = ops
        self.core.op_generation = generation
        self.core.op_free = stack
        self.core.n_op_slots = room
        return 0

    def cancel(self, uint64_t op_id):
        """Post nothing further of an operation; it ends when what is posted has.

        An operation that is unknown, ended, or wholly posted is left alone.
        """
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            cancel(self.core, op_id)
            pthread_mutex_unlock(&self.core.lock)

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
        self._ensure_open()
        with nogil:
            self.cq.take_events()
            err = ibv_req_notify_cq(self.cq.cq, 0)
            pthread_mutex_lock(&self.core.lock)
            more = drain(self.core, PROGRESS_BUDGET)
            if err:
                # No event will come any more: what is in flight must not wait.
                fail_all(self.core, IBV_WC_GENERAL_ERR)
            finished = self.core.finished
            self.core.finished = NULL
            self.core.finished_tail = &self.core.finished
            arrivals = self.core.arrivals
            self.core.arrivals = NULL
            self.core.arrivals_tail = &self.core.arrivals
            pthread_mutex_unlock(&self.core.lock)
        if self.core.n_unreported:
            for slot in range(self.core.n_slots):
                if (self.core.queues[slot] is not NULL and self.core.queues[slot].failed
                        and not self.core.queues[slot].reported):
                    self.core.queues[slot].reported = True
                    failed.append(slot)
            self.core.n_unreported = 0
        return Progress(
            _take_finished(finished), _take_arrivals(arrivals), failed, bool(more))


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
        release_ids(op.ids)
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
