"""What goes around asyncio: threads, batches in flight, QPs and chains of each way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from kvxfer.bench import contenders, pair
from kvxfer.bench._limits import Poster
from kvxfer.bench.direct import ByLoop, Direct
from kvxfer.bench.runner import Settings, job_for
from kvxfer.bench.side import Window
from kvxfer.bench.workload import Workload
from kvxfer.errors import CompletionError, UsageError
from tests.endpoints import SOON

WAYS = ["no-asyncio", "verbs", "read"]
LOOPS = ["verbs", "read"]
SIZE = 1024


@dataclass
class EachLane(Window):
    """Goes on until every lane has begun ``at_least`` batches."""

    def more(self) -> bool:
        assert time.perf_counter() - self.begin < SOON, f"begun: {self.counts}"
        return min(self.counts) < self.at_least


class Moving:
    """One way, connected to its target; moves batches and looks at what it moved."""

    def __init__(self, side: Direct) -> None:
        self.side = side
        self.tables = side.workload.tables(side.workload.cases[0])
        self.counts = [0] * side.workload.lanes
        side.begin(self.tables)

    @property
    def posters(self) -> Sequence[Poster]:
        assert isinstance(self.side, ByLoop)
        return self.side.movers

    def batches(self, of_each_lane: int) -> None:
        """Move batches until each lane has begun so many."""
        window = EachLane(0.0, of_each_lane, self.counts, begin=time.perf_counter())
        self.side.run_batches(self.tables, window)
        assert len(window.times) == window.begun
        assert all(0 < seconds < SOON for seconds in window.times)

    def check(self) -> None:
        """See that every block of each lane's last batch has its bytes."""
        lanes = range(len(self.counts))
        sets = [
            found
            for lane in lanes
            for found in self.tables.last(lane, self.counts[lane], 1)
        ]
        assert len(sets) == len(lanes)
        assert self.side.peek(sets) == 0
        assert self.side.verify(sets) == 0
        # What was not moved is not taken for it.
        assert (
            self.side.verify([self._elsewhere(*sets[0])]) == self.side.blocks_of_batch
        )

    def _elsewhere(self, source: int, target: int) -> tuple[int, int]:
        return (source + 1) % self.tables.sets, target


@contextlib.contextmanager
def moving(
    name: str,
    *,
    threads: int = 1,
    depth: int = 1,
    batch: int = 40,
    pattern: str = "random",
    boot: str = "",
    **options: Any,
) -> Iterator[Moving]:
    workload = Workload(
        (SIZE,), (batch,), 2 << 20, pattern=pattern, planes=2, lanes=threads * depth
    )
    settings = Settings(
        threads=threads,
        depth=depth,
        options=options,
        extra={"plane_names": ["k", "v"]},
    )
    contender = contenders.find(name)
    job = job_for(contender, workload, settings, 0)
    if boot:
        job["boot"] = ["-c", f"{boot}; {job['boot'][1]}"]
    side = pair.find(contender.kind)[0](job)
    assert isinstance(side, Direct)
    side.open()
    try:
        yield Moving(side)
    finally:
        side.close()
        side.pool.cache.close()


@pytest.mark.parametrize("wire", ["shm", "cma", "tcp"])
@pytest.mark.parametrize("name", WAYS)
def test_threads_batches_qps_and_chains(name: str, wire: str) -> None:
    with moving(
        name,
        threads=2,
        depth=2,
        qps_per_connection=2,
        chain=8,
        soft_wire=wire,
    ) as way:
        way.batches(5)
        way.check()
        facts = way.side.facts()
        assert (facts["device"], facts["wire"]) == ("soft0", wire)
        assert [len(ends.links[0].qps) for ends in way.side.ends] == [2, 2]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(
    ("chain", "qps", "batch"),
    [(1, 1, 5), (1, 4, 7), (7, 2, 40), (16, 3, 64), (64, 2, 40)],
)
def test_a_bare_loop_counts_its_wrs(
    name: str, chain: int, qps: int, batch: int
) -> None:
    """Chains that end early, and more WRs than the send queues have room for."""
    with moving(
        name,
        batch=batch,
        depth=3,
        sq_depth=16 if chain <= 16 else 64,
        chain=chain,
        qps_per_connection=qps,
    ) as way:
        way.batches(4)
        way.check()
        (poster,) = way.side.movers
        assert poster.n_batches == sum(way.counts)
        assert poster.n_wrs == poster.n_batches * batch * 2
        assert way.side.facts()["wrs_per_block"] == 1


@pytest.mark.parametrize("progress", ["event", "adaptive", "spin"])
def test_the_engine_counts_the_wrs_of_all_batches(progress: str) -> None:
    """What lies together goes as one WR; a notification is one, or a few, more."""
    with moving(
        "no-asyncio", threads=2, depth=2, pattern="contiguous", progress=progress
    ) as way:
        way.batches(5)
        way.check()
        n_batches = sum(mover.n_batches for mover in way.side.movers)
        n_wrs = sum(mover.n_wrs for mover in way.side.movers)
        assert n_batches == sum(way.counts)
        assert 2 < n_wrs / n_batches <= 5
        assert way.side.facts()["wrs_per_block"] == n_wrs / n_batches / 80


@pytest.mark.parametrize("name", LOOPS)
def test_chains_take_turns_on_the_qps(name: str) -> None:
    """The last QP gets none of a batch of fewer chains, and some of the next one."""
    with moving(name, batch=8, chain=8, qps_per_connection=3) as way:
        (poster,) = way.posters
        poster.qps[2].to_error()
        poster.begin(0, 0, 0)
        assert poster.wait() == [0]
        poster.begin(0, 1, 1)
        with pytest.raises(CompletionError) as caught:
            poster.wait()
        assert caught.value.qp_num == poster.qps[2].qp_num


@pytest.mark.parametrize("name", LOOPS)
def test_batches_of_a_loop_end_one_by_one(name: str) -> None:
    with moving(name, depth=3) as way:
        (poster,) = way.posters
        assert poster.wait() == []
        for flight in (2, 0, 1):
            poster.begin(flight, flight, flight)
        ended: list[int] = []
        while len(ended) < 3:
            found = poster.wait()
            assert found
            ended += found
        # They share QP and CQ, and were begun in this order.
        assert ended == [2, 0, 1]
        assert poster.wait() == []


def test_an_engine_that_fails_says_so() -> None:
    with moving("no-asyncio", qps_per_connection=2) as way:
        (mover,) = way.side.movers
        way.side.ends[0].links[0].qp.to_error()
        with pytest.raises(CompletionError):
            mover.begin(0, 0, 0)
            mover.wait()


def test_a_small_ring_is_granted_anew() -> None:
    """Many more notifications than the target's ring holds, from both threads."""
    small = "from kvxfer.bench import ends; ends._RING_BYTES = 8192"
    with moving("no-asyncio", threads=2, batch=16, boot=small) as way:
        way.batches(200)
        way.check()


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_on_a_device_that_does_nothing(name: str) -> None:
    with moving(
        name, threads=2, depth=2, device="null0", qps_per_connection=2, chain=1
    ) as way:
        way.batches(5)
        facts = way.side.facts()
        assert (facts["device"], facts["wire"]) == ("null0", "null")
        # A few of the blocks are neighbours, which the engine makes one.
        assert 0.9 < facts["wrs_per_block"] <= 1


def test_what_a_loop_cannot_be_made_of() -> None:
    with moving("verbs", sq_depth=16, chain=16) as way:
        side = way.side
        assert isinstance(side, ByLoop)
        qps, planes = side.ends[0].links[0].qps, side.planes(side.ends[0])
        with moving("verbs", sq_depth=16, chain=16) as other:
            two = [*qps, *other.side.ends[0].links[0].qps]
            with pytest.raises(UsageError, match="one CQ"):
                Poster(two, planes, chain=1, depth=1)
        with pytest.raises(UsageError, match="16 slots holds no chain of 64"):
            Poster(qps, planes, chain=64, depth=1)
        for chain in (0, 65):
            with pytest.raises(UsageError, match=f"chain is {chain}, not 1 to 64"):
                Poster(qps, planes, chain=chain, depth=1)
        with pytest.raises(UsageError, match="at least"):
            Poster([], planes, chain=1, depth=1)
        with pytest.raises(UsageError, match="at least"):
            Poster(qps, [], chain=1, depth=1)
        with pytest.raises(UsageError, match="at least"):
            Poster(qps, planes, chain=1, depth=0)
