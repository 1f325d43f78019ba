"""Several QPs to one peer: bytes, notifications, failures, and who has fewer."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer._engine import RingArrival
from kvxfer.errors import BrokenPeerError, CompletionError, UsageError
from kvxfer.verbs_types import Opcode, QPLimits, SendWR
from tests.endpoints import (
    SOON,
    arena,
    check_reconnects,
    connected,
    failure_of,
    scattered,
    take,
)
from tests.engine_rig import Rig, Shape
from tests.test_engine_ring import arrivals_of, decode

SUCCESS, FLUSHED = 0, 5


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_arrival_means_every_byte_on_every_qp(data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=12))
    rng = random.Random(data.draw(st.integers(0, 999)))
    with Rig(
        Shape(n_rows=1),
        depth=data.draw(st.sampled_from([4, 16, 64])),
        receives=data.draw(st.integers(1, 8)),
        lanes=lanes,
        stripe_bytes=data.draw(st.sampled_from([1, 300, 2000])),
        chain=data.draw(st.integers(1, 64)),
        wire=data.draw(st.sampled_from(["tcp", "cma", "shm"])),
    ) as rig:
        rig.let_go()
        for i, n in enumerate(sizes):
            ours = [rng.randrange(64) for _ in range(n)]
            theirs = rng.sample(range(64), n)
            ids = rig.submit(ours, theirs)
            deadline = time.monotonic() + SOON
            while not rig.target.found:
                assert time.monotonic() < deadline
                for end in (rig.source, rig.target):
                    end.wait(lambda: True)
            # The arrival alone says that all is there.
            (arrival,) = arrivals_of(rig, 1)
            assert (rig.target.memory == rig.expected(ours, theirs, [0])).all()
            assert arrival.error is None
            record = decode(rig, arrival)
            assert (record.sequence, record.block_ids.tolist()) == (i, theirs)
            done = rig.finish(ids)[-1]
            assert (done.status, done.n_bytes) == (SUCCESS, 2 * 64 * n)
            rig.source.engine.grant(rig.slot, arrival.head, i + 1)
            rig.target.memory[:] = rig.before
        assert rig.source.engine.unretired(rig.slot) == 0


@pytest.mark.parametrize("held", [0, 1, 2])
def test_nothing_is_announced_before_the_last_qp(held: int) -> None:
    """Whichever it is: with its data still on the way there is no arrival."""
    with Rig(depth=64, lanes=3, stripe_bytes=640, chain=4) as rig:
        ids = rig.submit(range(40), range(40))
        for i, (ours, theirs) in enumerate(rig.pairs):
            if i != held:
                rig.target.connect(theirs, rig.source, ours)
        # 80 blocks, ten at a time: 30, 30 and 20; the first has the record
        # too, and each an immediate.
        left = [32, 31, 21][held]
        rig.source.wait(lambda: rig.source.engine.unretired(rig.slot) == left)
        rig.target.wait(lambda: True)
        assert rig.target.found == []
        assert rig.source.engine.in_flight == 1
        ours, theirs = rig.pairs[held]
        rig.target.connect(theirs, rig.source, ours)
        (arrival,) = arrivals_of(rig, 1)
        assert (rig.target.memory == rig.expected(range(40), range(40), [0])).all()
        assert len(decode(rig, arrival).block_ids) == 40
        rig.finish(ids)


def test_many_at_once_arrive_in_order() -> None:
    with Rig(depth=16, receives=64, ring_bytes=1 << 16, lanes=3, stripe_bytes=200) as r:
        ids = [r.submit(range(n), range(n), [n % 3])[0] for n in range(1, 41)]
        r.let_go()
        ends = r.finish(ids)
        arrivals = arrivals_of(r, 40)
        assert [len(decode(r, a).block_ids) for a in arrivals] == list(range(1, 41))
        assert sorted(end.op_id for end in ends) == sorted(ids)


def test_all_qps_carry_data() -> None:
    with Rig(depth=64, notify=False, lanes=4, stripe_bytes=640, chain=4) as rig:
        (op,) = rig.submit(range(40), range(40))
        assert rig.source.engine.unretired(rig.slot) == 80
        # The first alone cannot finish it.
        ours, theirs = rig.pairs[0]
        rig.target.connect(theirs, rig.source, ours)
        rig.source.wait(lambda: rig.source.engine.unretired(rig.slot) == 60)
        assert rig.source.engine.in_flight == 1
        for ours, theirs in rig.pairs[1:]:
            rig.target.connect(theirs, rig.source, ours)
        assert rig.finish([op])[0].status == SUCCESS


def test_one_that_fails_takes_the_others_along() -> None:
    with Rig(depth=64, notify=False, lanes=3, stripe_bytes=640, chain=4) as rig:
        ids = rig.submit(range(40), range(40))
        rig.source.wait(lambda: True)
        rig.pairs[1][0].to_error()
        rig.source.wait(lambda: rig.source.failed == [rig.slot])
        # The others are in flight still: not before they are done as well.
        assert rig.source.engine.in_flight == 1
        for ours, _ in rig.pairs:
            ours.to_error()
        rig.source.engine.flush(rig.slot)
        (end,) = rig.finish(ids)
        assert (end.status, end.qp_num) == (FLUSHED, rig.pairs[1][0].qp_num)


def test_immediates_that_no_record_asked_for_are_refused() -> None:
    with Rig(lanes=2, receives=8) as rig:
        rig.let_go()
        ring, rkey = rig.target.ring.ctypes.data, rig.target.ring_mr.rkey
        imm = SendWR(Opcode.RDMA_WRITE_WITH_IMM, (), ring, rkey, imm_data=3)
        assert rig.pairs[1][0].post_send([imm, imm]) == 2
        (arrival,) = arrivals_of(rig, 1)
        assert isinstance(arrival, RingArrival)
        assert arrival.error == "more immediates came than QPs carried data"


def test_limits() -> None:
    with Rig() as rig:
        qps = [rig.source.new_qp(QPLimits()) for _ in range(5)]
        with pytest.raises(UsageError, match="5 QPs for one queue, not 1 to 4"):
            rig.source.engine.add_initiator(qps, rig.rows())
        with pytest.raises(UsageError, match="0 QPs for one queue"):
            rig.source.engine.add_initiator([], rig.rows())


# -- whole connections --------------------------------------------------------------

LARGE = {"k": (65536, 65536), "v": (65536, 65536 + 64)}


@pytest.mark.parametrize("wire", ["tcp", "cma", "shm"])
@pytest.mark.parametrize(("ours", "theirs"), [(2, 2), (4, 4), (4, 1), (1, 4), (3, 2)])
async def test_writes_over_several_qps(
    ours: int, theirs: int, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVXFER_SOFT_WIRE", wire)
    async with connected(
        arena(planes=LARGE, seed=1),
        arena(planes=LARGE, seed=2),
        qps_per_connection=ours,
        server_options={"qps_per_connection": theirs},
    ) as pair:
        assert pair.peer.link.n_qps == min(ours, theirs)
        for i in range(4):
            await pair.check_write(scattered(32, 24, i), scattered(32, 24, i + 9))
            arrivals = await take(pair.server, 3)
            assert [a.layer for a in arrivals] == [0, 1, 2]
            assert {a.bytes for a in arrivals} == {24 * 2 * 65536}
        if wire == "tcp" and min(ours, theirs) > 1:
            assert {qp.wire for qp in pair.peer.link._qps} == {"tcp"}


@pytest.mark.parametrize("index", [0, 1])
async def test_a_qp_that_fails_breaks_the_connection(index: int) -> None:
    options: dict[str, Any] = {"qps_per_connection": 2}
    async with connected(
        arena(planes=LARGE, seed=1), arena(planes=LARGE, seed=2), **options
    ) as pair:
        await pair.check_write(range(32), range(32))
        link = pair.peer.link
        await link.adapter.call(link._qps[index].to_error)
        error = await failure_of(
            pair.client.write_cache(pair.peer, range(32), range(32))
        )
        assert isinstance(error, BrokenPeerError | CompletionError)
        await check_reconnects(pair)


async def test_the_cq_has_room_for_the_receives_of_every_connection() -> None:
    options = {"max_connections": 300, "qps_per_connection": 4, "notify_receives": 100}
    async with connected(server_options=options) as pair:
        (adapter,) = pair.server._host.adapters
        assert adapter.engine.cq.depth >= 300 * 4 * 100
        await pair.check_write([1], [2])
