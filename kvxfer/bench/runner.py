"""Runs contenders in turn: rounds, pairs of processes, in random order.

What is compared was measured one after the other: the same case of all contenders,
whose pairs live for a round and wait while it is not their turn. So what the machine
does differently from minute to minute touches all of them. Where memory does not hold
all pairs at once, each lives alone and measures all cases of its round. Nothing of a
pair is left when this ends, however it ends.
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
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvxfer.bench.contenders import Contender
from kvxfer.bench.nearness import word_round_trip
from kvxfer.bench.side import Job
from kvxfer.bench.workload import Case, Workload

#: Where the package lies, for a Python that does not have it.
_HOME = str(Path(__file__).parent.parent.parent)
_BOOT = (
    f"import sys; sys.path.append({_HOME!r}); "
    "from kvxfer.bench import pair, side; side.main(pair.find, sys.argv[1:])"
)
_STOP_SECONDS = 5.0
#: What a pair takes besides its windows: start, memory, checks.
_PAIR_SECONDS = 4.0
_CASE_SECONDS = 0.5
_PATIENCE = 120.0

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
      patience: Seconds that a pair may take for its start or a case; 0 is by the
        windows.
      together: Whether the pairs of all contenders live at the same time.
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
    together: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def unheeded(self, contender: Contender) -> list[str]:
        """List what was asked for that a contender takes no notice of."""
        asked = {
            "--threads": self.threads,
            "--depth": self.depth,
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
      windows: One entry a contender, case and round.
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
    of_a_pair = _PAIR_SECONDS + len(workload.cases) * (settings.window + _CASE_SECONDS)
    return settings.rounds * n_contenders * of_a_pair


class PairError(Exception):
    """A pair did not do what it was to do; the text says why."""


class Pair:
    """The processes of one contender, from their start to their end.

    Args:
      patience: Seconds that it may take to start, and to measure a case.
    """

    def __init__(
        self, contender: Contender, job: Job, python: str, patience: float
    ) -> None:
        self.contender = contender
        self._job = job
        self._python = python
        self._patience = patience
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start both processes; they map their memory and connect.

        Raises:
          PairError: They do not.
        """
        self._process = await asyncio.create_subprocess_exec(
            *(self._python, *self._job["boot"], "initiator", json.dumps(self._job)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **self.contender.environ},
            # Ctrl-C is for us; what we kill takes its target along.
            start_new_session=True,
        )
        await self._hear("ready")
        self._pause(signal.SIGSTOP)

    async def measure(self, case: Case) -> Event:
        """Have one case measured; return its window.

        Raises:
          PairError: It failed, ended, or took longer than its patience.
        """
        assert self._process is not None and self._process.stdin is not None
        question = json.dumps(dataclasses.astuple(case)) + "\n"
        self._pause(signal.SIGCONT)
        self._process.stdin.write(question.encode())
        window = await self._hear("window")
        self._pause(signal.SIGSTOP)
        return window

    async def finish(self) -> None:
        """Let the two end by themselves.

        Raises:
          PairError: They do not.
        """
        assert self._process is not None and self._process.stdin is not None
        self._pause(signal.SIGCONT)
        self._process.stdin.close()
        await self._hear("done")
        await self._end(_STOP_SECONDS)

    async def kill(self) -> None:
        """Have nothing left of it. Twice is fine."""
        await self._end(0)
        self._log.close()

    def _pause(self, number: signal.Signals) -> None:
        """Stop both processes, or let them go on, where they cannot wait in peace."""
        if self.contender.restless and self._process is not None:
            # The two are a session of their own. If they are gone we hear it next.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _hear(self, name: str) -> Event:
        """Wait for what it reports next, which must be ``name``."""
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await asyncio.wait_for(
                self._process.stdout.readline(), self._patience
            )
        except asyncio.TimeoutError:
            raise PairError(f"not {name} after {self._patience:g} s") from None
        event: Event = json.loads(line or '{"event": "failed", "error": ""}')
        if event["event"] != name:
            raise PairError((event.get("error") or "it ended early") + self._tail())
        del event["event"]
        return event

    async def _end(self, seconds: float) -> None:
        """See it end, by force after ``seconds``."""
        process = self._process
        if process is None:
            return
        ending = asyncio.ensure_future(process.communicate())
        try:
            await asyncio.wait({ending}, timeout=seconds)
        finally:
            if process.returncode is None:
                # Not process.kill(): it may reap the process under asyncio's feet.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            await ending
            self._process = None

    def _tail(self) -> str:
        """Return the last lines that it wrote to stderr, indented."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-8:]
        return "".join(f"\n    {line}" for line in lines if line.strip())


class _Run:
    """One run: the contenders that are left, and what came of the others.

    Args:
      on_step: See :func:`run`.
    """

    def __init__(
        self,
        contenders: list[Contender],
        workload: Workload,
        settings: Settings,
        on_step: Callable[[int, str, Event | None], None],
    ) -> None:
        self.left = list(contenders)
        self.outcome = Outcome()
        self._workload = workload
        self._settings = settings
        self._on_step = on_step
        self._shuffle = random.Random(workload.seed).shuffle

    async def round(self, number: int) -> None:
        """Measure everybody who is left once."""
        order = list(self.left)
        self._shuffle(order)
        if self._settings.together:
            await self._turns(number, order)
            return
        for contender in order:
            await self._turns(number, [contender])

    async def _turns(self, number: int, contenders: list[Contender]) -> None:
        """Measure some whose pairs live at the same time, in turns case by case."""
        settings = self._settings
        patience = settings.patience or _PATIENCE + 20 * settings.window
        pairs: list[Pair] = []
        try:
            for contender in contenders:
                job = job_for(contender, self._workload, settings, number)
                python = settings.peer_python if contender.is_peer else sys.executable
                pair = Pair(contender, job, python, patience)
                pairs.append(pair)
                self._on_step(number, contender.name, None)
                async with self._leaving_out(pair):
                    await pair.start()
            for case in self._workload.cases:
                self._shuffle(pairs)
                for pair in pairs:
                    if pair.contender not in self.left:
                        continue
                    async with self._leaving_out(pair):
                        await self._window(number, pair, case)
            for pair in pairs:
                if pair.contender in self.left:
                    async with self._leaving_out(pair):
                        await pair.finish()
        finally:
            for pair in pairs:
                await pair.kill()

    @contextlib.asynccontextmanager
    async def _leaving_out(self, pair: Pair) -> AsyncIterator[None]:
        """Go on without a contender that fails."""
        try:
            yield
        except PairError as error:
            name = pair.contender.name
            self.outcome.failures.append({"contender": name, "error": str(error)})
            self.left.remove(pair.contender)
            await pair.kill()

    async def _window(self, number: int, pair: Pair, case: Case) -> None:
        name = pair.contender.name
        word_ns = await asyncio.to_thread(word_round_trip)
        window = {
            "contender": name,
            "round": number,
            **dataclasses.asdict(case),
            "planes": self._workload.planes,
            "word_ns": word_ns,
            **await pair.measure(case),
        }
        self.outcome.windows.append(window)
        self._on_step(number, name, window)


async def run(
    contenders: list[Contender],
    workload: Workload,
    settings: Settings,
    on_step: Callable[[int, str, Event | None], None] = lambda *_: None,
) -> Outcome:
    """Run all rounds.

    A contender that fails is left out of what follows.

    Args:
      on_step: Called with the round, the contender's name, and a window or None when
        a pair begins.

    Cancellation:
      Nothing is left running.
    """
    going = _Run(contenders, workload, settings, on_step)
    for number in range(settings.rounds):
        await going.round(number)
    going.outcome.complete = True
    return going.outcome
