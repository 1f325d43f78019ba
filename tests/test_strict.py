"""Strict mode of the software device: wrong use that no status reports is named."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvxfer._verbs import Device, take_violations
from kvxfer.errors import DeviceUnavailableError, QueueFullError
from kvxfer.testing import loopback, strict
from kvxfer.verbs_types import QPLimits
from tests.device_ends import SUCCESS, Rig, Spec, Target, statuses
from tests.endpoints import QUICK
from tests.engine_rig import Rig as EngineRig
from tests.engine_rig import Shape

SHAPE = Shape(n_rows=3)


WIRES = ["tcp", "cma", "shm"]


@pytest.fixture(params=WIRES)
def rig(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    monkeypatch.setenv("KVXFER_SOFT_STRICT", "report")
    wire = request.param
    with Rig(Target("soft0", "soft", wire=wire, shared=wire == "shm")) as rig:
        yield rig
    assert take_violations() == []


def violation() -> str:
    """Return the one thing that was seen."""
    (found,) = take_violations()
    return found


def test_bytes_that_change_while_they_are_sent(rig: Rig) -> None:
    a, b = rig.pair()
    a.device.set_faults("nth=2,act=delay,us=50000")
    a.post(a.write(b, 0, 0, 1000, wr_id=1), a.write(b, 1000, 1000, 1000, wr_id=2))
    a.buffer[1500] ^= 1
    assert statuses(a, 2) == [(1, SUCCESS), (2, SUCCESS)]
    assert "1000 bytes of a WR (wr_id 0x2," in violation()


def test_bytes_that_may_change(rig: Rig) -> None:
    """Inline ones at once, others with the completion, those beside them always."""
    a, b = rig.pair(Spec(limits=QPLimits(max_send_wr=64, max_send_sge=2)))
    for i in range(8):
        a.post(a.write(b, 0, 0, 1000, wr_id=i))
        a.buffer[1000:] += 1
        assert statuses(a, 1) == [(i, SUCCESS)]
        a.buffer[:] += 1


def test_a_send_queue_that_nobody_will_empty(rig: Rig) -> None:
    a, b = rig.pair()
    wrs = [a.write(b, 0, 0, 8, wr_id=i, signaled=False) for i in range(128)]
    a.post(*wrs[:127])
    assert take_violations() == []
    a.post(wrs[127])
    assert "full and none of its 128 WRs is signaled" in violation()
    for _ in range(2):  # it is said once
        with pytest.raises(QueueFullError):
            a.qp.post_send([wrs[0]])


def test_a_full_send_queue_with_one_signaled_wr(rig: Rig) -> None:
    a, b = rig.pair()
    a.post(*(a.write(b, 0, 0, 8, wr_id=i, signaled=i == 5) for i in range(128)))
    assert statuses(a, 1) == [(5, SUCCESS)]


def test_two_threads_at_one_queue_pair(rig: Rig) -> None:
    a, b = rig.pair()
    a.device.set_faults("nth=1,act=slow_post,us=200000")
    first = threading.Thread(target=a.post, args=[a.write(b, 0, 0, 8, wr_id=1)])
    first.start()
    seen: list[str] = []
    while not seen and first.is_alive():
        a.post(a.write(b, 8, 8, 8))
        a.reap(1)
        seen = take_violations()
    first.join()
    a.reap(1)
    assert "two threads post to the send queue" in seen[0]
    take_violations()


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_SOFT_STRICT", "very")
    with pytest.raises(DeviceUnavailableError, match="EINVAL"):
        Device("soft0")


def test_abort() -> None:
    program = """if True:
        from tests.device_ends import *
        with Rig(Target("soft0", "soft")) as rig:
            a, b = rig.pair()
            for i in range(128):
                a.post(a.write(b, 0, 0, 8, signaled=False))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KVXFER_SOFT_STRICT": "abort"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -6
    assert "soft0: strict: the send queue" in done.stderr


# -- what kvxfer itself does --------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("depth", [2, 3, 8, 64])
def test_the_engine_has_nothing_to_hide(depth: int, wire: str) -> None:
    rng = np.random.default_rng(depth)
    with strict(), EngineRig(SHAPE, depth=depth, notify=False, wire=wire) as rig:
        rig.let_go()
        for _ in range(20):
            n = int(rng.integers(1, 40))
            ours = [int(i) for i in rng.integers(0, SHAPE.n_local, n)]
            theirs = [int(i) for i in rng.permutation(SHAPE.n_remote)[:n]]
            ops = rig.submit(ours, theirs, (0, 2))
            assert rig.finish(ops)[-1].status == SUCCESS


@pytest.mark.parametrize("wire", WIRES)
async def test_client_and_server_have_nothing_to_hide(wire: str) -> None:
    with strict():
        async with loopback(**QUICK, sq_depth=16, soft_wire=wire) as pair:
            for i in range(20):
                await pair.client.write_cache(pair.peer, [i % 16, 3], [5, i % 5])


async def test_what_was_seen_fails_the_context() -> None:
    with pytest.raises(AssertionError, match="changed between its post and"), strict():
        async with loopback(client_faults="act=delay,us=50000", **QUICK) as pair:
            write = asyncio.ensure_future(
                pair.client.write_cache(pair.peer, [1], [2], 0)
            )
            while not write.done():
                pair.source.view(0, "k")[:] += 1
                await asyncio.sleep(0.001)
            await write
