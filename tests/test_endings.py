"""Closing, restarting and letting go while something is under way."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from kvxfer import Client, Server
from kvxfer.errors import (
    BrokenPeerError,
    ClosedResourceError,
    KVXferError,
    RetryExceededError,
)
from kvxfer.verbs_types import QPState
from tests.endpoints import (
    QUICK,
    SOON,
    Pair,
    arena,
    big,
    check_reconnects,
    connected,
    dial,
    failure_of,
    until,
)


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


async def test_a_server_that_closes_during_writes() -> None:
    """Once its close returns nothing lands any more."""
    for round_ in range(3):
        async with connected(big(1), big(2)) as pair:
            ids = range(64)
            writes = [
                asyncio.ensure_future(pair.client.write_cache(pair.peer, ids, ids))
                for _ in range(5)
            ]
            for _ in range(10 * round_):
                await asyncio.sleep(0)
            await pair.server.close()
            before = pair.target.memory.copy()
            ends = await asyncio.wait_for(
                asyncio.gather(*writes, return_exceptions=True), SOON
            )
            for end in ends:
                if isinstance(end, BaseException):
                    assert isinstance(end, BrokenPeerError | RetryExceededError), repr(
                        end
                    )
                    assert end.fenced is not None
            assert any(isinstance(end, KVXferError) for end in ends)
            assert (pair.target.memory == before).all()


async def test_a_write_that_succeeded_is_announced_though_the_server_lets_go() -> None:
    for round_ in range(12):
        async with connected(drain_timeout=0.2) as pair:
            (conn_id,) = pair.server._connections.incoming
            writes = [
                asyncio.ensure_future(
                    pair.client.write_cache(
                        pair.peer, range(32), range(32), 0, request_id=str(i)
                    )
                )
                for i in range(60)
            ]
            for _ in range(2 + round_ % 4):
                await asyncio.sleep(0)
            assert pair.server._control is not None
            pair.server._control.drop(conn_id, "a test")
            ends = await asyncio.wait_for(
                asyncio.gather(*writes, return_exceptions=True), SOON
            )
            await until(lambda: not pair.server.peers)
            await pair.server.close()
            told = {a.request_id async for a in pair.server.arrivals()}
            for i, end in enumerate(ends):
                if not isinstance(end, BaseException):
                    assert str(i) in told


async def test_a_client_that_closes_during_writes() -> None:
    """Its own memory is free when the close returns, the target's as well."""
    async with connected(big(1), big(2)) as pair:
        ids = range(64)
        writes = [
            asyncio.ensure_future(pair.client.write_cache(pair.peer, ids, ids))
            for _ in range(5)
        ]
        await asyncio.sleep(0)
        await pair.client.close()
        pair.source.memory[:] = 0xEE
        before = pair.target.memory.copy()
        for end in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(end, BaseException):
                assert isinstance(end, BrokenPeerError | ClosedResourceError)
        await until(lambda: not pair.server.peers)
        assert (pair.target.memory == before).all()


async def test_closing_twice_at_once_waits_for_the_first() -> None:
    async with connected(big(1), big(2)) as pair:
        write = asyncio.ensure_future(
            pair.client.write_cache(pair.peer, range(64), range(64))
        )
        await asyncio.sleep(0)
        for closing in (pair.client.close, pair.server.close):
            first = asyncio.ensure_future(closing())
            await asyncio.sleep(0)
            await closing()
            assert pair.source.cache.in_use == 0
            await first
        with contextlib.suppress(KVXferError):  # it may have been quicker
            await asyncio.wait_for(write, SOON)


async def test_a_cancelled_close_closes() -> None:
    async with connected(big(1), big(2)) as pair:
        write = asyncio.ensure_future(
            pair.client.write_cache(pair.peer, range(64), range(64))
        )
        await asyncio.sleep(0)
        for owner in (pair.client, pair.server):
            closing = asyncio.ensure_future(owner.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            assert owner._host.cache.in_use == 0
        with contextlib.suppress(KVXferError):  # it may have been quicker
            await asyncio.wait_for(write, SOON)


async def test_a_close_overtakes_a_connect() -> None:
    async with connected() as pair, connected() as other:
        connecting = [
            asyncio.ensure_future(pair.client.connect("127.0.0.1", other.server.port))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        await pair.client.close()
        for task in connecting:
            error = await failure_of(task)
            assert type(error) is ClosedResourceError


async def test_a_cancelled_connect_leaves_nothing() -> None:
    # A dialer that went away before the offer is known by its silence alone.
    async with connected(server_options={"connect_timeout": 0.5}) as pair:
        with arena(seed=5) as source:
            async with Client(source.cache, **QUICK) as client:
                for turns in range(0, 40, 3):
                    connecting = asyncio.ensure_future(dial(client, pair.server))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    connecting.cancel()
                    await asyncio.wait({connecting})
                peer = await dial(client, pair.server)
                await client.write_cache(peer, [1], [2])
                await until(lambda: len(pair.server.peers) == 2)


async def test_a_server_restarted_on_its_port_is_a_new_peer() -> None:
    async with connected() as pair:
        await pair.check_write([1], [2])
        port, old = pair.server.port, pair.target.memory
        await pair.server.close()
        # The goodbye, not the device, is to say why the next write fails.
        await until(lambda: not pair.peer.connected)
        before = old.copy()
        with arena(seed=8) as target:
            async with Server(target.cache, port=port, **QUICK) as server:
                untouched = target.memory.copy()
                error = await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
                assert type(error) is BrokenPeerError
                assert (target.memory == untouched).all()
                peer = await dial(pair.client, server)
                assert peer is not pair.peer
                again = Pair(pair.source, target, server, pair.client, peer)
                await again.check_write([3], [4])
                # The old peer stays what it is: gone.
                error = await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
                assert type(error) is BrokenPeerError
        assert (old == before).all()


async def test_a_link_that_fails_by_itself_is_noticed_without_a_write() -> None:
    async with connected() as pair:
        (incoming,) = pair.server._connections.incoming.values()
        await incoming.link.adapter.call(incoming.link.qp.to_error)
        await until(lambda: not pair.peer.connected)
        await until(lambda: not pair.server.peers)
        error = await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
        assert "its QP failed" in str(error.__cause__)
        await check_reconnects(pair)


async def test_a_confirmed_fence_is_one() -> None:
    """When the peer says so, its QP is out: whatever is in flight cannot land."""
    async with connected(big(1), big(2)) as pair:
        (incoming,) = pair.server._connections.incoming.values()
        await pair.check_write([1], [2], 0)  # a peer that is known dies at once
        write = asyncio.ensure_future(
            pair.client.write_cache(pair.peer, range(64), range(64))
        )
        await asyncio.sleep(0)
        assert await pair.peer._control.request_fence("a test asks", timeout=SOON)
        assert incoming.link.qp.state is QPState.ERR
        before = pair.target.memory.copy()
        # All of it had landed, or it failed.
        with contextlib.suppress(KVXferError):
            await asyncio.wait_for(write, SOON)
        assert (pair.target.memory == before).all()
