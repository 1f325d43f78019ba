"""What does not come to rest by itself: drained by force, rebuilt, or quarantined."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvxfer import RequestState, TicketState
from kvxfer.errors import (
    NotQuiescentError,
    RequestAbortedError,
    UsageError,
    VerbsError,
)
from kvxfer.link import Link
from kvxfer.requests import LayerState
from kvxfer.testing import set_faults
from tests.endpoints import SOON, big, connected, expected, until
from tests.patience import patient
from tests.streaming import Streamed, streamed

#: Nothing that is posted completes for as long as a test may take.
HELD = "act=delay,us=60000000"


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


class StuckQP:
    """A QP that neither goes to ERR nor can be destroyed, until it is let go.

    The software device always does both. This stands before a real QP of it, and
    fails as a driver does whose firmware does not answer.
    """

    def __init__(self, qp: Any) -> None:
        self._qp = qp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._qp, name)

    def to_error(self) -> None:
        raise VerbsError(5, "ibv_modify_qp")

    def close(self) -> None:
        raise VerbsError(16, "ibv_destroy_qp")


@contextlib.asynccontextmanager
async def stuck(link: Link) -> AsyncIterator[None]:
    """Have the QPs of a link stuck; at the end they are destroyed after all."""
    qps = link._qps
    link._qps = [StuckQP(qp) for qp in qps]  # type: ignore[misc]
    try:
        yield
    finally:
        link._qps = qps
        await link._destroy()


def only_peer(pair: Streamed) -> Any:
    """The client's one connection."""
    (peer,) = pair.client._streams_now().remotes.peers()
    return peer


def check_bytes(
    pair: Streamed, before: Any, ours: list[int], theirs: list[int]
) -> None:
    """Compare the whole target with what one request should have done to it."""
    after = expected(pair.source, pair.target, before, ours, theirs)
    assert (pair.target.memory == after).all()


# -- past the drain timeout ----------------------------------------------------------


async def test_what_does_not_drain_ends_with_its_connection_and_others_go_on() -> None:
    async with streamed(drain_timeout=patient(0.1)) as pair:
        before = pair.target.memory.copy()
        victim = pair.server.offer(pair.prefill, "victim", {"main": [1, 2]})
        other = pair.server.offer(pair.prefill, "other", {"main": [5, 6]})
        requests = [pair.client.open(name) for name in ("victim", "other")]
        await until(lambda: {r.state for r in requests} == {RequestState.STREAMING})
        (conn_id,) = pair.server._connections.incoming
        # The first WR that the device looks at, whenever it does, holds what is behind.
        set_faults(pair.client, f"{HELD},times=1")
        requests[0].ready(0, [1, 2])
        requests[1].ready(None, [8, 9])
        requests[1].finish()
        await until(lambda: pair.client.statistics().in_flight)
        await asyncio.wait_for(_end(requests[0]), SOON)
        assert requests[0].state is RequestState.ABORTED
        assert requests[0].metrics.bytes == 0
        await asyncio.wait_for(other.wait(), SOON)
        await asyncio.wait_for(requests[1].sent(), SOON)
        (now,) = pair.server._connections.incoming
        assert now != conn_id
        with pytest.raises(RequestAbortedError):
            await asyncio.wait_for(victim.wait(), SOON)
        check_bytes(pair, before, [8, 9], [5, 6])


@pytest.mark.parametrize("n_qps", [2, 4])
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_what_is_held_on_several_qps_ends_with_the_connection(
    n_qps: int, side: str
) -> None:
    """The rest is repeated on the next one, and its digests are right."""
    async with streamed(big(1), big(2), sq_depth=16, qps_per_connection=n_qps) as pair:
        victim = pair.server.offer(pair.prefill, "victim", {"main": range(32)})
        other = pair.server.offer(
            pair.prefill, "other", {"main": range(32, 64)}, checksum=True
        )
        requests = [pair.client.open(name) for name in ("victim", "other")]
        await until(lambda: {r.state for r in requests} == {RequestState.STREAMING})
        assert only_peer(pair).link.n_qps == n_qps
        (conn_id,) = pair.server._connections.incoming
        # Of one QP the first WR that the device looks at, whenever it does, holds what
        # is behind; what went over the others comes through.
        set_faults(pair.client, f"{HELD},times=1")
        requests[0].ready(None, range(32))
        requests[1].ready(None, range(32), final=True)
        await until(lambda: requests[0].layer_state(0).name == "POSTED")
        if side == "prefill":
            await asyncio.wait_for(_end(requests[0]), SOON)
        else:
            await asyncio.wait_for(pair.server.fence("victim"), SOON)
        await until(lambda: victim.state is TicketState.ABORTED)
        await until(lambda: requests[0].state is RequestState.ABORTED)
        settled = pair.target.memory.copy()
        requests[1].finish()
        await asyncio.wait_for(other.wait(), SOON)
        await asyncio.wait_for(requests[1].sent(), SOON)
        (now,) = pair.server._connections.incoming
        assert now != conn_id
        check_bytes(pair, settled, list(range(32)), list(range(32, 64)))
        # The blocks are free, and nothing of the old life lands in them.
        again = pair.server.offer(pair.prefill, "again", {"main": range(32)})
        third = pair.client.open("again")
        third.ready(None, range(32, 64))
        third.finish()
        await asyncio.wait_for(again.wait(), SOON)
        settled = pair.target.memory.copy()
        check_bytes(pair, settled, list(range(32, 64)), list(range(32)))


# -- not quiet at all ----------------------------------------------------------------


async def test_a_writer_whose_device_does_not_let_go_says_so() -> None:
    async with streamed(drain_timeout=patient(0.1)) as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [1, 2]})
        requests = [pair.client.open(name) for name in ("r", "s")]
        also = pair.server.offer(pair.prefill, "s", {"main": [3]})
        await until(lambda: {r.state for r in requests} == {RequestState.STREAMING})
        set_faults(pair.client, HELD)
        for request, ids in zip(requests, ([1, 2], [3]), strict=True):
            request.ready(0, ids)
        await until(lambda: pair.client.statistics().in_flight)
        async with stuck(only_peer(pair).link):
            await asyncio.wait_for(_end(requests[0]), SOON)
            assert isinstance(requests[0].error, NotQuiescentError)
            assert requests[0].state in (RequestState.ABORTED, RequestState.FAILED)
            with pytest.raises(NotQuiescentError, match="may still read the source"):
                await requests[0].sent()
        # The other side does not depend on it: its own QP is gone.
        with pytest.raises(RequestAbortedError):
            await asyncio.wait_for(ticket.wait(), SOON)
        also.abort()


async def test_blocks_that_may_still_be_written_to_are_not_offered_again() -> None:
    async with streamed(fence_timeout=patient(0.1)) as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [1, 2]})
        request = pair.client.open("r")
        await until(lambda: request.state is RequestState.STREAMING)
        set_faults(pair.client, HELD)
        request.ready(0, [1, 2])
        await until(lambda: pair.client.statistics().in_flight)
        ((conn_id, incoming),) = pair.server._connections.incoming.items()
        async with stuck(incoming.link):
            with pytest.raises(NotQuiescentError, match="may still land"):
                await asyncio.wait_for(pair.server.fence("r"), SOON)
            assert isinstance(ticket.error, NotQuiescentError)
            assert ticket.state in (TicketState.ABORTED, TicketState.FAILED)
            with pytest.raises(UsageError, match="block 2 of group 'main'"):
                pair.server.offer(pair.prefill, "r2", {"main": [7, 2]})
        # Others are as good as ever, over a new connection.
        before = pair.target.memory.copy()
        set_faults(pair.client, "")
        again = pair.server.offer(pair.prefill, "r3", {"main": [7, 8]})
        other = pair.client.open("r3")
        other.ready(None, [4, 5])
        other.finish()
        await asyncio.wait_for(again.wait(), SOON)
        assert conn_id not in pair.server._connections.incoming
        check_bytes(pair, before, [4, 5], [7, 8])


async def _end(request: Any) -> None:
    await request.abort()


async def test_every_request_on_a_qp_that_does_not_let_go_says_so() -> None:
    """Those without an offer too, though none of their WRs has failed."""
    blocks = {"r": 1, "s": 2}
    with pytest.raises(VerbsError, match="ibv_destroy_qp"):  # the close says it
        async with connected(drain_timeout=patient(0.1)) as pair:
            requests = [
                pair.client.request(pair.peer, name, [block])
                for name, block in blocks.items()
            ]
            set_faults(pair.client, HELD)
            for request in requests:
                request.ready(0, [3])
            posted = LayerState.POSTED
            await until(lambda: all(r.layer_state(0) is posted for r in requests))
            async with stuck(pair.peer.link):
                with pytest.raises(VerbsError, match="ibv_destroy_qp"):
                    await asyncio.wait_for(pair.peer.close(), SOON)
                for request in requests:
                    with pytest.raises(NotQuiescentError, match="may still read"):
                        await asyncio.wait_for(request.sent(), SOON)
