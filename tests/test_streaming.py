"""Streamed requests end to end, in one process, every byte compared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, Server, wire
from kvxfer.errors import (
    BrokenPeerError,
    ChecksumError,
    ClosedResourceError,
    KVXferError,
    LayoutError,
    ProtocolError,
    RequestAbortedError,
    RequestExpiredError,
    RequestIncompleteError,
    RequestStalledError,
    UsageError,
)
from kvxfer.requests import LayerState, RequestState, TicketState
from kvxfer.testing import set_faults
from tests.endpoints import SOON, arena, big, expected, take, until
from tests.streaming import Streamed, streamed


async def over(*things: Any) -> None:
    """Wait until requests and tickets are over, however they end."""
    await until(lambda: all(thing._over.is_set for thing in things))


def wanted(pair: Streamed, ours: list[int], theirs: list[int], **kw: Any) -> Any:
    return expected(pair.source, pair.target, pair.target.memory, ours, theirs, **kw)


async def test_a_request_from_the_offer_to_the_last_layer() -> None:
    async with streamed() as pair:
        after = wanted(pair, [1, 2, 3], [7, 5, 9])
        ticket = pair.server.offer(pair.prefill, "r1", {"main": [7, 5, 9]})
        request = pair.client.open("r1")
        for layer in range(3):
            request.ready(layer, [1, 2, 3], final=True)
            await asyncio.wait_for(ticket.wait_layer(layer), SOON)
            assert layer in ticket.layers_done
        request.finish(aux=b"first token: 42")
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        assert (pair.target.memory == after).all()
        assert ticket.state is TicketState.DONE and ticket.error is None
        assert ticket.aux == b"first token: 42"
        assert request.state is RequestState.DONE and request.error is None
        assert request.layer_state(2) is LayerState.VISIBLE
        metrics = request.metrics
        assert metrics.bytes == ticket.bytes_done == 3 * 3 * 512
        (peer,) = pair.client._streams_now().remotes.peers()
        assert (metrics.device, metrics.wire) == (peer.device, peer.wire)
        assert peer.wire != "none"
        assert [times.layer for times in metrics.layers] == [0, 1, 2]
        for times in metrics.layers:
            stages = (times.ready, times.posted, times.acknowledged, times.visible)
            assert None not in stages
            assert times.ready <= times.posted <= times.acknowledged  # type: ignore[operator]
        assert pair.server.finished() == [ticket]
        assert pair.client.finished() == [request]
        assert not pair.server.finished() and not pair.client.finished()


@pytest.mark.parametrize("offer_first", [True, False])
async def test_either_side_may_come_first(offer_first: bool) -> None:
    async with streamed() as pair:
        after = wanted(pair, [4, 6], [0, 31])

        def offer() -> Any:
            return pair.server.offer(pair.prefill, "r", {"main": [0, 31]})

        def write() -> Any:
            request = pair.client.open("r")
            request.ready(None, [4, 6])
            request.finish()
            return request

        if offer_first:
            ticket = offer()
            await until(lambda: pair.client.statistics().parked_offers == 1)
            request = write()
        else:
            request = write()
            await until(lambda: pair.client.statistics().waiting)
            lacks = {wait.lacks.value for wait in pair.client.statistics().waiting}
            assert lacks == {"an offer"}
            ticket = offer()
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        assert (pair.target.memory == after).all()


async def test_chunked_prefill_maps_itself_and_skips_what_is_there() -> None:
    """Chunks of 3, 2 and 4 blocks; the first two positions are a prefix hit."""
    async with streamed() as pair:
        local = list(range(10, 19))
        remote = list(range(20, 27))
        after = wanted(pair, local[2:], remote)
        ticket = pair.server.offer(
            pair.prefill, "r", {"main": remote}, first_block=2, checksum=True
        )
        request = pair.client.open("r")
        for start, stop in ((0, 3), (3, 5), (5, 9)):
            for layer in range(3):
                request.ready(
                    layer, local[start:stop], first_block=start, final=stop == 9
                )
        request.finish()
        await asyncio.wait_for(ticket.wait(), SOON)
        assert (pair.target.memory == after).all()
        assert ticket.bytes_done == 3 * 7 * 512


async def test_a_partly_filled_block_is_sent_again_until_its_layer_is_final() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]}, checksum=True)
        request = pair.client.open("r")
        places = pair.source.cache.group(None).rows(1)
        request.ready(1, [8, 9])
        await until(lambda: ticket.bytes_done == 2 * 512)
        for _, place in places:
            pair.source.blocks(place)[9] = 77
        after = wanted(pair, [8, 9], [3, 4], layers=[1])
        request.ready(1, [9], first_block=1, final=True)
        await asyncio.wait_for(ticket.wait_layer(1), SOON)
        assert (pair.target.memory == after).all()
        with pytest.raises(UsageError, match="layer 1 is final"):
            request.ready(1, [9], first_block=1)
        request.ready(None, [8, 9])  # the layers that are not
        request.finish()
        await asyncio.wait_for(ticket.wait(), SOON)


class Query:
    """As a CUDA event that is polled."""

    def __init__(self) -> None:
        self.set = False

    def query(self) -> bool:
        return self.set


class Synchronize:
    """As a CUDA event that is waited for."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def set(self) -> bool:
        return self._event.is_set()

    @set.setter
    def set(self, value: bool) -> None:
        self._event.set()

    def synchronize(self) -> None:
        self._event.wait(SOON)


def _query() -> tuple[Any, Callable[[], None]]:
    event = Query()
    return event, lambda: setattr(event, "set", True)


def _synchronize() -> tuple[Any, Callable[[], None]]:
    event = Synchronize()
    return event, lambda: setattr(event, "set", True)


def _asyncio() -> tuple[Any, Callable[[], None]]:
    event = asyncio.Event()
    return event, event.set


def _callable() -> tuple[Any, Callable[[], None]]:
    event = threading.Event()
    return lambda: event.is_set(), event.set


@pytest.mark.parametrize("make", [_query, _synchronize, _asyncio, _callable])
async def test_bytes_are_read_when_their_event_has_happened(make: Any) -> None:
    async with streamed() as pair:
        event, happen = make()
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5]})
        request = pair.client.open("r")
        request.ready(0, [1], final=True, event=event)
        await until(lambda: pair.client.statistics().waiting)
        assert {w.lacks.value for w in pair.client.statistics().waiting} == {
            "its event"
        }
        for _, place in pair.source.cache.group(None).rows(0):
            pair.source.blocks(place)[1] = 99
        after = wanted(pair, [1], [5], layers=[0])
        happen()
        await asyncio.wait_for(ticket.wait_layer(0), SOON)
        assert (pair.target.memory == after).all()
        await request.abort()


async def test_an_event_that_fails_ends_the_request_on_both_sides() -> None:
    def broken() -> None:
        raise RuntimeError("the stream is gone")

    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5]})
        request = pair.client.open("r")
        request.ready(2, [1], event=broken)
        await over(request, ticket)
        for error in (request.error, ticket.error):
            assert error is not None and error.layer == 2
            assert "the stream is gone" in str(error)
        with pytest.raises(UsageError, match="expected something with query"):
            request.ready(1, [1], event=object())


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_an_abort_is_learned_on_both_sides_and_leaves_nothing(side: str) -> None:
    async with streamed(big(1), big(2), peer_window_bytes=1 << 20) as pair:
        ids = list(range(64))
        ticket = pair.server.offer(pair.prefill, "r", {"main": ids})
        request = pair.client.open("r")
        for layer in range(7):  # of 8: however fast it is, it is not all
            request.ready(layer, ids)
        await until(lambda: ticket.bytes_done > 0)
        if side == "prefill":
            await request.abort("enough of it")
        else:
            await ticket.abort("enough of it")
        await over(request, ticket)
        before = pair.target.memory.copy()
        assert request.state is RequestState.ABORTED
        assert ticket.state is TicketState.ABORTED
        for error in (request.error, ticket.error):
            assert isinstance(error, RequestAbortedError)
            assert "enough of it" in str(error) and error.request_id == "r"
            assert 0 <= (error.bytes_done or 0) <= 28 << 20
        assert pair.client._host.adapters[0].engine.in_flight == 0
        # The blocks are free at once, and another request has them to itself.
        again = pair.server.offer(pair.prefill, "r2", {"main": ids[:4]})
        other = pair.client.open("r2")
        other.ready(None, ids[4:8])
        other.finish()
        after = expected(pair.source, pair.target, before, ids[4:8], ids[:4])
        await asyncio.wait_for(again.wait(), SOON)
        assert (pair.target.memory == after).all()


async def test_abort_before_the_offer_is_told_when_it_comes() -> None:
    async with streamed() as pair:
        request = pair.client.open("r")
        request.ready(0, [1])
        await request.abort("not wanted")
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5]})
        with pytest.raises(RequestAbortedError, match="not wanted"):
            await asyncio.wait_for(ticket.wait(), SOON)


async def test_in_a_thread_abort_returns_when_nothing_is_in_flight() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5]})
        request = pair.client.open("r")
        request.ready(0, [1])

        def engine() -> None:
            request.abort("from a thread")
            assert request.state is RequestState.ABORTED
            ticket.abort("also")
            assert ticket.state is TicketState.ABORTED

        await _in_thread(engine)


async def _in_thread(function: Callable[[], None]) -> None:
    """Run in a thread that ends, unlike those of the loop's executor."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised in the caller
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    await until(lambda: not thread.is_alive())
    thread.join()
    if failures:
        raise failures[0]


async def test_threads_drive_requests_and_poll() -> None:
    async with streamed() as pair:
        after = pair.target.memory.copy()
        for i in range(8):
            after = expected(pair.source, pair.target, after, [i, i + 8], [i, i + 16])

        def engine(i: int) -> None:
            name = f"r{i}"
            blocks = {"main": [i, i + 16]}
            ticket = pair.server.offer(pair.prefill, name, blocks)
            request = pair.client.open(name)
            for layer in range(3):
                request.ready(layer, [i, i + 8], final=True)
            request.finish(name.encode())
            while not ticket._over.is_set:  # as an engine does between its steps
                assert pair.client.statistics().requests.keys() <= set(RequestState)
                assert request.metrics.bytes <= 3 * 2 * 512
                assert set(ticket.layers_done) <= set(range(3))
                ticket._over.wait_blocking(0.0001)
            assert ticket._over.wait_blocking(SOON)
            assert request._over.wait_blocking(SOON)
            assert ticket.state is TicketState.DONE and ticket.aux == name.encode()

        await asyncio.gather(*(_in_thread(lambda i=i: engine(i)) for i in range(8)))  # type: ignore[misc]
        assert (pair.target.memory == after).all()
        assert len(pair.client.finished()) == len(pair.server.finished()) == 8


async def test_cancelling_who_waits_aborts_on_both_sides() -> None:
    async with streamed() as pair:
        for waits in ("sent", "wait"):
            ticket = pair.server.offer(pair.prefill, waits, {"main": [5]})
            request = pair.client.open(waits)
            request.ready(0, [1])
            await until(lambda: ticket.state is TicketState.ARRIVING)  # noqa: B023
            task = asyncio.ensure_future(
                request.sent() if waits == "sent" else ticket.wait()
            )
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            first = request if waits == "sent" else ticket
            assert first._over.is_set
            await over(request, ticket)
            for error in (request.error, ticket.error):
                assert isinstance(error, RequestAbortedError)
                assert error.code == "cancelled"


async def test_deadline_lease_and_stall_end_a_request() -> None:
    async with streamed(stall_timeout=0.2, request_lease=SOON) as pair:
        late = pair.server.offer(pair.prefill, "late", {"main": [1]})
        request = pair.client.open("late", deadline=0.05)
        await over(request, late)
        for error in (request.error, late.error):
            assert isinstance(error, RequestExpiredError) and error.code == "deadline"

        short = pair.server.offer(pair.prefill, "short", {"main": [1]}, lease=0.05)
        request = pair.client.open("short")
        await over(request, short)
        for error in (request.error, short.error):
            assert isinstance(error, RequestExpiredError) and error.code == "lease"

        lonely = pair.client.open("lonely", lease=0.05)
        await over(lonely)
        assert isinstance(lonely.error, RequestExpiredError)

        set_faults(pair.client, "act=delay,us=3000000,times=1")
        stuck = pair.server.offer(pair.prefill, "stuck", {"main": [1]})
        request = pair.client.open("stuck")
        await until(lambda: request.state is RequestState.STREAMING)
        request.ready(0, [2])
        await over(request, stuck)
        for error in (request.error, stuck.error):
            assert isinstance(error, RequestStalledError) and error.code == "stalled"


async def test_a_request_that_has_nothing_ready_does_not_stall() -> None:
    async with streamed(stall_timeout=0.1, request_lease=1.0) as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [1]})
        request = pair.client.open("r")
        request.ready(0, [1])
        await over(request, ticket)
        assert isinstance(request.error, RequestExpiredError)


async def test_a_corrupted_layer_is_never_reported() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]}, checksum=True)
        request = pair.client.open("r")
        request.ready(1, [8])
        await until(lambda: ticket.bytes_done > 0)
        _, place = pair.target.cache.group(None).rows(1)[0]
        pair.target.blocks(place)[3, 100] ^= 1
        request.ready(1, [9], first_block=1, final=True)
        await over(request, ticket)
        assert ticket.layers_done == ()
        for error in (request.error, ticket.error):
            assert isinstance(error, ChecksumError) and error.layer == 1
            assert "blocks 3, 4" in str(error)
        assert isinstance(ticket.error, ChecksumError)
        assert ticket.error.block_ids == (3, 4)


async def test_what_is_finished_with_holes_is_an_error() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        request = pair.client.open("r")
        request.ready(0, [1, 2])
        request.ready(1, [1])
        request.ready(2, [1, 2])
        request.finish()
        await over(request, ticket)
        for error in (request.error, ticket.error):
            assert isinstance(error, RequestIncompleteError) and error.layer == 1


async def test_the_client_refuses_blocks_that_are_not_offered() -> None:
    async with streamed() as pair:
        before = pair.target.memory.copy()
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        request = pair.client.open("r")
        request.ready(0, [1, 2, 3])
        await over(request, ticket)
        assert isinstance(request.error, LayoutError)
        assert "only those up to 1 are offered" in str(ticket.error)
        assert (pair.target.memory == before).all()


async def test_a_chunk_that_cannot_be_posted_is_not_waited_for() -> None:
    """The decode side is told how many records it has to hear of before the end."""
    async with streamed(fence_timeout=SOON) as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        request = pair.client.open("r")
        request.ready(0, [1])
        await until(lambda: request.layer_state(0) is LayerState.ACKNOWLEDGED)
        streams = pair.client._streams_now()
        (peer,) = streams.remotes.peers()
        # No call lets a block in that the cache does not have.
        request._core.ready(("main", 1), 0, np.array([99]), final=True, is_open=True)
        streams.post(lambda: streams.finish(streams._requests["r"], b""))
        await asyncio.wait_for(over(request, ticket), SOON / 2)
        assert isinstance(request.error, LayoutError)
        assert "layer 1 cannot be written" in str(ticket.error)
        assert peer.connected


async def test_a_record_of_foreign_blocks_is_refused_and_reported() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        request = pair.client.open("r")
        request.ready(0, [1, 2])
        await until(lambda: ticket.bytes_done > 0)
        (peer,) = pair.client._streams_now().remotes.peers()
        ids = np.array([9], np.int64)
        tag = (ticket._generation, 0, 0)
        peer.start("main", 0, ids, ids, "r", tag, None, 0, lambda transfer: None)
        await over(ticket, request)
        assert isinstance(ticket.error, ProtocolError)
        assert "block 9 is not among those offered" in str(ticket.error)
        assert pair.server._offers_now().refused == 1
        async for failure in pair.server.failures():
            assert "block 9" in failure.reason
            break


async def test_a_direct_write_may_not_touch_what_is_offered() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        peer = await pair.client.connect("127.0.0.1", pair.server.port)
        with pytest.raises(KVXferError):
            # Told at the second one at the latest: the first is in place by then.
            while True:
                await pair.client.write_cache(peer, [1], [4], 0)
        assert pair.server._offers_now().refused
        await ticket.abort()


async def test_blocks_belong_to_one_request_until_it_is_over() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        with pytest.raises(UsageError, match="block 4 of group 'main' is offered"):
            pair.server.offer(pair.prefill, "r2", {"main": [4, 5]})
        with pytest.raises(UsageError, match="'r' is offered already"):
            pair.server.offer(pair.prefill, "r", {"main": [6]})
        await pair.server.fence("r")
        assert ticket.state is TicketState.ABORTED
        again = pair.server.offer(pair.prefill, "r2", {"main": [4, 5]})
        await again.abort()


async def test_wrong_use_is_said_where_it_happens() -> None:
    async with streamed() as pair:
        offer = pair.server.offer
        for blocks, message in [
            ({}, "mapping of group to block ids"),
            ([3], "mapping of group to block ids"),
            ({"main": [99]}, "of 32 blocks"),
            ({"main": [3, 3]}, "offered twice"),
            ({"other": [3]}, "other"),
        ]:
            with pytest.raises(UsageError, match=message):
                offer(pair.prefill, "r", blocks)  # type: ignore[arg-type]
        for where in ("nowhere", "host:0", "host:99999", ""):
            with pytest.raises(UsageError):
                offer(where, "r", {"main": [3]})
        with pytest.raises(UsageError, match="2 addresses"):
            offer([pair.prefill, "h:1"], "r", {"main": [3]}, sources=1)
        with pytest.raises(UsageError, match="lease"):
            offer(pair.prefill, "r", {"main": [3]}, lease=0)
        with pytest.raises(UsageError, match="empty"):
            pair.client.open("")
        request = pair.client.open("r")
        with pytest.raises(UsageError, match="open already"):
            pair.client.open("r")
        with pytest.raises(LayoutError, match="layer 7"):
            request.ready(7, [1])
        with pytest.raises(LayoutError, match="of 32 blocks"):
            request.ready(0, [32])
        with pytest.raises(UsageError, match="not a position"):
            request.ready(0, [1], first_block=-1)
        with pytest.raises(UsageError, match="more than 65536"):
            request.finish(bytes(65537))
        request.finish()
        with pytest.raises(UsageError, match="is finished"):
            request.ready(0, [1])
        with pytest.raises(UsageError, match="is finished"):
            request.finish()
        await request.abort()
        await request.abort()


async def test_closing_ends_what_is_open() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3]})
        request = pair.client.open("r")
        request.ready(0, [1])
        await until(lambda: ticket.bytes_done > 0)
        await pair.client.close()
        assert isinstance(request.error, ClosedResourceError)
        await over(ticket)
        assert isinstance(ticket.error, BrokenPeerError)
        with pytest.raises(ClosedResourceError):
            pair.client.open("r2")
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3]})
        request = pair.client.open("r")
        request.ready(0, [1])
        await until(lambda: ticket.bytes_done > 0)
        await pair.server.close()
        assert isinstance(ticket.error, ClosedResourceError)
        await over(request)
        assert isinstance(request.error, BrokenPeerError)
        with pytest.raises((UsageError, ClosedResourceError)):
            pair.server.offer(pair.prefill, "r2", {"main": [4]})


async def test_the_direct_form_needs_no_offer() -> None:
    async with streamed() as pair:
        after = wanted(pair, [1, 2, 3], [9, 8, 7])
        peer = await pair.client.connect("127.0.0.1", pair.server.port)
        request = pair.client.request(peer, "d", [9, 8, 7])
        request.ready(None, [1, 2], final=False)
        request.ready(None, [3], first_block=2, final=True)
        with pytest.raises(UsageError, match="no ticket"):
            request.finish(aux=b"x")
        request.finish()
        await asyncio.wait_for(request.sent(), SOON)
        assert (pair.target.memory == after).all()
        arrivals = await take(pair.server, 6)
        assert {arrival.request_id for arrival in arrivals} == {"d"}
        assert request.layer_state(0) is LayerState.VISIBLE


async def test_several_sources_must_all_finish() -> None:
    """Two ranks, each with some of the layers of the decode side."""
    halves = [arena(seed=i, layers=layers) for i, layers in ((1, [0, 1]), (3, [2, 3]))]
    with arena(seed=2, layers=4) as target, halves[0] as low, halves[1] as high:
        options: dict[str, Any] = {"listen": "127.0.0.1:0"}
        async with (
            Server(target.cache, port=0) as server,
            Client(low.cache, **options) as first,
            Client(high.cache, **options) as second,
        ):
            after = expected(low, target, target.memory, [1], [5], [0, 1])
            after = expected(high, target, after, [2], [5], [2, 3])
            assert first.listening is not None and second.listening is not None
            ticket = server.offer(first.listening, "r", {"main": [5]}, sources=2)
            one = first.open("r")
            one.ready(None, [1])
            one.finish(b"low")
            await until(lambda: ticket.bytes_done == 2 * 512)
            # Nobody knows yet whether the other writer holds these layers as well.
            assert ticket.layers_done == ()
            same = server.offer(second.listening, "r", {"main": [5]}, sources=2)
            assert same is ticket
            await until(lambda: len(ticket.layers_done) == 2)
            two = second.open("r")
            assert ticket.state is TicketState.ARRIVING, ticket.error
            two.ready(None, [2], final=True)
            await asyncio.wait_for(ticket.wait_layer(3), SOON)
            two.finish()
            await asyncio.wait_for(ticket.wait(), SOON)
            assert (target.memory == after).all() and ticket.aux == b"low"
            await one.sent()
            await two.sent()


async def test_a_broken_connection_is_rebuilt_and_others_never_notice() -> None:
    async with streamed(big(1), big(2), peer_window_bytes=1 << 20) as pair:
        ids = list(range(32))
        victim = pair.server.offer(pair.prefill, "victim", {"main": ids})
        other = pair.server.offer(
            pair.prefill, "other", {"main": range(32, 64)}, checksum=True
        )
        requests = [pair.client.open(name) for name in ("victim", "other")]
        for request in requests:
            request.ready(None, ids)
        await until(lambda: victim.bytes_done > 0 and other.bytes_done > 0)
        (conn_id,) = pair.server._connections.incoming
        pair.server._connections.drop_peer(conn_id, "a test")
        requests[1].finish()
        await asyncio.wait_for(other.wait(), SOON)
        await asyncio.wait_for(requests[1].sent(), SOON)
        (now,) = pair.server._connections.incoming
        assert now != conn_id
        await asyncio.wait_for(pair.server.fence("victim"), SOON)
        after = expected(
            pair.source, pair.target, pair.target.memory, ids, range(32, 64)
        )
        assert (pair.target.memory == after).all()


async def test_a_look_at_a_layer_knows_of_what_was_said_just_now() -> None:
    """Else it answers ACKNOWLEDGED for blocks that are yet to be read."""
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5, 6]})
        request = pair.client.open("r")
        with pytest.raises(LayoutError, match="nothing is ready of layer 0"):
            request.layer_state(0)
        request.ready(0, [1])
        assert request.layer_state(0) is LayerState.WAITING
        assert [times.layer for times in request.metrics.layers] == [0]
        await until(lambda: request.layer_state(0) is LayerState.ACKNOWLEDGED)
        # The loop has not had a turn since, so it cannot have been written.
        request.ready(0, [2], first_block=1)
        assert request.layer_state(0) is LayerState.WAITING
        await until(lambda: request.layer_state(0) is LayerState.ACKNOWLEDGED)
        await ticket.abort()
        await over(request)
        request.ready(1, [1])
        assert request.layer_state(1) is LayerState.WAITING


@pytest.mark.parametrize("n_qps", [1, 2, 4])
async def test_acknowledged_is_not_yet_visible_and_an_abort_waits_for_that(
    n_qps: int,
) -> None:
    """A device that acknowledges at once and puts bytes in place a second later."""
    # Of sixty WRs sixteen fit at a time: the abort finds a chunk in its middle, since
    # without a thread of the engine the rest waits for the event loop.
    async with streamed(
        *(big(1), big(2)), sq_depth=16, qps_per_connection=n_qps, progress="event"
    ) as pair:
        ids = list(range(60))
        ticket = pair.server.offer(pair.prefill, "r", {"main": ids})
        request = pair.client.open("r")
        await until(lambda: request.state is RequestState.STREAMING)
        set_faults(pair.server, "act=posted_write_delay,us=1000000")
        request.ready(0, ids)
        await until(lambda: request.layer_state(0) is LayerState.POSTED)
        assert request.metrics.bytes == 0
        await request.abort()
        await over(ticket)
        before = pair.target.memory.copy()
        set_faults(pair.server, "")
        # What follows on the same connection pushes everything into its place.
        again = pair.server.offer(pair.prefill, "r2", {"main": range(60, 64)})
        other = pair.client.open("r2")
        other.ready(None, range(4))
        other.finish()
        await asyncio.wait_for(again.wait(), SOON)
        after = expected(pair.source, pair.target, before, range(4), range(60, 64))
        assert (pair.target.memory == after).all()


async def test_what_an_old_connection_says_is_not_believed_on_the_new_one() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5]})
        await until(lambda: pair.client.statistics().parked_offers == 1)
        remotes = pair.client._streams_now().remotes
        (remote,) = remotes._by_invite.values()
        (old,) = remotes.peers()
        (_, offer, _) = remotes._parked["r"]
        old.break_("a test")
        # A connection that has begun to break does not say that anything is over.
        assert not remote.send(wire.Ended(conn_id=1, generation=1, code="aborted"))
        await until(lambda: remotes.peers() not in ([], [old]))
        await ticket.abort()
        await until(lambda: pair.client.statistics().parked_offers == 0)
        remotes._on_message(remote, old, offer)
        assert pair.client.statistics().parked_offers == 0


async def test_a_broken_connection_gives_no_word_that_nothing_can_land() -> None:
    """The write is dropped, and arrives when its queue pair has failed."""
    async with streamed(ib_timeout=14, retry_cnt=2) as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [5, 6]})
        request = pair.client.open("r")
        await until(lambda: request.state is RequestState.STREAMING)
        set_faults(pair.client, "act=late_write,nth=1,us=50000")
        request.ready(0, [1, 2])
        await until(lambda: request.layer_state(0) is LayerState.POSTED)
        await asyncio.wait_for(pair.server.fence("r"), SOON)
        before = pair.target.memory.copy()
        await over(request)
        again = pair.server.offer(pair.prefill, "r2", {"main": [7]})
        other = pair.client.open("r2")
        other.ready(None, [3])
        other.finish()
        await asyncio.wait_for(again.wait(), SOON)
        after = expected(pair.source, pair.target, before, [3], [7])
        assert (pair.target.memory == after).all()
        assert ticket.state is TicketState.ABORTED
