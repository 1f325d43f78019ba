"""Who is woken on the rings of shared memory: those who wait, and nobody else.

To wake a thread takes longer than to copy a block of 64 KiB, and where there are two
processors it takes one of them from somebody.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvxfer.verbs_types import Opcode
from tests.device_ends import PATH, PATIENCE, SUCCESS, End, Rig, Spec, Target, statuses

WIRES = [
    pytest.param(Target("soft0", "soft", wire="cma"), id="cma"),
    pytest.param(Target("soft0", "soft", wire="shm", shared=True), id="shm"),
]
CQ_ERR = 0  # IBV_EVENT_CQ_ERR
THREADS = Path("/proc/self/task")
# No retry timer, whose look at the ring would make good what was missed.
TIMELESS = Spec(path=dataclasses.replace(PATH, timeout=0))


# A plan of faults changes nothing of that for WRs that it does not strike.
PLANS = {"no-plan": "", "plan": "nth=1000000,act=drop; nth=1000000,act=reorder_bytes"}


@pytest.fixture(params=WIRES)
def target(request: pytest.FixtureRequest) -> Target:
    """One of the wires that have rings."""
    found: Target = request.param
    return found


@pytest.fixture(params=PLANS.values(), ids=list(PLANS))
def rig(
    target: Target, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    monkeypatch.setenv("KVXFER_SOFT_FAULT", request.param)
    with Rig(target) as rig:
        yield rig


def end_with_thread(rig: Rig, spec: Spec = TIMELESS) -> tuple[End, Path]:
    """An end and the thread that its device has started."""
    before = set(THREADS.iterdir())
    end = rig.end(spec)
    (thread,) = set(THREADS.iterdir()) - before
    return end, thread


def pair_with_threads(rig: Rig) -> tuple[End, End, Path, Path]:
    """Two connected ends and the thread of each; the wire is up."""
    a, of_a = end_with_thread(rig)
    b, of_b = end_with_thread(rig)
    a.connect(b)
    b.connect(a)
    a.post(a.write(b, 0, 0, 8))
    a.reap_one()
    a.buffer[:] = np.frombuffer(secrets.token_bytes(len(a.buffer)), np.uint8)
    return a, b, of_a, of_b


def times_slept(thread: Path) -> int:
    """How often a thread went to sleep by itself."""
    lines = (thread / "status").read_text().splitlines()
    return int(next(s for s in lines if s.startswith("voluntary")).split()[1])


def seconds_run(thread: Path) -> float:
    """How long a thread has had a processor."""
    return int((thread / "schedstat").read_text().split()[0]) * 1e-9


def poll(end: End, n: int) -> list[int]:
    """Poll for completions without ever arming the CQ."""
    deadline = time.monotonic() + PATIENCE
    found: list[int] = []
    while len(found) < n:
        found += [wc.status for wc in end.cq.poll()]
        assert time.monotonic() < deadline
    return found


def wait_until_asleep(*threads: Path) -> None:
    """Wait until each thread has gone to sleep and has stayed so for some looks."""
    deadline = time.monotonic() + PATIENCE
    looks = 0
    while looks < 20:
        # The third field, behind a name in parentheses: S for sleeping.
        states = [
            (t / "stat").read_text().rpartition(")")[2].split()[0] for t in threads
        ]
        looks = looks + 1 if states == ["S"] * len(threads) else 0
        assert time.monotonic() < deadline


def wait_until_answered(a: End, b: End, end: int, *threads: Path) -> None:
    """Wait until the first ``end`` bytes have landed, and nobody does anything more."""
    deadline = time.monotonic() + PATIENCE
    while not (b.buffer[:end] == a.buffer[:end]).all():
        assert time.monotonic() < deadline
    wait_until_asleep(*threads)


def test_who_polls_has_nobody_woken(rig: Rig) -> None:
    """The answer to a WR that nobody sleeps for wakes no thread of its device."""
    a, b, ours, _ = pair_with_threads(rig)
    # The first answer may be one that the CQ was armed for.
    a.post(a.write(b, 0, 0, 64))
    poll(a, 1)
    wait_until_asleep(ours)
    before = times_slept(ours)
    for i in range(200):
        a.post(a.write(b, i, i, 64))
        assert poll(a, 1) == [SUCCESS]
    assert times_slept(ours) - before < 20
    assert (b.buffer[:263] == a.buffer[:263]).all()


def test_arming_behind_an_answer_that_nobody_took(rig: Rig) -> None:
    """It lies in the ring while all sleep: who arms now is told of it."""
    a, b, ours, theirs = pair_with_threads(rig)
    for i in range(20):
        while a.wait_event(0):
            pass
        assert a.cq.poll() == []
        wait_until_asleep(ours)
        a.post(a.write(b, i, i, 64, wr_id=i))
        wait_until_answered(a, b, i + 64, ours, theirs)
        a.cq.arm()
        assert a.wait_event(PATIENCE)
        assert statuses(a, 1) == [(i, SUCCESS)]


def test_what_was_answered_is_not_flushed(rig: Rig) -> None:
    """A QP goes to ERR with an answer in the ring: that WR has succeeded."""
    a, b, ours, theirs = pair_with_threads(rig)
    while a.wait_event(0):
        pass
    wait_until_asleep(ours, theirs)
    a.post(a.write(b, 0, 0, 64, wr_id=7))
    wait_until_answered(a, b, 64, ours, theirs)
    a.qp.to_error()
    assert statuses(a, 1) == [(7, SUCCESS)]
    assert (b.buffer[:64] == a.buffer[:64]).all()


def test_an_overrun_is_noticed_while_nobody_polls(rig: Rig) -> None:
    """One WR at a time fills a CQ that nobody looks at; then the event comes."""
    spec = dataclasses.replace(TIMELESS, cq_depth=4)
    a, b = rig.pair(spec)
    a.post(a.write(b, 0, 0, 8))
    poll(a, 1)
    for i in range(a.cq.depth + 1):
        a.post(a.write(b, 0, 0, 8, wr_id=i))
    assert a.wait_async_event() == CQ_ERR


def test_more_answers_than_are_taken_at_once_are_not_flushed(rig: Rig) -> None:
    """As many as the send queue holds lie in the ring when the QP goes to ERR."""
    a, b, ours, theirs = pair_with_threads(rig)
    while a.wait_event(0):
        pass
    wait_until_asleep(ours, theirs)
    n = a.qp.max_send_wr
    for i in range(n):
        a.post(a.write(b, i, i, 1, wr_id=i))
        wait_until_answered(a, b, i + 1, ours, theirs)
    a.qp.to_error()
    assert statuses(a, n) == [(i, SUCCESS) for i in range(n)]


def test_one_arms_while_another_posts(rig: Rig) -> None:
    """No event is lost between a thread that arms and one that posts."""
    a, b, _, _ = pair_with_threads(rig)
    n = 2000
    room = threading.Semaphore(a.qp.max_send_wr)

    def post() -> None:
        for i in range(n):
            assert room.acquire(timeout=PATIENCE)
            a.post(a.write(b, 0, 0, 8, wr_id=i))

    poster = threading.Thread(target=post)
    poster.start()
    try:
        for i in range(n):
            assert statuses(a, 1) == [(i, SUCCESS)]
            room.release()
    finally:
        poster.join()


def test_a_writer_ahead_of_its_receives_keeps_no_processor_busy() -> None:
    """While a WR waits for a RECV, the side that has none sleeps between its tries."""
    path = dataclasses.replace(TIMELESS.path, min_rnr_timer=1, rnr_retry=7)
    spec = dataclasses.replace(TIMELESS, path=path)
    with Rig(Target("soft0", "soft", wire="tcp")) as rig:
        a, _ = end_with_thread(rig, spec)
        b, theirs = end_with_thread(rig, spec)
        a.connect(b)
        b.connect(a)
        a.post(a.write(b, 0, 0, 8, opcode=Opcode.RDMA_WRITE_WITH_IMM))
        deadline = time.monotonic() + PATIENCE
        while not (b.buffer[:8] == a.buffer[:8]).all():
            assert time.monotonic() < deadline
        begun, used = time.monotonic(), seconds_run(theirs)
        a.expect_silence(0.3)
        share = (seconds_run(theirs) - used) / (time.monotonic() - begun)
        b.post_recv(1)
        assert a.reap_one().status == SUCCESS
        assert share < 0.2
