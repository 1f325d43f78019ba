"""What breaks under a write: a typed exception, a quiet device, a clean end."""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np
import pytest

from kvxfer import Client, Failure, Server
from kvxfer.adapter import Adapter
from kvxfer.errors import (
    BrokenPeerError,
    CompletionError,
    KVXferError,
    LocalProtectionError,
    RemoteAccessError,
    WriteTimeoutError,
)
from kvxfer.link import Link
from kvxfer.regions import Keys
from kvxfer.testing import set_faults
from tests.endpoints import (
    SOON,
    Bytes,
    big,
    check_reconnects,
    connected,
    expected,
    failure_of,
)
from tests.patience import patient


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


async def next_failure(server: Server) -> Failure:
    """Wait for what a writer gave up."""
    return await asyncio.wait_for(anext(server.failures()), SOON)


async def deregister(owner: Client | Server) -> None:
    """Break an endpoint's memory regions: no WR can touch the cache any more."""
    (adapter,) = owner._host.adapters
    for region in adapter._regions:
        await adapter.call(region.close)


# -- a failed WR --------------------------------------------------------------------


async def test_a_refused_rkey_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed WR can never look like success."""
    rkeys = Adapter.rkeys
    monkeypatch.setattr(
        Adapter,
        "rkeys",
        lambda adapter, place: Keys(place.n_blocks, (0x123456 + place.base % 7,)),
    )
    async with connected(fence_timeout=SOON) as pair:
        monkeypatch.setattr(Adapter, "rkeys", rkeys)
        before = pair.target.memory.copy()
        error = await failure_of(
            pair.client.write_cache(pair.peer, [1, 2], [3, 4], [2, 0], request_id="r7")
        )
        assert type(error) is RemoteAccessError
        assert (error.status, error.status_name) == (10, "IBV_WC_REM_ACCESS_ERR")
        assert error.wr_id and error.qp_num and error.vendor_err
        assert (error.peer, error.request_id) == (pair.peer.address, "r7")
        assert error.layer == 2
        assert error.fenced is True
        failure = await next_failure(pair.server)
        assert (failure.request_id, failure.layers) == ("r7", (2, 0))
        assert "IBV_WC_REM_ACCESS_ERR" in failure.reason
        assert (pair.target.memory == before).all()
        assert not pair.peer.connected
        assert not pair.client.is_connected("127.0.0.1", pair.server.port)
        error = await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
        assert type(error) is BrokenPeerError
        await check_reconnects(pair)


async def test_the_writes_beside_a_failed_one_name_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with connected(big(1), big(2), fence_timeout=SOON) as pair:
        # Else they may all be there before the region is not.
        set_faults(pair.client, "act=delay,us=5000")
        ids = range(64)
        writes = [
            asyncio.ensure_future(pair.client.write_cache(pair.peer, ids, ids, i % 8))
            for i in range(16)
        ]
        await deregister(pair.server)
        before = pair.target.memory.copy()
        ends = await asyncio.wait_for(
            asyncio.gather(*writes, return_exceptions=True), SOON
        )
        failed = [e for e in ends if isinstance(e, BaseException)]
        # The device had no time for all of them, and one of them met the region.
        kinds = [type(e) for e in failed]
        assert kinds.count(RemoteAccessError) == 1
        assert set(kinds) <= {RemoteAccessError, BrokenPeerError}
        for error in failed:
            assert isinstance(error, KVXferError)
            if "has just broken" in str(error) or "is broken" in str(error):
                assert error.fenced is None  # it came too late to post anything
                continue
            assert error.fenced is True
            if isinstance(error, BrokenPeerError):
                assert isinstance(error.__cause__, CompletionError)
        # Nothing landed once the region was deregistered.
        assert (pair.target.memory == before).all()


async def test_local_memory_that_is_not_registered() -> None:
    async with connected() as pair:
        before = pair.target.memory.copy()
        await deregister(pair.client)
        error = await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
        assert type(error) is LocalProtectionError
        assert (pair.target.memory == before).all()


# -- timeouts -----------------------------------------------------------------------


async def test_a_write_between_the_failure_and_the_word_of_it() -> None:
    """The engine knows that the queue has failed before the loop has been told."""
    async with connected() as pair:
        link = pair.peer.link
        link.adapter.engine.abort(link.slot)
        assert pair.peer.connected
        error = await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
        assert type(error) is BrokenPeerError
        assert not pair.peer.connected


async def test_a_timeout_leaves_the_connection_usable() -> None:
    # Driven by the loop: a thread may have all of it done before a busy machine lets
    # the loop look at the clock.
    async with connected(big(1), big(2), sq_depth=16, progress="event") as pair:
        ids = range(64)
        for round_ in range(5):
            error = await failure_of(
                pair.client.write_cache(
                    pair.peer, ids, ids, request_id=f"r{round_}", timeout=0.0005
                )
            )
            assert type(error) is WriteTimeoutError
            assert (error.request_id, error.peer) == (f"r{round_}", pair.peer.address)
            # All that was posted is acknowledged: nothing can come late.
            assert error.fenced is True
            assert "layers are done" in str(error)
            # The source is ours again, and what is written there travels nowhere.
            before = pair.target.memory.copy()
            kept = pair.source.memory.copy()
            pair.source.memory[:] = 0xEE
            failure = await next_failure(pair.server)
            assert failure.request_id == f"r{round_}"
            assert failure.layers and set(failure.layers) <= set(range(8))
            assert "not written within" in failure.reason
            assert (pair.target.memory == before).all()
            pair.source.memory[:] = kept
        await pair.check_write([1, 2], [3, 4])


async def test_each_write_has_a_deadline_of_its_own() -> None:
    async with connected(big(1), big(2), sq_depth=16) as pair:
        ids = range(64)
        timeouts = [60.0, 0.01, 50.0, 0.06, 0.03]
        # Far longer than the longest of those that are to be over.
        set_faults(pair.client, "act=delay,us=400000,times=1")
        writes = [
            asyncio.ensure_future(
                pair.client.write_cache(pair.peer, ids, ids, timeout=timeout)
            )
            for timeout in timeouts
        ]
        ends = await asyncio.gather(*writes, return_exceptions=True)
        for timeout, end in zip(timeouts, ends, strict=True):
            late = isinstance(end, WriteTimeoutError)
            assert late is (timeout < 1), (timeout, end)


async def test_a_deadline_that_is_met_is_no_timeout() -> None:
    async with connected() as pair:
        for _ in range(50):
            await pair.check_write([1], [2], timeout=5.0)
        assert pair.peer.connected


# -- cancellation -------------------------------------------------------------------


def only_of(memory: Bytes, *allowed: Bytes) -> bool:
    """Say whether each byte of ``memory`` is that of one of the others."""
    fine = np.zeros(len(memory), bool)
    for other in allowed:
        fine |= memory == other
    return bool(fine.all())


async def test_a_cancelled_write_returns_when_the_device_is_done() -> None:
    """The source may be overwritten at once: none of that ever reaches the target."""
    rng = random.Random(3)
    ids = range(64)
    async with connected(big(1), big(2), sq_depth=16) as pair:
        old, source = pair.target.memory.copy(), pair.source.memory.copy()
        wanted = expected(pair.source, pair.target, old, ids, ids)
        n_cancelled = 0
        for round_ in range(12):
            pair.target.memory[:] = old
            pair.source.memory[:] = source
            write = asyncio.ensure_future(
                pair.client.write_cache(pair.peer, ids, ids, request_id=f"r{round_}")
            )
            asyncio.get_running_loop().call_later(rng.random() * 0.01, write.cancel)
            await asyncio.wait({write}, timeout=SOON)
            pair.source.memory[:] = 0xEE
            at_once = pair.target.memory.copy()
            assert only_of(at_once, old, wanted)
            # A write behind it, in order: nothing of the first can come later.
            await pair.client.write_cache(pair.peer, [], [], 0)
            await pair.client.write_cache(pair.peer, [0], [0], 7)
            after = expected(pair.source, pair.target, at_once, [0], [0], [7])
            assert (pair.target.memory == after).all()
            if write.cancelled() and (at_once != wanted).any():
                n_cancelled += 1
                failure = await next_failure(pair.server)
                while failure.request_id != f"r{round_}":
                    failure = await next_failure(pair.server)
                assert failure.reason == "cancelled"
        assert pair.peer.connected
        assert n_cancelled


async def test_writes_cancelled_before_they_began_leave_no_trace() -> None:
    async with connected() as pair:
        before = pair.target.memory.copy()
        write = asyncio.ensure_future(pair.client.write_cache(pair.peer, [1], [2]))
        write.cancel()
        await asyncio.wait({write})
        assert write.cancelled()
        assert (pair.target.memory == before).all()
        await pair.check_write([3], [4])


async def test_a_write_that_cannot_be_drained_costs_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Past the drain timeout the QP goes to ERR, and the wait still ends."""
    async with connected(
        *(big(1), big(2)),
        drain_timeout=0.05,
        fence_timeout=SOON,
        server_options={"notify_receives": 1},
    ) as pair:
        # No credit and no acknowledgement: the server's half is out of RTS already.
        (incoming,) = pair.server._connections.incoming.values()
        monkeypatch.setattr(Link, "wire", "tcp")
        await incoming.link.fail()
        start = time.monotonic()
        error = await failure_of(
            pair.client.write_cache(pair.peer, range(64), range(64), timeout=0.1)
        )
        assert isinstance(error, WriteTimeoutError | BrokenPeerError | CompletionError)
        assert error.fenced is True
        assert time.monotonic() - start < patient(5)
