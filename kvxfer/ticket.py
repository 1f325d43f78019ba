"""A request as the side that is written to sees it: looks and waits."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

from kvxfer.blocks import Ids
from kvxfer.errors import KVXferError, LayoutError
from kvxfer.inbound import Inbound
from kvxfer.positions import Window
from kvxfer.requests import End, EndCode, Key, TicketState
from kvxfer.waiting import Ending, Waiters

__all__ = ["Ticket"]


class Desk(Protocol):
    """What a ticket needs of the offers that it is one of; ``Any`` is a ticket."""

    def check(self) -> None:
        """Raise unless this is the process and the loop of the server."""

    def check_elsewhere(self) -> None:
        """Raise on the loop's own thread, where nobody may wait."""

    def layers(self, windows: Mapping[str, Window]) -> set[int]:
        """The layers of the cache in some groups."""

    def digest_of(self, key: Key, block_ids: Ids) -> int:
        """Compute the digest of blocks of the cache."""

    def stop(self, ticket: Any, end: End) -> None:
        """End a request badly; on the loop."""

    def abort(self, ticket: Any, end: End) -> Ending:
        """End a request badly; any thread."""


class Ticket:
    """A request whose blocks are offered; made by ``Server.offer``.

    All attributes may be read from any thread, without waiting.

    Attributes:
      request_id: As it was offered.
      addresses: The writers that it is offered to.
      arrived: When each layer was complete, by ``time.monotonic()``.
    """

    def __init__(
        self,
        offers: Desk,
        request_id: str,
        windows: dict[str, Window],
        needed: int,
        lease: float,
        checksum: bool,
    ) -> None:
        self.request_id = request_id
        self.addresses: list[str] = []
        self.arrived: dict[int, float] = {}
        self._offers = offers
        self._windows = windows
        self._needed = needed
        self._checksum = checksum
        self._expires = time.monotonic() + lease
        self._core = Inbound(windows, needed, offers.digest_of if checksum else None)
        self._generation = secrets.randbits(63) | 1
        self._error: KVXferError | None = None
        self._quarantined = False
        self._over = Waiters()
        self._layers: dict[int, Waiters] = {}
        self._lease: asyncio.TimerHandle | None = None
        self._fences: list[asyncio.TimerHandle] = []

    def __repr__(self) -> str:
        return f"<Ticket {self.request_id!r}, {self.state.value}>"

    @property
    def state(self) -> TicketState:
        """Where it stands."""
        return self._core.state

    @property
    def layers_done(self) -> tuple[int, ...]:
        """The layers that are in place, in every group that was offered."""
        return tuple(sorted(self.arrived))

    @property
    def bytes_done(self) -> int:
        """Bytes of blocks that have landed; what was sent twice counts twice."""
        return self._core.bytes_done

    @property
    def error(self) -> KVXferError | None:
        """Why it ended badly; None while it goes on, and when all went well."""
        return self._error

    @property
    def aux(self) -> bytes:
        """What the writer gave to ``finish``; empty before the request is done.

        Of several sources the first one that gave anything.
        """
        return self._core.aux if self.state is TicketState.DONE else b""

    async def wait_layer(self, layer: int) -> None:
        """Wait until a layer is in place, in every group that was offered.

        Raises:
          KVXferError: The request ended before; see :attr:`error`.
          LayoutError: This cache has no such layer.

        Cancellation:
          Ends the wait and nothing else.
        """
        self._offers.check()
        self._check_layer(layer)
        if layer not in self.arrived and not self._core.is_over:
            await self._layers.setdefault(layer, Waiters()).wait()
        if layer not in self.arrived:
            raise self._failure()

    async def wait(self) -> None:
        """Wait until all is in place.

        Raises:
          KVXferError: The request ended badly; see :attr:`error`. No byte of it can
            land any more.

        Cancellation:
          Aborts the request; raised when no byte of it can land any more.
        """
        self._offers.check()
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            self._offers.stop(
                self, End(EndCode.CANCELLED, "who waited for it was cancelled")
            )
            await self._over.wait_uncancelled()
            raise
        if self.state is not TicketState.DONE:
            raise self._failure()

    def join(self, timeout: float | None = None) -> None:
        """Wait as :meth:`wait` does, in a thread that is not the event loop's.

        Args:
          timeout: Seconds; None waits as long as the lease.

        Raises:
          KVXferError: The request ended badly; see :attr:`error`.
          TimeoutError: It goes on. Nothing has changed.
          UsageError: This is the event loop's thread.
        """
        self._offers.check_elsewhere()
        if not self._over.wait_blocking(timeout):
            raise TimeoutError(f"{self!r} goes on after {timeout:g} s")
        if self.state is not TicketState.DONE:
            raise self._failure()

    def join_layer(self, layer: int, timeout: float | None = None) -> None:
        """Wait as :meth:`wait_layer` does; otherwise as :meth:`join`."""
        self._offers.check_elsewhere()
        self._check_layer(layer)
        waiters = self._layers.setdefault(layer, Waiters())
        # Looked at behind that: what comes from now on wakes the waiters.
        if (
            layer not in self.arrived
            and not self._over.is_set
            and not waiters.wait_blocking(timeout)
        ):
            raise TimeoutError(f"layer {layer} is not there after {timeout:g} s")
        if layer not in self.arrived:
            raise self._failure()

    def _check_layer(self, layer: int) -> None:
        if layer not in self._offers.layers(self._windows):
            raise LayoutError(f"this cache has no layer {layer!r} in what was offered")

    def abort(self, reason: str = "") -> Ending:
        """Give the request up; does nothing if it is over.

        May be called from any thread. In another thread than the event loop's it
        returns when no byte of the request can land any more; on the event loop
        ``await`` what it returns for that.
        """
        end = End(EndCode.ABORTED, reason or "given up by the side that is written to")
        return self._offers.abort(self, end)

    def _failure(self) -> KVXferError:
        if self._error is None:
            return LayoutError("no writer of this request holds that layer")
        return self._error.with_traceback(None)  # else it grows with each
