"""Completions of an old life: of a queue that is gone, whose slot another one has."""

from __future__ import annotations

import pytest

from kvxfer.verbs_types import SGE, QPLimits, SendWR
from tests.engine_rig import Rig, Shape, as_array

SUCCESS, FLUSHED = 0, 5
DEPTH = 16
#: In a wr_id: this one is of a receive.
RECEIVE = 1 << 37


def an_old_life(rig: Rig) -> int:
    """End the rig's queue by a bad rkey; return the wr_id that failed, of its first."""
    source = rig.source
    rows = [(9, 0, 64, 64, [rig.pair(0, rkey=1)])]
    slot = source.engine.add_initiator(source.qp, rows)
    rig.let_go()
    (op_id,) = source.engine.submit(slot, [0], as_array([1]), as_array([2]))
    (end,) = rig.finish([op_id])
    assert end.culprit and source.failed == [slot]
    source.qp.close()
    source.engine.forget(slot)
    source.engine.remove(slot)
    source.failed.clear()
    return end.wr_id


@pytest.mark.parametrize("succeeds", [True, False])
@pytest.mark.parametrize("receive", [False, True])
def test_it_says_nothing_of_the_queue_that_has_the_slot_now(
    succeeds: bool, receive: bool
) -> None:
    """A device may keep CQEs of QPs that are gone, as Soft-RoCE does."""
    limits = QPLimits(max_send_wr=DEPTH, max_send_sge=8)
    with Rig(depth=DEPTH, notify=False) as rig:
        source, target, engine = rig.source, rig.target, rig.source.engine
        engine.remove(rig.slot)
        stale = an_old_life(rig) | (RECEIVE if receive else 0)

        # The new life: as much in flight as it can have, to a peer that is not ready.
        ours, theirs = source.new_qp(limits), target.new_qp(limits)
        source.connect(ours, target, theirs)
        assert engine.add_initiator(ours, rig.rows()) == rig.slot
        ids = rig.submit(range(40), range(40), [0, 1])
        assert engine.unretired(rig.slot) == DEPTH

        # The completion comes by another QP of the same CQ, in front of a write that
        # tells when it has been seen.
        by, to = source.new_qp(limits), target.new_qp(limits)
        source.connect(by, target, to)
        target.connect(to, source, by)
        slot = engine.add_initiator(by, rig.rows())
        local, _, remote, _, length, lkey, rkey = rig.pair(0)
        assert isinstance(lkey, int) and isinstance(rkey, int)
        late = SendWR(
            wr_id=stale,
            sges=(SGE(local, length, lkey),),
            remote_addr=remote,
            rkey=rkey if succeeds else 1,
        )
        by.post_send([late])
        marker = engine.submit(slot, [2], as_array([5]), as_array([6]))
        end = rig.finish(marker)[-1]
        assert end.op_id == marker[0]
        assert end.status == (SUCCESS if succeeds else FLUSHED)

        assert source.failed == ([] if succeeds else [slot])
        assert engine.unretired(rig.slot) == DEPTH
        assert engine.in_flight == 2
        target.connect(theirs, source, ours)
        ends = {end.op_id: end for end in rig.finish(ids)}
        for op_id in ids:
            assert (ends[op_id].status, ends[op_id].n_wrs) == (SUCCESS, 80)
        assert engine.unretired(rig.slot) == 0
        wanted = rig.expected(range(40), range(40), [0, 1])
        seen = 4 * rig.remote_length  # behind them is where the write that tells went
        assert (target.memory[:seen] == wanted[:seen]).all()


def test_it_says_nothing_of_a_queue_that_is_forgotten() -> None:
    """Nothing of it is in flight, and it is not counted out once more."""
    limits = QPLimits(max_send_wr=DEPTH, max_send_sge=8)
    with Rig(depth=DEPTH, notify=False) as rig:
        source, target, engine = rig.source, rig.target, rig.source.engine
        gone = rig.slot
        rig.let_go()
        engine.abort(gone)
        source.qp.close()
        engine.forget(gone)
        by, to = source.new_qp(limits), target.new_qp(limits)
        source.connect(by, target, to)
        target.connect(to, source, by)
        rig.slot = engine.add_initiator(by, rig.rows())
        assert rig.slot != gone
        rig.finish(rig.submit([1], [2]))
        local, _, remote, _, length, lkey, rkey = rig.pair(0)
        assert isinstance(lkey, int) and isinstance(rkey, int)
        # As the first WR of the rig's first queue would have had it.
        late = SendWR(
            wr_id=gone << 52 | 1 << 38,
            sges=(SGE(local, length, lkey),),
            remote_addr=remote,
            rkey=rkey,
        )
        by.post_send([late])
        for i in range(3):
            assert rig.finish(rig.submit([i], [i]))[-1].status == SUCCESS
        engine.remove(gone)


def test_a_new_queue_carries_nothing_of_one_that_is_gone() -> None:
    """Its table may lie where that of the old one lay in memory."""
    # A table longer than malloc keeps aside, so that it gives out its place again.
    shape = Shape(n_local=4, n_remote=4, n_rows=16)
    limits = QPLimits(max_send_wr=DEPTH, max_send_sge=8)
    with Rig(shape, depth=DEPTH, notify=False) as rig:
        source, target, engine = rig.source, rig.target, rig.source.engine
        engine.remove(rig.slot)
        for shape.block_bytes in (64, 32, 48, 16) * 4:
            ours, theirs = source.new_qp(limits), target.new_qp(limits)
            source.connect(ours, target, theirs)
            target.connect(theirs, source, ours)
            rig.slot = engine.add_initiator(ours, rig.rows())
            target.memory[:] = rig.before
            (end,) = rig.finish(rig.submit([0, 2], [1, 3]))[-1:]
            assert end.status == SUCCESS
            wanted = rig.expected([0, 2], [1, 3], [0])
            assert (target.memory == wanted).all(), shape.block_bytes
            engine.remove(rig.slot)
            ours.close()
            theirs.close()
