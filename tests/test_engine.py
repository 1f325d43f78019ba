"""The engine over the software device: accounting, the ring, ends of operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer._engine import CANCELLED_STATUS, Engine
from kvxfer._verbs import Device
from kvxfer.blocks import PlanePair, extents
from kvxfer.errors import (
    ClosedResourceError,
    LayoutError,
    UsageError,
)
from kvxfer.verbs_types import QPLimits
from tests.engine_rig import Rig, Shape, as_array

if TYPE_CHECKING:
    from kvxfer._engine import Pair, Row

SUCCESS, FLUSHED, REM_ACCESS = 0, 5, 10

# -- WRs ----------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_bytes_are_those_of_the_plain_arithmetic(data: st.DataObject) -> None:
    shape = Shape(
        n_local=data.draw(st.integers(1, 40)),
        n_remote=data.draw(st.integers(1, 40)),
        block_bytes=(size := data.draw(st.integers(1, 200))),
        local_stride=size + data.draw(st.sampled_from([0, 8])),
        remote_stride=size + data.draw(st.sampled_from([0, 24])),
    )
    n = data.draw(st.integers(1, shape.n_remote))
    theirs = data.draw(
        st.permutations(range(shape.n_remote)).map(lambda ids: ids[:n])
        | st.just(list(range(n)))
    )
    ours = [data.draw(st.integers(0, shape.n_local - 1)) for _ in theirs]
    if data.draw(st.booleans()):
        ours = [i % shape.n_local for i in theirs]
    merge_bytes = data.draw(st.sampled_from([1, 256, 1 << 20]))
    with Rig(
        shape,
        notify=False,
        max_sge=1,
        merge_bytes=merge_bytes,
        chain=data.draw(st.integers(1, 64)),
    ) as rig:
        rig.let_go()
        ids = rig.submit(ours, theirs, [2, 0])
        ends = rig.finish(ids)
        assert (rig.target.memory == rig.expected(ours, theirs, [2, 0])).all()
        for end, row in zip(ends, [2, 0], strict=True):
            plain = extents(
                [_plane_pair(rig, row * 2 + i) for i in range(2)],
                ours,
                theirs,
                merge_bytes=merge_bytes,
            )
            assert (end.status, end.n_wrs) == (SUCCESS, len(plain))
            assert end.n_bytes == sum(extent.length for extent in plain)


def _plane_pair(rig: Rig, index: int) -> PlanePair:
    base, stride, remote, remote_stride, block_bytes, _, _ = rig.pair(index)
    n_local, n_remote = rig.shape.n_local, rig.shape.n_remote
    return PlanePair(
        base, stride, remote, remote_stride, block_bytes, n_local, n_remote
    )


@pytest.mark.parametrize(
    ("options", "n_wrs"),
    [
        ({"max_sge": 1}, 32),  # nothing to gather with
        ({"max_sge": 5}, 7),  # 32 blocks, 5 to a WR
        ({"max_sge": 16}, 2),
        ({"max_sge": 16, "merge_bytes": 4 * 64}, 8),
        ({"max_sge": 16, "merge_bytes": 4 * 64 + 63}, 8),
        ({"max_sge": 16, "merge_bytes": 1}, 32),
    ],
)
def test_neighbours_at_the_target_are_gathered(
    options: dict[str, Any], n_wrs: int
) -> None:
    shape = Shape(remote_stride=64, n_planes=1)
    with Rig(shape, notify=False, **options) as rig:
        rig.let_go()
        ours = list(range(63, -1, -2))
        (end,) = rig.finish(rig.submit(ours, range(32)))
        assert (end.status, end.n_wrs) == (SUCCESS, n_wrs)
        assert (rig.target.memory == rig.expected(ours, range(32), [0])).all()


class _AtTheTop(Rig):
    """A peer that says that its only plane is the last byte that there is."""

    def pair(self, index: int, **changes: int) -> Pair:
        return super().pair(index, remote_base=2**64 - 1, **changes)


def test_a_block_may_be_said_to_begin_anywhere() -> None:
    shape = Shape(n_remote=1, block_bytes=1, n_planes=1, n_rows=1)
    with _AtTheTop(shape, notify=False) as rig:
        rig.let_go()
        (end,) = rig.finish(rig.submit([3], [0]))
        assert end.status != SUCCESS
        assert end.n_wrs == 1
        assert (rig.target.memory == rig.before).all()


def test_a_run_at_the_end_of_a_chain_is_one_wr() -> None:
    with Rig(Shape(remote_stride=64, n_planes=1), notify=False, chain=16) as rig:
        rig.let_go()
        ids = [i for i in range(64) if i % 3]  # 21 runs of two
        (end,) = rig.finish(rig.submit(ids, ids))
        assert (end.status, end.n_wrs) == (SUCCESS, 21)
        assert (rig.target.memory == rig.expected(ids, ids, [0])).all()


@pytest.mark.parametrize(("max_wr_bytes", "n_wrs"), [(1000, 5), (999, 6), (5000, 1)])
def test_blocks_longer_than_a_wr_are_split(max_wr_bytes: int, n_wrs: int) -> None:
    shape = Shape(
        n_local=3,
        n_remote=4,
        block_bytes=5000,
        local_stride=5000,
        remote_stride=5000,
        n_planes=2,
    )
    with Rig(shape, notify=False, max_wr_bytes=max_wr_bytes) as rig:
        rig.let_go()
        (end,) = rig.finish(rig.submit([2, 0], [0, 3]))
        assert end.n_wrs == 2 * 2 * n_wrs
        assert end.n_bytes == 2 * 2 * 5000
        assert (rig.target.memory == rig.expected([2, 0], [0, 3], [0])).all()


# -- accounting ---------------------------------------------------------------------


def test_no_more_is_posted_than_the_queue_holds() -> None:
    with Rig(depth=16) as rig:
        ids = rig.submit(range(40), range(40), [0, 1])
        assert rig.source.engine.unretired(rig.slot) == 16
        assert rig.source.engine.in_flight == 2
        rig.let_go()
        ends = rig.finish(ids)
        assert [end.status for end in ends] == [SUCCESS] * 2
        assert [end.n_wrs for end in ends] == [2 * 40 + 2] * 2
        assert rig.source.engine.unretired(rig.slot) == 0
        assert rig.source.engine.in_flight == 0


def test_no_more_is_posted_than_the_cq_holds() -> None:
    """The depths of all queues together may exceed it."""
    with Rig(depth=128, cq_depth=32, notify=False) as rig:
        source = rig.source
        qps = [source.new_qp(QPLimits(max_send_wr=128)) for _ in range(3)]
        theirs = [rig.target.new_qp(QPLimits()) for _ in range(3)]
        slots = []
        for qp, other in zip(qps, theirs, strict=True):
            source.connect(qp, rig.target, other)
            slots.append(source.engine.add_initiator(qp, rig.rows()))
        ids = rig.submit(range(60), range(60))
        for slot in slots:
            ids += source.engine.submit(
                slot, [1], as_array(range(60)), as_array(range(60))
            )
        posted = sum(source.engine.unretired(slot) for slot in [rig.slot, *slots])
        assert posted == source.engine.cq.depth
        rig.let_go()
        for qp, other in zip(qps, theirs, strict=True):
            rig.target.connect(other, source, qp)
        assert {end.status for end in rig.finish(ids)} == {SUCCESS}
        assert source.engine.in_flight == 0
        for slot in [rig.slot, *slots]:
            assert source.engine.unretired(slot) == 0


def test_receives_are_part_of_the_cq() -> None:
    with Rig(cq_depth=32, notify=False) as rig:
        qp = rig.source.new_qp(QPLimits(max_recv_wr=64))
        with pytest.raises(UsageError, match="no room in the CQ for 64 more receives"):
            rig.source.engine.add_target(qp, rig.source.ring.ctypes.data, 4096, 64)
        # Refused altogether: what is left of the CQ is all there.
        slot = rig.source.engine.add_target(qp, rig.source.ring.ctypes.data, 4096, 31)
        rig.source.engine.remove(slot)


def test_the_smallest_key_goes_first() -> None:
    with Rig(depth=16, notify=False) as rig:
        (late,) = rig.submit(range(40), range(40), [0], key=10)
        (later,) = rig.submit(range(40), range(40), [1], key=10)
        (urgent,) = rig.submit(range(40), range(40), [2], key=5)
        rig.let_go()
        ends = rig.finish([late, later, urgent])
        assert [end.op_id for end in ends] == [urgent, late, later]
        wanted = rig.expected(range(40), range(40), [0, 1, 2])
        assert (rig.target.memory == wanted).all()


# -- cancelling and failing ---------------------------------------------------------


def test_cancelling_by_how_far_an_operation_is() -> None:
    with Rig(depth=16, notify=False) as rig:
        engine = rig.source.engine
        (posted,) = rig.submit(range(4), range(4), [0])
        (partial,) = rig.submit(range(40), range(40), [1])
        (waiting,) = rig.submit(range(40), range(40), [2])
        for op_id in (waiting, partial, posted, 12345 << 32, 7):
            engine.cancel(op_id)
        # Nothing of it was posted, so nothing has to be waited for.
        assert engine.attention
        (end,) = rig.finish([waiting])
        assert (end.status, end.n_bytes) == (CANCELLED_STATUS, 0)
        assert engine.unretired(rig.slot) == 16
        rig.let_go()
        _, first, second = rig.finish([posted, partial])
        assert (first.op_id, first.status) == (posted, SUCCESS)
        assert (second.op_id, second.status) == (partial, CANCELLED_STATUS)
        assert (second.n_wrs, second.n_bytes) == (8, 8 * 64)
        wanted = rig.expected(range(4), range(4), [0])
        plane = slice(2 * rig.remote_length, 3 * rig.remote_length)
        wanted[plane] = rig.expected(range(8), range(8), [1])[plane]
        assert (rig.target.memory == wanted).all()
        # The queue goes on.
        (end,) = [e for e in rig.finish(rig.submit([1], [50])) if e.n_wrs == 2]
        assert end.status == SUCCESS


def test_a_cancelled_operation_waits_for_its_own_wrs_alone() -> None:
    with Rig(depth=16, notify=False) as rig:
        engine = rig.source.engine
        (partial,) = rig.submit(range(40), range(40), [0], key=10)
        # While the urgent one posts, the first has 16 WRs at most behind it.
        (urgent,) = rig.submit(range(64), range(64), [1], key=5)
        rig.let_go()
        rig.source.wait(lambda: True)
        engine.cancel(partial)
        ends = rig.finish([partial, urgent])
        by_id = {end.op_id: end for end in ends}
        assert by_id[urgent].status == SUCCESS
        assert by_id[partial].status in (CANCELLED_STATUS, SUCCESS)
        assert (by_id[partial].status == SUCCESS) == (by_id[partial].n_wrs == 80)


def test_a_failed_wr_fails_its_operation_and_those_behind() -> None:
    class BadRow(Rig):
        def rows(self) -> list[Row]:
            rows = super().rows()
            layer, group, n_local, n_remote, pairs = rows[1]
            rows[1] = (
                layer,
                group,
                n_local,
                n_remote,
                [pairs[0], self.pair(3, rkey=1)],
            )
            return rows

    with BadRow(depth=64, notify=False) as rig:
        ids = rig.submit([1, 2], [3, 4], [0, 1, 2])
        rig.let_go()
        good, culprit, victim = rig.finish(ids)
        assert (good.status, good.culprit) == (SUCCESS, False)
        assert (culprit.status, culprit.culprit) == (REM_ACCESS, True)
        assert culprit.qp_num == rig.source.qp.qp_num
        assert culprit.vendor_err and culprit.wr_id
        assert (victim.status, victim.culprit) == (REM_ACCESS, False)
        assert rig.source.failed == [rig.slot]
        wanted = rig.expected([1, 2], [3, 4], [0])
        plane = slice(2 * rig.remote_length, 3 * rig.remote_length)
        wanted[plane] = rig.expected([1, 2], [3, 4], [1])[plane]
        assert (rig.target.memory == wanted).all()
        with pytest.raises(ClosedResourceError, match="queue 0 has failed"):
            rig.submit([1], [1])


def test_the_blame_falls_on_the_operation_whose_wr_it_was() -> None:
    """And not on one that overtook it and has posted nothing yet."""

    class BadRow(Rig):
        def rows(self) -> list[Row]:
            rows = super().rows()
            rows[0] = (10, 0, 64, 64, [self.pair(0, rkey=1), self.pair(1, rkey=1)])
            return rows

    with BadRow(depth=16, notify=False) as rig:
        (bad,) = rig.submit(range(40), range(40), [0], key=10)
        (urgent,) = rig.submit(range(40), range(40), [1], key=5)
        rig.let_go()
        ends = {end.op_id: end for end in rig.finish([bad, urgent])}
        assert ends[bad].culprit
        assert not ends[urgent].culprit
        assert (rig.target.memory == rig.before).all()


def test_abort_ends_the_operations_once_all_is_flushed() -> None:
    with Rig(depth=16) as rig:
        engine = rig.source.engine
        ids = rig.submit(range(40), range(40), [0, 1])
        engine.abort(rig.slot)
        assert not engine.attention
        rig.source.qp.to_error()
        engine.flush(rig.slot)
        ends = rig.finish(ids)
        assert {end.status for end in ends} == {FLUSHED}
        assert not any(end.culprit for end in ends)
        # Its owner knows already.
        assert rig.source.failed == []
        assert engine.unretired(rig.slot) == 0
        engine.remove(rig.slot)
        with pytest.raises(ClosedResourceError, match="there is no queue 0"):
            engine.unretired(rig.slot)


def test_forget_is_for_qps_that_are_gone() -> None:
    with Rig(depth=16) as rig:
        engine = rig.source.engine
        ids = rig.submit(range(40), range(40), [0, 1])
        with pytest.raises(UsageError, match="still has 2 operations"):
            engine.remove(rig.slot)
        with pytest.raises(UsageError, match="is still open"):
            engine.forget(rig.slot)
        with pytest.raises(UsageError, match="has not failed"):
            engine.flush(rig.slot)
        rig.source.qp.close()
        engine.forget(rig.slot)
        assert {end.status for end in rig.finish(ids)} == {FLUSHED}
        engine.remove(rig.slot)
        engine.close()
        engine.close()
        with pytest.raises(ClosedResourceError):
            engine.progress()


# -- wrong use ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_ids", "remote_ids", "rows", "message"),
    [
        ([64], [0], [0], r"local_block_ids\[0\] is 64, not in \[0, 64\)"),
        ([0, 1], [0, -1], [0], r"remote_block_ids\[1\] is -1, not in \[0, 64\)"),
        ([0, 1, 2], [4, 5, 4], [0], r"\[2\] is 4, which the list names twice"),
        ([0, 1], [0], [0], "2 local ids, 1 remote ids"),
        ([0], [0], [3], r"row 3 is not in \[0, 3\)"),
        ([0], [0], [-1], r"row -1 is not in \[0, 3\)"),
    ],
)
def test_ids_are_checked_before_anything_is_posted(
    local_ids: Sequence[int],
    remote_ids: Sequence[int],
    rows: Sequence[int],
    message: str,
) -> None:
    with Rig(notify=False) as rig:
        rig.let_go()
        for _ in range(2):
            with pytest.raises(LayoutError, match=message):
                rig.submit(local_ids, remote_ids, rows)
            assert rig.source.engine.in_flight == 0
        # The scratch bits of the check are clean again.
        (end,) = rig.finish(rig.submit(range(64), range(64)))
        assert end.status == SUCCESS


def test_wrong_use_of_an_engine() -> None:
    with Rig() as rig:
        engine = rig.source.engine
        with pytest.raises(UsageError, match="another CQ"):
            engine.add_initiator(rig.target.qp, rig.rows())
        with pytest.raises(UsageError, match="1 queues are still in the engine"):
            engine.close()
        with pytest.raises(ClosedResourceError, match="there is no queue 5"):
            engine.submit(5, [0], as_array([1]), as_array([2]))
        with pytest.raises(UsageError, match="request id of 257 bytes"):
            rig.submit([1], [2], request_id=bytes(257))
        with pytest.raises(LayoutError, match="a block has no bytes"):
            empty = [(0, 0, 1, 1, [rig.pair(0, block_bytes=0)])]
            qp = rig.source.new_qp(QPLimits())
            engine.add_initiator(qp, empty)
        assert engine.submit(rig.slot, [], as_array([1]), as_array([2])) == []
        assert rig.submit([], []) == []


@pytest.mark.parametrize("options", [{"chain": 0}, {"chain": 65}, {"max_sge": 17}])
def test_limits_of_an_engine(options: dict[str, Any]) -> None:
    with Device("soft0") as device, pytest.raises(UsageError, match="not 1 to"):
        Engine(device, cq_depth=16, **options)
