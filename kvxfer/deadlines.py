"""One timer for all deadlines of an adapter.

A timer of the event loop for each write would cost more than the rest of a small
write. Most writes have the same timeout, so within one timeout the first that was
added is the first that is due, and what ends is taken out at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Callback = Callable[[], None]


class Deadlines:
    """Calls back what has not been taken out in time; on the running loop."""

    def __init__(self) -> None:
        self._spans: dict[float, dict[object, tuple[float, Callback]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: object, seconds: float, callback: Callback) -> None:
        """Call ``callback`` once in ``seconds``, unless ``key`` is discarded before.

        Args:
          key: Hashable; not in use with the same number of seconds.
        """
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        self._spans.setdefault(seconds, {})[key] = (when, callback)
        self._set(loop, when)

    def discard(self, key: object, seconds: float) -> None:
        """Forget a deadline; one that has passed or is unknown is left alone."""
        span = self._spans.get(seconds)
        if span is not None:
            span.pop(key, None)
            if not span:
                del self._spans[seconds]

    def close(self) -> None:
        """Forget all deadlines. Twice is fine."""
        self._spans.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        """Look at what is due no later than ``when``."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        due: list[Callback] = []
        for span in self._spans.values():
            for key in list(span):
                when, callback = span[key]
                if when > now:
                    break
                due.append(callback)
                del span[key]
        self._spans = {seconds: span for seconds, span in self._spans.items() if span}
        if self._spans:
            first = min(next(iter(s.values()))[0] for s in self._spans.values())
            self._set(loop, first)
        for callback in due:
            callback()
