"""Turns: who is measured when, and what a contender that fails leaves to the others."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from typing import Any

import pytest

from kvxfer.bench import contenders, runner
from kvxfer.bench.runner import Outcome, Settings
from kvxfer.bench.workload import Case, Workload
from tests.bench.processes import descendants, gone, state
from tests.endpoints import SOON

LOAD = Workload((1024, 2048), (8, 16), pool_bytes=1 << 20)


async def run(*names: str, **settings: Any) -> Outcome:
    chosen = [contenders.find(name) for name in names]
    extra = {"plane_names": ["kv"], **settings.pop("extra", {})}
    return await runner.run(
        chosen, LOAD, Settings(window=0.001, extra=extra, **settings)
    )


def places(outcome: Outcome) -> list[tuple[int, Case, str]]:
    return [
        (w["round"], Case(w["block_bytes"], w["batch"]), w["contender"])
        for w in outcome.windows
    ]


async def test_who_is_compared_is_measured_one_after_the_other() -> None:
    outcome = await run("kvxfer", "memcpy", "tcp", rounds=2, together=True)
    found = places(outcome)
    turns = [found[at : at + 3] for at in range(0, len(found), 3)]
    assert [{place[:2] for place in turn} for turn in turns] == [
        {(number, case)} for number in (0, 1) for case in LOAD.cases
    ]
    assert all({name for *_, name in t} == {"kvxfer", "memcpy", "tcp"} for t in turns)
    assert len({tuple(name for *_, name in turn) for turn in turns}) > 1
    assert outcome.complete and not outcome.failures
    assert all(w["wrong_blocks"] == 0 for w in outcome.windows)


async def test_alone_where_memory_does_not_hold_them_all() -> None:
    found = places(await run("kvxfer", "memcpy", rounds=1, together=False))
    assert [case for _, case, _ in found] == LOAD.cases * 2
    assert len({name for *_, name in found[: len(LOAD.cases)]}) == 1


@pytest.mark.parametrize("together", [True, False])
async def test_the_others_go_on_without_who_fails(together: bool) -> None:
    """At its start; and in the middle, at 2 KiB blocks, of which 1 KiB is no number."""
    names = ("kvxfer", "kvxfer:device=mlx5_77", "writes:2x1K")
    outcome = await run(*names, rounds=2, together=together)
    assert {f["contender"] for f in outcome.failures} == set(names[1:])
    for failure in outcome.failures:
        word = "mlx5" if "mlx5" in failure["contender"] else "1024 bytes"
        assert word in failure["error"] or "ibv_get_device_list" in failure["error"]
    found = places(outcome)
    assert [place for place in found if place[2] == "kvxfer"] == [
        (number, case, "kvxfer") for number in (0, 1) for case in LOAD.cases
    ]
    assert [place for place in found if place[2] == names[2]] == [
        (0, Case(1024, batch), names[2]) for batch in LOAD.batches
    ]


async def test_who_cannot_wait_in_peace_is_stopped_meanwhile() -> None:
    restless = dataclasses.replace(contenders.find("tcp"), restless=True)
    settings = Settings(window=0.001, extra={"plane_names": ["kv"]})
    job = runner.job_for(restless, LOAD, settings, 0)
    before = descendants(os.getpid())
    pair = runner.Pair(restless, job, sys.executable, SOON)
    try:
        await pair.start()
        for case in LOAD.cases:
            both = descendants(os.getpid()) - before
            assert len(both) == 2

            async def stopped(pids: set[int]) -> None:
                while {state(pid) for pid in pids} != {"T"}:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.001)

            await asyncio.wait_for(stopped(both), SOON)
            assert (await pair.measure(case))["wrong_blocks"] == 0
        await pair.finish()
    finally:
        await pair.kill()
    assert gone(both)


@pytest.mark.parametrize("restless", [False, True])
async def test_one_that_is_killed_while_it_waits(restless: bool) -> None:
    contender = dataclasses.replace(contenders.find("tcp"), restless=restless)
    job = runner.job_for(contender, LOAD, Settings(extra={"plane_names": ["kv"]}), 0)
    before = descendants(os.getpid())
    pair = runner.Pair(contender, job, sys.executable, SOON)
    try:
        await pair.start()
        both = descendants(os.getpid()) - before
        for pid in both:
            os.kill(pid, signal.SIGKILL)

        async def ended() -> None:
            while not gone(both):  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.001)

        await asyncio.wait_for(ended(), SOON)
        with pytest.raises(runner.PairError, match="it ended early"):
            await pair.measure(LOAD.cases[0])
    finally:
        await pair.kill()


async def test_one_that_takes_too_long() -> None:
    outcome = await run("kvxfer", rounds=1, patience=0.001)
    (failure,) = outcome.failures
    assert failure["error"].startswith("not ready after 0.001 s")
    assert outcome.windows == []


async def test_how_near_the_processors_were() -> None:
    outcome = await run("memcpy", rounds=1)
    # Of one processor it is not known.
    times = [w["word_ns"] for w in outcome.windows]
    assert all(t is None or 1 < t < 1e6 for t in times)
    assert len(times) == len(LOAD.cases)
    assert any(times) == (len(os.sched_getaffinity(0)) > 1)
