# cython: language_level=3, embedsignature=True, cdivision=True
"""The engine as Python sees it: queues, operations, progress.

An *operation* moves the blocks of one layer to one peer: a list of local and a
list of remote block ids, applied to every plane of the layer. One engine has one
CQ and any number of queues, a queue being the QPs to one peer with what is known
of that peer's memory. Python's objects become queues in ``_queues.pyx`` and
submissions in ``_submission.pyx``, which also says in Python what came of them. The
work is done by ``_core.pyx``, ``_post.pyx`` and ``_progress.pyx``, without the GIL:
one release of it for a submission, one for a look at what has completed.

Nothing here waits, and nothing knows asyncio. Whoever owns the engine calls
:meth:`Engine.progress` when :attr:`Engine.fd` is readable. All state is behind one
lock, since a thread may do most of it in place of that call: see ``_driver.pyx``.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvxfer._core cimport *
from kvxfer._post cimport flush, relist
from kvxfer._progress cimport cancel, forget, settle, settle_all, stop, take_events
from kvxfer._queues cimport (
    drop_queue,
    fill_ring,
    fill_route,
    new_queue,
    post_receives,
    take_failed,
    unretired,
)
from kvxfer._submission cimport (
    BUDGET,
    Watch,
    prepare,
    release,
    start,
    summary,
    take_arrivals,
    take_finished,
)
from kvxfer._verbs cimport CompletionQueue, Device, QueuePair

from kvxfer._submission import Finished, Progress, RingArrival, Watch
from kvxfer.errors import ClosedResourceError, ProtocolError, UsageError, verbs_error

__all__ = [
    "CANCELLED_STATUS", "Engine", "Finished", "Progress", "RingArrival", "Watch"]

CANCELLED_STATUS = CANCELLED


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
      spin_ns: Nanoseconds that the thread of ``adaptive`` looks on after the last
        completion before it sleeps; None: 20,000 where this process may run on more
        than two processors, else none.
    """

    def __init__(self, Device device not None, *, cq_depth, chain=64, max_sge=8,
                 merge_bytes=1 << 20, max_wr_bytes=1 << 30,
                 window_bytes=32 << 20, device_window_bytes=128 << 20,
                 stripe_bytes=256 << 10, str progress="event", spin_ns=None):
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
        self._watched = {}
        self.cq = CompletionQueue(device, cq_depth)
        try:
            self._driver = Driver(self.cq, progress, spin_ns)
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
    def spin_ns(self):
        """Nanoseconds that the thread looks on after the last completion."""
        return 0 if self.core is NULL else self.core.spin_ns

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
            list kept
            Queue *queue
        self._ensure_open()
        kept = [qps] if isinstance(qps, QueuePair) else list(qps)
        queue = new_queue(self.core, self.cq, kept, receives)
        self._qps[queue.slot] = kept
        return queue

    cdef void _drop_queue(self, Queue *queue) noexcept:
        cdef uint32_t slot = queue.slot
        drop_queue(self.core, queue)
        del self._qps[slot]

    cdef int _ensure_open(self) except -1:
        if self.cq is None:
            raise ClosedResourceError("this Engine was never made")
        return self.cq._ensure_open()

    cdef Queue *_queue(self, uint32_t slot) except NULL:
        self._ensure_open()
        if slot >= self.core.n_slots or self.core.queues[slot] is NULL:
            raise ClosedResourceError(f"there is no queue {slot}")
        return self.core.queues[slot]

    def add_initiator(self, qps not None, rows, ring=None, flush_to=None, lanes=None):
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
          lanes: For each row the QPs that its data may go by, as a bit mask of their
            positions; two different masks at most. None: all of them.
        """
        cdef Queue *queue = self._new_queue(qps, 0)
        try:
            fill_route(queue, rows, ring, flush_to, lanes)
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
            Queue *queue = self._new_queue(qps, receives)
            uint32_t n = receives
            int err
        try:
            fill_ring(queue, ring_addr, ring_bytes)
        except BaseException:
            self._drop_queue(queue)
            raise
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            err = post_receives(self.core, queue, n)
            if err == 0:
                settle(self.core, BUDGET)
            leave(self.core)
        if err:
            self._drop_queue(queue)
            raise verbs_error(err, "ibv_post_recv", f"{receives} on each QP")
        return queue.slot

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
        let_go(self.core)
        self._drop_queue(queue)

    def abort(self, slot):
        """Stop posting on a queue; its operations end as flushed once it is drained.

        The caller then moves the QPs to ERR and calls :meth:`flush`.
        """
        cdef Queue *queue = self._queue(slot)
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            stop(self.core, queue)
            leave(self.core)

    def flush(self, slot):
        """Make sure that a failed queue, its QPs in ERR, reports its last WRs."""
        cdef Queue *queue = self._queue(slot)
        if not queue.failed:
            raise UsageError(f"queue {slot} has not failed")
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            flush(self.core, queue)
            settle(self.core, BUDGET)
            leave(self.core)

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
            leave(self.core)

    def unretired(self, slot):
        """Return how many posted WRs of a queue have not come back yet."""
        return unretired(self._queue(slot))

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
            leave(self.core)

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
            Batch *batch = prepare(
                self.core, self._queue(slot), rows, local_ids, remote_ids, request_id,
                key, tag)
            list result
        if batch is NULL:
            return []
        start(self.core, batch, True)
        result = [batch.ops[i].id for i in range(batch.n_ops)]
        release(self.core, batch)
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
        batch = prepare(
            self.core, self.core.queues[slot], rows, local_ids, remote_ids, request_id,
            key, tag)
        if batch is NULL:
            return (0, 0, 0.0)
        done = start(self.core, batch, False)
        try:
            if done:
                return summary(batch)
            return [batch.ops[i].id for i in range(batch.n_ops)]
        finally:
            release(self.core, batch)

    def watch(self, Watch watch not None, list op_ids not None):
        """Have :meth:`progress` tell ``watch`` of the ends of these operations.

        To be called right after they were submitted.
        """
        for op_id in op_ids:
            self._watched[op_id] = watch

    @property
    def watches(self):
        """Who watches operations that have not ended."""
        return set(self._watched.values())

    def cancel(self, uint64_t op_id):
        """Post nothing further of an operation; it ends when what is posted has.

        An operation that is unknown, ended, or wholly posted is left alone.
        """
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            cancel(self.core, op_id)
            settle(self.core, BUDGET)
            leave(self.core)

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
            list ended = []
        self._ensure_open()
        with nogil:
            eventfd_read(self.core.news_fd, &count)
            pthread_mutex_lock(&self.core.lock)
            if not self.core.thread_drives:
                # Else the event is the thread's: taken here, it would sleep on.
                take_events(self.core)
            more = settle_all(self.core, BUDGET)
            finished = self.core.finished
            self.core.finished = NULL
            self.core.finished_tail = &self.core.finished
            arrivals = self.core.arrivals
            self.core.arrivals = NULL
            self.core.arrivals_tail = &self.core.arrivals
            unreported = self.core.n_unreported
            self.core.waits = True
            let_go(self.core)
        return Progress(
            take_finished(self.core, finished, self._watched, ended),
            take_arrivals(arrivals),
            take_failed(self.core) if unreported else [], more, ended)
