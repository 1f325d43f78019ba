# cython: language_level=3, embedsignature=True, cdivision=True
"""Writes with nothing unusual about them, begun by one call.

``Client.write_cache`` checks its arguments and where things stand step by step, and
has the words for what is wrong. Here the same is looked at in C, and what is not as it
mostly is is left to those steps. Most writes are of a place that was written before,
over a connection that is well: a small one is over in less time than the steps take.
"""

from cpython.unicode cimport PyUnicode_AsUTF8String
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport getpid

from kvxfer._core cimport Batch, Core, Queue
from kvxfer._counters cimport Traffic
from kvxfer._engine cimport Engine
from kvxfer._submission cimport prepare, release, start, summary
from kvxfer._transfer cimport Transfer

from asyncio import _get_running_loop as _running_loop

import numpy as np

from kvxfer.blocks import as_ids
from kvxfer.errors import KVXferError

cdef object _ARRAY = np.ndarray
cdef object _INT64 = np.dtype(np.int64)
cdef object _INT32 = np.dtype(np.int32)
cdef tuple _NO_TAG = (0, 0, 0)


cdef class Turns:
    """When the event loop is owed a turn by writes that did not wait for it.

    Attributes:
      every: After so many of them.
      at_most: Or so many seconds that they took.
    """

    cdef:
        public int every
        public double at_most
        int _n
        double _seconds

    def __init__(self):
        self.every = 64
        self.at_most = 0.0005

    cpdef void note(self, double seconds) noexcept:
        """A write has ended before it was waited for."""
        self._n += 1
        self._seconds += seconds

    cpdef void forget(self) noexcept:
        """The loop has its turn."""
        self._n = 0
        self._seconds = 0.0

    @property
    def owed(self):
        """Whether the loop has been kept from its other tasks: give it a turn.

        It is, once it is said.
        """
        if self._n < self.every and self._seconds < self.at_most:
            return False
        self.forget()
        return True


cdef class QuickWrites:
    """Begins the writes to one connected peer; whoever breaks it lets go of this.

    Args:
      engine: Of the device that reaches it.
      slot: Its queue there.
      key: By which the engine orders these writes.
      plans: What was written before: ``(rows, layers, wires)`` by group and layer as
        the caller gave them.
      traffic: Counts what has ended.
      turns: Of the device.
      result: Makes the result of bytes, WRs, seconds, device, wire and layers.
      device: Name of the device.
      wires: How bytes travel, by the plan's bit mask; empty where it is not known yet.
    """

    cdef:
        Engine _engine
        uint32_t _slot
        uint32_t _generation
        uint64_t _key
        dict _plans
        Traffic _traffic
        Turns _turns
        object _result
        object _device
        tuple _wires
        object _loop
        int _pid

    def __init__(
        self, Engine engine not None, uint32_t slot, uint64_t key, dict plans not None,
        Traffic traffic not None, Turns turns not None, result, str device,
        tuple wires not None,
    ):
        self._generation = engine._queue(slot).generation
        self._engine = engine
        self._slot = slot
        self._key = key
        self._plans = plans
        self._traffic = traffic
        self._turns = turns
        self._result = result
        self._device = device
        self._wires = wires
        self._loop = _running_loop()
        self._pid = getpid()

    def knows(self, uint32_t wires):
        """Say whether it is known how bytes travel that go by these."""
        return wires < len(self._wires) and bool(self._wires[wires])

    def write(self, local_ids, remote_ids, layer, group, request_id):
        """Write if nothing is unusual.

        Returns:
          The result; or the transfer, if the write has to be waited for; or None, and
          nothing was done.
        """
        cdef:
            Queue *queue
            Batch *batch
            object plan
            bytes request = b""
        # By type, since True is no layer and equals 1.
        if not ((layer is None or type(layer) is int)
                and (group is None or type(group) is str)
                and (request_id is None or type(request_id) is str)
                and self._pid == getpid() and _running_loop() is self._loop):
            return None
        plan = self._plans.get((group, layer))
        queue = self._queue()
        if plan is None or queue is NULL or not self._wires[plan[2]]:
            return None
        try:
            if request_id is not None:
                request = PyUnicode_AsUTF8String(request_id)
            if not _are_ids(local_ids):
                local_ids = as_ids(local_ids)
            if not _are_ids(remote_ids):
                remote_ids = as_ids(remote_ids)
            batch = prepare(
                self._engine.core, queue, plan[0], local_ids, remote_ids, request,
                self._key, _NO_TAG)
        except (KVXferError, ValueError, BufferError):
            return None
        if batch is NULL:
            return None
        return self._begin(batch, plan[1], plan[2])

    cdef Queue *_queue(self) noexcept:
        """Find the queue; NULL if it is not ours any more."""
        cdef:
            Core *core = self._engine.core
            Queue *queue
        if self._engine.cq is None or self._engine.cq.closed:
            return NULL
        queue = core.queues[self._slot] if self._slot < core.n_slots else NULL
        if queue is NULL or queue.generation != self._generation:
            return NULL
        return queue

    cdef object _begin(self, Batch *batch, object layers, uint32_t wires):
        cdef:
            Core *core = self._engine.core
            uint64_t n_bytes
            uint64_t n_wrs
            double seconds
            bint done = start(core, batch, False)
        try:
            if not done:
                return self._expect(batch, layers, wires)
            n_bytes, n_wrs, seconds = summary(batch)
            self._traffic.wrote(
                n_bytes, <uint64_t>batch.n_ids * batch.n_ops, n_wrs, seconds)
        finally:
            release(core, batch)
        self._turns.note(seconds)
        return self._result(
            n_bytes, n_wrs, seconds, self._device, self._wires[wires], layers)

    cdef Transfer _expect(self, Batch *batch, tuple layers, uint32_t wires):
        cdef:
            list op_ids = [batch.ops[i].id for i in range(batch.n_ops)]
            Transfer transfer = Transfer(self._slot, layers, op_ids)
        transfer.n_blocks = <uint64_t>batch.n_ids * batch.n_ops
        transfer.wires = wires
        self._engine.watch(transfer, op_ids)
        return transfer


cdef bint _are_ids(object ids) except -1:
    """Whether these are integers as the engine takes them, at first sight."""
    if type(ids) is not _ARRAY:
        return False
    dtype = ids.dtype
    return dtype is _INT64 or dtype is _INT32
