"""A streamed request as an engine holds it: marks, looks and waits.

Everything here may be called from any thread and returns at once, but for what is
awaited. What is wrong with a call is said where it is made.
"""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from kvxfer.blocks import Ids, as_ids
from kvxfer.errors import ClosedResourceError, KVXferError, LayoutError, UsageError
from kvxfer.events import check_event
from kvxfer.outbound import Chunk, Outbound
from kvxfer.policy import Flow
from kvxfer.requests import (
    End,
    EndCode,
    Key,
    LayerState,
    LayerTimes,
    RequestState,
)
from kvxfer.stream_statistics import RequestMetrics
from kvxfer.waiting import Ending, Waiters
from kvxfer.wire import MAX_AUX_BYTES

__all__ = ["Request", "as_groups"]


class Home(Protocol):
    """What a request needs of the streams that carry it out; ``Any`` is a request."""

    def group(self, name: str | None) -> str:
        """Return a group's name, which may be left out if there is one only."""

    def layers(self, group: str, layer: int | None) -> list[int]:
        """Return the layer asked for, or all of a group."""

    def check_ids(self, group: str, layers: list[int], ids: Ids) -> None:
        """Raise LayoutError for blocks that are not in all of these layers."""

    def check_aux(self, request: Any, aux: bytes) -> None:
        """Raise UsageError where nobody is there to take ``aux``."""

    def check(self) -> None:
        """Raise unless this is the process and the loop of the client."""

    def check_elsewhere(self) -> None:
        """Raise on the loop's own thread, where nobody may wait."""

    def post(self, call: Callable[[], None]) -> None:
        """Have something carried out on the loop."""

    def ready(
        self,
        request: Any,
        keys: list[Key],
        ids: Ids,
        first_block: int,
        final: bool,
        event: Any,
        optional: bool,
    ) -> None:
        """Take what has become ready; on the loop."""

    def finish(self, request: Any, aux: bytes) -> None:
        """Nothing more will become ready; on the loop."""

    def stop(self, request: Any, end: End) -> None:
        """End a request badly; on the loop."""

    def abort(self, request: Any, end: End) -> Ending:
        """End a request badly; any thread."""


class Request:
    """A request that is written; made by ``Client.open`` and ``Client.request``.

    Attributes:
      request_id: As it was opened.
    """

    def __init__(
        self, streams: Home, request_id: str, *, deadline: float, priority: int
    ) -> None:
        self.request_id = request_id
        self._streams = streams
        self._core = Outbound(request_id, time.monotonic)
        self._flow: Flow[Chunk] = Flow(deadline, priority)
        self._lock = threading.Lock()
        self._final: set[Key] = set()
        # Marks are carried out on the loop, later: until one has been, no look at its
        # layer may answer from what was marked before it.
        self._n_said: collections.Counter[Key] = collections.Counter()
        self._n_heard: collections.Counter[Key] = collections.Counter()
        self._finished = False
        self._born = time.monotonic()
        self._died: float | None = None
        self._error: KVXferError | None = None
        self._over = Waiters()
        self._n_wrs = 0
        self._way = ("", "")
        self._wires = 0

    def __repr__(self) -> str:
        return f"<Request {self.request_id!r}, {self.state.value}>"

    # -- looks -----------------------------------------------------------------

    @property
    def state(self) -> RequestState:
        """Where it stands."""
        return self._core.state

    @property
    def error(self) -> KVXferError | None:
        """Why it ended badly; None while it goes on, and when all went well."""
        return self._error

    @property
    def metrics(self) -> RequestMetrics:
        """What it has done so far."""
        return RequestMetrics(
            bytes=self._core.bytes_done,
            wrs=self._n_wrs,
            seconds=(self._died or time.monotonic()) - self._born,
            layers=self._times(),
            device=self._way[0],
            wire=self._way[1],
        )

    def layer_state(self, layer: int, group: str | None = None) -> LayerState:
        """Say how far a layer is: waiting, posted, acknowledged or visible.

        All that has been said to be ready counts from then on, in any thread. What is
        ``ACKNOWLEDGED`` has been read; it is read again if the connection breaks
        before the layer is ``VISIBLE``.

        Raises:
          LayoutError: Nothing has been said to be ready of such a layer.
        """
        key = (self._streams.group(group), layer)
        if not self._n_said[key]:
            raise LayoutError(f"nothing is ready of layer {layer!r}")
        if self._n_said[key] > self._n_heard[key] or key not in self._core.layers():
            return LayerState.WAITING
        return self._core.layer_state(key)

    def _times(self) -> tuple[LayerTimes, ...]:
        known = {(times.group, times.layer): times for times in self._core.times()}
        said = [key for key, n in self._n_said.copy().items() if n]
        return tuple(
            known.get(key) or LayerTimes(*key) for key in sorted({*said, *known})
        )

    # -- marks -----------------------------------------------------------------

    def ready(
        self,
        layer: int | None,
        local_block_ids: object,
        first_block: int = 0,
        final: bool = False,
        group: str | None = None,
        event: Any = None,
    ) -> None:
        """Say that blocks of a layer hold what they shall hold.

        They are written as soon as they are offered, and must not change before the
        request is over, but for a last block that is partly filled: it may be filled
        further and be said to be ready again. Blocks before the first one offered
        are skipped.

        Args:
          layer: Model layer; None: all layers of the group that both sides hold.
          local_block_ids: Blocks of the client's cache, one a position.
          first_block: The position in the request of the first of them.
          final: Nothing more of this layer will become ready. The other side may use
            it from then on, and write to the blocks itself.
          group: Whose block ids these are; may be left out if the cache has one.
          event: Waited for before the bytes are read: what has ``query()`` or
            ``synchronize()``, an ``asyncio.Event`` of the client's loop, or a
            callable, which is called in a thread until it does not return False.

        Raises:
          UsageError: The layer is final, the request is finished, or ``event`` is
            nothing that can be waited for.
          LayoutError: The cache has no such layer, group or block.
          ClosedResourceError: The client is closed.

          Nothing has changed then. What is wrong with regard to the offer is known
          only with it, and ends the request.
        """
        check_event(event)
        name = self._streams.group(group)
        layers = self._streams.layers(name, layer)
        if isinstance(first_block, bool) or not 0 <= first_block < 1 << 31:
            raise UsageError(f"first_block is {first_block!r}, not a position")
        ids: Ids = np.array(as_ids(local_block_ids, "local_block_ids"))
        self._streams.check_ids(name, layers, ids)
        keys = [(name, each) for each in layers]
        with self._lock:
            self._check_unfinished()
            done = [key[1] for key in keys if key in self._final]
            if done and (layer is not None or len(done) == len(keys)):
                raise UsageError(f"layer {done[0]} is final: nothing may follow")
            keys = [key for key in keys if key not in self._final]
            if final:
                self._final.update(keys)
            self._n_said.update(keys)
            try:
                self._streams.post(
                    lambda: self._hear(
                        keys, ids, first_block, final, event, layer is None
                    )
                )
            except ClosedResourceError:
                self._n_said.subtract(keys)
                raise

    def _hear(self, keys: list[Key], *mark: Any) -> None:
        try:
            self._streams.ready(self, keys, *mark)
        finally:
            self._n_heard.update(keys)

    def finish(self, aux: bytes = b"") -> None:
        """Say that nothing more will become ready: every layer is final.

        Args:
          aux: Up to 64 KiB for the other side, which sees it when all is in place.

        Raises:
          UsageError: It is finished already, or ``aux`` is too long.
          ClosedResourceError: The client is closed.
        """
        aux = bytes(aux)
        if len(aux) > MAX_AUX_BYTES:
            raise UsageError(
                f"aux has {len(aux)} bytes, more than {MAX_AUX_BYTES}: send what is "
                "longer through blocks"
            )
        with self._lock:
            self._check_unfinished()
            self._streams.check_aux(self, aux)
            self._finished = True
            self._streams.post(lambda: self._streams.finish(self, aux))

    def abort(self, reason: str = "") -> Ending:
        """Give the request up; does nothing if it is over.

        May be called from any thread. In another thread than the event loop's it
        returns when no write of the request is in flight any more; on the event loop
        ``await`` what it returns for that. The other side is told.

        Raises:
          NotQuiescentError: A device does not let go of the blocks.
        """
        end = End(EndCode.ABORTED, reason or "given up by the side that writes")
        return self._streams.abort(self, end)

    async def sent(self) -> None:
        """Wait until the other side has everything.

        Raises:
          KVXferError: The request ended badly; see :attr:`error`. No write of it is
            in flight.

        Cancellation:
          Aborts the request; raised when no write of it is in flight any more.
        """
        self._streams.check()
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            self._streams.stop(
                self, End(EndCode.CANCELLED, "who waited for it was cancelled")
            )
            await self._over.wait_uncancelled()
            raise
        if self._error is not None:
            raise self._error.with_traceback(None)  # else it grows with each

    def join(self, timeout: float | None = None) -> None:
        """Wait as :meth:`sent` does, in a thread that is not the event loop's.

        Args:
          timeout: Seconds; None waits as long as the request may take.

        Raises:
          KVXferError: The request ended badly; see :attr:`error`.
          TimeoutError: It goes on. Nothing has changed.
          UsageError: This is the event loop's thread.
        """
        self._streams.check_elsewhere()
        if not self._over.wait_blocking(timeout):
            raise TimeoutError(f"{self!r} goes on after {timeout:g} s")
        if self._error is not None:
            raise self._error.with_traceback(None)  # else it grows with each

    def _check_unfinished(self) -> None:
        if self._finished:
            raise UsageError(f"request {self.request_id!r} is finished")


def as_groups(blocks: object, only: str | None) -> dict[str, object]:
    """Give block ids by group, where one group needs no name."""
    if isinstance(blocks, Mapping):
        return dict(blocks)
    if only is None:
        raise LayoutError("the cache has several groups: give block ids by group")
    return {only: blocks}
