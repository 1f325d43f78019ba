"""How long to wait before trying again: longer each time, and never all at once.

Pure arithmetic on a clock that the caller reads.
"""

from __future__ import annotations

import random

__all__ = ["Backoff", "Backoffs"]

_FIRST = 0.05
_LAST = 5.0
# Addresses that are remembered before the old ones are dropped.
_MANY = 1024


class Backoff:
    """The pauses between attempts at one thing: 50 ms, doubled up to 5 s, each +-50 %.

    Without the jitter all clients of a server that restarts would come back in
    step, again and again.
    """

    def __init__(self, rng: random.Random | None = None) -> None:
        self._random = rng or random.Random()
        self._n = 0
        self._not_before = 0.0

    def failed(self, now: float) -> float:
        """Note a failure at ``now``; return the seconds to wait from then on."""
        if now > self._not_before + 2 * _LAST:
            self._n = 0  # the last failure was long ago
        pause = min(_LAST, _FIRST * float(1 << self._n)) * self._random.uniform(
            0.5, 1.5
        )
        self._n = min(self._n + 1, 16)
        self._not_before = now + pause
        return pause

    def wait(self, now: float) -> float:
        """Return the seconds that are left of the pause, 0 if it is over."""
        return max(0.0, self._not_before - now)

    def is_old(self, now: float) -> bool:
        """Whether the next failure would count as the first."""
        return now > self._not_before + 2 * _LAST


class Backoffs:
    """A :class:`Backoff` for each address that failed last time."""

    def __init__(self) -> None:
        self._by_address: dict[str, Backoff] = {}

    def wait(self, address: str, now: float) -> float:
        """Return the seconds to wait before the next attempt at ``address``."""
        known = self._by_address.get(address)
        return 0.0 if known is None else known.wait(now)

    def failed(self, address: str, now: float) -> float:
        """Note a failure; return the seconds to wait from ``now`` on."""
        if len(self._by_address) >= _MANY:
            for other, backoff in list(self._by_address.items()):
                if backoff.is_old(now):
                    del self._by_address[other]
        return self._by_address.setdefault(address, Backoff()).failed(now)

    def worked(self, address: str) -> None:
        """Note a success: the next failure is a first one again."""
        self._by_address.pop(address, None)
