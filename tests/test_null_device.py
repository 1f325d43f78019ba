"""The null device: as strict as a NIC with its queues, and not one byte moves."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from typing import Any

import pytest

from kvxfer import Client, Server, devices
from kvxfer._verbs import live_objects
from kvxfer.errors import DeviceUnavailableError, OptionError, UsageError, VerbsError
from kvxfer.options import Options
from kvxfer.verbs_types import Opcode, QPLimits, QPState, WCOpcode
from tests.device_ends import FLUSH, SUCCESS, Rig, Spec, Target, statuses
from tests.endpoints import QUICK, arena, connected, failure_of, take


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(Target("null0", "null")) as rig:
        yield rig


def test_a_write_completes_at_once_and_moves_nothing(rig: Rig) -> None:
    a, b = rig.pair()
    a.post(a.write(b, 0, 0, 4096, wr_id=7))
    [wc] = a.cq.poll()
    assert (wc.wr_id, wc.status, wc.opcode) == (7, SUCCESS, WCOpcode.RDMA_WRITE)
    assert not b.buffer.any()
    assert a.qp.wire == "null"


def test_nobody_is_told_of_an_immediate(rig: Rig) -> None:
    a, b = rig.pair()
    b.post_recv(1)
    a.post(a.write(b, 0, 0, 8, opcode=Opcode.RDMA_WRITE_WITH_IMM))
    assert statuses(a, 1) == [(0, SUCCESS)]
    b.expect_silence(0)
    b.qp.to_error()
    assert statuses(b, 1) == [(1, FLUSH)]


def test_a_slot_is_free_when_a_completion_behind_it_was_polled(rig: Rig) -> None:
    a, b = rig.pair(Spec(limits=QPLimits(max_send_wr=4)))
    depth = a.qp.max_send_wr
    wrs = [a.write(b, 0, 0, 8, wr_id=i, signaled=i == 2) for i in range(depth + 2)]
    with pytest.raises(VerbsError) as caught:
        a.qp.post_send(wrs)
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.n_posted == depth
    assert statuses(a, 1) == [(2, SUCCESS)]
    a.post(*(a.write(b, 0, 0, 8, signaled=False) for _ in range(3)))
    with pytest.raises(VerbsError):
        a.post(a.write(b, 0, 0, 8))


def test_one_arming_one_event(rig: Rig) -> None:
    a, b = rig.pair()
    a.cq.arm()
    assert not a.wait_event(0)
    a.post(a.write(b, 0, 0, 8), a.write(b, 0, 0, 8))
    assert a.wait_event(5)
    assert not a.wait_event(0)
    assert len(a.cq.poll()) == 2


def test_states_are_those_of_a_nic(rig: Rig) -> None:
    a, b = rig.pair()
    a.post(a.write(b, 0, 0, 8, signaled=False))
    a.qp.to_error()
    a.post(a.write(b, 0, 0, 8, wr_id=5, signaled=False))
    assert statuses(a, 1) == [(5, FLUSH)]
    a.qp.to_reset()
    with pytest.raises(VerbsError) as caught:
        a.post(a.write(b, 0, 0, 8))
    assert caught.value.errno == errno.ENOMEM
    assert a.qp.state == QPState.RESET


def test_no_thread_and_no_plan_of_faults(rig: Rig) -> None:
    a, _ = rig.pair()
    assert "soft.threads" not in live_objects()
    with pytest.raises(UsageError, match="null0"):
        a.device.set_faults("act=drop")


async def test_a_whole_write() -> None:
    async with connected(device="null0") as pair:
        before = pair.target.memory.copy()
        result = await pair.client.write_cache(pair.peer, [1, 2, 9], [5, 6, 7])
        assert result.bytes == 3 * 3 * 2 * 256
        assert (result.device, result.wire) == ("null0", "null")
        assert (pair.target.memory == before).all()
        assert await take(pair.server, 0) == []


@pytest.mark.parametrize(("ours", "theirs"), [("null0", "soft0"), ("soft0", "null0")])
async def test_it_meets_only_its_like(ours: str, theirs: str) -> None:
    options: dict[str, Any] = dict(QUICK)
    with arena() as source, arena() as target:
        async with (
            Server(target.cache, port=0, device=theirs, **options) as server,
            Client(source.cache, device=ours, **options) as client,
        ):
            error = await failure_of(client.connect("127.0.0.1", server.port))
            assert isinstance(error, DeviceUnavailableError)
            assert "null0" in str(error) and "soft0" in str(error)


def test_it_is_never_chosen() -> None:
    assert "null" not in {spec.provider for spec in devices.usable(Options())}
    assert [s.name for s in devices.usable(Options(device="null0"))] == ["null0"]
    with pytest.raises(OptionError, match="null"):
        devices.usable(Options(device="null0", require_rdma=True))


@pytest.mark.parametrize("bound", ["every", "at_most"])
async def test_writes_that_never_wait_leave_the_loop_its_turns(bound: str) -> None:
    """By their number or by their time, whichever is reached first."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with connected(device="null0") as pair:
        owed = pair.peer.scheduler.turns
        owed.every, owed.at_most = 1 << 30, 1e9
        task = asyncio.ensure_future(other())
        try:
            await asyncio.sleep(0)
            for n_turns in (0, 1):
                setattr(owed, bound, 0 if n_turns else 1 << 30)
                before = turns
                for _ in range(5):
                    await pair.client.write_cache(pair.peer, [1], [2], 0)
                assert turns == before + 5 * n_turns
        finally:
            task.cancel()
