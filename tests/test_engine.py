"""The engine over the software device: accounting, the ring, ends of operations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import notify
from kvxfer._engine import CANCELLED_STATUS, Engine, RingArrival
from kvxfer._verbs import Device
from kvxfer.blocks import PlanePair, extents
from kvxfer.errors import (
    ClosedResourceError,
    LayoutError,
    ProtocolError,
    UsageError,
)
from kvxfer.layout import Group, Plane, PlaneLayer
from kvxfer.verbs_types import SGE, Opcode, QPLimits, SendWR
from tests.engine_rig import Rig, Shape, as_array

if TYPE_CHECKING:
    from kvxfer._engine import Row

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
    options: dict[str, int], n_wrs: int
) -> None:
    shape = Shape(remote_stride=64, n_planes=1)
    with Rig(shape, notify=False, **options) as rig:
        rig.let_go()
        ours = list(range(63, -1, -2))
        (end,) = rig.finish(rig.submit(ours, range(32)))
        assert (end.status, end.n_wrs) == (SUCCESS, n_wrs)
        assert (rig.target.memory == rig.expected(ours, range(32), [0])).all()


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


# -- the notify ring ----------------------------------------------------------------


def arrivals_of(rig: Rig, n: int) -> list[RingArrival]:
    """Wait for ``n`` arrivals at the target; take them."""
    found = rig.target.found
    rig.target.wait(lambda: len(found) >= n)
    taken, found[:] = found[:n], found[n:]
    return taken


def decode(rig: Rig, arrival: RingArrival) -> notify.Record:
    """Decode an arrival's record for the rig's planes."""
    place = PlaneLayer(1 << 20, 64, 64, 96, "u8")
    planes = [Plane(name, {10 + i: place for i in range(3)}) for name in ("a", "b")]
    return notify.decode(arrival.record, (Group("main", tuple(planes)),))


def test_records_follow_their_data_and_wrap_at_the_rings_end() -> None:
    rng = random.Random(4)
    with Rig(depth=64, ring_bytes=4096, receives=8) as rig:
        rig.let_go()
        head = 0
        for i in range(200):
            ids = rng.sample(range(64), rng.randrange(1, 64))
            request = bytes(rng.randrange(65, 90) for _ in range(i % 20))
            rig.finish(rig.submit(ids, ids, [i % 3], request_id=request))
            (arrival,) = arrivals_of(rig, 1)
            record = decode(rig, arrival)
            assert (record.sequence, record.layer) == (i, 10 + i % 3)
            assert record.block_ids.tolist() == ids
            assert (record.request_id or "").encode() == request
            # Behind its data: every byte is in place when the record is.
            assert (rig.target.memory == rig.expected(ids, ids, [i % 3]))[
                _planes(rig, i % 3)
            ].all()
            length = -(-(64 + -(-len(request) // 8) * 8 + 4 * len(ids)) // 64) * 64
            if head % 4096 + length > 4096:
                head += 4096 - head % 4096
            head += length
            assert arrival.head == head
            rig.source.engine.grant(rig.slot, head, i + 1)
            rig.target.memory[:] = rig.before
        assert head > 10 * 4096


def _planes(rig: Rig, row: int) -> slice:
    return slice(2 * row * rig.remote_length, 2 * (row + 1) * rig.remote_length)


def test_without_credit_nothing_is_announced_and_the_data_goes_on() -> None:
    with Rig(depth=64, receives=2) as rig:
        rig.let_go()
        ids = rig.submit([1], [2], [0, 1, 2])
        assert len(rig.finish(ids[:2])) == 2
        engine = rig.source.engine
        assert engine.in_flight == 1
        # Not even posted: it would wait at the peer for a receive.
        rig.source.wait(lambda: engine.unretired(rig.slot) == 0)
        arrivals = arrivals_of(rig, 2)
        assert (rig.target.memory == rig.expected([1], [2], [0, 1, 2])).all()
        engine.grant(rig.slot, arrivals[0].head, 1)
        # Credit that was given before, again: it is a running count.
        engine.grant(rig.slot, 0, 0)
        assert rig.finish(ids)[-1].status == SUCCESS
        assert decode(rig, arrivals_of(rig, 1)[0]).sequence == 2


def test_credit_for_what_was_never_sent_is_refused() -> None:
    with Rig() as rig:
        rig.let_go()
        rig.finish(rig.submit([1], [2]))
        (arrival,) = arrivals_of(rig, 1)
        for n_bytes, n_records in [(arrival.head + 64, 1), (arrival.head, 2)]:
            with pytest.raises(ProtocolError, match="of which only 1 up to 128"):
                rig.source.engine.grant(rig.slot, n_bytes, n_records)
        rig.source.engine.grant(rig.slot, arrival.head, 1)


def test_cancelling_cannot_lose_a_record_whose_place_is_taken() -> None:
    with Rig(depth=16, receives=8) as rig:
        # 7 WRs of blocks a plane and the record: the immediate has no room.
        (first,) = rig.submit(range(7), range(7), [0])
        (second,) = rig.submit([9], [9], [1])
        rig.source.engine.cancel(first)
        rig.source.engine.cancel(second)
        rig.let_go()
        ends = {end.op_id: end.status for end in rig.finish([first, second])}
        assert ends == {first: SUCCESS, second: CANCELLED_STATUS}
        (end,) = rig.finish(rig.submit([3], [3], [2]))[-1:]
        assert end.status == SUCCESS
        records = [decode(rig, arrival) for arrival in arrivals_of(rig, 2)]
        assert [(r.sequence, r.layer) for r in records] == [(0, 10), (1, 12)]


GOOD = (0x314E564B, 68, 0, 128, 10, 1, 0, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("header", "imm_data", "error"),
    [
        (GOOD, 0, None),
        ((1, *GOOD[1:]), 0, "header is not valid"),
        ((GOOD[0], 69, *GOOD[2:]), 0, "header is not valid"),
        ((GOOD[0], 1 << 31, *GOOD[2:]), 0, "header is not valid"),
        ((*GOOD[:2], 1, *GOOD[3:]), 0, "header is not valid"),
        ((*GOOD[:5], 1 << 30, *GOOD[6:]), 0, "header is not valid"),
        ((*GOOD[:8], 257, *GOOD[9:]), 0, "header is not valid"),
        (GOOD, 1, "points outside the ring or not at the next record"),
        (GOOD, 62, "points outside the ring or not at the next record"),
        (GOOD, 63, "header is not valid"),  # longer than what is left of the ring
        (GOOD, 64, "points outside the ring or not at the next record"),
        (GOOD, 0xFFFFFFFF, "points outside the ring or not at the next record"),
        (GOOD, None, "carries no immediate"),
    ],
)
def test_a_peer_that_breaks_the_rules_of_the_ring(
    header: tuple[int, ...], imm_data: int | None, error: str | None
) -> None:
    with Rig(notify=False) as rig:
        rig.let_go()
        record = notify._HEADER.pack(*header) + b"\5\0\0\0" + bytes(4)
        source = rig.source
        for offset in range(0, 4096, 64):
            source.ring[offset : offset + 64] = 0
            source.ring[offset : offset + 64] = np.frombuffer(record[:64], np.uint8)
        sge = SGE(source.ring.ctypes.data, 4096, source.ring_mr.lkey)
        ring, rkey = rig.target.ring.ctypes.data, rig.target.ring_mr.rkey
        if error is None:
            source.ring[64:72] = np.frombuffer(record[64:], np.uint8)
        wrs = [SendWR(Opcode.RDMA_WRITE, (sge,), ring, rkey)]
        if imm_data is None:
            wrs.append(SendWR(Opcode.SEND))
        else:
            opcode = Opcode.RDMA_WRITE_WITH_IMM
            wrs.append(SendWR(opcode, (), ring, rkey, imm_data=imm_data))
        # Not by the engine, which follows the rules; its WRs are none of them.
        assert rig.source.qp.post_send(wrs) == 2
        (arrival,) = arrivals_of(rig, 1)
        if error is None:
            assert arrival.error is None
            assert decode(rig, arrival).block_ids.tolist() == [5]
        else:
            assert arrival.error is not None and error in arrival.error
            assert arrival.record == b""


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
def test_limits_of_an_engine(options: dict[str, int]) -> None:
    with Device("soft0") as device, pytest.raises(UsageError, match="not 1 to"):
        Engine(device, cq_depth=16, **options)
