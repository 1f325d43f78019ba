"""Prompts, and engines in threads that go from step to step until all are done."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tests.engines.pool import BLOCK_TOKENS

__all__ = ["Job", "Stepping", "run", "some_jobs"]


@dataclass(frozen=True)
class Job:
    """A prompt, and what the engines are to do with it.

    Attributes:
      n_prefix: Tokens that the decode engine has computed before; whole blocks.
      preempt_after: Chunks after which the prefill engine preempts it once.
      give_up: ``at once``: whoever wanted it goes away, and both engines hear of it.
        ``arriving``: the decode engine alone gives it up when a part is there.
    """

    name: str
    n_tokens: int
    n_prefix: int = 0
    preempt_after: int | None = None
    give_up: Literal["", "at once", "arriving"] = ""


class Stepping(Protocol):
    """An engine, as its thread sees it."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""

    def step(self) -> None:
        """Do a little. Never waits for the other engine."""


@dataclass(eq=False)
class Threads:
    """Engines in threads, and what went wrong in them."""

    errors: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def start(self, engine: Stepping, name: str) -> threading.Thread:
        def go() -> None:
            try:
                while not engine.is_done and not self.stop.is_set():
                    engine.step()
                    self.stop.wait(0.0005)  # other threads of this process compute
            except BaseException as error:  # noqa: BLE001 - raised by run()
                self.errors.append(error)
                self.stop.set()

        thread = threading.Thread(target=go, name=name)
        thread.start()
        return thread


def run(engines: Sequence[Stepping], seconds: float) -> None:
    """Run engines in threads until all are done; raise what went wrong in one."""
    threads = Threads()
    running = [
        threads.start(engine, f"{type(engine).__name__} {i}")
        for i, engine in enumerate(engines)
    ]
    try:
        for thread in running:
            thread.join(seconds)
    finally:
        late = [thread.name for thread in running if thread.is_alive()]
        threads.stop.set()
        for thread in running:
            thread.join()
    if threads.errors:
        raise threads.errors[0]
    assert not late, f"not done in {seconds:g} s: {late}"


def some_jobs(n: int, seed: int) -> list[Job]:
    """Make prompts of many kinds."""
    rng = random.Random(seed)
    jobs = []
    for i in range(n):
        n_tokens = rng.randrange(1, 45)
        n_prefix = rng.choice([0, 0, rng.randrange(0, n_tokens)])
        n_prefix -= n_prefix % BLOCK_TOKENS
        jobs.append(
            Job(
                f"r{i}",
                n_tokens,
                n_prefix,
                preempt_after=rng.choice([None, None, 1, 2]),
                give_up=rng.choice(["", "", "", "at once", "arriving"]),
            )
        )
    return jobs
