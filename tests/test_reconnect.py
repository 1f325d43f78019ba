"""Connecting again to a server that is full, and how many it takes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import Any

import pytest

from kvxfer import Client, Server
from kvxfer.errors import ConnectTimeoutError, RefusedError
from kvxfer.testing import live_objects
from tests.children import Nursery
from tests.endpoints import QUICK, SOON, arena, dial, take, until
from tests.leaks import take_census
from tests.patience import patient


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


#: Two hundred clients on two processors: each has its turn late, and is alive.
STORM: dict[str, Any] = {
    **QUICK,
    "connect_timeout": patient(30.0),
    "loop_timeout": patient(60.0),
    "ping_interval": patient(5.0),
    "ping_timeout": patient(20.0),
}
SHAPE: dict[str, Any] = {"n_blocks": 32, "layers": 1, "planes": {"k": (256, 288)}}


def held(server: Server | None = None) -> dict[str, int]:
    """Count what the process has: one connection is as good as another."""
    census = take_census()
    counts = {
        "fds": len(census.fds),
        "threads": len(census.threads),
        **live_objects(),
    }
    if server is None:
        return counts
    control = server._control
    assert control is not None
    return {
        **counts,
        "peers": len(server.peers),
        "links": control.statistics().links_open,
        "pending": control.statistics().pending,
    }


def more(server: Server | None, before: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Say of what there is more than before; something may have been ending then."""
    now = held(server)
    return {
        what: (before.get(what, 0), n)
        for what, n in now.items()
        if n > before.get(what, 0)
    }


@pytest.mark.parametrize(
    ("n_children", "n_clients", "times"),
    [(3, 4, 4), pytest.param(10, 20, 50, marks=pytest.mark.slow)],
)
async def test_a_storm_of_connects_with_kills(
    nursery: Nursery, n_children: int, n_clients: int, times: int
) -> None:
    """No connect is slower than its deadline, and nothing of any is left.

    Two of the processes are killed, one as it begins and one half through, each with
    all its clients, and others take their places. What it saw is shown by ``-rP``.
    """
    every: dict[str, Any]
    every = {"shape": SHAPE, "n_clients": n_clients, "times": times, **STORM}
    one_at_a_time = asyncio.Lock()
    with arena(n_blocks=32, layers=1, planes={"k": (256, 288)}, seed=2) as target:
        # All of them have one address, of which half may be pending.
        async with Server(target.cache, port=0, max_handshakes=512, **STORM) as server:
            taken = asyncio.ensure_future(_take_all(server))

            async def connects(kill_at: str = "", **changes: int) -> float:
                async with contextlib.AsyncExitStack() as stack:
                    async with one_at_a_time:
                        starting = nursery.start(
                            "reconnect", port=server.port, **{**every, **changes}
                        )
                        child = await stack.enter_async_context(starting)
                    found = await child.event(patient(140))
                    while "worst" not in found:
                        assert found, "a child has failed"
                        if found["event"] == kill_at:
                            child.signal(signal.SIGKILL)
                            return 0.0
                        found = await child.event(patient(140))
                    return float(found["worst"])

            async def after_a_kill(kill_at: str) -> float:
                await connects(kill_at)
                return await connects()

            await connects("begun", n_clients=1)  # whatever is made once
            await until(lambda: not server.peers)
            before = held(server)
            whole = [connects() for _ in range(n_children - 2)]
            worst = await asyncio.gather(
                after_a_kill("begun"), after_a_kill("half"), *whole
            )
            assert max(worst) < STORM["connect_timeout"]
            # A peer that was killed may be known by its silence alone.
            with contextlib.suppress(asyncio.TimeoutError):
                await until(lambda: not more(server, before), 3 * STORM["ping_timeout"])
            assert not more(server, before)
            accepted = server.handshakes()["accepted"]
            assert accepted >= n_children * n_clients * times
            sys.stdout.write(
                f"connections made: {accepted}\n"
                "processes killed: 2 of the storm, and 1 before it\n"
                f"slowest connect: {max(worst):.2f} s\n"
                f"before: {before}\nafter: {held(server)}\n"
            )
        await taken


async def _take_all(server: Server) -> None:
    async for _ in server.arrivals():
        continue
