"""What goes wrong, with a device's own timing and its own words.

After each of these the library has to go on: the same client writes again, over
a new connection where the old one is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvxfer import inbox as inbox_module
from kvxfer.errors import (
    BrokenPeerError,
    KVXferError,
    RemoteAccessError,
    RetryExceededError,
    WriteTimeoutError,
)
from tests.endpoints import (
    SOON,
    Pair,
    arena,
    connected,
    dial,
    expected,
    scattered,
    take,
    until,
)
from tests.patience import patient

pytestmark = pytest.mark.rdma

OURS, THEIRS = scattered(32, 24, 1), scattered(32, 24, 2)


async def write_fails(pair: Pair) -> KVXferError:
    """Write until a write fails, which has to be soon."""

    async def loop() -> KVXferError:
        while True:
            try:
                await pair.client.write_cache(pair.peer, OURS, THEIRS)
            except KVXferError as error:
                return error

    return await asyncio.wait_for(loop(), SOON)


async def check_again(pair: Pair) -> None:
    """Connect again and write."""
    await until(lambda: not pair.peer.connected)
    pair.peer = await dial(pair.client, pair.server)
    await pair.check_write(OURS, THEIRS)


async def test_a_region_that_is_gone() -> None:
    """As after a restart that the initiator does not know of: a stale rkey."""
    async with connected() as pair:
        await pair.check_write(OURS, THEIRS)
        (adapter,) = pair.server._host.adapters
        for region in adapter._regions:
            region.close()
        before = pair.target.memory.copy()
        error = await write_fails(pair)
        assert isinstance(error, RemoteAccessError)
        assert error.status_name == "IBV_WC_REM_ACCESS_ERR"
        assert error.layer is not None and error.peer == pair.peer.address
        assert error.fenced is not None
        assert (pair.target.memory == before).all()
        assert not pair.peer.connected


async def test_the_target_goes_to_err() -> None:
    async with connected() as pair:
        await pair.check_write(OURS, THEIRS)
        (incoming,) = pair.server._connections.incoming.values()
        incoming.link.qp.to_error()
        # The receives come back flushed, so the server may say it first.
        error = await write_fails(pair)
        assert isinstance(error, RetryExceededError | BrokenPeerError)
        await check_again(pair)


async def test_the_initiator_goes_to_err() -> None:
    async with connected() as pair:
        await pair.check_write(OURS, THEIRS)
        pair.peer.link.qp.to_error()
        assert isinstance(await write_fails(pair), BrokenPeerError)
        await check_again(pair)


async def test_a_dead_peer_is_noticed_by_the_device_alone() -> None:
    """The control connection is in good health, the QP at its other end is deaf."""
    quiet: dict[str, Any] = {"ping_interval": 20.0, "ping_timeout": 60.0 + SOON}
    quiet["loop_timeout"] = quiet["ping_timeout"]
    async with connected(**quiet) as pair:
        await pair.check_write(OURS, THEIRS)
        # Behind the last arrival no receive is to be posted any more, which would fail
        # in RESET and tell the server.
        await take(pair.server, 3)
        (incoming,) = pair.server._connections.incoming.values()
        # Unlike ERR, RESET does not tell the server by flushed receives.
        await incoming.link.adapter.call(incoming.link.qp.to_reset)
        start = time.monotonic()
        error = await write_fails(pair)
        assert isinstance(error, RetryExceededError)
        # 7 times 67 ms; NICs may take up to four times as long.
        assert time.monotonic() - start < patient(5)


@contextlib.asynccontextmanager
async def held(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    """Give a pair whose server keeps one arrival and gives credit for no more.

    A device may be done with any write before somebody can interrupt it. This way
    the data of the next one go out, and what announces them has to wait.
    """
    monkeypatch.setattr(inbox_module, "_MAX_WAITING", 1)
    planes = {"k": 64 << 10, "v": 64 << 10}
    async with connected(
        arena(planes=planes, layers=1, seed=1),
        arena(planes=planes, layers=1, seed=2),
        sq_depth=16,
        chain=4,
        notify_receives=2,
    ) as pair:
        for _ in range(3):
            await pair.check_write(OURS, THEIRS)
        yield pair


async def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing further is posted or lands late; the connection lives on."""
    async with held(monkeypatch) as pair:
        with pytest.raises(WriteTimeoutError) as caught:
            await pair.client.write_cache(pair.peer, OURS, THEIRS, timeout=0.2)
        assert caught.value.fenced is True
        assert pair.peer.connected
        await take(pair.server, 3)
        # This compares what it does not write as well.
        await pair.check_write(OURS[:2], THEIRS[:2])


async def test_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    async with held(monkeypatch) as pair:
        write = asyncio.ensure_future(
            pair.client.write_cache(pair.peer, OURS, THEIRS, request_id="r")
        )
        done, _ = await asyncio.wait({write}, timeout=0.2)
        assert not done
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        assert pair.peer.connected
        async for failure in pair.server.failures():
            assert (failure.request_id, failure.reason) == ("r", "cancelled")
            break
        await take(pair.server, 3)
        await pair.check_write(OURS[:2], THEIRS[:2])


@pytest.mark.parametrize("side", ["client", "server"])
async def test_closing_under_a_write(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has closed, nothing is read, or nothing lands, any more."""
    async with held(monkeypatch) as pair:
        write = asyncio.ensure_future(pair.client.write_cache(pair.peer, OURS, THEIRS))
        done, _ = await asyncio.wait({write}, timeout=0.2)
        assert not done
        await (pair.client if side == "client" else pair.server).close()
        still = pair.target.memory.copy()
        with pytest.raises(BrokenPeerError):
            await write
        assert (pair.target.memory == still).all()


async def test_interrupted_at_any_moment() -> None:
    """With WRs in flight or not: what is not named is never written."""
    planes = {"k": 64 << 10, "v": 64 << 10}
    async with connected(
        arena(planes=planes, layers=2, seed=1),
        arena(planes=planes, layers=2, seed=2),
        sq_depth=64,
        chain=4,
    ) as pair:
        wanted = expected(pair.source, pair.target, pair.target.memory, OURS, THEIRS)
        for i in range(12):
            write = asyncio.ensure_future(
                pair.client.write_cache(pair.peer, OURS, THEIRS)
            )
            for _ in range(i):
                await asyncio.sleep(0)
            write.cancel()
            await asyncio.wait({write})
            assert pair.peer.connected
        await pair.client.write_cache(pair.peer, OURS, THEIRS)
        assert (pair.target.memory == wanted).all()
