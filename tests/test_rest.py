"""Arrivals that come densely are taken together: a timer wakes who rests from them."""

from __future__ import annotations

import select

import pytest

from tests.endpoints import SOON
from tests.engine_rig import Rig

MODES = ["event", "adaptive"]


def write(rig: Rig, n: int) -> None:
    """Write some blocks so many times, each time for an arrival of its own."""
    for _ in range(n):
        rig.finish(rig.submit([1, 2], [3, 4]))


def take(rig: Rig, n: int) -> None:
    """Wait for so many arrivals, told by the descriptor alone, and give credit."""
    target = rig.target
    target.wait(lambda: len(target.found) >= n)
    assert [arrival.error for arrival in target.found] == [None] * n
    rig.source.engine.grant(rig.slot, target.found[-1].head, n)


def is_told(rig: Rig) -> bool:
    """Say whether the target's descriptor becomes readable; it takes nothing."""
    return bool(select.select([rig.target.engine.fd], [], [], SOON)[0])


@pytest.mark.parametrize("progress", MODES)
def test_what_comes_while_python_rests_is_told_by_the_timer(progress: str) -> None:
    with Rig(progress=progress) as rig:
        rig.let_go()
        rig.target.engine.progress()  # nothing yet: the next one makes an event
        write(rig, 2)
        take(rig, 2)  # both at once: it rests now
        for n in range(3, 8):
            write(rig, 1)
            take(rig, n)


@pytest.mark.parametrize("progress", MODES)
def test_when_the_rest_is_over_and_nothing_has_come_an_event_tells(
    progress: str,
) -> None:
    with Rig(progress=progress) as rig:
        rig.let_go()
        write(rig, 2)
        take(rig, 2)
        assert is_told(rig)  # the timer
        found = rig.target.engine.progress()
        assert not (found.arrivals or found.finished or found.failed or found.more)
        # And is quiet then, until something comes.
        assert not select.select([rig.target.engine.fd], [], [], 0)[0]
        write(rig, 1)
        take(rig, 3)


def test_who_is_woken_while_he_rests_is_still_quiet_after_it() -> None:
    """The timer goes on; its end is taken by whoever looks next."""
    with Rig() as rig:
        rig.let_go()
        write(rig, 2)
        take(rig, 2)
        for _ in range(3):  # as by another wake-up
            rig.target.engine.progress()
        assert is_told(rig)
        rig.target.engine.progress()
        assert not select.select([rig.target.engine.fd], [], [], 0)[0]
        write(rig, 1)
        take(rig, 3)


def test_who_rests_can_go() -> None:
    with Rig() as rig:
        rig.let_go()
        write(rig, 2)
        take(rig, 2)
        engine = rig.target.engine
        rig.target.qp.to_error()
        engine.abort(rig.receiver)
        engine.flush(rig.receiver)
        rig.target.qp.close()
        engine.forget(rig.receiver)
        engine.remove(rig.receiver)
        assert is_told(rig)
        engine.progress()
        assert not select.select([engine.fd], [], [], 0)[0]
