"""Leaving in peace: nobody new, the peers told, what is under way done, then closed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvxfer import Client, wire
from kvxfer.errors import (
    BrokenPeerError,
    ClosedResourceError,
    KVXferError,
    RefusedError,
)
from kvxfer.testing import set_faults
from tests.endpoints import QUICK, SOON, Pair, arena, connected, take, until

SLOW = "act=delay,us=400000,times=1"
FOR_EVER = "act=delay,us=60000000"


async def begin_write(pair: Pair, plan: str) -> asyncio.Task[Any]:
    """Start a write that is under way for a while."""
    set_faults(pair.client, plan)
    write = asyncio.ensure_future(pair.client.write_cache(pair.peer, [1, 2], [3, 4]))
    await until(lambda: pair.peer._writes == 1)
    return write


async def test_a_server_that_leaves_lets_writes_end_and_nobody_in() -> None:
    async with connected() as pair:
        write = await begin_write(pair, SLOW)
        leaving = asyncio.ensure_future(pair.server.close(grace=SOON))
        await until(lambda: pair.peer.draining)
        with pytest.raises(BrokenPeerError, match="about to leave"):
            await pair.client.write_cache(pair.peer, [1], [2])
        host, _, port = pair.peer.address.rpartition(":")
        with pytest.raises(RefusedError) as caught:
            await pair.client.connect(host, int(port))
        assert caught.value.code == "closing"
        with arena(seed=3) as other:
            async with Client(other.cache, **QUICK) as stranger:
                with pytest.raises(RefusedError) as caught:
                    await stranger.connect(host, int(port))
                assert caught.value.code == "closing"
        with pytest.raises(ClosedResourceError, match="closing"):
            pair.server.offer("127.0.0.1:1", "r", {"main": [1]})
        assert not leaving.done() and not write.done()
        arrived = asyncio.ensure_future(take(pair.server, 3))
        assert (await write).bytes > 0
        await arrived
        await asyncio.wait_for(leaving, SOON)
        await until(lambda: not pair.peer.connected)


async def test_nobody_waits_for_those_who_do_nothing() -> None:
    async with connected() as pair:
        await pair.check_write([1], [2])
        await asyncio.wait_for(pair.server.close(grace=1e6), SOON)


@pytest.mark.parametrize("features", [wire.FEATURES, 0])
async def test_the_grace_ends(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the writer is of a release that cannot be told."""
    monkeypatch.setattr(wire, "FEATURES", features)
    async with connected() as pair:
        write = None if not features else await begin_write(pair, FOR_EVER)
        await asyncio.wait_for(pair.server.close(grace=0.2), SOON)
        assert bool(pair.peer.draining) == bool(features)
        if write is not None:
            with pytest.raises(KVXferError):
                await asyncio.wait_for(write, SOON)


async def test_a_cancelled_grace_closes_at_once() -> None:
    async with connected() as pair:
        write = await begin_write(pair, FOR_EVER)
        leaving = asyncio.ensure_future(pair.server.close(grace=1e6))
        await until(lambda: pair.peer.draining)
        leaving.cancel()
        await asyncio.wait({leaving}, timeout=SOON)
        assert leaving.cancelled()
        assert await take(pair.server, 1) == []
        with pytest.raises(KVXferError):
            await asyncio.wait_for(write, SOON)


async def test_a_client_that_leaves_lets_its_writes_end() -> None:
    async with connected() as pair:
        write = await begin_write(pair, SLOW)
        leaving = asyncio.ensure_future(pair.client.close(grace=SOON))
        await asyncio.sleep(0)
        with pytest.raises(ClosedResourceError, match="draining"):
            await pair.client.write_cache(pair.peer, [1], [2])
        assert (await write).bytes > 0
        await asyncio.wait_for(leaving, SOON)
