"""A task goes on in the turn that ends its wait, and is a task like any other."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvxfer._waiter import Turn, Waiter

Make = Callable[[Coroutine[Any, Any, Any]], "asyncio.Task[Any]"]


def _in_python(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.tasks._PyTask(  # type: ignore[attr-defined]
        work, loop=asyncio.get_running_loop()
    )
    return task


@pytest.fixture(params=["in C", "in Python"])
def make(request: pytest.FixtureRequest) -> Make:
    """Make a task, by either of asyncio's two classes."""
    return asyncio.ensure_future if request.param == "in C" else _in_python


async def in_a_turn(work: Callable[[Turn], None]) -> None:
    """Have the loop itself call ``work`` in a turn, as it calls a reader."""
    loop = asyncio.get_running_loop()
    turn = Turn(loop)
    over = loop.create_future()

    def call() -> None:
        turn.begin()
        try:
            work(turn)
            turn.end()
        finally:
            over.set_result(None)

    loop.call_soon(call)
    await over


class Waiting:
    """A task that awaits so many waiters, one after the other, and what it did."""

    def __init__(self, make: Make, n: int = 1) -> None:
        self.waiters = [Waiter() for _ in range(n)]
        self.n_over = 0
        self.task = make(self._wait())

    async def _wait(self) -> str:
        for waiter in self.waiters:
            await waiter
            self.n_over += 1
        return "all"


async def test_it_goes_on_when_the_turn_ends_and_not_before(make: Make) -> None:
    waiting = [Waiting(make) for _ in range(3)]
    await asyncio.sleep(0)
    order: list[str] = []

    def work(_turn: Turn) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: order.append(f"later {sum(w.n_over for w in waiting)}"))
        for each in waiting:
            each.waiters[0].wake()
            each.waiters[0].wake()
        order.append(f"here {sum(w.n_over for w in waiting)}")

    await in_a_turn(work)
    await asyncio.sleep(0)
    # All of them before the loop came to anything else.
    assert order == ["here 0", "later 3"]
    assert [await each.task for each in waiting] == ["all"] * 3


async def test_without_a_turn_the_loop_lets_it_go_on(make: Make) -> None:
    waiting = Waiting(make, 2)
    await asyncio.sleep(0)
    waiting.waiters[0].wake()
    assert waiting.n_over == 0
    waiting.waiters[1].wake()
    assert await waiting.task == "all"


async def test_what_is_woken_already_is_not_waited_for() -> None:
    waiter = Waiter()
    waiter.wake()
    await waiter
    await waiter


async def test_in_another_loops_turn_it_waits_for_its_own(make: Make) -> None:
    waiting = Waiting(make)
    await asyncio.sleep(0)
    begun, woken = threading.Event(), threading.Event()
    seen: list[int] = []

    def elsewhere() -> None:
        loop = asyncio.new_event_loop()
        turn = Turn(loop)
        turn.begin()
        begun.set()
        assert woken.wait(10)
        turn.end()
        seen.append(waiting.n_over)
        loop.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert begun.wait(10)
    waiting.waiters[0].wake()
    woken.set()
    thread.join()
    assert seen == [0]
    assert await waiting.task == "all"


async def test_cancellation_ends_the_await_alone(make: Make) -> None:
    waiter = Waiter()
    ends: list[str] = []

    async def stubborn() -> str:
        for _ in range(2):
            try:
                await waiter
            except asyncio.CancelledError as error:
                ends.append(str(error))
            else:
                return "woken"
        raise AssertionError("never woken")

    task = make(stubborn())
    await asyncio.sleep(0)
    assert task.cancel("enough")
    assert task.cancel("once more")
    await asyncio.sleep(0)
    assert len(ends) == 1
    assert not task.done()
    await in_a_turn(lambda _turn: waiter.wake())
    assert await task == "woken"


async def test_cancelled_and_woken_at_once_it_goes_on_once(make: Make) -> None:
    for cancel_first in (True, False):
        waiting = Waiting(make)
        await asyncio.sleep(0)

        def both(
            _turn: Turn, waiting: Waiting = waiting, first: bool = cancel_first
        ) -> None:
            if first:
                waiting.task.cancel()
            waiting.waiters[0].wake()
            if not first:
                waiting.task.cancel()

        await in_a_turn(both)
        with pytest.raises(asyncio.CancelledError):
            await waiting.task
        assert waiting.n_over == 0


async def test_it_goes_on_in_its_own_context(make: Make) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    waiter = Waiter()
    seen: list[str] = []

    async def named(own: str) -> None:
        name.set(own)
        await waiter
        seen.append(name.get())

    task = make(named("the task's"))
    await asyncio.sleep(0)
    name.set("the waker's")
    await in_a_turn(lambda _turn: waiter.wake())
    await task
    assert seen == ["the task's"]


def test_one_that_ends_the_loop_does_not_take_the_others_along() -> None:
    waiters: list[Waiter] = []
    ends: list[str] = []

    async def wait(what: str) -> None:
        waiter = Waiter()
        waiters.append(waiter)
        await waiter
        ends.append(what)
        if what == "exit":
            raise SystemExit(3)

    async def main() -> None:
        tasks = [asyncio.ensure_future(wait(w)) for w in ("a", "exit", "b", "c")]
        await asyncio.sleep(0)

        def wake_all(_turn: Turn) -> None:
            for waiter in waiters:
                waiter.wake()

        await in_a_turn(wake_all)
        await asyncio.wait(tasks[2:])

    loop = asyncio.new_event_loop()
    try:
        running = loop.create_task(main())
        with pytest.raises(SystemExit):
            loop.run_until_complete(running)
        assert ends == ["a", "exit"]
        loop.run_until_complete(running)
        assert ends == ["a", "exit", "b", "c"]
    finally:
        loop.close()
