"""What a client or server has done so far, in plain numbers.

Kept by the event loop's thread and read by any: whoever makes metrics of them does so
when it is asked, so that a write pays for a few additions and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvxfer._counters import BOUNDS, Histogram, Traffic
from kvxfer.requests import LayerTimes

__all__ = ["BOUNDS", "STAGES", "Counters", "Histogram"]

#: What :attr:`Counters.stages` has.
STAGES = (
    *("connect", "write", "fence"),
    *("layer_queue", "layer_wire", "layer_announce"),
    "arrival_queue",
)


class Counters(Traffic):
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
        self.stages = {name: Histogram() for name in STAGES}
        transfers = {"done": 0, "failed": 0, "expired": 0, "cancelled": 0}
        super().__init__(transfers, self.stages["write"])
        self.completion_errors: Counter[str] = Counter()
        self.connects: Counter[str] = Counter(new=0, again=0, failed=0)
        self.broken = 0
        self.given_up = 0

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
