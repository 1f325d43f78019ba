# cython: language_level=3, embedsignature=True
"""The operations of one call, until the last of them has ended.

Compiled, and of few objects: of a thousand writes in flight each is out of the caches
when it ends, and what it consists of has to be fetched again, piece by piece.
"""

import enum

from libc.stdint cimport uint64_t

from kvxfer._core cimport CANCELLED, now_ns
from kvxfer._submission cimport Watch
from kvxfer._waiter cimport Waiter


class Outcome(enum.Enum):
    """How a transfer ended."""

    DONE = enum.auto()
    FAILED = enum.auto()
    EXPIRED = enum.auto()


cdef class Transfer(Watch):
    """What one call asked for: an operation a layer. Awaited, it is until it ends.

    Args:
      slot: The queue.
      layers: One an operation.
      op_ids: The operations; none at all where there are no blocks to write.

    Attributes:
      failures: Layer and record of the operations that failed.
      n_bytes: Written by the operations that ended well, and ``n_wrs`` by all.
      n_blocks: What it is to move, all layers together.
      wires: By which wires of the link it goes: bit mask.
      request: The request id.
      timeout: Seconds that it gets; ``due`` says when they are over, on the clock of
        ``time.monotonic``; 0: never.
      expired: They are over.
      drain: The timer that breaks the queue if what is posted does not complete in
        time, by calling ``undrained``.
      abandoned: Its QP could be neither drained nor destroyed; who sets it calls
        ``tell``.
      on_end: Called once, where nobody waits, when it has ended or is abandoned.
      began: When it was made, on the same clock.
    """

    def __init__(self, uint64_t slot, tuple layers not None, list op_ids not None):
        self.slot = slot
        self.layers = layers
        self.began = now_ns() * 1e-9
        self._op_ids = op_ids
        self._open = len(op_ids)

    cdef bint done(self, uint64_t op_id, uint64_t n_bytes, uint64_t n_wrs) except -1:
        self.n_bytes += n_bytes
        self.n_wrs += n_wrs
        return self._end(op_id)

    cdef bint failed(self, uint64_t op_id, object finished) except -1:
        self.n_wrs += <uint64_t>finished.n_wrs
        if self.failures is None:
            self.failures = []
        self.failures.append((self.layers[self._op_ids.index(op_id)], finished))
        return self._end(op_id)

    cdef bint _end(self, uint64_t op_id) except -1:
        self._open -= 1
        if self._open:
            if self._ended is None:
                self._ended = set()
            self._ended.add(op_id)
            return False
        if self.on_end is not None:
            return True
        self.wake()
        return False

    def __await__(self):
        if self._waiter is None:
            self._waiter = Waiter()
            if self._open == 0 or self.abandoned:
                self._waiter.wake()
        return self._waiter

    cpdef wake(self):
        """Let whoever waits for it go on."""
        if self._waiter is not None:
            self._waiter.wake()

    def tell(self):
        """Call ``on_end`` if there is one, and wake who waits."""
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(self)
        self.wake()

    @property
    def ended(self):
        """Whether nothing of it is in flight any more."""
        return self._open == 0

    @property
    def is_done(self):
        """Whether all of it has ended, and well."""
        return self._open == 0 and self.failures is None

    @property
    def pending(self):
        """The operations that have not ended."""
        if self._open == 0:
            return []
        return [i for i in self._op_ids if self._ended is None or i not in self._ended]

    @property
    def outcome(self):
        """How it ended; to be asked once it has."""
        if self.failures is None:
            return Outcome.DONE
        if any([f.status != CANCELLED for _, f in self.failures]):
            return Outcome.FAILED
        return Outcome.EXPIRED

    @property
    def layers_done(self):
        """The layers whose every byte the peer's device has acknowledged."""
        bad = {layer for layer, _ in self.failures or ()}
        left = set(self.pending)
        bad.update([
            layer for layer, i in zip(self.layers, self._op_ids) if i in left])
        return [layer for layer in self.layers if layer not in bad]
