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
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from kvxfer._engine import Engine
from kvxfer._quick import Turns
from kvxfer._transfer import Outcome, Transfer
from kvxfer.blocks import AnyIds
from kvxfer.completions import Completions
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


class Plan(NamedTuple):
    """What a call writes, but for the blocks."""

    rows: tuple[int, ...]
    """As the engine knows them."""
    layers: tuple[int, ...]
    """The layer of each."""
    wires: int = 1
    """By which wires of the link they go: bit mask."""


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
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf
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
        transfer.wires = plan.wires
        self._engine.watch(transfer, op_ids)
        return transfer

    def watch(self, transfer: Transfer, on_end: Callable[[Transfer], None]) -> None:
        """Have ``on_end`` called when a transfer has ended or is abandoned.

        For a transfer that nobody awaits. It has no deadline: whoever watches it calls
        :meth:`stop`.
        """

        def ended(transfer: Transfer) -> None:
            _cancel_drain(transfer)
            on_end(transfer)

        transfer.on_end = ended

    def bound(
        self, transfer: Transfer, timeout: float, undrained: Callable[[], None]
    ) -> None:
        """Bound the time that a transfer gets; whoever calls this awaits it.

        Past ``timeout`` seconds it posts nothing further and ends when what is posted
        has completed; should that take longer than the drain timeout, ``undrained`` is
        called: whoever owns the queue moves its QP to ERR.
        """
        self.turns.forget()
        transfer.undrained = undrained
        transfer.timeout = timeout
        transfer.due = transfer.began + timeout
        # One timer for all: it is set anew when it has rung, which is seldom.
        if transfer.due < self._timer_due:
            self._set_timer(transfer.due)

    async def run(
        self, transfer: Transfer, cancelled: asyncio.CancelledError | None = None
    ) -> Outcome:
        """Wait until a transfer has ended and return how.

        Args:
          cancelled: What has ended an await of the transfer already.

        Raises:
          NotQuiescentError: The device may still read the source blocks.

        Cancellation:
          Posts nothing further; raised when the device is done with the blocks.
        """
        try:
            if cancelled is not None:
                self.stop(transfer)
            while not transfer.ended and not transfer.abandoned:
                try:
                    await transfer
                except asyncio.CancelledError as error:
                    self.stop(transfer)
                    cancelled = error
        finally:
            self.unbound(transfer)
        if transfer.abandoned:
            raise NotQuiescentError(
                "the QP could be neither drained nor destroyed: the device may still "
                "read the source blocks; do not reuse or free them in this process"
            ) from cancelled
        if cancelled is not None:
            raise cancelled
        return transfer.outcome

    def unbound(self, transfer: Transfer) -> None:
        """Nobody waits for a transfer any more."""
        transfer.due = 0.0
        _cancel_drain(transfer)

    def close(self) -> None:
        """Forget the timer; nothing may be in flight. Twice is fine."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._timer_due = math.inf

    def abandon(self, slot: int) -> None:
        """Give up on the transfers of a queue that cannot be brought to rest."""
        abandoned = [t for t in self._engine.watches if t.slot == slot]
        for transfer in abandoned:
            transfer.abandoned = True
        # Whoever is told of one may look at the others.
        for transfer in abandoned:
            transfer.tell()

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, due - time.monotonic()), self._look
        )

    def _look(self) -> None:
        """Stop the transfers whose time is over."""
        self._timer = None
        self._timer_due = math.inf
        # What has completed meanwhile counts: look before judging.
        self._completions.catch_up()
        now = time.monotonic()
        bounded = [t for t in self._engine.watches if t.due and not t.expired]
        for transfer in bounded:
            if transfer.due <= now:
                transfer.expired = True
                self.stop(transfer)
        first = min((t.due for t in bounded if not t.expired), default=math.inf)
        if first < math.inf:
            self._set_timer(first)

    def stop(self, transfer: Transfer) -> None:
        """Post nothing further of a transfer; see that it ends.

        Should what is posted not complete in the drain timeout, ``undrained`` of the
        transfer is called.
        """

        def break_unless_ended() -> None:
            if not transfer.ended and transfer.undrained is not None:
                transfer.undrained()

        if transfer.drain is not None:
            return
        transfer.drain = asyncio.get_running_loop().call_later(
            self._drain_timeout, break_unless_ended
        )
        for op_id in transfer.pending:
            self._engine.cancel(op_id)


def _cancel_drain(transfer: Transfer) -> None:
    if transfer.drain is not None:
        transfer.drain.cancel()
