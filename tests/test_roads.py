"""Rows that are restricted to some of the QPs to one peer."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer._engine import CANCELLED_STATUS, RingArrival
from kvxfer.errors import UsageError
from kvxfer.verbs_types import QPLimits
from tests.endpoints import SOON
from tests.engine_rig import Rig
from tests.test_engine_ring import arrivals_of, decode

SUCCESS, FLUSHED = 0, 5


def let_go_of(rig: Rig, lane: int) -> None:
    """Let one of the target's QPs receive."""
    ours, theirs = rig.pairs[lane]
    rig.target.connect(theirs, rig.source, ours)


@pytest.mark.parametrize("free", [0, 1])
def test_what_waits_for_one_does_not_keep_back_the_other(free: int) -> None:
    """The older one has filled its QP, and has more to post by it than that holds."""
    stuck = 1 - free
    with Rig(depth=8, lanes=2, row_lanes=[1, 2, 1], notify=False) as rig:
        (old,) = rig.submit(range(40), range(40), [stuck])
        ids = [rig.submit([i], [i], [free])[0] for i in range(30)]
        let_go_of(rig, free)
        ends = rig.finish(ids)
        assert [end.op_id for end in ends] == ids
        assert {end.status for end in ends} == {SUCCESS}
        assert rig.source.engine.in_flight == 1
        wanted = rig.expected(range(30), range(30), [free])
        assert (rig.target.memory == wanted).all()
        let_go_of(rig, stuck)
        assert rig.finish([old])[-1].status == SUCCESS


def test_each_row_goes_by_its_own() -> None:
    with Rig(depth=64, lanes=3, row_lanes=[1, 6, 6], notify=False) as rig:
        # Ten blocks of two planes, in one stripe: the first of those two.
        rig.submit(range(10), range(10), [1])
        first, second = (rig.pairs[i][0] for i in (0, 1))
        assert rig.source.engine.unretired(rig.slot) == 20
        second.to_error()
        rig.source.wait(lambda: rig.source.failed == [rig.slot])
        for ours, _ in rig.pairs:
            ours.to_error()
        rig.source.engine.flush(rig.slot)
        rig.source.wait(lambda: rig.source.engine.in_flight == 0)
        (end,) = rig.source.found
        assert (end.status, end.qp_num) == (FLUSHED, second.qp_num)
        assert end.qp_num != first.qp_num


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_arrival_means_every_byte_of_rows_of_both(data: st.DataObject) -> None:
    lanes = data.draw(st.integers(2, 4))
    split = data.draw(st.integers(1, lanes - 1))
    sides = [(1 << split) - 1, (1 << lanes) - (1 << split)]
    row_lanes = [sides[i] for i in data.draw(st.permutations([0, 1, 1]))]
    rng = random.Random(data.draw(st.integers(0, 999)))
    sizes = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=8))
    with Rig(
        depth=data.draw(st.sampled_from([4, 16, 64])),
        receives=data.draw(st.integers(4, 8)),
        lanes=lanes,
        row_lanes=row_lanes,
        stripe_bytes=data.draw(st.sampled_from([1, 300, 2000])),
        chain=data.draw(st.integers(1, 64)),
        window_bytes=data.draw(st.sampled_from([1, 4096, 1 << 20])),
        flush=data.draw(st.booleans()),
        progress=data.draw(st.sampled_from(["event", "adaptive", "spin"])),
    ) as rig:
        rig.let_go()
        n_records = 0
        for n in sizes:
            ours = [rng.randrange(64) for _ in range(n)]
            theirs = rng.sample(range(64), n)
            rows = rng.sample(range(3), rng.randint(1, 3))
            ids = rig.submit(ours, theirs, rows)
            deadline = time.monotonic() + SOON
            while len(rig.target.found) < len(rows):
                assert time.monotonic() < deadline
                for end in (rig.source, rig.target):
                    end.wait(lambda: True)
            # The arrivals alone say that all is there.
            arrivals = arrivals_of(rig, len(rows))
            assert (rig.target.memory == rig.expected(ours, theirs, rows)).all()
            found = [decode(rig, arrival) for arrival in arrivals]
            assert {record.layer for record in found} == {10 + row for row in rows}
            n_records += len(rows)
            ends = rig.finish(ids)[-len(ids) :]
            assert {(end.status, end.n_bytes) for end in ends} == {(0, 2 * 64 * n)}
            rig.source.engine.grant(rig.slot, arrivals[-1].head, n_records)
            rig.target.memory[:] = rig.before
            rig.target.found.clear()
        assert rig.source.engine.unretired(rig.slot) == 0


@pytest.mark.parametrize("row", [0, 1])
def test_cancelled_in_the_middle_of_one(row: int) -> None:
    """The submission goes on by the other."""
    with Rig(depth=8, lanes=2, row_lanes=[1, 2, 1], notify=False) as rig:
        first, second = rig.submit(range(40), range(40), [row, 1 - row])
        rig.source.engine.cancel(first)
        rig.let_go()
        ends = {end.op_id: end for end in rig.finish([first, second])}
        assert ends[first].status == CANCELLED_STATUS
        assert 0 < ends[first].n_bytes < 2 * 64 * 40
        assert (ends[second].status, ends[second].n_bytes) == (SUCCESS, 2 * 64 * 40)


def test_an_abort_ends_what_is_in_flight_and_what_waits_on_both() -> None:
    with Rig(depth=8, lanes=2, row_lanes=[1, 2, 1]) as rig:
        ids = [
            op
            for i in range(6)
            for op in rig.submit(range(20), range(20), [i % 2, 1 - i % 2])
        ]
        assert rig.source.engine.unretired(rig.slot) == 16
        rig.source.engine.abort(rig.slot)
        for ours, _ in rig.pairs:
            ours.to_error()
        rig.source.engine.flush(rig.slot)
        ends = rig.finish(ids)
        assert sorted(end.op_id for end in ends) == sorted(ids)
        assert all(end.status != SUCCESS for end in ends)
        assert rig.source.engine.unretired(rig.slot) == 0


def test_a_queue_with_operations_on_both_is_taken_out() -> None:
    with Rig(depth=8, lanes=2, row_lanes=[1, 2, 1]) as rig:
        ids = rig.submit(range(20), range(20), [0, 1]) + rig.submit([1], [1], [1])
        rig.source.engine.abort(rig.slot)
        for ours, _ in rig.pairs:
            ours.close()
        rig.source.engine.forget(rig.slot)
        assert len(rig.finish(ids)) == 3
        rig.source.engine.remove(rig.slot)


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ([1, 2], "lanes for 2 rows, not 3"),
        ([1, 2, 3], "3 sets of QPs, not 1 to 2"),
        ([1, 1, 0], "lanes 0x0 are not some of 0x3"),
        ([1, 1, 4], "lanes 0x4 are not some of 0x3"),
    ],
)
def test_lanes_that_cannot_be(lanes: list[int], message: str) -> None:
    with Rig() as rig:
        qps = [rig.source.new_qp(QPLimits()) for _ in range(2)]
        with pytest.raises(UsageError, match=message):
            rig.source.engine.add_initiator(qps, rig.rows(), lanes=lanes)


def test_the_record_goes_by_the_first_and_each_that_had_data_announces() -> None:
    with Rig(depth=64, lanes=2, row_lanes=[1, 2, 1]) as rig:
        ids = rig.submit(range(4), range(4), [1])
        let_go_of(rig, 0)
        # The record and its immediate are there; the data is not.
        rig.source.wait(lambda: rig.source.engine.unretired(rig.slot) == 9)
        rig.target.wait(lambda: True)
        assert rig.target.found == []
        let_go_of(rig, 1)
        (arrival,) = arrivals_of(rig, 1)
        assert isinstance(arrival, RingArrival)
        assert (rig.target.memory == rig.expected(range(4), range(4), [1])).all()
        rig.finish(ids)
