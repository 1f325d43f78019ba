"""Connecting again to a server that is full, and how many it takes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from kvxfer import Client, Server
from kvxfer.errors import ConnectTimeoutError, RefusedError
from tests.endpoints import QUICK, SOON, arena, dial, take, until


async def test_a_server_that_is_full_is_tried_again() -> None:
    with arena(seed=1) as one, arena(seed=3) as two, arena(seed=2) as target:
        async with (
            Server(target.cache, port=0, max_connections=1, **QUICK) as server,
            Client(two.cache, **QUICK) as second,
        ):
            async with Client(one.cache, **QUICK) as first:
                await dial(first, server)
                with pytest.raises((RefusedError, ConnectTimeoutError)) as caught:
                    await second.connect("127.0.0.1", server.port, timeout=0.3)
                assert "max_connections" in str(caught.value)
                waiting = asyncio.ensure_future(dial(second, server))
                assert server._control is not None
                control = server._control
                refused = control.statistics().refused
                await until(lambda: control.statistics().refused > refused)
                assert not waiting.done()
            peer = await asyncio.wait_for(waiting, SOON)
            await second.write_cache(peer, [1], [2])


@pytest.mark.slow
async def test_hundreds_of_peers_of_one_server() -> None:
    """As many as it says it takes, each with receives of its own; and one more."""
    n = 300
    async with contextlib.AsyncExitStack() as stack:
        source = stack.enter_context(arena(layers=1, n_blocks=4, seed=1))
        target = stack.enter_context(arena(layers=1, n_blocks=4, seed=2))
        limits: dict[str, Any] = {"max_client_connections": n, "max_connections": n}
        server = Server(target.cache, port=0, **limits, **QUICK)
        await stack.enter_async_context(server)
        client = await stack.enter_async_context(Client(source.cache, **QUICK))
        peers = []
        for i in range(n):
            peers.append(await dial(client, server))
            # A client keeps one connection to an address; here it has many.
            client._peers[str(i)] = client._peers.pop(f"127.0.0.1:{server.port}")
        assert len(server.peers) == len(set(peers)) == n
        with pytest.raises(RefusedError, match=rf"{n} connections"):
            await client.connect("127.0.0.1", server.port, timeout=1.0)
        await asyncio.gather(*(client.write_cache(p, [1], [2]) for p in peers))
        assert len(await take(server, n)) == n
        await asyncio.gather(*(peer.close() for peer in peers))
        await until(lambda: not server.peers)
