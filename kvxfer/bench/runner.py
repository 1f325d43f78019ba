"""Runs contenders in turn: rounds, a pair of processes at a time, in random order.

Two figures that are compared were taken in the same round, so that what the machine
does differently from minute to minute touches both. Nothing of a pair is left when the
next one starts, or when this ends, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvxfer.bench.contenders import Contender
from kvxfer.bench.side import Job
from kvxfer.bench.workload import Workload

#: Where the package lies, for a Python that does not have it.
_HOME = str(Path(__file__).parent.parent.parent)
_BOOT = (
    f"import sys; sys.path.append({_HOME!r}); "
    "from kvxfer.bench import pair, side; side.main(pair.find, sys.argv[1:])"
)
_STOP_SECONDS = 5.0
#: What a pair takes besides its windows: start, memory, checks.
_PAIR_SECONDS = 4.0
_SIZE_SECONDS = 0.5

Event = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
      rounds: How often each contender is measured.
      window: Seconds of a timed window.
      at_least: Batches of a window in any case.
      depth: Batches that each thread keeps in flight.
      threads: Threads that write, each with its connection.
      memory: ``shared`` or ``ordinary``, where the contender leaves the choice.
      options: Options of kvxfer, on both sides.
      peer_python: The Python that has the other engines.
      patience: Seconds that one pair may take; 0 is by the windows.
      extra: What else a job needs.
    """

    rounds: int = 1
    window: float = 0.3
    at_least: int = 3
    depth: int = 1
    threads: int = 1
    memory: str = "shared"
    options: dict[str, Any] = field(default_factory=dict)
    peer_python: str = sys.executable
    patience: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def unheeded(self, contender: Contender) -> list[str]:
        """List what was asked for that a contender takes no notice of."""
        asked = {
            "--threads": self.threads,
            "--depth": self.depth,
            "--qps": self.options.get("qps_per_connection", 1),
        }
        return [
            f"{option} {asked[option]}"
            for option in contender.ignores
            if asked[option] > 1
        ]


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
      windows: One entry a contender, size and round.
      failures: What went wrong, with the contender's name.
      complete: Whether all rounds were run.
    """

    windows: list[Event] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    complete: bool = False


def job_for(
    contender: Contender, workload: Workload, settings: Settings, number: int
) -> Job:
    """Return what one pair is to do in round ``number``."""
    own = dataclasses.asdict(workload)
    if contender.is_peer:
        own["lanes"] = 1
    return {
        "contender": contender.name,
        "kind": contender.kind,
        "round": number,
        "parent": os.getpid(),
        "boot": ["-c", _BOOT],
        "workload": own,
        "window": settings.window,
        "at_least": settings.at_least,
        "depth": settings.depth,
        "threads": settings.threads,
        "memory": contender.memory or settings.memory,
        "options": {**settings.options, **contender.options},
        **settings.extra,
        **contender.parameters,
    }


def seconds_for(n_contenders: int, workload: Workload, settings: Settings) -> float:
    """Estimate how long a run takes."""
    of_a_pair = _PAIR_SECONDS + len(workload.sizes) * (settings.window + _SIZE_SECONDS)
    return settings.rounds * n_contenders * of_a_pair


class PairError(Exception):
    """A pair did not do what it was to do; the text says why."""


async def events_of(
    contender: Contender, job: Job, python: str, patience: float
) -> AsyncGenerator[Event, None]:
    """Run one pair and give what it reports.

    Raises:
      PairError: It failed, ended early or took longer than ``patience`` seconds.

    Cancellation:
      The processes are killed before it is raised.
    """
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(python, *job["boot"], "initiator", json.dumps(job)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **contender.environ},
            # Ctrl-C is for us; what we kill takes its target along.
            start_new_session=True,
        )
        assert process.stdout is not None
        done = False
        try:
            deadline = asyncio.get_running_loop().time() + patience
            while not done:
                left = deadline - asyncio.get_running_loop().time()
                try:
                    line = await asyncio.wait_for(process.stdout.readline(), left)
                except asyncio.TimeoutError:
                    raise PairError(f"not done after {patience:g} s") from None
                if not line:
                    break
                event: Event = json.loads(line)
                if event["event"] == "failed":
                    raise PairError(event["error"] + _tail(log))
                done = event["event"] == "done"
                yield event
            if not done:
                raise PairError("it ended before it was done" + _tail(log))
        finally:
            await _end(process, _STOP_SECONDS if done else 0)


async def _end(process: asyncio.subprocess.Process, seconds: float) -> None:
    """See a process end, by force after ``seconds``."""
    ending = asyncio.ensure_future(process.communicate())
    try:
        await asyncio.wait({ending}, timeout=seconds)
    finally:
        if process.returncode is None:
            # Not process.kill(): it may reap the process under asyncio's feet.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await ending


def _tail(log: Any) -> str:
    """Return the last lines that a pair wrote to stderr, indented."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()[-8:]
    return "".join(f"\n    {line}" for line in lines if line.strip())


async def run(
    contenders: list[Contender],
    workload: Workload,
    settings: Settings,
    on_step: Callable[[int, str, Event | None], None] = lambda *_: None,
) -> Outcome:
    """Run all rounds.

    A contender that fails is left out of the rounds that follow.

    Args:
      on_step: Called with the round, the contender's name, and a window or None when
        a pair begins.

    Cancellation:
      Nothing is left running.
    """
    outcome = Outcome()
    shuffle = random.Random(workload.seed).shuffle
    patience = settings.patience or 120 + 20 * settings.window * len(workload.sizes)
    left = list(contenders)
    for number in range(settings.rounds):
        order = list(left)
        shuffle(order)
        for contender in order:
            on_step(number, contender.name, None)
            job = job_for(contender, workload, settings, number)
            python = settings.peer_python if contender.is_peer else sys.executable
            try:
                async with contextlib.aclosing(
                    events_of(contender, job, python, patience)
                ) as events:
                    async for event in events:
                        if event.pop("event") == "window":
                            window = {
                                "contender": contender.name,
                                "round": number,
                                "batch": workload.batch,
                                "planes": workload.planes,
                                **event,
                            }
                            outcome.windows.append(window)
                            on_step(number, contender.name, window)
            except PairError as error:
                outcome.failures.append(
                    {"contender": contender.name, "error": str(error)}
                )
                left.remove(contender)
    outcome.complete = True
    return outcome
