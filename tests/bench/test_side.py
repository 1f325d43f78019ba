"""What a window looks at, whoever moved the blocks."""

from __future__ import annotations

from kvxfer.bench.side import Initiator, Window, measure
from kvxfer.bench.workload import Case, Tables, Workload


class LastFirst(Initiator):
    """Moves nothing, and has its lanes begin in the order of the last one first."""

    has_target = False

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.job = {"window": 0.0, "at_least": 1}
        self.control = None
        self.moved: list[tuple[int, int]] = []
        self.looked: list[tuple[int, int]] = []

    def prepare(self, tables: Tables) -> None:
        self.moved.clear()

    def run_batches(self, tables: Tables, window: Window) -> None:
        lane = self.workload.lanes - 1
        while window.more():
            self.moved.append(tables.pick(lane, window.next(lane)))
            window.note(0.001)
            lane = (lane - 1) % self.workload.lanes

    def peek(self, sets: list[tuple[int, int]]) -> int | None:
        assert self.moved == sets
        self.looked += sets
        return 0

    def verify(self, sets: list[tuple[int, int]]) -> int | None:
        assert set(sets) <= set(self.moved)
        return 0


def test_what_is_looked_at_has_been_moved_whichever_lane_came_first() -> None:
    side = LastFirst(Workload((1024,), (4,), pool_bytes=1 << 20, lanes=4))
    measure(side, Case(1024, 4))
    assert len(side.looked) == 1
