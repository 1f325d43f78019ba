"""The software device fails on purpose: what it then says, and what it leaves alone.

Every test goes by the verbs classes, so what is shown here is the device; what the
library makes of it is in ``test_fault_transfers.py``.
"""

from __future__ import annotations

import dataclasses
import errno
import secrets
import select
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvxfer._verbs import Device, QueuePair
from kvxfer.errors import QueueFullError, UsageError, VerbsError
from kvxfer.verbs_types import Opcode, PortState, QPState
from tests.device_ends import (
    FLUSH,
    PATIENCE,
    RETRY_EXC,
    SUCCESS,
    End,
    Rig,
    Spec,
    Target,
    statuses,
)

INJECTED = 0x40  # vendor_err of a WR that the plan alone is to blame for
SAID_BY_TARGET = {
    9: "REM_INV_REQ_ERR",
    10: "REM_ACCESS_ERR",
    11: "REM_OP_ERR",
    13: "RNR_RETRY_EXC_ERR",
}
SAID_BY_INITIATOR = {
    1: "LOC_LEN_ERR",
    2: "LOC_QP_OP_ERR",
    3: "LOC_EEC_OP_ERR",
    4: "LOC_PROT_ERR",
    5: "WR_FLUSH_ERR",
    6: "MW_BIND_ERR",
    7: "BAD_RESP_ERR",
    8: "LOC_ACCESS_ERR",
    12: "RETRY_EXC_ERR",
    14: "LOC_RDD_VIOL_ERR",
    15: "REM_INV_RD_REQ_ERR",
    16: "REM_ABORT_ERR",
    17: "INV_EECN_ERR",
    18: "INV_EEC_STATE_ERR",
    19: "FATAL_ERR",
    20: "RESP_TIMEOUT_ERR",
    21: "GENERAL_ERR",
    22: "TM_ERR",
    23: "TM_RNDV_INCOMPLETE",
}
N = 7  # WRs of a chain


@pytest.fixture(params=["tcp", "cma", "shm"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    wire = request.param
    with Rig(Target("soft0", "soft", wire=wire, shared=wire == "shm")) as rig:
        yield rig


def chain(a: End, b: End, signaled: set[int], n: int = N) -> None:
    """Post ``n`` WRs, WR i to bytes [1000 i, 1000 i + 1000)."""
    a.post(
        *(
            a.write(b, 1000 * i, 1000 * i, 1000, wr_id=i, signaled=i in signaled)
            for i in range(n)
        )
    )


def landed(a: End, b: End, n: int = N) -> list[int]:
    """Return which of a chain's WRs are in place; none may be so in part."""
    found = []
    for i in range(n):
        part = slice(1000 * i, 1000 * i + 1000)
        if np.array_equal(a.buffer[part], b.buffer[part]):
            found.append(i)
        else:
            assert not b.buffer[part].any()
    assert not b.buffer[1000 * n :].any()
    return found


def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event of its own."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.001)


def until_landed(a: End, b: End, n: int = N) -> None:
    """Wait for the first ``n`` WRs; a look meanwhile may see a part of one."""
    size = 1000 * n
    until(lambda: np.array_equal(a.buffer[:size], b.buffer[:size]))
    assert landed(a, b) == list(range(n))


def expect_no_change(end: End, seconds: float) -> None:
    """No byte of the buffer changes for so long."""
    before = end.buffer.copy()
    select.select([], [], [], seconds)
    assert np.array_equal(end.buffer, before)


# -- plans --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        "",
        " ; ;",
        "seed=7",
        "act=drop",
        "qp=*,nth=100,act=status:rem_access",
        "qp=77, nth=1, times=3, act=status:IBV_WC_LOC_LEN_ERR",
        "seed=1; rate=0.001,act=drop; rate=1,act=ack_lost; rate=.5,act=drop",
        "act=delay,us=50..500; act=posted_write_delay,us=200",
        "act=enomem@post=7",
        "act=dup; nth=2,act=slow_post,us=10..20",
        "act=port_down@t=2s; act=port_up@t=2500ms; t=1us,act=gid_change",
        "nth=3,act=partial_then_die,on=initiator;act=late_write,us=5",
        "act=reorder_bytes;act=cq_overflow;act=qp_fatal;act=device_fatal",
    ],
)
def test_plans_that_are_taken(plan: str) -> None:
    with Device("soft0") as device:
        device.set_faults(plan)


@pytest.mark.parametrize(
    ("plan", "at"),
    [
        ("nonsense", 0),
        ("seed=7;nonsense=1", 16),
        ("act=explode", 4),
        ("act=status", 4),
        ("act=status:SUCCESS", 4),
        ("act=status:nothing", 4),
        ("nth=3", 0),
        ("act=drop,nth=0", 13),
        ("act=drop,rate=1.5", 14),
        ("act=drop,rate=x", 14),
        ("act=drop,qp=0", 12),
        ("act=drop,qp=99999999", 12),
        ("act=drop;;act=delay", 10),
        ("act=slow_post", 0),
        ("act=dup,us=5", 11),
        ("act=drop,us=5", 12),
        ("act=delay,us=9..5", 13),
        ("act=drop@t=5s", 11),
        ("act=port_down@t=5", 16),
        ("act=port_up", 0),
        ("act=drop,on=target", 12),
        ("act=drop,on=both", 12),
        ("act=status:rem_access,on=initiator", 11),
        ("act=status:loc_prot,on=target", 11),
        ("act=drop,act=drop", 13),
        ("act=drop nth=3", 9),
        ("act=drop;" * 33, 288),
    ],
)
def test_a_malformed_plan_is_refused_with_the_place(plan: str, at: int) -> None:
    refused = pytest.raises(UsageError, match=f"at offset {at}:")
    with Device("soft0") as device, refused:
        device.set_faults(plan)


def test_a_malformed_plan_leaves_the_old_one(rig: Rig) -> None:
    a, b = rig.pair()
    a.device.set_faults("nth=2,act=status:general")
    with pytest.raises(UsageError):
        a.device.set_faults("nth=1,act=nothing")
    chain(a, b, {0, 1})
    assert statuses(a, 2 + N - 2)[:2] == [(0, SUCCESS), (1, 21)]


def test_a_plan_comes_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_SOFT_FAULT", "nth=1,act=status:general")
    with Rig(Target("soft0", "soft")) as rig:
        a, b = rig.pair()
        a.post(a.write(b, 0, 0, 8))
        assert a.reap_one().status == 21


def test_the_same_seed_fails_the_same_wrs(rig: Rig) -> None:
    def failing(seed: int) -> int:
        a, b = rig.pair()
        a.device.set_faults(f"seed={seed};rate=0.05,act=status:general")
        for i in range(64):
            a.post(a.write(b, 0, 0, 8, wr_id=i))
        found = [wc.wr_id for wc in a.reap(64) if wc.status == 21]
        return found[0] if found else 64

    first = [failing(seed) for seed in range(8)]
    assert first == [failing(seed) for seed in range(8)]
    assert len(set(first)) > 2


# -- a status at any WR -------------------------------------------------------------


@pytest.mark.parametrize("signaled", ["none", "all", "that", "others"])
@pytest.mark.parametrize("at", range(N))
def test_every_status_at_every_place(rig: Rig, at: int, signaled: str) -> None:
    """Before it all is well, it fails as wanted, after it all is flushed."""
    for status, name in {**SAID_BY_INITIATOR, **SAID_BY_TARGET}.items():
        with_completion = {
            "none": set[int](),
            "all": set(range(N)),
            "that": {at},
            "others": set(range(N)) - {at},
        }[signaled]
        a, b = rig.pair()
        b.post_recv(70)
        by = b if status in SAID_BY_TARGET else a
        by.device.set_faults(f"nth={at + 1},act=status:{name}")
        chain(a, b, with_completion)
        done = [(i, SUCCESS) for i in range(at) if i in with_completion]
        flushed = [(i, FLUSH) for i in range(at + 1, N)]
        wcs = a.reap(len(done) + 1 + len(flushed))
        assert [(wc.wr_id, wc.status) for wc in wcs] == [
            *done,
            (at, status),
            *flushed,
        ], name
        assert wcs[len(done)].vendor_err == INJECTED
        assert a.qp.state == QPState.ERR
        assert landed(a, b) == list(range(at))
        # An error of the target's own takes its QP along; ours does not.
        if status in (9, 10, 11):
            assert statuses(b, 1) == [(70, FLUSH)]
            assert b.wait_async_event() in (1, 2, 3)
        else:
            assert b.qp.state == QPState.RTS
        a.close()
        b.close()


def test_a_qp_that_fails_by_itself(rig: Rig) -> None:
    a, b = rig.pair()
    a.device.set_faults("nth=3,act=qp_fatal")
    chain(a, b, set())
    assert statuses(a, N - 2) == [(i, FLUSH) for i in range(2, N)]
    assert a.wait_async_event() == 1  # IBV_EVENT_QP_FATAL
    assert landed(a, b) == [0, 1]
    assert b.qp.state == QPState.RTS


# -- loss ---------------------------------------------------------------------------


def test_a_lost_acknowledgement(rig: Rig) -> None:
    """Written, and said to have failed: nobody may conclude the one from the other."""
    a, b = rig.pair()
    a.device.set_faults("nth=4,act=ack_lost")
    chain(a, b, set(range(N)))
    assert statuses(a, N) == [
        *((i, SUCCESS) for i in range(3)),
        (3, RETRY_EXC),
        *((i, FLUSH) for i in range(4, N)),
    ]
    assert landed(a, b) == list(range(N))
    assert b.qp.state == QPState.RTS


def test_a_dropped_wr(rig: Rig) -> None:
    a, b = rig.pair()
    a.device.set_faults("nth=4,act=drop")
    chain(a, b, set())
    assert statuses(a, N - 3) == [
        (3, RETRY_EXC),
        *((i, FLUSH) for i in range(4, N)),
    ]
    assert landed(a, b) == [0, 1, 2]


def test_a_slow_device_is_no_dead_peer(rig: Rig) -> None:
    """It may be slower than the retry time of 7 x 67 ms all in all."""
    a, b = rig.pair()
    a.device.set_faults("act=delay,us=1000..200000;seed=4")
    chain(a, b, {N - 1})
    assert statuses(a, 1) == [(N - 1, SUCCESS)]
    assert landed(a, b) == list(range(N))


def test_each_wr_arrives_twice_and_happens_once(rig: Rig) -> None:
    """Of each kind: what came before is acknowledged again and left alone."""
    a, b = rig.pair()
    a.device.set_faults("act=dup")
    for i in range(4):
        b.post_recv(70 + i, 60000 + 8 * i, 8)
    chain(a, b, {0, N - 1})
    a.post(
        a.write(b, 0, 0, 0, opcode=Opcode.RDMA_WRITE_WITH_IMM, wr_id=7),
        a.write(b, 0, 0, 8, opcode=Opcode.SEND, wr_id=8),
        a.write(b, 30000, 0, 5000, opcode=Opcode.RDMA_READ, wr_id=9),
        a.write(b, 1, 30000, 20000, wr_id=10),
    )
    done = [0, N - 1, 7, 8, 9, 10]
    assert statuses(a, len(done)) == [(i, SUCCESS) for i in done]
    assert statuses(b, 2) == [(70, SUCCESS), (71, SUCCESS)]
    assert np.array_equal(a.buffer[30000:35000], a.buffer[:5000])
    assert np.array_equal(a.buffer[1:20001], b.buffer[30000:50000])
    assert np.array_equal(a.buffer[:8], b.buffer[60008:60016])
    # Nothing of the second ones is announced, or overwrites what is newer.
    b.buffer[:] = 1
    a.device.set_faults("")
    a.post(a.write(b, 0, 0, 8, wr_id=11))
    assert statuses(a, 1) == [(11, SUCCESS)]
    assert (b.buffer[8:] == 1).all()
    b.expect_silence()


def test_a_large_message_twice(rig: Rig) -> None:
    """It has several frames on a socket."""
    size = 12 << 20
    a, b = rig.pair(Spec(size=size))
    a.device.set_faults("nth=1,act=dup;nth=2,act=dup")
    a.post(
        a.write(b, 0, 0, size, wr_id=1),
        a.write(b, 8, 0, size - 8, wr_id=2),
        a.write(b, 0, 16, 8, wr_id=3),
    )
    assert statuses(a, 3) == [(i, SUCCESS) for i in (1, 2, 3)]
    assert np.array_equal(a.buffer[8:24], b.buffer[:16])
    assert np.array_equal(a.buffer[:8], b.buffer[16:24])
    assert np.array_equal(a.buffer[32:], b.buffer[24:-8])


# -- queues -------------------------------------------------------------------------


@pytest.mark.parametrize("nth", range(1, N + 1))
def test_no_memory_at_each_place_of_a_chain(rig: Rig, nth: int) -> None:
    """What was taken before it is executed, and the rest is the caller's."""
    a, b = rig.pair()
    a.device.set_faults(f"act=enomem@post={nth}")
    wrs = [a.write(b, 1000 * i, 1000 * i, 1000, wr_id=i) for i in range(N)]
    with pytest.raises(QueueFullError) as caught:
        a.qp.post_send(wrs)
    assert caught.value.n_posted == nth - 1
    assert statuses(a, nth - 1) == [(i, SUCCESS) for i in range(nth - 1)]
    assert landed(a, b) == list(range(nth - 1))
    a.post(*wrs[nth - 1 :])
    assert statuses(a, N - nth + 1) == [(i, SUCCESS) for i in range(nth - 1, N)]
    assert landed(a, b) == list(range(N))


def test_a_completion_queue_that_overflows(rig: Rig) -> None:
    """It says so, and its QPs are in ERR: their completions are lost."""
    a, b = rig.pair()
    a.device.set_faults("nth=3,act=cq_overflow")
    chain(a, b, set(range(N)))
    assert a.wait_async_event() == 0  # IBV_EVENT_CQ_ERR
    until(lambda: a.qp.state == QPState.ERR)
    with pytest.raises(VerbsError):
        while True:
            a.cq.poll()
    assert landed(a, b) == list(range(len(landed(a, b))))


def test_a_doorbell_that_takes_its_time(rig: Rig) -> None:
    a, b = rig.pair()
    a.device.set_faults("nth=2,act=slow_post,us=50000")
    start = time.monotonic()
    chain(a, b, {N - 1}, 1)
    chain(a, b, {N - 1})
    assert time.monotonic() - start >= 0.05
    assert statuses(a, 1) == [(N - 1, SUCCESS)]
    assert landed(a, b) == list(range(N))


# -- bytes --------------------------------------------------------------------------


def test_an_acknowledgement_before_the_bytes(rig: Rig) -> None:
    """A completion at the initiator says nothing of what a reader there sees."""
    a, b = rig.pair()
    b.device.set_faults("act=posted_write_delay,us=1000000")
    chain(a, b, {N - 1})
    assert statuses(a, 1) == [(N - 1, SUCCESS)]
    assert landed(a, b) == []
    until_landed(a, b)


def loop(end: End) -> list[QueuePair]:
    """Make two QPs of one device, connected with each other."""
    pair = [QueuePair(end.pd, end.cq, end.spec.limits) for _ in range(2)]
    for ours, theirs in (pair, pair[::-1]):
        path = dataclasses.replace(
            end.path_to(end), qp_num=theirs.qp_num, psn=0, own_psn=0
        )
        ours.to_init(access=end.spec.qp_access)
        ours.to_rtr(path)
        ours.to_rts(path)
    return pair


@pytest.mark.parametrize("reader", ["writer", "target"])
def test_an_announcement_before_the_bytes_of_a_gpu(rig: Rig, reader: str) -> None:
    """It is in host memory, they go another way; a READ by any QP goes behind them."""
    a, b = rig.pair()
    b.device.set_faults("act=gpu_write_delay,us=60000000")
    b.post_recv(1)
    chain(a, b, {N - 1})
    a.post(a.write(b, 0, 0, 0, opcode=Opcode.RDMA_WRITE_WITH_IMM, signaled=False))
    assert statuses(a, 1) == [(N - 1, SUCCESS)]
    assert statuses(b, 1) == [(1, SUCCESS)]
    assert landed(a, b) == []
    read = dataclasses.replace(
        b.write(b, 60000, 50000, 8, opcode=Opcode.RDMA_READ), wr_id=2
    )
    if reader == "writer":
        a.post(a.write(b, 50000, 50000, 8, opcode=Opcode.RDMA_READ, wr_id=2))
        assert statuses(a, 1) == [(2, SUCCESS)]
    else:
        pair = loop(b)
        pair[0].post_send([read])
        assert statuses(b, 1) == [(2, SUCCESS)]
        for qp in pair:
            qp.close()
    assert landed(a, b) == list(range(N))


@pytest.mark.parametrize("by", ["imm", "send", "read", "dereg", "error", "destroy"])
def test_what_puts_acknowledged_bytes_in_place(rig: Rig, by: str) -> None:
    a, b = rig.pair()
    b.device.set_faults("act=posted_write_delay,us=60000000")
    b.post_recv(1, 50000, 8)
    chain(a, b, {N - 1})
    assert statuses(a, 1) == [(N - 1, SUCCESS)]
    assert landed(a, b) == []
    if by == "imm":
        a.post(a.write(b, 0, 0, 0, opcode=Opcode.RDMA_WRITE_WITH_IMM))
        assert statuses(b, 1) == [(1, SUCCESS)]
    elif by == "send":
        a.post(a.write(b, 60000, 0, 0, opcode=Opcode.SEND))
        assert statuses(b, 1) == [(1, SUCCESS)]
    elif by == "read":
        a.post(a.write(b, 50000, 0, 8, opcode=Opcode.RDMA_READ))
        assert statuses(a, 1) == [(0, SUCCESS)]
        assert np.array_equal(a.buffer[50000:50008], a.buffer[:8])
    elif by == "dereg":
        b.mr.close()
    elif by == "error":
        b.qp.to_error()
    else:
        b.qp.close()
    assert landed(a, b) == list(range(N))


def test_bytes_in_another_order(rig: Rig) -> None:
    """Whoever sees the last byte of a block has not seen the block.

    Reading on until the last byte is there, and then all of it, finds holes sooner
    or later; when the completion is there, there are none.
    """
    size = 4 << 20
    a, b = rig.pair(Spec(size=size))
    b.device.set_faults("act=reorder_bytes")
    a.buffer[:] |= 1  # none is zero, as all are before
    holes = 0
    deadline = time.monotonic() + PATIENCE
    while not holes and time.monotonic() < deadline:
        b.buffer[:] = 0
        a.post(a.write(b, 0, 0, size))
        while not b.buffer[-1]:
            if a.cq.poll():
                break
        else:
            holes += not b.buffer.all()
            a.reap_one()
        assert np.array_equal(a.buffer, b.buffer)
    assert holes


# -- an old life --------------------------------------------------------------------


@pytest.mark.parametrize("fenced", ["error", "reset", "reconnected", "destroyed"])
def test_a_late_write_of_an_old_life(rig: Rig, fenced: str) -> None:
    """The target's own fence keeps it out, whatever is still in the network."""
    a, b = rig.pair()
    a.device.set_faults("nth=2,act=late_write,us=300000")
    chain(a, b, {0}, 2)
    assert statuses(a, 2) == [(0, SUCCESS), (1, RETRY_EXC)]
    if fenced == "error":
        b.qp.to_error()
    elif fenced == "destroyed":
        b.qp.close()
    else:
        b.qp.to_reset()
        if fenced == "reconnected":
            a.qp.to_reset()
            a.psn, b.psn = secrets.randbits(24), secrets.randbits(24)
            a.connect(b)
            b.connect(a)
    expect_no_change(b, 0.6)
    assert landed(a, b) == [0]
    if fenced == "reconnected":
        a.post(a.write(b, 1000, 1000, 1000, wr_id=1))
        assert statuses(a, 1) == [(1, SUCCESS)]
        assert landed(a, b) == [0, 1]


def test_without_a_fence_it_lands(rig: Rig) -> None:
    """The initiator's end of the matter is not enough."""
    a, b = rig.pair()
    b.post_recv(70)
    a.device.set_faults("nth=2,act=late_write,us=50000")
    late = a.write(b, 1000, 1000, 1000, opcode=Opcode.RDMA_WRITE_WITH_IMM)
    a.post(a.write(b, 0, 0, 1000, wr_id=1), late)
    assert statuses(a, 2) == [(1, SUCCESS), (0, RETRY_EXC)]
    assert landed(a, b, 2) == [0]
    if rig.target.wire != "tcp":
        # The end of the QP's life shows in what the two share.
        expect_no_change(b, 0.2)
        b.expect_silence(0.1)
        return
    until_landed(a, b, 2)
    assert statuses(b, 1) == [(70, SUCCESS)]


# -- the port and the adapter -------------------------------------------------------


def test_a_port_that_comes_back_in_time(rig: Rig) -> None:
    a, b = rig.pair()
    for end in (a, b):
        other = b if end is a else a
        end.device.set_faults("act=port_down@t=0us;act=port_up@t=200ms")
        assert end.wait_async_event() == 10  # IBV_EVENT_PORT_ERR
        assert end.device.query_port().state is PortState.DOWN
        end.post(end.write(other, 0, 0, 8))
        end.expect_silence(0.05)
        other.post(other.write(end, 8, 8, 8))
        assert statuses(end, 1) == [(0, SUCCESS)]
        assert statuses(other, 1) == [(0, SUCCESS)]
        assert end.wait_async_event() == 9  # IBV_EVENT_PORT_ACTIVE
        assert end.device.query_port().state is PortState.ACTIVE


@pytest.mark.parametrize("whose", ["initiator", "target"])
def test_a_port_that_stays_down(rig: Rig, whose: str) -> None:
    a, b = rig.pair()
    end = a if whose == "initiator" else b
    end.device.set_faults(f"nth=3,act=port_down,on={whose}")
    chain(a, b, set(range(N)))
    found = [wc.status for wc in a.reap(N)]
    n = found.index(RETRY_EXC)
    assert n <= 2
    assert found == [SUCCESS] * n + [RETRY_EXC] + [FLUSH] * (N - n - 1)
    assert landed(a, b)[:n] == list(range(n))


@pytest.mark.parametrize("whose", ["initiator", "target"])
def test_a_gid_that_changes(rig: Rig, whose: str) -> None:
    """Who is connected to the old one is connected to nobody."""
    a, b = rig.pair()
    a.post(a.write(b, 0, 0, 8))
    assert statuses(a, 1) == [(0, SUCCESS)]
    end = a if whose == "initiator" else b
    before = end.gid
    end.device.set_faults("act=gid_change@t=0us")
    assert end.wait_async_event() == 18  # IBV_EVENT_GID_CHANGE
    assert end.gid != before
    end.device.set_faults("")
    a.post(a.write(b, 0, 0, 8, wr_id=1))
    assert statuses(a, 1) == [(1, RETRY_EXC)]
    # By the new one it goes on.
    for one in (a, b):
        one.qp.to_reset()
    a.connect(b)
    b.connect(a)
    a.post(a.write(b, 0, 0, 8, wr_id=2))
    assert statuses(a, 1) == [(2, SUCCESS)]


def test_an_adapter_that_is_lost(rig: Rig) -> None:
    a, b = rig.pair()
    a.post_recv(70)
    a.device.set_faults("act=device_fatal@t=0us")
    assert a.wait_async_event() == 8  # IBV_EVENT_DEVICE_FATAL
    assert statuses(a, 1) == [(70, FLUSH)]
    a.post(a.write(b, 0, 0, 8, wr_id=1))
    assert statuses(a, 1) == [(1, FLUSH)]
    a.qp.to_reset()
    with pytest.raises(VerbsError) as caught:
        a.connect(b)
    assert caught.value.errno == errno.EIO
    assert not b.buffer.any()
