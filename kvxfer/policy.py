"""Which chunk of which request goes to a device next. Pure; no clock, no I/O.

Admission is bounded: each peer and each device has a window of bytes and WRs that
may be in flight, so that what is urgent waits behind a window and not behind
everything that was ready before it. Among what waits the order is:

1. the earliest deadline (requests without one come after all that have one),
2. the highest priority,
3. the request that has been served least, so that a large one takes turns with small
   ones, chunk by chunk,
4. within a request the lowest layer, and within a layer the order of readiness.

A request that has just come does not make up for the time when it was not there: it
begins where the least served of its peers stands.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Admission", "Flow", "Load", "Window"]

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """How much may be in flight."""

    n_bytes: int
    n_wrs: int


@dataclass
class Load:
    """How much is."""

    n_bytes: int = 0
    n_wrs: int = 0

    def admits(self, n_bytes: int, n_wrs: int, window: Window) -> bool:
        """Whether so much more fits; alone, anything does."""
        if not self.n_wrs:
            return True
        return (
            self.n_bytes + n_bytes <= window.n_bytes
            and self.n_wrs + n_wrs <= window.n_wrs
        )

    def add(self, n_bytes: int, n_wrs: int) -> None:
        """Count more, or less, in."""
        self.n_bytes += n_bytes
        self.n_wrs += n_wrs


@dataclass(eq=False)
class Flow(Generic[T]):
    """What one request has waiting, and what it has had.

    Attributes:
      deadline: When it has to be done, on any clock; infinity: no deadline.
      priority: Higher goes first.
    """

    deadline: float = math.inf
    priority: int = 0
    served: int = 0
    order: int = 0
    waiting: list[tuple[int, int, _Item[T]]] = field(default_factory=list)

    @property
    def key(self) -> tuple[float, int, int, int]:
        """Its place among the others."""
        return (self.deadline, -self.priority, self.served, self.order)


@dataclass(eq=False)
class _Item(Generic[T]):
    flow: Flow[T]
    peer: Hashable
    device: Hashable
    n_bytes: int
    n_wrs: int
    value: T


class Admission(Generic[T]):
    """Decides what goes next, and keeps count of what is in flight.

    Args:
      peer: The window of each peer.
      device: The window of each device.
    """

    def __init__(self, peer: Window, device: Window) -> None:
        self.peer_window = peer
        self.device_window = device
        self.peers: dict[Hashable, Load] = {}
        self.devices: dict[Hashable, Load] = {}
        self._flows: dict[Flow[T], Hashable] = {}
        self._orders = itertools.count()
        self._items = itertools.count()
        self._in_flight: dict[T, _Item[T]] = {}

    def push(
        self,
        flow: Flow[T],
        value: T,
        *,
        peer: Hashable,
        device: Hashable,
        layer: int,
        n_bytes: int,
        n_wrs: int,
    ) -> None:
        """Let something of a request wait for its turn; it goes to one peer only."""
        if flow not in self._flows:
            self._flows[flow] = peer
            flow.order = next(self._orders)
            rivals = [
                f.served
                for f in self._flows
                if f is not flow
                and (f.deadline, f.priority) == (flow.deadline, flow.priority)
            ]
            flow.served = max(flow.served, min(rivals, default=0))
        item = _Item(flow, peer, device, n_bytes, n_wrs, value)
        heapq.heappush(flow.waiting, (layer, next(self._items), item))

    def pop(self) -> T | None:
        """Take what goes next, and count it as in flight; None: nothing may."""
        best: Flow[T] | None = None
        for flow in self._flows:
            if (best is None or flow.key < best.key) and self._may_go(flow):
                best = flow
        if best is None:
            return None
        _, _, item = heapq.heappop(best.waiting)
        best.served += item.n_bytes
        self._load(self.peers, item.peer).add(item.n_bytes, item.n_wrs)
        self._load(self.devices, item.device).add(item.n_bytes, item.n_wrs)
        self._in_flight[item.value] = item
        if not best.waiting:
            del self._flows[best]
        return item.value

    def done(self, value: T) -> None:
        """What was taken has ended, or was not posted after all."""
        item = self._in_flight.pop(value)
        for loads, name in ((self.peers, item.peer), (self.devices, item.device)):
            load = loads[name]
            load.add(-item.n_bytes, -item.n_wrs)
            if not load.n_wrs:
                del loads[name]

    def remove(self, flow: Flow[T]) -> list[T]:
        """Forget what a request has waiting, and return it."""
        self._flows.pop(flow, None)
        removed = [item.value for _, _, item in flow.waiting]
        flow.waiting.clear()
        return removed

    def blocked(self, flow: Flow[T]) -> bool:
        """Whether what a request would send next finds its window full."""
        # Other threads may ask, while what waits is on its way.
        return any(not self._fits(item) for _, _, item in flow.waiting[:1])

    @property
    def waiting(self) -> int:
        """How many chunks wait."""
        return sum(len(flow.waiting) for flow in self._flows)

    def _may_go(self, flow: Flow[T]) -> bool:
        return self._fits(flow.waiting[0][2])

    def _fits(self, item: _Item[T]) -> bool:
        n_bytes, n_wrs = item.n_bytes, item.n_wrs
        peer = self.peers.get(item.peer)
        device = self.devices.get(item.device)
        return (peer is None or peer.admits(n_bytes, n_wrs, self.peer_window)) and (
            device is None or device.admits(n_bytes, n_wrs, self.device_window)
        )

    @staticmethod
    def _load(loads: dict[Hashable, Load], name: Hashable) -> Load:
        return loads.setdefault(name, Load())
