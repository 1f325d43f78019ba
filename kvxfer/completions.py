"""Finished operations wake who waits for them: the engine's end in an event loop.

The only module that adds readers to a loop: for what has finished, and for what
happens to the device itself. The loop wakes when there is a completion, or, while
the engine's own thread sees to those, when an operation has ended; one wake takes
everything that has finished. A wake-up is a hint: there may be nothing, and there may
be more than one call's budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kvxfer._engine import Engine, RingArrival
from kvxfer._transfer import Transfer
from kvxfer._waiter import Turn
from kvxfer.verbs_types import AsyncEvent

_T = TypeVar("_T")


class Completions:
    """Hands what an engine finishes to whoever waits for it, on one loop.

    Args:
      engine: Its :meth:`~kvxfer._engine.Engine.progress` is called from here only.
      on_arrival: Called for each notification that a peer has written.
      on_failed: Called with the slot of each queue that has failed by itself.
      on_event: Called for each asynchronous event of the device.
    """

    def __init__(
        self,
        engine: Engine,
        on_arrival: Callable[[RingArrival], None],
        on_failed: Callable[[int], None],
        on_event: Callable[[AsyncEvent], None],
    ) -> None:
        self._engine = engine
        self._on_arrival = on_arrival
        self._on_failed = on_failed
        self._on_event = on_event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: Turn | None = None
        self._fd = -1
        self._device = engine.cq.device
        self._async_fd = -1
        self._watched: set[int] = set()

    def start(self) -> None:
        """Begin to listen on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._turn = Turn(self._loop)
        self._fd = self._engine.fd
        self._loop.add_reader(self._fd, self.wake)
        self._async_fd = self._device.async_fd
        self._loop.add_reader(self._async_fd, self._take_events)

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Listen on a descriptor of the same device as well, while this listens."""
        if self._loop is not None:
            self._watched.add(fd)
            self._loop.add_reader(fd, on_readable)

    def unwatch(self, fd: int) -> None:
        """Listen on it no longer. Twice is fine."""
        if self._loop is not None and fd in self._watched:
            self._watched.discard(fd)
            self._loop.remove_reader(fd)

    def wake(self) -> None:
        """Take what has finished; go on in the loop's next round if there is more.

        For the loop: at the end those go on that have waited for it.
        """
        if self._loop is None:
            return
        assert self._turn is not None
        self._turn.begin()
        try:
            if self._take():
                self._loop.call_soon(self.wake)
        finally:
            self._turn.end()

    def catch_up(self) -> None:
        """Take all that has finished by now, however much it is.

        For whoever is about to destroy a QP: what it has completed counts.
        """
        while self._loop is not None and self._take():
            pass

    def _take(self) -> bool:
        """Take one budget's worth; return whether there may be more."""
        progress = self._engine.progress()
        # Of operations without a transfer nobody wants to know: making the rest of
        # theirs has failed.
        for transfer in progress.ended:
            self._deliver(Transfer.tell, transfer)
        for arrival in progress.arrivals:
            # As _deliver(), without a frame of its own.
            try:
                self._on_arrival(arrival)
            except Exception as error:  # noqa: BLE001 - goes to the loop's handler
                self._complain(arrival, error)
        for slot in progress.failed:
            self._deliver(self._on_failed, slot)
        return progress.more

    def _take_events(self) -> None:
        """Take the device's asynchronous events until there are none."""
        while self._loop is not None:
            event = self._device.take_async_event()
            if event is None:
                return
            self._deliver(self._on_event, event)

    def _deliver(self, callback: Callable[[_T], None], news: _T) -> None:
        """Call back; what one callback raises must not cost the others their news."""
        try:
            callback(news)
        except Exception as error:  # noqa: BLE001 - goes to the loop's handler
            self._complain(news, error)

    def _complain(self, news: object, error: Exception) -> None:
        assert self._loop is not None
        self._loop.call_exception_handler(
            {"message": f"a callback failed on {news!r}", "exception": error}
        )

    def close(self) -> None:
        """Stop listening. Twice is fine."""
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop.remove_reader(self._async_fd)
            for fd in self._watched:
                self._loop.remove_reader(fd)
            self._loop = None
