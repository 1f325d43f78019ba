"""Which operations go to the engine, with what key, and how their end is awaited.

The engine decides, without the GIL, which of the admitted operations is posted
next; here they get the key by which it decides: the earliest deadline first, and
among equals the first submitted, which within a call is the order of its layers.

A transfer is what one call asked for: one operation a layer. Its end has two
parts, *failed* and *quiescent*, and it is awaited until the second: when
:meth:`Scheduler.run` returns or raises, the device is done with the source blocks.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvxfer._engine import CANCELLED_STATUS, Engine, Finished
from kvxfer.completions import Completions
from kvxfer.errors import NotQuiescentError


class Outcome(enum.Enum):
    """How a transfer ended."""

    DONE = enum.auto()
    FAILED = enum.auto()
    EXPIRED = enum.auto()


@dataclass(eq=False)
class Transfer:
    """The operations of one call until the last of them has ended."""

    slot: int
    layers: tuple[int, ...]
    pending: dict[int, int] = field(default_factory=dict)
    """Operation id -> layer, of those that have not ended."""
    n_bytes: int = 0
    n_wrs: int = 0
    expired: bool = False
    failures: list[tuple[int, Finished]] = field(default_factory=list)
    """Layer and record of the operations that failed."""
    waiter: asyncio.Future[None] | None = None
    drain: asyncio.TimerHandle | None = None
    """Breaks the queue if what is posted does not complete in time."""
    abandoned: bool = False
    """Its QP could be neither drained nor destroyed."""
    on_end: Callable[[Transfer], None] | None = None
    """Called once, where nobody waits, when it has ended or is abandoned."""

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
        if any(f.status != CANCELLED_STATUS for _, f in self.failures):
            return Outcome.FAILED
        return Outcome.EXPIRED if self.failures else Outcome.DONE

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

    def submit(
        self,
        slot: int,
        rows: Sequence[tuple[int, int]],
        local_ids: NDArray[np.int64],
        remote_ids: NDArray[np.int64],
        request_id: bytes,
        timeout: float,
        tag: tuple[int, int, int] = (0, 0, 0),
    ) -> Transfer:
        """Hand a transfer to the engine, which posts what it has room for.

        Args:
          rows: ``(row, layer)`` of each operation; rows as the engine knows them.
          timeout: Seconds; an earlier deadline goes first.
          tag: Travels with the notifications; see ``Engine.submit``.

        Raises:
          LayoutError: An id is out of range or named twice. Nothing was posted.
        """
        deadline_ms = int((time.monotonic() + timeout) * 1000)
        transfer = Transfer(slot, tuple(layer for _, layer in rows))
        op_ids = self._engine.submit(
            slot,
            [row for row, _ in rows],
            local_ids,
            remote_ids,
            request_id,
            deadline_ms,
            tag,
        )
        # None at all where there are no blocks to write.
        transfer.pending.update(zip(op_ids, transfer.layers, strict=False))
        self._completions.expect(list(transfer.pending), transfer.note)
        self._transfers.add(transfer)
        self._look()
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
        expiry = loop.call_later(timeout, self._expire, transfer, break_queue)
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
            expiry.cancel()
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

    def abandon(self, slot: int) -> None:
        """Give up on the transfers of a queue that cannot be brought to rest."""
        for transfer in self._transfers:
            if transfer.slot == slot:
                transfer.abandoned = True
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
        self._look()

    def _look(self) -> None:
        """See what has ended without an event."""
        if self._engine.attention:
            asyncio.get_running_loop().call_soon(self._completions.wake)
