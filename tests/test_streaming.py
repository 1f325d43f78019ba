"""Streamed requests end to end, in one process, every byte compared."""

from __future__ import annotations

import asyncio

from kvxfer.requests import RequestState, TicketState
from tests.endpoints import SOON, expected
from tests.streaming import streamed


async def test_a_request_from_the_offer_to_the_last_layer() -> None:
    async with streamed() as pair:
        wanted = expected(
            pair.source, pair.target, pair.target.memory, [1, 2, 3], [7, 5, 9]
        )
        ticket = pair.server.offer(pair.prefill, "r1", {"main": [7, 5, 9]})
        request = pair.client.open("r1")
        for layer in range(3):
            request.ready(layer, [1, 2, 3], final=True)
            await asyncio.wait_for(ticket.wait_layer(layer), SOON)
            assert layer in ticket.layers_done
        request.finish(aux=b"first token: 42")
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        assert (pair.target.memory == wanted).all()
        assert ticket.state is TicketState.DONE
        assert ticket.aux == b"first token: 42"
        assert request.state is RequestState.DONE
        assert pair.server.finished() == [ticket]
        assert pair.client.finished() == [request]
        assert pair.server.finished() == []
