"""Which operations go to the engine, with what key, and how their end is awaited.

The engine decides, without the GIL, which of the admitted operations is posted
next; here they get the key by which it decides, see :func:`make_key`. What has the
same key takes turns; within a call the operations go in the order of its layers.

A transfer is what one call asked for: one operation a layer. Its end has two
parts, *failed* and *quiescent*, and it is awaited until the second: when
:meth:`Scheduler.run` returns or raises, the device is done with the source blocks.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import NamedTuple

from kvxfer._engine import CANCELLED_STATUS, Engine, Finished
from kvxfer._quick import Turns
from kvxfer.blocks import AnyIds
from kvxfer.completions import Completions
from kvxfer.deadlines import Deadlines
from kvxfer.errors import NotQuiescentError

_LAYER_BITS = 16
_PRIORITY_BITS = 10
_DEADLINE_BITS = 38


def make_key(
    deadline: float | None = None, priority: int = 0, layer: int | None = None
) -> int:
    """Make the key by which the engine orders what waits: the smallest goes first.

    The earliest deadline, then the highest priority, then the lowest layer.

    Args:
      deadline: On the loop's clock, in seconds, good for 8 years of it; told apart
        by milliseconds. None: after all that have one.
      priority: -512 to 511; what is beyond counts as the nearest.
      layer: From 0; None: as the first layer, so that the layers of one submission
        do not stand back behind those of younger ones.
    """
    latest = (1 << _DEADLINE_BITS) - 1
    when = latest if deadline is None else min(max(int(deadline * 1e3), 0), latest - 1)
    half = 1 << (_PRIORITY_BITS - 1)
    rank = half - 1 - min(max(priority, -half), half - 1)
    place = min(layer or 0, (1 << _LAYER_BITS) - 1)
    return ((when << _PRIORITY_BITS | rank) << _LAYER_BITS) | place


#: Of a write without anything special about it. Its timeout bounds the wait; it is
#: no deadline, or else the large write of a moment ago would have to go first.
PLAIN_KEY = make_key()


class Outcome(enum.Enum):
    """How a transfer ended."""

    DONE = enum.auto()
    FAILED = enum.auto()
    EXPIRED = enum.auto()


class Plan(NamedTuple):
    """What a call writes, but for the blocks."""

    rows: tuple[int, ...]
    """As the engine knows them."""
    layers: tuple[int, ...]
    """The layer of each."""


class Transfer:
    """The operations of one call until the last of them has ended.

    Made for each write that has to be awaited: what most never have is of the class.
    """

    n_blocks = 0
    """What it is to move, once a layer; for the counts of whoever began it."""
    n_bytes = 0
    n_wrs = 0
    expired = False
    waiter: asyncio.Future[None] | None = None
    drain: asyncio.TimerHandle | None = None
    """Breaks the queue if what is posted does not complete in time."""
    abandoned = False
    """Its QP could be neither drained nor destroyed."""
    on_end: Callable[[Transfer], None] | None = None
    """Called once, where nobody waits, when it has ended or is abandoned."""

    def __init__(self, slot: int, layers: tuple[int, ...], op_ids: list[int]) -> None:
        self.slot = slot
        self.layers = layers
        # None at all where there are no blocks to write.
        self.pending = dict(zip(op_ids, layers, strict=False))
        """Operation id -> layer, of those that have not ended."""
        self.failures: list[tuple[int, Finished]] = []
        """Layer and record of the operations that failed."""

    def note(self, finished: Finished) -> None:
        """Take the end of one operation; wake the waiter at the last one."""
        layer = self.pending.pop(finished.op_id)
        self.n_wrs += finished.n_wrs
        if finished.status == 0:
            self.n_bytes += finished.n_bytes
        else:
            self.failures.append((layer, finished))
        if not self.pending:
            self.wake()

    def wake(self) -> None:
        """Let the waiting task look again, or whoever is to be told."""
        if self.on_end is not None and (self.ended or self.abandoned):
            on_end, self.on_end = self.on_end, None
            on_end(self)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    @property
    def ended(self) -> bool:
        """Whether nothing of it is in flight any more."""
        return not self.pending

    @property
    def outcome(self) -> Outcome:
        """How it ended; to be asked once it has."""
        if not self.failures:
            return Outcome.DONE
        if any(f.status != CANCELLED_STATUS for _, f in self.failures):
            return Outcome.FAILED
        return Outcome.EXPIRED

    @property
    def layers_done(self) -> list[int]:
        """The layers whose every byte the peer's device has acknowledged."""
        open_layers = {*self.pending.values(), *(layer for layer, _ in self.failures)}
        return [layer for layer in self.layers if layer not in open_layers]


class Scheduler:
    """Admits transfers to one engine and waits for their end.

    Args:
      drain_timeout: Seconds that cancelled operations get to complete what they
        have posted, before ``break_queue`` is called for their queue.
    """

    def __init__(
        self, engine: Engine, completions: Completions, drain_timeout: float
    ) -> None:
        self._engine = engine
        self._completions = completions
        self._drain_timeout = drain_timeout
        self._transfers: set[Transfer] = set()
        self._deadlines = Deadlines()
        self.turns = Turns()
        """When writes that ended before they were waited for owe the loop one."""

    def write(
        self,
        slot: int,
        plan: Plan,
        local_ids: AnyIds,
        remote_ids: AnyIds,
        request_id: bytes,
    ) -> tuple[int, int, float] | Transfer:
        """Hand a transfer to the engine, which posts what it has room for.

        Returns:
          Its bytes, WRs and seconds, if it has ended already and well; nothing more
          is to be done then. Otherwise what to :meth:`run`.

        Raises:
          LayoutError: An id is out of range or named twice. Nothing was posted.
        """
        ended = self._engine.write(
            slot, plan.rows, local_ids, remote_ids, request_id, PLAIN_KEY
        )
        if isinstance(ended, tuple):
            self.turns.note(ended[2])
            return ended
        return self.expect(slot, plan, ended)

    def submit(
        self,
        slot: int,
        plan: Plan,
        local_ids: AnyIds,
        remote_ids: AnyIds,
        request_id: bytes,
        key: int,
        tag: tuple[int, int, int] = (0, 0, 0),
    ) -> Transfer:
        """As :meth:`write`, but the end is always heard of later; see :meth:`watch`.

        Args:
          key: Of :func:`make_key`.
          tag: Travels with the notifications; see ``Engine.submit``.
        """
        return self.expect(
            slot,
            plan,
            self._engine.submit(
                slot, plan.rows, local_ids, remote_ids, request_id, key, tag
            ),
        )

    def expect(self, slot: int, plan: Plan, op_ids: list[int]) -> Transfer:
        """Take operations that the engine has just been given as one transfer."""
        transfer = Transfer(slot, plan.layers, op_ids)
        self._completions.expect(op_ids, transfer.note)
        self._transfers.add(transfer)
        return transfer

    def watch(self, transfer: Transfer, on_end: Callable[[Transfer], None]) -> None:
        """Have ``on_end`` called when a transfer has ended or is abandoned.

        For a transfer that nobody awaits by :meth:`run`. It has no deadline: whoever
        watches it calls :meth:`stop`.
        """

        def ended(transfer: Transfer) -> None:
            if transfer.drain is not None:
                transfer.drain.cancel()
            self._transfers.discard(transfer)
            on_end(transfer)

        transfer.on_end = ended

    async def run(
        self, transfer: Transfer, timeout: float, break_queue: Callable[[], None]
    ) -> Outcome:
        """Wait until a transfer has ended and return how.

        Past ``timeout`` seconds it posts nothing further and ends when what is
        posted has completed; should that take longer than the drain timeout,
        ``break_queue`` is called: whoever owns the queue moves its QP to ERR.

        Raises:
          NotQuiescentError: The device may still read the source blocks.

        Cancellation:
          Posts nothing further; raised when the device is done with the blocks.
        """
        loop = asyncio.get_running_loop()
        self.turns.forget()
        self._deadlines.add(
            transfer, timeout, lambda: self._expire(transfer, break_queue)
        )
        cancelled: asyncio.CancelledError | None = None
        try:
            while not transfer.ended and not transfer.abandoned:
                transfer.waiter = loop.create_future()
                try:
                    await transfer.waiter
                except asyncio.CancelledError as error:
                    self.stop(transfer, break_queue)
                    cancelled = error
        finally:
            self._deadlines.discard(transfer, timeout)
            if transfer.drain is not None:
                transfer.drain.cancel()
            self._transfers.discard(transfer)
        if transfer.abandoned:
            raise NotQuiescentError(
                "the QP could be neither drained nor destroyed: the device may still "
                "read the source blocks; do not reuse or free them in this process"
            ) from cancelled
        if cancelled is not None:
            raise cancelled
        return transfer.outcome

    def close(self) -> None:
        """Forget the timer; nothing may be in flight. Twice is fine."""
        self._deadlines.close()

    def abandon(self, slot: int) -> None:
        """Give up on the transfers of a queue that cannot be brought to rest."""
        abandoned = [t for t in self._transfers if t.slot == slot]
        for transfer in abandoned:
            transfer.abandoned = True
        # Whoever watches one hears of it here, and it leaves the set.
        for transfer in abandoned:
            transfer.wake()

    def _expire(self, transfer: Transfer, break_queue: Callable[[], None]) -> None:
        # What has completed meanwhile counts: look before judging.
        self._completions.wake()
        if not transfer.ended:
            transfer.expired = True
            self.stop(transfer, break_queue)

    def stop(self, transfer: Transfer, break_queue: Callable[[], None]) -> None:
        """Post nothing further of a transfer; see that it ends.

        Should what is posted not complete in the drain timeout, ``break_queue`` is
        called.
        """

        def break_unless_ended() -> None:
            if not transfer.ended:
                break_queue()

        if transfer.drain is not None:
            return
        transfer.drain = asyncio.get_running_loop().call_later(
            self._drain_timeout, break_unless_ended
        )
        for op_id in list(transfer.pending):
            self._engine.cancel(op_id)
