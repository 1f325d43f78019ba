"""The end of something, waited for and asked for, from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Generator
from typing import TypeVar

from kvxfer.errors import NotQuiescentError

__all__ = ["MAX_FINISHED", "Ending", "Waiters", "take_all"]

#: Of what has ended, the last so many are kept for whoever polls. Each keeps what
#: its request was, some 10 KB, and not everybody polls.
MAX_FINISHED = 4096

_T = TypeVar("_T")


def take_all(queue: deque[_T]) -> list[_T]:
    """Empty a queue; of several threads that do so at once each item has one."""
    found: list[_T] = []
    while True:
        try:
            found.append(queue.popleft())
        except IndexError:  # to look first would be to look at what another takes
            return found


class Waiters:
    """A moment that comes once; woken on the loop, awaited there or in threads."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._futures: list[asyncio.Future[None]] = []

    @property
    def is_set(self) -> bool:
        """Whether the moment has come."""
        return self._event.is_set()

    def wake(self) -> None:
        """The moment has come. On the loop."""
        self._event.set()
        for future in self._futures:
            if not future.done():
                future.set_result(None)
        self._futures.clear()

    async def wait(self) -> None:
        """Wait for the moment, on the loop."""
        if self.is_set:
            return
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        await future

    async def wait_uncancelled(self) -> None:
        """Wait for the moment, whatever the waiting task is told meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        while not self.is_set:
            try:
                await self.wait()
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def wait_blocking(self, seconds: float | None) -> bool:
        """Wait in a thread that is not the loop's; whether the moment came."""
        return self._event.wait(seconds)


class Ending:
    """The end of a request that was given up: to be awaited on its event loop.

    In another thread it has been waited for already.

    Raises:
      NotQuiescentError: It did not come in ``patience`` seconds.
    """

    def __init__(self, over: Waiters, on_loop: bool, patience: float) -> None:
        self._over = over
        if not on_loop and not over.wait_blocking(patience):
            raise NotQuiescentError(
                f"no end within {patience:g} s: the event loop does not run, or a "
                "device does not let go"
            )

    def __await__(self) -> Generator[None, None, None]:
        return self._over.wait_uncancelled().__await__()
