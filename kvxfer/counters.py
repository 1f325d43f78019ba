"""What a client or server has done so far, in plain numbers.

Kept by the event loop's thread and read by any: whoever makes metrics of them does so
when it is asked, so that a write pays for a few additions and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from kvxfer.requests import LayerTimes

#: Upper bounds in seconds: from a block within a host to a cache across a network.
BOUNDS = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4),
    *(1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)


#: What :attr:`Counters.stages` has.
STAGES = (
    *("connect", "write", "fence"),
    *("layer_queue", "layer_wire", "layer_announce"),
    "arrival_queue",
)


class Histogram:
    """How often what took how long.

    Attributes:
      counts: For each of :data:`BOUNDS`, what took longer than the one before and not
        longer than it; at the end what took longer than all.
      seconds: The sum.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Counters:
    """The counts of one client or server since it was made.

    Attributes:
      written_bytes: Acknowledged by peers' devices.
      written_blocks: Likewise, a block once for each layer.
      work_requests: Posted for writes that have ended well.
      transfers: Calls, by how they ended: done, failed, expired, cancelled.
      stages: How long what took: ``connect``, ``write``, ``fence``; of the layers of
        requests ``layer_queue`` (ready until given to a device, offer awaited),
        ``layer_wire`` (until acknowledged) and ``layer_announce`` (until the other
        side has said that it is complete); of arrivals ``arrival_queue`` (until taken).
      completion_errors: Failed work completions, by the status of verbs.
      connects: Connections, by how they came about: ``new``, ``again`` to an address
        that was connected before, ``failed``.
      broken: Connections that broke.
      arrivals: Layers of writes that have landed here.
      arrived_blocks: Blocks in them.
      arrived_bytes: Bytes in them.
      given_up: Layers of writes that peers gave up.
    """

    def __init__(self) -> None:
        self.written_bytes = 0
        self.written_blocks = 0
        self.work_requests = 0
        self.transfers: Counter[str] = Counter(done=0, failed=0, expired=0, cancelled=0)
        self.stages = {name: Histogram() for name in STAGES}
        self.completion_errors: Counter[str] = Counter()
        self.connects: Counter[str] = Counter(new=0, again=0, failed=0)
        self.broken = 0
        self.arrivals = 0
        self.arrived_blocks = 0
        self.arrived_bytes = 0
        self.given_up = 0

    def wrote(self, n_bytes: int, n_blocks: int, n_wrs: int, seconds: float) -> None:
        """Count a write that has ended well."""
        self.written_bytes += n_bytes
        self.written_blocks += n_blocks
        self.work_requests += n_wrs
        self.transfers["done"] += 1
        self.stages["write"].observe(seconds)

    def streamed(self, layers: Iterable[LayerTimes]) -> None:
        """Count where the layers of a request have spent their time."""
        for times in layers:
            for stage, begin, end in (
                ("layer_queue", times.ready, times.posted),
                ("layer_wire", times.posted, times.acknowledged),
                ("layer_announce", times.acknowledged, times.visible),
            ):
                if begin is not None and end is not None:
                    self.stages[stage].observe(max(0.0, end - begin))

    def arrived(self, n_blocks: int, n_bytes: int) -> None:
        """Count a layer that has landed."""
        self.arrivals += 1
        self.arrived_blocks += n_blocks
        self.arrived_bytes += n_bytes
