"""The engine's notify ring: records, credit, and peers that break the rules."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from kvxfer._engine import CANCELLED_STATUS, RingArrival
from kvxfer._records import RecordReader
from kvxfer.errors import ProtocolError
from kvxfer.layout import Group, Plane, PlaneLayer
from kvxfer.notify import Record
from kvxfer.verbs_types import SGE, Opcode, SendWR
from tests.engine_rig import Rig, as_array

SUCCESS = 0
# Of native/notify.h: magic, length, sequence, n_bytes, layer, n_ids, group, n_qps,
# request_bytes, flags, digest, generation, total.
HEADER = struct.Struct("<IIQQIIHHHHQQQ")


def arrivals_of(rig: Rig, n: int) -> list[RingArrival]:
    """Wait for ``n`` arrivals at the target; take them."""
    found = rig.target.found
    rig.target.wait(lambda: len(found) >= n)
    taken, found[:] = found[:n], found[n:]
    return taken


def decode(rig: Rig, arrival: RingArrival) -> Record:
    """Decode an arrival's record for the rig's planes."""
    place = PlaneLayer(1 << 20, 64, 64, 96, "u8")
    planes = [Plane(name, {10 + i: place for i in range(3)}) for name in ("a", "b")]
    return RecordReader((Group("main", tuple(planes)),)).read(arrival.record)


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


def test_a_record_carries_the_tag_of_its_operation() -> None:
    tag = (1 << 63, 3, (1 << 64) - 1)
    with Rig() as rig:
        rig.let_go()
        rig.finish(
            rig.source.engine.submit(
                rig.slot, [0], as_array([1]), as_array([2]), b"r", tag=tag
            )
        )
        record = decode(rig, arrivals_of(rig, 1)[0])
    assert (record.generation, record.total, record.digest) == tag


GOOD = (0x314E564B, 68, 0, 128, 10, 1, 0, 1, 0, 0, 0, 0, 0)


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
        record = HEADER.pack(*header) + b"\5\0\0\0" + bytes(4)
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
