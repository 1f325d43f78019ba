"""What is said while a connection begins to end, or while nobody can be reached."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import zmq.asyncio

from kvxfer import Client, KVCache, Server, control_io, wire
from kvxfer.control import InviteListener
from kvxfer.control_invite import Inviter
from kvxfer.errors import KVXferError, RequestAbortedError, UsageError
from kvxfer.notify import Record
from kvxfer.offers import Offers
from kvxfer.remotes import Remotes
from kvxfer.requests import End, EndCode, RequestState, TicketState
from kvxfer.ticket import Ticket
from kvxfer.writers import Writer, Writers
from tests import control_messages as make
from tests.endpoints import SOON, arena, until
from tests.streaming import HASTY, streamed


async def test_complete_is_heard_of_a_connection_that_has_begun_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has landed has landed: the request of a ticket that is done is done."""
    say = Offers._say_complete
    async with streamed() as pair:

        def late(offers: Offers, ticket: Ticket) -> None:
            assert pair.client._streams is not None
            (peer,) = pair.client._streams.remotes.peers()
            peer.break_("a test")
            # Its end is told in the loop's next turn; the word comes after that.
            say(offers, ticket)

        monkeypatch.setattr(Offers, "_say_complete", late)
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        request = pair.client.open("r")
        request.ready(None, [1, 2])
        request.finish()
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        assert ticket.state is TicketState.DONE
        assert request.state is RequestState.DONE


def _cut(server: Server, n_links: int = 1) -> None:
    """Break the links of a server's control connections; nobody says goodbye."""
    control = server._listening()
    assert len(control._doors._by_fd) == n_links
    for fd in list(control._doors._by_fd):
        with socket.socket(fileno=os.dup(fd)) as link:
            link.shutdown(socket.SHUT_RDWR)


def _make_deaf(monkeypatch: pytest.MonkeyPatch) -> set[str | None]:
    """Let clients made from now on hear no invitations, while they are in the set."""
    deaf: set[str | None] = set()
    on_invite = Remotes._on_invite

    def hear(remotes: Remotes, invite: wire.Invite, host: str) -> None:
        if remotes.endpoint not in deaf:
            on_invite(remotes, invite, host)

    monkeypatch.setattr(Remotes, "_on_invite", hear)
    return deaf


def _writers(server: Server) -> Writers:
    assert server._offers is not None
    return server._offers.writers


async def test_complete_is_said_again_when_its_link_has_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The word is lost with the link: the writer is invited to hear it."""
    say = Offers._say_complete
    async with streamed() as pair:

        def lost(offers: Offers, ticket: Ticket) -> None:
            _cut(pair.server)
            say(offers, ticket)

        monkeypatch.setattr(Offers, "_say_complete", lost)
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        request = pair.client.open("r")
        request.ready(None, [1, 2])
        request.finish()
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        assert request.state is RequestState.DONE


async def test_complete_is_said_again_when_it_came_behind_the_goodbye(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A record is taken as long as there is the queue pair that brought it."""
    held: list[Callable[[], None]] = []
    record, closed = Offers.record, Writers.closed

    def hold(offers: Offers, conn_id: int, one: Record) -> None:
        held.append(lambda: record(offers, conn_id, one))

    def release(writers: Writers, *arguments: Any, **named: Any) -> None:
        while held:
            held.pop(0)()
        closed(writers, *arguments, **named)

    async with streamed() as pair:
        monkeypatch.setattr(Offers, "record", hold)
        monkeypatch.setattr(Writers, "closed", release)
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3]})
        request = pair.client.open("r")
        request.ready(None, [1])
        request.finish()
        await until(lambda: len(held) == 3 and not request._core.in_flight)
        (peer,) = pair.client._streams_now().remotes.peers()
        peer.break_("a test")
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        assert request.state is RequestState.DONE


async def test_complete_is_said_to_a_writer_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was done before another one, and comes back when that one is done too."""
    deaf = _make_deaf(monkeypatch)
    with arena(seed=2) as target, arena(seed=1) as one, arena(seed=3) as two:
        async with (
            Server(target.cache, host="127.0.0.1", port=0, **HASTY) as server,
            Client(one.cache, listen="127.0.0.1:0", **HASTY) as first,
            Client(two.cache, listen="127.0.0.1:0", **HASTY) as second,
        ):
            addresses = [first.listening or "", second.listening or ""]
            ticket = server.offer(addresses, "r", {"main": [5]}, sources=2)
            requests = [client.open("r") for client in (first, second)]
            await until(lambda: all(r.state.value == "streaming" for r in requests))
            requests[0].ready(None, [1])
            requests[0].finish()
            await until(lambda: ticket._core._sources[_first(server)].finished)
            deaf.add(first.listening)
            (peer,) = first._streams_now().remotes.peers()
            peer.break_("a test")
            await until(lambda: _first(server).conn_id is None)
            requests[1].ready(None, [1])
            requests[1].finish()
            await asyncio.wait_for(ticket.wait(), SOON)
            deaf.clear()
            for request in requests:
                await asyncio.wait_for(request.sent(), SOON)


def _first(server: Server) -> Writer:
    return next(iter(_writers(server)._by_address.values()))


@pytest.mark.parametrize("patient", [True, False])
async def test_a_writer_that_does_not_come_back_is_not_invited_for_ever(
    monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    deaf = _make_deaf(monkeypatch)
    async with streamed() as pair:
        ticket = pair.server.offer(pair.prefill, "r", {"main": [3]})
        request = pair.client.open("r")
        request.ready(None, [1])
        request.finish()
        await asyncio.wait_for(ticket.wait(), SOON)
        await asyncio.wait_for(request.sent(), SOON)
        deaf.add(pair.client.listening)
        writer = _first(pair.server)
        _cut(pair.server)
        await until(lambda: writer.inviter._sending is not None)
        if patient:
            await until(lambda: not _writers(pair.server)._by_address)
            assert writer.inviter._sending is None
            assert pair.client._streams_now().remotes.peers() == []
    assert writer.inviter._sending is None


async def test_an_offer_that_is_extended_when_it_ends_invites_nobody() -> None:
    async with streamed() as pair:
        ticket = pair.server.offer("127.0.0.1:1", "r", {"main": [3]}, sources=2)
        await until(lambda: ticket._lease is not None)
        again = pair.server.offer(pair.prefill, "r", {"main": [3]}, sources=2)
        assert again is ticket
        offers = pair.server._offers
        assert offers is not None
        offers.stop(ticket, End(EndCode.ABORTED, "a test"))
        assert ticket.state is TicketState.ABORTED
        # What the offer has left for the loop to do comes before what is left now.
        await asyncio.wait_for(pair.server.fence("another"), SOON)
        for _ in range(3):
            await asyncio.sleep(0)
        assert not offers.writers._by_address


async def test_an_inviter_survives_a_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors now are no reason to invite nobody ever after."""
    taken: list[wire.Invite] = []
    listener = InviteListener("127.0.0.1:0", lambda invite, _: taken.append(invite), 99)
    await listener.open()
    monkeypatch.setattr(control_io, "shortage", lambda: "a test leaves none")
    inviter = Inviter(str(listener.endpoint), 0.01)
    try:
        inviter.start(make.invite())
        sending = inviter._sending
        assert sending is not None
        for _ in range(3):
            await asyncio.sleep(0)
        assert not sending.done()
        monkeypatch.undo()
        await until(lambda: taken)
    finally:
        ended = inviter.stop()
        assert ended is not None
        await asyncio.wait({ended})
        await listener.close()


async def test_a_name_that_is_not_known_costs_no_sockets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is tried."""
    contexts: list[zmq.asyncio.Context] = []
    make_context = control_io._new_context

    def made() -> zmq.asyncio.Context:
        contexts.append(make_context())
        return contexts[-1]

    monkeypatch.setattr(control_io, "_new_context", made)
    inviter = Inviter("no..name:1", 0.001)
    inviter.start(make.invite())
    try:
        await until(lambda: caplog.text.count("cannot be invited yet") > 2)
        assert not contexts
    finally:
        ended = inviter.stop()
        assert ended is not None
        await asyncio.wait({ended})


async def test_a_writer_that_comes_back_hears_of_an_offer_that_is_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not wait for another writer, which has not stopped yet."""
    options = {**HASTY, "fence_timeout": SOON}
    with arena(seed=2) as target, arena(seed=1) as one, arena(seed=3) as two:
        async with (
            Server(target.cache, host="127.0.0.1", port=0, **options) as server,
            Client(one.cache, listen="127.0.0.1:0", **options) as first,
            Client(two.cache, listen="127.0.0.1:0", **options) as second,
        ):
            addresses = [first.listening or "", second.listening or ""]
            ticket = server.offer(addresses, "r", {"main": [5]}, sources=2)
            requests = [client.open("r") for client in (first, second)]
            await until(lambda: all(r.state.value == "streaming" for r in requests))
            # The second does not hear that it is to stop.
            on_abort = Remotes._on_abort
            assert first._streams is not None and second._streams is not None
            deaf, other = second._streams.remotes, first._streams.remotes

            def hear(remotes: Remotes, *arguments: object) -> None:
                if remotes is not deaf:
                    on_abort(remotes, *arguments)  # type: ignore[arg-type]

            monkeypatch.setattr(Remotes, "_on_abort", hear)
            (peer,) = other.peers()
            peer.break_("a test")
            await until(lambda: not other.peers())
            aborting = asyncio.ensure_future(ticket.abort())
            with pytest.raises(RequestAbortedError):
                await asyncio.wait_for(requests[0].sent(), SOON / 2)
            assert ticket.state is TicketState.OFFERED or not ticket._core.is_over
            await requests[1].abort()
            await asyncio.wait_for(aborting, SOON)


async def test_digests_are_not_for_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor computes them. Nobody waits for the lease to learn that."""
    async with streamed() as pair:
        far = pair.target.cache
        monkeypatch.setattr(
            KVCache, "on_host", property(lambda cache: cache is not far)
        )
        with pytest.raises(UsageError, match="checksum=True is for caches in host"):
            pair.server.offer(pair.prefill, "r", {"main": [3]}, checksum=True)
        pair.server.offer(pair.prefill, "other", {"main": [3]})
        far = pair.source.cache
        ticket = pair.server.offer(pair.prefill, "r", {"main": [4]}, checksum=True)
        request = pair.client.open("r")
        request.ready(None, [1])
        request.finish()
        for end in (ticket.wait(), request.sent()):
            with pytest.raises(KVXferError, match="cache lies on a GPU"):
                await asyncio.wait_for(end, SOON / 2)
