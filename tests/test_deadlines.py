"""One timer for all deadlines: each is called back once, in time, or not at all."""

from __future__ import annotations

import asyncio
import random

from kvxfer.deadlines import Deadlines
from tests.endpoints import until


async def test_what_is_not_discarded_is_called_back_once() -> None:
    deadlines = Deadlines()
    called: list[int] = []
    rng = random.Random(3)
    spans = [0.001, 0.002, 0.005, 0.01]
    kept = []
    for i in range(400):
        span = rng.choice(spans)
        deadlines.add(i, span, lambda i=i: called.append(i))  # type: ignore[misc]
        if rng.random() < 0.5:
            deadlines.discard(i, span)
            deadlines.discard(i, span)
        else:
            kept.append((span, i))
    await until(lambda: len(called) >= len(kept))
    assert sorted(called) == sorted(i for _, i in kept)
    # Within one span the first that came goes first.
    for span in spans:
        mine = [i for s, i in kept if s == span]
        assert [i for i in called if i in mine] == mine
    deadlines.close()


async def test_a_shorter_one_does_not_wait_for_a_longer_one() -> None:
    deadlines = Deadlines()
    called: list[str] = []
    deadlines.add("long", 60.0, lambda: called.append("long"))
    deadlines.add("short", 0.001, lambda: called.append("short"))
    await until(lambda: called)
    deadlines.close()
    deadlines.close()
    assert called == ["short"]


async def test_an_idle_one_keeps_no_timer() -> None:
    deadlines = Deadlines()
    called: list[str] = []
    deadlines.add("a", 0.001, lambda: called.append("a"))
    await until(lambda: called)
    loop = asyncio.get_running_loop()
    scheduled = [h for h in loop._scheduled if not h.cancelled()]  # type: ignore[attr-defined]
    assert scheduled == [] or all("_look" not in repr(h) for h in scheduled)
    deadlines.discard("a", 0.001)
    deadlines.close()
