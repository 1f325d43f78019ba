"""Asking for what has ended, from several threads."""

from __future__ import annotations

import collections
from typing import Any

import pytest

from kvxfer.waiting import MAX_FINISHED
from tests.endpoints import until
from tests.streaming import Streamed, streamed


class Raced(collections.deque[Any]):
    """A queue that another thread empties whenever somebody has looked at it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: list[Any] = []

    def __len__(self) -> int:
        n = super().__len__()
        for _ in range(n):
            self.taken.append(self.popleft())
        return n


async def end_one(pair: Streamed, side: str) -> Any:
    """End a request of the client, or an offer of the server."""
    if side == "client":
        request = pair.client.open("r")
        await request.abort()
        return request
    ticket = pair.server.offer(pair.prefill, "r", {"main": [1]})
    await ticket.abort()
    return ticket


@pytest.mark.parametrize("side", ["client", "server"])
async def test_two_threads_that_ask_at_once(side: str) -> None:
    """Each has what it has taken, and neither meets the other."""
    async with streamed() as pair:
        ended = await end_one(pair, side)
        endpoint: Any = pair.client if side == "client" else pair.server
        owner = endpoint._streams if side == "client" else endpoint._offers
        await until(lambda: len(owner._finished) == 1)
        raced = owner._finished = Raced(owner._finished)
        found = endpoint.finished()
        assert [*found, *raced.taken] == [ended]


async def test_whoever_does_not_ask_keeps_the_last_of_them() -> None:
    async with streamed() as pair:
        requests = [pair.client.open(str(i)) for i in range(MAX_FINISHED + 3)]
        for request in requests:
            await request.abort()
        assert pair.client.finished() == requests[3:]
