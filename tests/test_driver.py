"""Who drives an engine: an event loop at events, or a thread of the engine's own."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from kvxfer._engine import Engine
from kvxfer._verbs import Device
from kvxfer.errors import UsageError
from kvxfer.testing import loopback
from kvxfer.verbs_types import QPLimits
from tests.device_ends import SUCCESS
from tests.endpoints import QUICK, SOON, arena, connected
from tests.engine_rig import Rig, Shape, as_array
from tests.leaks import TASK_DIR

THREADED = ["adaptive", "spin"]
MODES = ["event", *THREADED]
THREAD = "kvxfer-engine"


def statuses() -> list[str]:
    """Return what /proc says of each thread of an engine in this process."""
    found = []
    for task in TASK_DIR.iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # ended since it was listed
            continue
        if status.startswith(f"Name:\t{THREAD}\n"):
            found.append(status)
    return found


def n_threads() -> int:
    """Count the threads of engines in this process."""
    return len(statuses())


def wake_ups(rig: Rig, op_ids: list[int]) -> list[int]:
    """Wait for the end of operations; return what each wake-up found of them."""
    found: list[int] = []
    poll = select.poll()
    poll.register(rig.source.engine.fd, select.POLLIN)
    while sum(found) < len(op_ids):
        assert poll.poll(SOON * 1000), "nothing comes any more"
        finished = rig.source.engine.progress().finished
        assert all(one.status == SUCCESS for one in finished)
        found.append(len(finished))
    return found


@pytest.mark.parametrize("progress", THREADED)
def test_what_waits_for_room_goes_on_while_python_does_not_look(progress: str) -> None:
    """64 blocks by a send queue of 16: all are there before anybody asks."""
    with Rig(depth=16, notify=False, progress=progress) as rig:
        rig.let_go()
        ids = rig.submit(range(64), range(64))
        wanted = rig.expected(range(64), range(64), [0])
        deadline = time.monotonic() + SOON
        while not np.array_equal(rig.target.memory, wanted):
            assert time.monotonic() < deadline, "it waits for Python"
        assert rig.finish(ids)[0].status == SUCCESS


def test_without_a_thread_it_waits() -> None:
    """The counterpart of the test above: in ``event`` Python has to look."""
    with Rig(depth=16, notify=False, progress="event") as rig:
        ids = rig.submit(range(64), range(64))
        rig.let_go()
        assert select.select([rig.source.engine.fd], [], [], SOON)[0]
        assert rig.source.engine.unretired(rig.slot) == 16
        assert rig.finish(ids)[0].status == SUCCESS


@pytest.mark.parametrize("progress", THREADED)
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_an_operation_wakes_python_once(progress: str, rows: tuple[int, ...]) -> None:
    """However many chains it takes: once an operation, at most."""
    with Rig(depth=16, notify=False, chain=4, progress=progress) as rig:
        rig.source.wait(lambda: True)
        ids = rig.submit(range(64), range(64), rows)
        assert not select.select([rig.source.engine.fd], [], [], 0)[0]
        rig.let_go()
        assert 0 not in wake_ups(rig, ids)


@pytest.mark.parametrize("progress", MODES)
def test_one_chain_wakes_python_once(progress: str) -> None:
    """Its completion is the operation's end, whoever notices it."""
    with Rig(depth=16, notify=False, progress=progress) as rig:
        rig.source.wait(lambda: True)
        ids = rig.submit(range(8), range(8))
        rig.let_go()
        assert wake_ups(rig, ids) == [1]
        assert not select.select([rig.source.engine.fd], [], [], 0)[0]


@pytest.mark.parametrize("progress", MODES)
def test_a_failure_is_told(progress: str) -> None:
    """A queue that fails while nobody looks wakes Python, with all that ended."""
    with Rig(depth=16, notify=False, progress=progress) as rig:
        ids = rig.submit(range(64), range(64))
        rig.source.qp.to_error()
        rig.source.wait(lambda: rig.source.failed)
        assert rig.source.failed == [rig.slot]
        rig.source.engine.flush(rig.slot)
        ends = rig.finish(ids)
        assert [end.op_id for end in ends] == ids


@pytest.mark.parametrize("progress", MODES)
def test_a_queue_that_cannot_post_keeps_nobody_from_the_news(progress: str) -> None:
    """What it was to write waits for its owner, and nothing is in flight meanwhile."""
    with Rig(depth=16, notify=False, progress=progress) as rig:
        rig.let_go()
        engine = rig.source.engine
        silent = rig.source.new_qp(QPLimits(max_send_wr=16, max_send_sge=8))
        slot = engine.add_initiator(silent, rig.rows())
        stuck = engine.submit(slot, [0], as_array([1]), as_array([2]))
        rig.source.wait(lambda: rig.source.failed == [slot])
        for i in range(8):
            (end,) = rig.finish(rig.submit([i], [i]))[-1:]
            assert end.status == SUCCESS
        engine.abort(slot)
        assert rig.finish(stuck)[-1].op_id == stuck[0]
        for i in range(8):
            (end,) = rig.finish(rig.submit([i], [i]))[-1:]
            assert end.status == SUCCESS


@pytest.mark.parametrize("progress", MODES)
def test_many_operations_at_once(progress: str) -> None:
    """More than the windows hold, on two lanes; each ends once and well."""
    shape = Shape(n_local=256, n_remote=256, block_bytes=64, n_rows=8)
    with Rig(shape, depth=32, notify=False, lanes=2, progress=progress) as rig:
        rig.let_go()
        op_ids = []
        for row in range(8):
            for part in range(4):
                blocks = range(part * 64, part * 64 + 64)
                op_ids += rig.submit(blocks, blocks, [row])
        ends = rig.finish(op_ids)
        assert sorted(end.op_id for end in ends) == sorted(op_ids)
        assert {end.status for end in ends} == {SUCCESS}
        wanted = rig.expected(range(256), range(256), range(8))
        assert np.array_equal(rig.target.memory, wanted)


@pytest.mark.parametrize("progress", MODES)
def test_the_thread_lives_as_long_as_the_engine(progress: str) -> None:
    before = n_threads()
    with Device("soft0") as device:
        engine = Engine(device, cq_depth=16, progress=progress)
        assert n_threads() == before + (progress != "event")
        engine.close()
        assert n_threads() == before
        engine.close()


@pytest.mark.parametrize("progress", THREADED)
def test_a_device_that_is_closed_ends_the_thread(progress: str) -> None:
    before = n_threads()
    with Device("soft0") as device:
        engine = Engine(device, cq_depth=16, progress=progress)
        assert n_threads() == before + 1
    assert n_threads() == before
    engine.close()


@pytest.mark.parametrize("progress", THREADED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_engine_that_is_forgotten_ends_its_thread(progress: str) -> None:
    before = n_threads()
    with Device("soft0") as device:
        engine = Engine(device, cq_depth=16, progress=progress)
        del engine
        gc.collect()
        assert n_threads() == before


def engine_threads() -> list[Path]:
    """Where /proc tells of each thread of an engine in this process."""
    return [
        task
        for task in TASK_DIR.iterdir()
        if (task / "comm").read_text() == f"{THREAD}\n"
    ]


def is_asleep(thread: Path) -> bool:
    """Whether a thread sleeps at one of some looks."""
    for _ in range(50):
        # The third field, behind a name in parentheses: R for running or waiting to.
        if (thread / "stat").read_text().rpartition(")")[2].split()[0] != "R":
            return True
    return False


def the_one_awake() -> Path:
    """Wait until all threads of engines sleep but one, which never does; return it.

    On a busy machine others may wait for their turn to go to sleep.
    """
    deadline = time.monotonic() + SOON
    while True:
        awake = [each for each in engine_threads() if not is_asleep(each)]
        if len(awake) == 1:
            return awake[0]
        assert time.monotonic() < deadline, f"{len(awake)} of them are awake"


def times_slept(thread: Path) -> int:
    """How often a thread went to sleep by itself."""
    lines = (thread / "status").read_text().splitlines()
    return int(next(s for s in lines if s.startswith("voluntary")).split()[1])


@pytest.mark.parametrize(("n_cpus", "spins"), [(1, 0), (2, 0), (3, 20_000)])
def test_the_thread_looks_on_where_there_are_processors_for_it(
    n_cpus: int, spins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n_cpus)))
    with Device("soft0") as device:
        engine = Engine(device, cq_depth=16, progress="adaptive")
        assert engine.spin_ns == spins
        engine.close()


def test_a_completion_is_found_by_a_thread_that_looks_on() -> None:
    """It has not gone to sleep before, so nobody has to wake it."""
    spin_ns = round(10 * SOON * 1e9)
    with Rig(depth=16, notify=False, progress="adaptive", spin_ns=spin_ns) as rig:
        rig.source.wait(lambda: True)
        ids = rig.submit(range(64), range(64))  # some of it has to wait for room
        thread = the_one_awake()
        before = times_slept(thread)
        rig.let_go()
        assert select.select([rig.source.engine.fd], [], [], SOON)[0]
        # Once, when there was nothing more to do.
        assert times_slept(thread) - before <= 1
        assert rig.finish(ids)[0].status == SUCCESS


def test_a_thread_that_does_not_look_on_sleeps() -> None:
    """The counterpart of the test above."""
    with Rig(depth=16, notify=False, progress="adaptive", spin_ns=0) as rig:
        ids = rig.submit(range(64), range(64))
        deadline = time.monotonic() + SOON
        while not all(is_asleep(each) for each in engine_threads()):
            assert time.monotonic() < deadline
        rig.let_go()
        assert rig.finish(ids)[0].status == SUCCESS


def test_a_mode_that_is_none() -> None:
    with Device("soft0") as device, pytest.raises(UsageError, match="'busy'"):
        Engine(device, cq_depth=16, progress="busy")


@pytest.mark.parametrize("progress", THREADED)
def test_a_forked_child_has_no_thread_and_ends(progress: str) -> None:
    """Also with the lock held at the moment of the fork, as often as not."""
    gc.collect()
    gc.freeze()  # or every child copies all memory of the tests before, to collect it
    with Rig(depth=16, notify=False, progress=progress) as rig:
        rig.let_go()
        for _ in range(8):
            ids = rig.submit(range(64), range(64))
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    signal.alarm(round(SOON))
                    rig.source.close()
                    rig.target.close()
                    del rig
                    gc.collect()
                    code = n_threads()
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0) == (pid, 0)
            assert rig.finish(ids)[-1].status == SUCCESS
            rig.source.found.clear()


@pytest.mark.parametrize("progress", MODES)
async def test_a_client_and_a_server(progress: str) -> None:
    """Writes that fit one chain, writes beyond the window, and a lot at once."""
    async with loopback(progress=progress, sq_depth=64, **QUICK) as pair:
        n = 16
        rng = np.random.default_rng(1)
        for layer in range(4):
            for plane in "kv":
                view = pair.source.view(layer, plane)
                view[:] = rng.integers(0, 256, view.shape, np.uint8)
        writes = [pair.client.write_cache(pair.peer, [0], [n - 1], 0)]
        writes += [
            pair.client.write_cache(pair.peer, range(n), range(n - 1, -1, -1), layer)
            for layer in range(4)
        ]
        await asyncio.wait_for(asyncio.gather(*writes), SOON)
        for layer in range(4):
            for plane in "kv":
                assert np.array_equal(
                    pair.source.view(layer, plane), pair.target.view(layer, plane)[::-1]
                )


@pytest.mark.parametrize("progress", MODES)
async def test_a_write_ends_though_one_look_does_not_take_all_its_completions(
    progress: str,
) -> None:
    """On the null device they are all there before the write's first look is over."""
    n_blocks = 80_000
    ids = np.random.default_rng(5).permutation(n_blocks)
    with (
        arena(n_blocks=n_blocks, layers=1, planes={"kv": (8, 24)}, seed=1) as source,
        arena(n_blocks=n_blocks, layers=1, planes={"kv": (8, 24)}, seed=2) as target,
    ):
        async with connected(source, target, device="null0", progress=progress) as pair:
            result = await pair.client.write_cache(pair.peer, ids, ids[::-1])
    # Each chain of 64 completes once, and one look takes at most 512.
    assert result.wrs > 64 * 512


def test_the_thread_takes_no_signals() -> None:
    """Python's own threads are to get them."""
    with Device("soft0") as device:
        engine = Engine(device, cq_depth=16, progress="adaptive")
        blocked = [_blocked_signals(status) for status in statuses()]
        assert blocked
        wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        assert all(wanted <= signals for signals in blocked)
        engine.close()


def _blocked_signals(status: str) -> set[int]:
    for line in status.splitlines():
        if line.startswith("SigBlk:"):
            mask = int(line.split()[1], 16)
            return {n for n in range(1, 65) if mask >> (n - 1) & 1}
    return set()
