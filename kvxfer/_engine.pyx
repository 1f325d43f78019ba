# cython: language_level=3, embedsignature=True, cdivision=True
"""The engine as Python sees it: queues, operations, progress.

An *operation* moves the blocks of one layer to one peer: a list of local and a
list of remote block ids, applied to every plane of the layer. One engine has one
CQ and any number of queues, a queue being the QPs to one peer with what is known
of that peer's memory. The work is done by ``_core.pyx``, ``_post.pyx`` and
``_progress.pyx``, without the GIL: one release of it for a submission, one for a
look at what has completed.

Nothing here waits, and nothing knows asyncio. Whoever owns the engine calls
:meth:`Engine.progress` when :attr:`Engine.fd` is readable. All state is behind one
lock, since a thread may do most of it in place of that call: see ``_driver.pyx``.
"""

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvxfer._core cimport *
from kvxfer._driver cimport Driver, linger
from kvxfer._ibverbs cimport *
from kvxfer._post cimport flush, post_receive, relist
from kvxfer._progress cimport cancel, forget, settle, stop, take_events, wake_thread
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

cdef enum:
    BUDGET = 512    # CQEs that one call takes; then others get their turn

_RING_ERRORS = {
    1: "an immediate points outside the ring or not at the next record",
    2: "a record's header is not valid",
    3: "a receive completed that carries no immediate",
    4: "more immediates came than QPs carried data",
}


cdef uint64_t _n_keys(rows):
    """Count the keys of the planes that are in slices."""
    return sum(
        len(key[1]) for row in rows for pair in row[4] for key in pair[5:]
        if not isinstance(key, int))


cdef uint32_t _fill_plane(
    kvx_plane *slot, tuple pair, uint32_t *room, uint64_t n_local, uint64_t n_remote
) except? 0xffffffff:
    """Fill in a plane; return how many keys of its slices went into ``room``."""
    cdef uint32_t n = 0
    (slot.local_base, slot.local_stride, slot.remote_base, slot.remote_stride,
     slot.block_bytes, lkey, rkey) = pair
    if slot.block_bytes == 0:
        raise LayoutError("a block has no bytes")
    if isinstance(lkey, int):
        slot.lkey = lkey
    else:
        slot.local_slice, keys = lkey
        n = _fill_keys(room, keys, slot.local_slice, n_local)
        slot.lkeys = room
    if isinstance(rkey, int):
        slot.rkey = rkey
    else:
        slot.remote_slice, keys = rkey
        slot.rkeys = room + n
        n += _fill_keys(room + n, keys, slot.remote_slice, n_remote)
    return n


cdef uint32_t _fill_keys(
    uint32_t *room, keys, uint64_t blocks, uint64_t n_blocks
) except? 0xffffffff:
    """Copy the keys of slices of so many blocks; return how many there are."""
    cdef uint32_t n = 0
    if blocks == 0 or len(keys) * blocks < n_blocks:
        raise LayoutError(
            f"{len(keys)} keys, each for {blocks} blocks, are not for {n_blocks}")
    for key in keys:
        room[n] = key
        n += 1
    return n


cdef int _open_ids(object ids, Py_buffer *view, str name) except -1:
    """Get at the memory of an array of int64 or int32; to be released."""
    PyObject_GetBuffer(ids, view, PyBUF_ND | PyBUF_FORMAT)
    # One letter of struct's: q and l have 8 bytes, i and l may have 4.
    if (view.ndim == 1 and view.format is not NULL and view.format[1] == 0
            and view.format[0] in (b"l", b"q", b"i")
            and view.itemsize in (4, 8)):
        return 0
    shape = f"{view.ndim} dimensions of format {view.format.decode()!r}"
    PyBuffer_Release(view)
    raise LayoutError(f"{name}: {shape}, not one of int64 or int32")


cdef uint32_t _take_ids(
    uint32_t *to, const Py_buffer *view, uint32_t n, uint64_t limit
) noexcept nogil:
    """Copy and check; return ``n`` or the position of the first id out of range."""
    if view.itemsize == 4:
        return kvx_take_ids32(to, <const int32_t *>view.buf, n, limit)
    return kvx_take_ids64(to, <const int64_t *>view.buf, n, limit)


cdef object _bad_id(
    str name, const Py_buffer *view, uint32_t position, uint64_t limit, str whose
):
    cdef int64_t value
    if view.itemsize == 4:
        value = (<const int32_t *>view.buf)[position]
    else:
        value = (<const int64_t *>view.buf)[position]
    return LayoutError(
        f"{name}[{position}] is {value}, not in [0, {limit}){whose}")


cdef class Engine:
    """Drives the QPs of one device over one CQ.

    Args:
      device: Open device; the CQ is made on it.
      cq_depth: WCs that the CQ holds; bounds all that is in flight.
      chain: WRs a doorbell at most, 1 to 64.
      max_sge: SGEs a WR at most (further bounded by each QP), 1 to 16.
      merge_bytes: Neighbouring blocks merge into WRs of up to so many bytes.
      max_wr_bytes: Longest WR that the port carries; longer blocks are split.
      window_bytes: Once a queue has so much in flight it posts no more data.
      device_window_bytes: The same for all queues together.
      stripe_bytes: Data that goes over one QP of a queue before the next has its
        turn.
      progress: ``event``, ``adaptive`` or ``spin``: who drives it, and when.
    """

    cdef:
        readonly CompletionQueue cq
        Driver _driver
        dict _qps      # slot -> list of QueuePair, kept alive while in use
        Core *core     # the driver's

    def __init__(self, Device device not None, *, cq_depth, chain=64, max_sge=8,
                 merge_bytes=1 << 20, max_wr_bytes=1 << 30,
                 window_bytes=32 << 20, device_window_bytes=128 << 20,
                 stripe_bytes=256 << 10, str progress="event"):
        if self.cq is not None:
            raise UsageError("an Engine is made once")
        if not 1 <= chain <= KVX_MAX_CHAIN:
            raise UsageError(f"chain is {chain}, not 1 to {KVX_MAX_CHAIN}")
        if not 1 <= max_sge <= KVX_MAX_SGE:
            raise UsageError(f"max_sge is {max_sge}, not 1 to {KVX_MAX_SGE}")
        if min(window_bytes, device_window_bytes, stripe_bytes) < 1:
            raise UsageError("windows and stripes have one byte at least")
        # An SGE's length has 32 bits.
        max_wr_bytes = min(max_wr_bytes, 1 << 30)
        merge_bytes = min(merge_bytes, max_wr_bytes)
        self._qps = {}
        self.cq = CompletionQueue(device, cq_depth)
        try:
            self._driver = Driver(self.cq, progress)
        except BaseException:
            self.cq.close()
            raise
        self.core = self._driver.core
        self.core.chain = chain
        self.core.limits = kvx_limits(max_sge, merge_bytes, max_wr_bytes)
        self.core.window_bytes = window_bytes
        self.core.device_window_bytes = device_window_bytes
        self.core.stripe_bytes = stripe_bytes

    def close(self):
        """Close the CQ; all queues must have been removed. Twice is fine."""
        if self.cq is None or self.cq.closed:
            return
        if self._qps:
            raise UsageError(f"{len(self._qps)} queues are still in the engine")
        self.cq.close()
        if self.cq.closed:
            core_close(self.core)

    @property
    def fd(self):
        """Readable when :meth:`progress` should be called."""
        self._ensure_open()
        return self.core.loop_fd

    @property
    def in_flight(self):
        """Operations that have not ended yet."""
        return 0 if self.core is NULL else self.core.n_ops

    @property
    def attention(self):
        """Whether something has ended without an event: call :meth:`progress`."""
        return self.core is not NULL and has_news(self.core)

    # -- queues ----------------------------------------------------------------

    cdef Queue *_new_queue(self, qps, uint32_t receives) except NULL:
        """Make a queue in a free slot; the caller fills in its route or ring."""
        cdef:
            Queue *queue
            uint32_t slot = 0
            QueuePair qp
        self.cq._ensure_open()
        if not 1 <= len(qps) <= MAX_LANES:
            raise UsageError(f"{len(qps)} QPs for one queue, not 1 to {MAX_LANES}")
        for qp in qps:
            qp._ensure_open()
            if qp.cq is not self.cq:
                raise UsageError("the QP completes into another CQ than the engine's")
        if self.core.outstanding + receives * len(qps) >= self.core.cq_limit:
            raise UsageError(
                f"no room in the CQ for {receives * len(qps)} more receives: of its "
                f"{self.core.cq_limit} entries {self.core.outstanding} are spoken for"
            )
        while slot < self.core.n_slots and self.core.queues[slot] is not NULL:
            slot += 1
        if slot > FIELD_MASK:
            raise UsageError(f"more than {FIELD_MASK + 1} connections on one engine")
        queue = <Queue *>calloc(1, sizeof(Queue))
        if queue is NULL:
            raise MemoryError
        self.core.next_generation = (self.core.next_generation + 1) & FIELD_MASK
        queue.slot = slot
        queue.generation = self.core.next_generation
        queue.limits = self.core.limits
        for qp in qps:
            queue.lanes[queue.n_lanes].qp = qp.qp
            queue.lanes[queue.n_lanes].qp_num = qp.qp.qp_num
            queue.lanes[queue.n_lanes].depth = qp.max_send_wr
            queue.n_lanes += 1
            queue.limits.max_sge = min(queue.limits.max_sge, qp.max_send_sge)
        queue.lane = queue.n_lanes - 1    # the first is next
        pthread_mutex_lock(&self.core.lock)
        if not self._make_slot(slot):
            pthread_mutex_unlock(&self.core.lock)
            free(queue)
            raise MemoryError
        self.core.queues[slot] = queue
        self.core.n_queues += 1
        if self.core.mode == SPIN:
            wake_thread(self.core)
        pthread_mutex_unlock(&self.core.lock)
        self._qps[slot] = list(qps)
        return queue

    cdef bint _make_slot(self, uint32_t slot) noexcept:
        """Have room for a queue in ``slot``; False without memory. Lock held."""
        cdef:
            Queue **grown
            uint32_t room = self.core.n_slots * 2 + 8
        if slot < self.core.n_slots:
            return True
        grown = <Queue **>calloc(room, sizeof(Queue *))
        if grown is NULL or kvx_heap_reserve(&self.core.runnable, room):
            free(grown)
            return False
        if self.core.n_slots:
            memcpy(grown, self.core.queues, self.core.n_slots * sizeof(Queue *))
        free(self.core.queues)
        self.core.queues = grown
        self.core.n_slots = room
        return True

    cdef int _ensure_open(self) except -1:
        if self.cq is None:
            raise ClosedResourceError("this Engine was never made")
        return self.cq._ensure_open()

    cdef Queue *_queue(self, uint32_t slot) except NULL:
        self._ensure_open()
        if slot >= self.core.n_slots or self.core.queues[slot] is NULL:
            raise ClosedResourceError(f"there is no queue {slot}")
        return self.core.queues[slot]

    def add_initiator(self, qps not None, rows, ring=None, flush_to=None):
        """Add the QPs to a peer whose memory this side writes; return the slot.

        Args:
          qps: A QP or up to four, in RTS, made with this engine's CQ.
          rows: One a layer and group: ``(layer, group, n_local, n_remote, pairs)``
            with a pair for each plane: ``(local_base, local_stride, remote_base,
            remote_stride, block_bytes, lkey, rkey)``. Operations name rows by
            their position. Where the memory is registered in slices, a key is
            ``(blocks, keys)``: block ``i`` has ``keys[i // blocks]``.
          ring: The peer's notify ring and our copy of it: ``(local_addr, lkey,
            remote_addr, rkey, length, max_records)``; None: no notifications.
          flush_to: ``(local_addr, lkey)`` of eight bytes that may be written: behind
            the last WR of each submission some bytes of the last block are read into
            them, which the peer's device answers when all of it is in place. None:
            no such READ. The peer's QP and memory must permit it.
        """
        cdef:
            Queue *queue
            uint32_t n_rows = len(rows)
            uint32_t n_planes = sum(len(row[4]) for row in rows)
            uint64_t n_blocks = max((row[3] for row in rows), default=0)
            uint64_t n_keys = _n_keys(rows)
            uint32_t at = 0
            uint32_t at_key = 0
            uint32_t lane
        queue = self._new_queue([qps] if isinstance(qps, QueuePair) else qps, 0)
        try:
            queue.rows = <Row *>calloc(n_rows + 1, sizeof(Row))
            queue.planes = <kvx_plane *>calloc(n_planes + 1, sizeof(kvx_plane))
            queue.seen = <uint64_t *>calloc(n_blocks // 64 + 1, sizeof(uint64_t))
            queue.keys = <uint32_t *>calloc(n_keys + 1, sizeof(uint32_t))
            if (queue.rows is NULL or queue.planes is NULL or queue.seen is NULL
                    or queue.keys is NULL):
                raise MemoryError
            for lane in range(queue.n_lanes):
                queue.lanes[lane].chains = <Chain *>calloc(
                    queue.lanes[lane].depth, sizeof(Chain))
                if queue.lanes[lane].chains is NULL:
                    raise MemoryError
            for i, (layer, group, n_local, n_remote, pairs) in enumerate(rows):
                queue.rows[i] = Row(
                    at, len(pairs), min(n_local, 1 << 32), min(n_remote, 1 << 32),
                    layer, group)
                for pair in pairs:
                    at_key += _fill_plane(
                        &queue.planes[at], pair, &queue.keys[at_key], n_local,
                        n_remote)
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
            if flush_to is not None:
                queue.flush_addr, queue.flush_lkey = flush_to
        except BaseException:
            self._drop_queue(queue)
            raise
        return queue.slot

    def add_target(self, qps not None, ring_addr, ring_bytes, receives):
        """Add the QPs of a peer that writes into our memory; return the slot.

        Posts ``receives`` receive WRs on each at once (INIT or later) and keeps them
        posted. ``ring_addr`` is the notify ring that the peer writes.
        """
        cdef:
            Queue *queue = self._new_queue(
                [qps] if isinstance(qps, QueuePair) else qps, receives)
            uint32_t n = receives
            uint32_t lane
            uint32_t _i
            int err = 0
        queue.own_ring = <const char *><uintptr_t>ring_addr
        queue.own_bytes = ring_bytes
        if queue.n_lanes > 1:
            queue.early = <uint8_t *>calloc(ring_bytes // KVX_NOTIFY_ALIGN + 1, 1)
            if queue.early is NULL:
                self._drop_queue(queue)
                raise MemoryError
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            for lane in range(queue.n_lanes):
                for _i in range(n):
                    if err == 0:
                        err = post_receive(self.core, queue, lane)
            if err == 0:
                settle(self.core, BUDGET)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)
        if err:
            self._drop_queue(queue)
            raise verbs_error(err, "ibv_post_recv", f"{receives} on each QP")
        return queue.slot

    cdef void _drop_queue(self, Queue *queue) noexcept:
        cdef uint32_t lane
        pthread_mutex_lock(&self.core.lock)
        for lane in range(queue.n_lanes):
            self.core.outstanding -= (
                queue.lanes[lane].posted - queue.lanes[lane].retired
                + queue.lanes[lane].receives)
            self.core.n_chains -= (
                queue.lanes[lane].next_chain - queue.lanes[lane].first_chain)
        self.core.n_ready -= queue.ready.n
        self.core.n_queues -= 1
        self.core.flying_bytes -= queue.flying_bytes
        queue.failed = True
        relist(self.core, queue)
        self.core.queues[queue.slot] = NULL
        kvx_template_forget(&self.core.template)
        pthread_mutex_unlock(&self.core.lock)
        del self._qps[queue.slot]
        free_queue(queue)

    def remove(self, slot):
        """Take a queue out, before its QPs are closed.

        Its operations must have ended: see :meth:`abort`.
        """
        cdef Queue *queue = self._queue(slot)
        if queue.n_ops:
            raise UsageError(f"queue {slot} still has {queue.n_ops} operations")
        pthread_mutex_lock(&self.core.lock)
        if queue.failed and not queue.reported and self.core.n_unreported:
            self.core.n_unreported -= 1
        pthread_mutex_unlock(&self.core.lock)
        self._drop_queue(queue)

    def abort(self, slot):
        """Stop posting on a queue; its operations end as flushed once it is drained.

        The caller then moves the QPs to ERR and calls :meth:`flush`.
        """
        cdef Queue *queue = self._queue(slot)
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            stop(self.core, queue)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)

    def flush(self, slot):
        """Make sure that a failed queue, its QPs in ERR, reports its last WRs."""
        cdef Queue *queue = self._queue(slot)
        if not queue.failed:
            raise UsageError(f"queue {slot} has not failed")
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            flush(self.core, queue)
            settle(self.core, BUDGET)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)

    def forget(self, slot):
        """End the operations of a queue whose QPs have been destroyed.

        A destroyed QP touches no memory, whatever its completions said.
        """
        cdef Queue *queue = self._queue(slot)
        if not all(qp.closed for qp in self._qps[slot]):
            raise UsageError(f"the QP of queue {slot} is still open")
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            forget(self.core, queue)
            # Others may have waited for its part of the CQ and the window.
            settle(self.core, BUDGET)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)

    def unretired(self, slot):
        """Return how many posted WRs of a queue have not come back yet."""
        cdef:
            Queue *queue = self._queue(slot)
            uint64_t found = 0
            uint32_t lane
        for lane in range(queue.n_lanes):
            found += queue.lanes[lane].posted - queue.lanes[lane].retired
        return found

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
            relist(self.core, queue)
            settle(self.core, BUDGET)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)

    # -- operations ------------------------------------------------------------

    def submit(self, slot, rows, local_ids not None, remote_ids not None,
               bytes request_id=b"", uint64_t key=0, tuple tag=(0, 0, 0)):
        """Start one operation a row and post what the send queue has room for.

        Args:
          slot: A queue that :meth:`add_initiator` returned.
          rows: Positions of rows; each becomes an operation of its own, posted in
            this order.
          local_ids: Blocks to read, each in range for the row: int64 or int32.
          remote_ids: Where they go, as many, in range, no two the same.
          request_id: Travels with the notification, up to 256 bytes.
          key: Among submissions that wait the smallest key goes first, on all
            queues of the engine; those of the same key take turns.
          tag: Travels with the notification: generation, total, digest; see
            ``native/notify.h``.

        Returns:
          The ids of the operations, in the order of ``rows``.

        Raises:
          LayoutError: An id is out of range or twice; nothing was posted.
          ClosedResourceError: The queue has failed or is gone.
        """
        cdef:
            Batch *batch = self._prepare(
                self._queue(slot), rows, local_ids, remote_ids, request_id, key, tag)
            list result
        if batch is NULL:
            return []
        self._start(batch, True)
        result = [batch.ops[i].id for i in range(batch.n_ops)]
        self._release(batch)
        return result

    def write(self, uint32_t slot, rows, local_ids not None, remote_ids not None,
              bytes request_id=b"", uint64_t key=0, tuple tag=(0, 0, 0)):
        """As :meth:`submit`; but what has ended well when this returns is told at once.

        Returns:
          A tuple of bytes, WRs and seconds, if all operations have ended; nothing
          more is heard of them. Otherwise a list, as :meth:`submit`.
        """
        cdef:
            Batch *batch
            bint done
        if (self.cq is None or self.cq.closed or slot >= self.core.n_slots
                or self.core.queues[slot] is NULL):
            self._queue(slot)
        batch = self._prepare(
            self.core.queues[slot], rows, local_ids, remote_ids, request_id, key, tag)
        if batch is NULL:
            return (0, 0, 0.0)
        done = self._start(batch, False)
        try:
            if done:
                return _summary(batch)
            return [batch.ops[i].id for i in range(batch.n_ops)]
        finally:
            self._release(batch)

    cdef bint _start(self, Batch *batch, bint leave) noexcept:
        """Admit a submission; return whether it has ended well and was taken back."""
        cdef bint done = False
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            admit(self.core, batch)
            batch.refs += 1    # the caller's
            relist(self.core, batch.queue)
            if not leave:
                linger(self.core, batch)
            settle(self.core, BUDGET)
            if not leave and batch.n_open == 0:
                done = _take_back(self.core, batch)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)
        return done

    cdef void _release(self, Batch *batch) noexcept:
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            release_batch(batch)
            pthread_mutex_unlock(&self.core.lock)

    cdef Batch *_prepare(
        self, Queue *queue, rows, local_ids, remote_ids, bytes request_id,
        uint64_t key, tuple tag,
    ) except? NULL:
        """Copy and check all that a submission needs; NULL if it is of nothing."""
        cdef:
            Py_buffer ours
            Py_buffer theirs
            Batch *batch = NULL
        _open_ids(local_ids, &ours, "local_block_ids")
        try:
            _open_ids(remote_ids, &theirs, "remote_block_ids")
            try:
                batch = self._fill_batch(queue, rows, &ours, &theirs, request_id)
            finally:
                PyBuffer_Release(&theirs)
        finally:
            PyBuffer_Release(&ours)
        if batch is not NULL:
            batch.key = key
            batch.generation, batch.total, batch.digest = tag
            if self._reserve_ops(queue, batch.n_ops):
                free(batch)
                raise MemoryError
        return batch

    cdef Batch *_fill_batch(
        self, Queue *queue, rows, const Py_buffer *ours, const Py_buffer *theirs,
        bytes request_id,
    ) except? NULL:
        cdef:
            uint64_t n = ours.shape[0]
            uint32_t n_rows = len(rows)
            uint64_t n_local = <uint64_t>1 << 32
            uint64_t n_remote = n_local
            uint32_t i
            Batch *batch
            Row *row
        if ours.shape[0] != theirs.shape[0]:
            raise LayoutError(
                f"{ours.shape[0]} local ids, {theirs.shape[0]} remote ids"
            )
        if n == 0 or n_rows == 0:
            return NULL
        self._check_sizes(queue, n, len(request_id))
        if queue.failed:
            raise ClosedResourceError(f"queue {queue.slot} has failed")
        batch = new_batch(n_rows, n)
        if batch is NULL:
            raise MemoryError
        try:
            batch.queue = queue
            batch.request_bytes = len(request_id)
            memcpy(batch.request, PyBytes_AS_STRING(request_id), len(request_id))
            for i in range(n_rows):
                index = rows[i]
                if not 0 <= index < queue.n_rows:
                    raise LayoutError(f"row {index} is not in [0, {queue.n_rows})")
                row = &queue.rows[<uint32_t>index]
                batch.ops[i].row = row
                n_local = min(n_local, row.n_local)
                n_remote = min(n_remote, row.n_remote)
            _copy_ids(batch, ours, theirs, n_local, n_remote)
        except BaseException:
            free(batch)
            raise
        return batch

    cdef int _check_sizes(
        self, Queue *queue, uint64_t n, uint32_t request_bytes
    ) except -1:
        if request_bytes > KVX_NOTIFY_MAX_REQUEST:
            raise UsageError(
                f"a request id of {request_bytes} bytes is longer than "
                f"{KVX_NOTIFY_MAX_REQUEST}"
            )
        if queue.ring is not NULL and (
                kvx_notify_length(request_bytes, n)
                > kvx_notify_limit(queue.ring_bytes)):
            raise UsageError(
                f"{n} blocks in one operation do not fit the notify ring of "
                f"{queue.ring_bytes} bytes; split the list"
            )
        if n >= <uint64_t>1 << 31:
            raise UsageError(f"{n} blocks in one operation; split the list")
        return 0

    cdef bint _reserve_ops(self, Queue *queue, uint32_t n) noexcept:
        """Have room for ``n`` more operations; True without memory."""
        cdef:
            bint failed
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            failed = reserve(self.core, queue, n)
            pthread_mutex_unlock(&self.core.lock)
        return failed

    def cancel(self, uint64_t op_id):
        """Post nothing further of an operation; it ends when what is posted has.

        An operation that is unknown, ended, or wholly posted is left alone.
        """
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            cancel(self.core, op_id)
            settle(self.core, BUDGET)
            tell(self.core)
            pthread_mutex_unlock(&self.core.lock)

    # -- progress --------------------------------------------------------------

    def progress(self):
        """Take completions, post what has become possible, return what has ended.

        Takes the events of the completion channel, arms it and then looks at the
        CQ, in this order, so that no completion is missed.
        """
        cdef:
            bint more
            Op *finished
            Arrival *arrivals
            uint32_t unreported
            uint64_t count
        self._ensure_open()
        with nogil:
            eventfd_read(self.core.news_fd, &count)
            pthread_mutex_lock(&self.core.lock)
            if not self.core.thread_drives:
                # Else the event is the thread's: taken here, it would sleep on.
                take_events(self.core)
            more = settle(self.core, BUDGET)
            finished = self.core.finished
            self.core.finished = NULL
            self.core.finished_tail = &self.core.finished
            arrivals = self.core.arrivals
            self.core.arrivals = NULL
            self.core.arrivals_tail = &self.core.arrivals
            unreported = self.core.n_unreported
            self.core.waits = True
            pthread_mutex_unlock(&self.core.lock)
        return Progress(
            self._take_finished(finished), _take_arrivals(arrivals),
            self._take_failed() if unreported else [], more)

    cdef list _take_failed(self):
        """Return the slots of the queues that have failed and were not told of."""
        cdef:
            list result = []
            Queue *queue
            uint32_t slot
        pthread_mutex_lock(&self.core.lock)
        for slot in range(self.core.n_slots):
            queue = self.core.queues[slot]
            if queue is not NULL and queue.failed and not queue.reported:
                queue.reported = True
                result.append(slot)
        self.core.n_unreported = 0
        pthread_mutex_unlock(&self.core.lock)
        return result

    cdef list _take_finished(self, Op *first):
        """Turn finished operations into Python records and free them."""
        cdef:
            list result = []
            Op *op = first
            Op *following
        while op is not NULL:
            result.append(Finished(
                op.id,
                op.status,
                bool(op.culprit),
                op.cursor.n_bytes,
                op.n_wrs,
                (op.died_ns - op.batch.born_ns) * 1e-9,
                op.wr_id,
                op.qp_num,
                op.vendor_err,
            ))
            op = op.next
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            op = first
            while op is not NULL:
                following = op.next
                release_batch(op.batch)
                op = following
            pthread_mutex_unlock(&self.core.lock)
        return result


cdef int _copy_ids(
    Batch *batch, const Py_buffer *ours, const Py_buffer *theirs,
    uint64_t n_local, uint64_t n_remote,
) except -1:
    """Copy the ids and check the copies; raise LayoutError for the first bad one."""
    cdef:
        uint32_t n = batch.n_ids
        uint32_t local
        uint32_t remote = n
        uint32_t twice = n
    with nogil:
        local = _take_ids(batch.local, ours, n, n_local)
        if local == n:
            remote = _take_ids(batch.remote, theirs, n, n_remote)
            if remote == n:
                twice = kvx_find_duplicate(batch.queue.seen, batch.remote, n)
    if local < n:
        raise _bad_id("local_block_ids", ours, local, n_local, "")
    if remote < n:
        raise _bad_id("remote_block_ids", theirs, remote, n_remote, " of the peer")
    if twice < n:
        raise LayoutError(
            f"remote_block_ids[{twice}] is {batch.remote[twice]}, which "
            "the list names twice; each remote block is written once"
        )
    return 0


cdef bint _take_back(Core *core, Batch *batch) noexcept nogil:
    """Take a submission's operations, all ended, off the finished ones.

    False, and nothing is taken, if one of them did not end well.
    """
    cdef:
        uint32_t i
        Op **place = &core.finished
    for i in range(batch.n_ops):
        if batch.ops[i].status:
            return False
    while place[0] is not NULL:
        if place[0].batch is batch:
            place[0] = place[0].next
            release_batch(batch)
        else:
            place = &place[0].next
    core.finished_tail = place
    return True


cdef tuple _summary(Batch *batch):
    """Bytes, WRs and seconds of a submission that has ended."""
    cdef:
        uint64_t n_bytes = 0
        uint64_t n_wrs = 0
        uint64_t died_ns = 0
        uint32_t i
    for i in range(batch.n_ops):
        n_bytes += batch.ops[i].cursor.n_bytes
        n_wrs += batch.ops[i].n_wrs
        died_ns = max(died_ns, batch.ops[i].died_ns)
    return (n_bytes, n_wrs, (died_ns - batch.born_ns) * 1e-9)


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
