"""What a server knows and nobody has taken: what has landed, what was given up.

Filled by the server, on its loop, and emptied by those who iterate over
``Server.arrivals()`` and ``Server.failures()``.
"""

from __future__ import annotations

import collections
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from time import monotonic

import msgspec

from kvxfer._waiter import Waiter
from kvxfer.blocks import Ids
from kvxfer.counters import Histogram

__all__ = ["Arrival", "Failure", "Inbox"]

# Arrivals kept for a consumer that is behind, before writers are held back.
_MAX_WAITING = 65536


# Made for each notification; a frozen dataclass would set each field by a call of its
# own.
class Arrival(msgspec.Struct, frozen=True, eq=False):
    """Blocks of one layer that have landed, every byte of them.

    Attributes:
      peer: Address of the writer.
      request_id: As the writer gave it, or None.
      layer: Model layer.
      block_ids: Blocks of this cache, in the writer's order.
      group: Whose block ids these are.
      bytes: Bytes written, all planes together.
    """

    peer: str
    request_id: str | None
    layer: int
    block_ids: Ids
    group: str
    bytes: int


@dataclass(frozen=True)
class Failure:
    """Layers of a request that a writer gave up: they will not arrive.

    Attributes:
      peer: Address of the writer.
      request_id: As the writer gave it, or None.
      layers: The layers concerned; what landed of them is undefined.
      reason: The writer's words.
    """

    peer: str
    request_id: str | None
    layers: tuple[int, ...]
    reason: str


class Inbox:
    """Keeps arrivals and failures, in their order, each for one consumer.

    Args:
      waited: Counts how long arrivals wait to be taken.
    """

    def __init__(self, waited: Histogram) -> None:
        self._waited = waited
        # With each when it came, and how its writer gets credit if that is still owed.
        self._arrivals: collections.deque[
            tuple[Arrival, float, Callable[[], None] | None]
        ] = collections.deque()
        self._failures: collections.deque[Failure] = collections.deque(maxlen=4096)
        self._news: set[Waiter] = set()
        self._ended = False

    def __len__(self) -> int:
        """Arrivals that nobody has taken yet."""
        return len(self._arrivals)

    @property
    def is_full(self) -> bool:
        """Whether the next writer is to be held back until its arrival is taken."""
        return len(self._arrivals) >= _MAX_WAITING

    def land(self, arrival: Arrival, credit: Callable[[], None] | None = None) -> None:
        """Add an arrival; ``credit`` is called when it is taken."""
        self._arrivals.append((arrival, monotonic(), credit))
        if self._news:
            self._wake()

    def lose(self, failure: Failure) -> None:
        """Add what a writer has given up."""
        self._failures.append(failure)
        self._wake()

    def end(self) -> None:
        """Nothing comes any more: who waits takes what is left, and is done."""
        self._ended = True
        self._wake()

    async def arrivals(self, check: Callable[[], None]) -> AsyncIterator[Arrival]:
        """See ``Server.arrivals``; ``check`` is called first, and may raise."""
        check()
        waiting = self._arrivals
        while True:
            while waiting:
                arrival, since, credit = waiting.popleft()
                self._waited.observe(monotonic() - since)
                if credit is not None:
                    credit()
                yield arrival
            if self._ended:
                return
            await self._next_news()

    async def failures(self, check: Callable[[], None]) -> AsyncIterator[Failure]:
        """See ``Server.failures``; ``check`` is called first, and may raise."""
        check()
        while True:
            while self._failures:
                yield self._failures.popleft()
            if self._ended:
                return
            await self._next_news()

    async def _next_news(self) -> None:
        news = Waiter()
        self._news.add(news)
        try:
            await news
        finally:
            self._news.discard(news)

    def _wake(self) -> None:
        for news in self._news:
            news.wake()
