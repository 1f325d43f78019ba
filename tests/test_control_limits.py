"""What strangers, and friends that are too many, cannot do to a listener."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from kvxfer import curve, wire
from kvxfer.control import ControlClient, InviteListener
from kvxfer.errors import RefusedError
from kvxfer.options import Options
from tests import control_messages as make
from tests.endpoints import connected, dial, until
from tests.test_control import (
    PATIENCE,
    Dialer,
    Listener,
    ask,
    dialed,
    hear,
    make_server,
)


@pytest.fixture
async def listener() -> Listener:
    return Listener()


@pytest.mark.parametrize("limit", ["max_connections", "max_client_connections"])
async def test_connections_are_bounded(listener: Listener, limit: str) -> None:
    limits: dict[str, Any] = {limit: 2}
    async with (
        make_server(listener, **limits) as server,
        dialed(server),
        dialed(server) as (client, _),
    ):
        with pytest.raises(RefusedError, match=rf"2 conn.*{limit}") as caught:
            async with dialed(server):
                pass
        assert caught.value.code == "busy"
        assert len(listener.conn_ids) == 2  # nothing was made for the third
        await client.close()
        await listener.wait_for(lambda: "closed" in listener.calls)
        await until(lambda: len(server._identities) == 1)
        async with dialed(server):
            assert server.statistics().refused == 1


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(52, b"\0")


def curve_options(folder: Path) -> tuple[dict[str, Any], curve.CurveKeys | None]:
    """Make keys; give the server's options and the client's keys."""
    public, server_secret = curve.generate("server", folder)
    _, secret = curve.generate("client", folder / "allowed")
    ours = Options.load(secret_key_file=secret, server_public_key=public)
    options = {
        "secret_key_file": str(server_secret),
        "client_keys_dir": str(folder / "allowed"),
    }
    return options, curve.client_keys(ours)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" * 9, id="http"),
        pytest.param(b"\xff\x00", id="half a greeting"),
        pytest.param(b"", id="silence"),
        pytest.param(GREETING, id="a greeting and no more"),
        pytest.param(
            GREETING + b"\x06" + (1 << 40).to_bytes(8, "big") + b"x" * 100,
            id="a terabyte",
        ),
    ],
)
async def test_links_that_never_become_peers(
    listener: Listener, data: bytes, keyed: bool, tmp_path: Path
) -> None:
    """They are closed and counted, delay nobody, and nothing is made for them."""
    options, keys = curve_options(tmp_path) if keyed else ({}, None)
    options["connect_timeout"] = 1.0
    with contextlib.ExitStack() as stack:
        async with make_server(listener, **options) as server:
            for _ in range(20):
                other = stack.enter_context(
                    socket.create_connection(("127.0.0.1", server.port))
                )
                other.sendall(data)
            client = ControlClient(Dialer(), keys=keys)
            await client.connect(server.endpoint, timeout=PATIENCE)
            await client.close()
            assert listener.calls.count("offer") == 1
            if not keyed and data.startswith(b"GET"):
                # Without keys ZMQ takes it for a peer of its first version, which
                # knows no handshake; it says nothing that is a message.
                stack.close()
            # While the other ends are open: it is this side that hangs up.
            await until(lambda: server.statistics().links_open == 0)
            statistics = server.statistics()
            assert (statistics.links, statistics.links_ready) == (21, 1)


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_link_that_trickles_never_becomes_a_peer(
    listener: Listener, keyed: bool, tmp_path: Path
) -> None:
    """A byte at a time: each of them is progress, and the deadline is for all."""
    options, keys = curve_options(tmp_path) if keyed else ({}, None)
    options["connect_timeout"] = 1.0
    async with make_server(listener, **options) as server:
        _, slow = await asyncio.open_connection("127.0.0.1", server.port)

        async def trickle() -> None:
            with contextlib.suppress(OSError):
                for byte in GREETING + bytes(10_000):
                    slow.write(bytes([byte]))
                    await slow.drain()
                    await asyncio.sleep(0.05)

        trickling = asyncio.ensure_future(trickle())
        client = ControlClient(Dialer(), keys=keys)
        await client.connect(server.endpoint, timeout=PATIENCE)
        await until(lambda: server.statistics().links == 2)
        # The greeting alone would take three seconds and more.
        await until(lambda: server.statistics().links_open == 1)
        assert not trickling.done()
        assert server.statistics().links_ready == 1
        assert listener.calls.count("offer") == 1
        trickling.cancel()
        await asyncio.wait({trickling})
        slow.close()
        with contextlib.suppress(OSError):
            await slow.wait_closed()
        await client.close()


async def test_handshakes_have_a_rate(listener: Listener) -> None:
    """Who dials too often is told to wait; one who does is let in."""
    async with make_server(listener, max_handshake_rate=2) as server:
        for _ in range(2):
            async with dialed(server):
                pass
        offers = listener.calls.count("offer")

        async def dial_again() -> None:
            nonlocal offers
            while True:
                async with dialed(server):
                    offers += 1

        with pytest.raises(RefusedError, match="max_handshake_rate") as caught:
            await asyncio.wait_for(dial_again(), PATIENCE)
        assert caught.value.code == "busy"
        assert listener.calls.count("offer") == offers
        assert server.statistics().refused == 1


@pytest.mark.parametrize("version", [9, None], ids=["of a version", "of nothing"])
async def test_garbage_without_a_connection_has_a_rate(
    listener: Listener, version: int | None
) -> None:
    """Of a flood little is read and answered; whoever dials meanwhile is let in."""
    rate, n = 2, 60
    frame = wire.encode(wire.Ping(seq=1), version=version) if version else b"nothing"
    loop = asyncio.get_running_loop()
    async with make_server(listener, max_handshake_rate=rate) as server:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(f"tcp://{server.endpoint}")
            began = loop.time()
            for _ in range(n):
                await dealer.send(frame)
            await until(lambda: server.statistics().garbage == n)
            async with dialed(server):
                seconds = loop.time() - began
            # Every answer to the flood comes before the one to this.
            await dealer.send(wire.encode(make.hello()))
            answers = []
            while not isinstance(answer := await hear(dealer), wire.Offer):
                answers.append(answer)
    assert all(isinstance(a, wire.Refuse) and a.code == "version" for a in answers)
    if version is None:
        assert not answers
    else:
        assert rate <= len(answers) <= rate + rate * seconds


@pytest.mark.parametrize("frame", [make.invite(), b"nothing"], ids=["valid", "garbage"])
async def test_invitations_have_a_rate(frame: bytes | wire.Invite) -> None:
    """Of those that are too many most are not read, and one that comes later is."""
    rate, n = 2, 60
    taken: list[wire.Invite] = []
    loop = asyncio.get_running_loop()
    data = wire.encode(frame) if isinstance(frame, wire.Invite) else frame
    listener = InviteListener(
        "127.0.0.1:0", lambda invite, _: taken.append(invite), rate
    )
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        began = loop.time()
        await listener.open()
        try:
            dealer.connect(f"tcp://{listener.endpoint}")
            for _ in range(n):
                await dealer.send(data)
            await until(lambda: len(taken) + listener.garbage + listener.unread == n)
            n_read = n - listener.unread
            assert rate <= n_read <= rate + rate * (loop.time() - began)
            later = make.invite(invite=b"another one now.")

            async def repeat() -> None:
                while later not in taken:
                    await dealer.send(wire.encode(later))
                    await asyncio.sleep(0.01)

            await asyncio.wait_for(repeat(), PATIENCE)
        finally:
            await listener.close()


async def test_clients_wait_for_their_turn() -> None:
    """The rate is the server's; a client that is told so tries again by itself."""
    async with connected(server_options={"max_handshake_rate": 2}) as pair:
        for _ in range(3):
            await pair.peer.close()
            pair.peer = await dial(pair.client, pair.server)
        await pair.check_write([1], [2])


async def test_who_says_too_much_is_disconnected(listener: Listener) -> None:
    """And nobody else is."""
    async with (
        make_server(listener, max_message_rate=20) as server,
        dialed(server) as (client, _),
    ):
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(f"tcp://{server.endpoint}")
            offer = await ask(dealer, make.hello())
            assert isinstance(offer, wire.Offer)
            await ask(dealer, make.accept(conn_id=offer.conn_id))
            for _ in range(100):
                await dealer.send(wire.encode(wire.Pong(seq=1)))
            await listener.wait_for(lambda: offer.conn_id in listener.reasons)
        assert "max_message_rate" in listener.reasons[offer.conn_id].text
        assert server.statistics().floods == 1
        assert await client.request_fence("still there?", timeout=PATIENCE)


async def test_a_recorded_handshake_opens_nothing(
    listener: Listener, tmp_path: Path
) -> None:
    """Every byte that a peer with a key sent, sent again."""
    options, keys = curve_options(tmp_path)
    async with make_server(listener, **options) as server:
        recorded = bytearray()

        async def relay(r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
            inner, outer = await asyncio.open_connection("127.0.0.1", server.port)

            async def pump(
                source: asyncio.StreamReader,
                sink: asyncio.StreamWriter,
                keep: bytearray | None,
            ) -> None:
                while data := await source.read(65536):
                    if keep is not None:
                        keep += data
                    sink.write(data)
                sink.close()

            await asyncio.gather(pump(r, outer, recorded), pump(inner, w, None))

        spy = await asyncio.start_server(relay, "127.0.0.1", 0)
        port = spy.sockets[0].getsockname()[1]
        client = ControlClient(Dialer(), keys=keys)
        await client.connect(f"127.0.0.1:{port}", timeout=PATIENCE)
        await client.close()
        await listener.wait_for(lambda: "closed" in listener.calls)
        spy.close()
        await spy.wait_closed()
        seen = list(listener.calls)
        assert len(recorded) > 1000
        await until(lambda: server.statistics().links_open == 0)
        with socket.create_connection(("127.0.0.1", server.port)) as replay:
            replay.sendall(recorded)
            await until(lambda: server.statistics().links == 2)
            await until(lambda: server.statistics().links_open == 0)
        assert server.statistics().links_ready == 1
        assert listener.calls == seen
