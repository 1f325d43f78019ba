"""Requests from threads that know no event loop: the blocking client and server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvxfer import RequestState, TicketState, blocking
from kvxfer.errors import RequestAbortedError, UsageError
from tests.endpoints import QUICK, SOON, arena, expected
from tests.streaming import streamed

OPTIONS: dict[str, Any] = {**QUICK, "port": 0}


def test_a_request_of_two_synchronous_engines() -> None:
    with arena(seed=1) as source, arena(seed=2) as target:
        after = expected(source, target, target.memory, [1, 2], [8, 9])
        with (
            blocking.Server(target.cache, **OPTIONS) as server,
            blocking.Client(source.cache, listen="127.0.0.1:0", **QUICK) as client,
        ):
            assert client.listening is not None
            ticket = server.offer(client.listening, "r", {"main": [8, 9]})
            request = client.open("r")
            for layer in range(3):
                request.ready(layer, [1, 2], final=True)
                ticket.join_layer(layer, SOON)
            with pytest.raises(TimeoutError, match="goes on"):
                ticket.join(0.001)
            with pytest.raises(TimeoutError, match="goes on"):
                request.join(0.001)
            request.finish(b"42")
            ticket.join(SOON)
            request.join(SOON)
            assert (target.memory == after).all() and ticket.aux == b"42"
            assert client.finished() == [request] and server.finished() == [ticket]
            assert client.statistics().requests == {}


def test_a_thread_that_aborts_or_fences_has_its_blocks_back() -> None:
    with (
        arena(seed=1) as source,
        arena(seed=2) as target,
        blocking.Server(target.cache, **OPTIONS) as server,
        blocking.Client(source.cache, listen="127.0.0.1:0", **QUICK) as client,
    ):
        if client.listening is not None:
            for name in ("abort", "fence"):
                ticket = server.offer(client.listening, name, {"main": [8, 9]})
                request = client.open(name)
                request.ready(0, [1, 2], final=True)
                ticket.join_layer(0, SOON)
                if name == "abort":
                    request.abort()
                    assert request.state is RequestState.ABORTED
                else:
                    server.fence(name)
                    assert ticket.state is TicketState.ABORTED
                for end in (request, ticket):
                    with pytest.raises(RequestAbortedError):
                        end.join(SOON)
                with pytest.raises(RequestAbortedError):
                    ticket.join_layer(1, SOON)


def test_the_direct_form_from_a_thread() -> None:
    with arena(seed=1) as source, arena(seed=2) as target:
        after = expected(source, target, target.memory, [1, 2], [8, 9])
        with (
            blocking.Server(target.cache, **OPTIONS) as server,
            blocking.Client(source.cache, **QUICK) as client,
        ):
            peer = client.connect("127.0.0.1", server.port)
            request = client.request(peer, "d", [8, 9])
            request.ready(None, [1, 2])
            request.finish()
            request.join(SOON)
            assert (target.memory == after).all()
            assert client.listening is None


async def test_a_loop_does_not_wait_for_itself() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [1]})
        request = pair.client.open("r")
        calls: list[Callable[[], None]] = [
            ticket.join,
            request.join,
            lambda: ticket.join_layer(0),
        ]
        for call in calls:
            with pytest.raises(UsageError, match="must not wait for itself"):
                call()
        await asyncio.wait_for(_over(request.abort()), SOON)


async def _over(ending: Any) -> None:
    await ending
