"""The handshake service on real sockets, with peers good, bad and dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq
import zmq.asyncio

from kvxfer import wire
from kvxfer.control import (
    CloseCause,
    CloseReason,
    ControlClient,
    ControlServer,
    OfferParts,
)
from kvxfer.control_io import in_thread
from kvxfer.errors import (
    AddressInUseError,
    ClosedResourceError,
    ConnectTimeoutError,
    ControlError,
    DeviceUnavailableError,
    GeometryMismatchError,
    ProtocolError,
    RefusedError,
    UsageError,
    VersionMismatchError,
)
from kvxfer.heartbeat import heartbeat
from kvxfer.options import Options
from tests import control_messages as make

# For waits that only a broken test uses up.
PATIENCE = 20.0
FAST = Options(ping_interval=0.05, ping_timeout=0.25)


# libuv opens a pipe for signals when its first loop is made, for good.
uvloop.new_event_loop().close()


class Recorder:
    """What a delegate was asked, in order."""

    def __init__(self, role: wire.Role) -> None:
        self.role: wire.Role = role
        self.log: list[tuple[str, Any]] = []
        self.news = asyncio.Event()

    def note(self, what: str, detail: Any = None) -> None:
        self.log.append((what, detail))
        self.news.set()

    @property
    def calls(self) -> list[str]:
        return [name for name, _ in self.log]

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        async def look() -> None:
            while not condition():
                self.news.clear()
                await self.news.wait()

        await asyncio.wait_for(look(), PATIENCE)


class Listener(Recorder):
    """A listener's delegate that writes down what it is asked."""

    def __init__(self, role: wire.Role = "target") -> None:
        super().__init__(role)
        self.conn_ids: list[int] = []
        self.reasons: dict[int, CloseReason] = {}
        self.addresses: list[str] = []
        self.on_offer: Callable[[wire.Hello], Awaitable[None]] | None = None
        self.on_accept: Callable[[], Awaitable[None]] | None = None
        self.on_fence: Callable[[], Awaitable[None]] | None = None

    async def offer(
        self, hello: wire.Hello, conn_id: int, peer_address: str
    ) -> OfferParts:
        self.note("offer", hello)
        if self.on_offer is not None:
            await self.on_offer(hello)
        self.conn_ids.append(conn_id)
        self.addresses.append(peer_address)
        return OfferParts(
            geometry=make.geometry(),
            device=make.device("soft9"),
            dialer_device=hello.devices[0].name,
            endpoint=make.endpoint(self.role),
        )

    async def accept(self, conn_id: int, accept: wire.Accept) -> None:
        self.note("accept", accept)
        if self.on_accept is not None:
            await self.on_accept()

    def established(self, conn_id: int) -> None:
        self.note("established", conn_id)

    async def fence(self, conn_id: int, reason: str) -> None:
        self.note("fence", reason)
        if self.on_fence is not None:
            await self.on_fence()

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        self.note("failed", message)

    def request(self, conn_id: int, message: wire.RequestMessage) -> None:
        self.note("request", message)

    def drain(self, conn_id: int, reason: str) -> None:
        self.note("drain", reason)

    def drained(self, conn_id: int) -> None:
        self.note("drained")

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        self.note("credit", (consumed_bytes, consumed_records))

    async def closed(self, conn_id: int, reason: CloseReason) -> None:
        assert conn_id not in self.reasons, "closed came twice"
        self.reasons[conn_id] = reason
        self.note("closed", reason.cause)


class Dialer(Recorder):
    """A dialer's delegate that writes down what it is asked."""

    def __init__(self, role: wire.Role = "initiator", **changes: Any) -> None:
        super().__init__(role)
        self.changes = changes
        self.on_accept: Callable[[], Awaitable[None]] | None = None

    def hello(self) -> wire.Hello:
        return make.hello(self.role, nonce=wire.new_nonce(), **self.changes)

    async def accept(self, offer: wire.Offer) -> wire.Accept:
        self.note("accept", offer)
        if self.on_accept is not None:
            await self.on_accept()
        return make.accept(self.role, conn_id=offer.conn_id)

    async def fence(self, conn_id: int, reason: str) -> None:
        self.note("fence", reason)

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        self.note("failed", message)

    def request(self, conn_id: int, message: wire.RequestMessage) -> None:
        self.note("request", message)

    def drain(self, conn_id: int, reason: str) -> None:
        self.note("drain", reason)

    def drained(self, conn_id: int) -> None:
        self.note("drained")

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        self.note("credit", (consumed_bytes, consumed_records))

    async def closed(self, reason: CloseReason) -> None:
        self.note("closed", reason.cause)


def make_server(
    delegate: Listener, host: str = "127.0.0.1", port: int = 0, **options: Any
) -> ControlServer:
    fields = {"ping_interval": 0.05, "ping_timeout": 0.25, **options}
    return ControlServer(
        delegate,
        host,
        port,
        incarnation=b"l" * 16,
        features=0b011,
        options=Options(**fields),
    )


@pytest.fixture
async def listener() -> Listener:
    return Listener()


@pytest.fixture
async def server(listener: Listener) -> AsyncIterator[ControlServer]:
    async with make_server(listener) as server:
        yield server


@contextlib.asynccontextmanager
async def dialed(
    server: ControlServer, delegate: Dialer | None = None
) -> AsyncIterator[tuple[ControlClient, Dialer]]:
    delegate = delegate or Dialer()
    client = ControlClient(delegate, options=FAST)
    try:
        await client.connect(server.endpoint, timeout=PATIENCE)
        yield client, delegate
    finally:
        await client.close()


async def settled(server: ControlServer) -> None:
    """Wait until no handshake is pending; the books follow ``closed`` by a turn."""

    async def look() -> None:
        while server.statistics().pending:  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(0)

    await asyncio.wait_for(look(), PATIENCE)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- the good case ---------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "ipc"])
@pytest.mark.parametrize("role", ["initiator", "target"])
async def test_handshake(host: str, role: wire.Role, tmp_path: Path) -> None:
    if host == "ipc":
        host = f"ipc://{tmp_path}/control"
    listener = Listener("target" if role == "initiator" else "initiator")
    dialer = Dialer(role)
    client = ControlClient(dialer)
    async with make_server(listener, host) as server:
        info = await client.connect(server.endpoint, timeout=PATIENCE)
        assert client.is_established
        assert server.connections == listener.conn_ids == [info.conn_id]
        assert listener.calls == ["offer", "accept", "established"]
        assert (info.version, info.features, info.role) == (1, 0b010, role)
        assert info.offer.incarnation == b"l" * 16
        expected = {"::1": "::1", "[::1]": "::1"}.get(host, "127.0.0.1")
        if host.startswith("ipc"):
            expected = ""
        assert info.peer_address == expected
        assert listener.addresses == [expected]
        await client.close("that was all")
        await listener.wait_for(lambda: bool(listener.reasons))
        reason = listener.reasons[info.conn_id]
        assert reason.cause is CloseCause.BYE and "that was all" in reason.text
    assert dialer.calls == ["accept", "closed"]
    assert listener.calls == ["offer", "accept", "established", "closed"]


async def test_server_close_tells_the_client(listener: Listener) -> None:
    server = make_server(listener)
    await server.start()
    async with dialed(server) as (client, dialer):
        await server.close("maintenance")
        await dialer.wait_for(lambda: "closed" in dialer.calls)
        assert dialer.log[-1] == ("closed", CloseCause.BYE)
        assert not client.is_established
        assert next(iter(listener.reasons.values())).cause is CloseCause.LOCAL


@pytest.mark.parametrize("role", ["initiator", "target"])
async def test_messages_while_established(role: wire.Role) -> None:
    listener = Listener("target" if role == "initiator" else "initiator")
    async with (
        make_server(listener) as server,
        dialed(server, Dialer(role)) as (client, dialer),
    ):
        (conn_id,) = server.connections
        if role == "initiator":
            assert server.send_credit(conn_id, 128, 2)
            assert server.send_credit(conn_id, 256, 4)
            await dialer.wait_for(lambda: len(dialer.log) == 3)
            assert dialer.log[1:] == [("credit", (128, 2)), ("credit", (256, 4))]
        else:
            assert client.send_credit(128, 2)
            await listener.wait_for(lambda: "credit" in listener.calls)
        assert client.send_failed(b"r1", [3], "gave up")
        await listener.wait_for(lambda: "failed" in listener.calls)
        assert server.send_failed(conn_id, b"r2", [4], "gave up too")
        await dialer.wait_for(lambda: "failed" in dialer.calls)
        with pytest.raises(UsageError):
            client.send_failed(b"r" * 257, [3], "")
        assert client.is_established
        assert await client.request_fence("a write failed", timeout=PATIENCE)
        assert listener.log[-1] == ("fence", "a write failed")
        assert await client.request_fence("again", timeout=PATIENCE)
        assert await server.fence(conn_id, "to be sure", timeout=PATIENCE)
        assert dialer.log[-1] == ("fence", "to be sure")
        assert server.drop(conn_id, "enough")
        assert not server.drop(conn_id, "enough")
        assert not server.send_credit(conn_id, 1, 1)
        assert not await server.fence(conn_id, "too late")
        await dialer.wait_for(lambda: "closed" in dialer.calls)
        assert not client.send_failed(b"r1", [3], "too late")
        assert not await client.request_fence("too late")


async def test_a_fence_that_takes_too_long_is_not_confirmed(
    server: ControlServer, listener: Listener
) -> None:
    go = asyncio.Event()

    async def wait() -> None:
        await go.wait()

    listener.on_fence = wait
    async with dialed(server) as (client, _):
        assert not await client.request_fence("x", timeout=0.01)
        go.set()
        assert await client.request_fence("x", timeout=PATIENCE)


async def test_fifty_clients_at_once(server: ControlServer, listener: Listener) -> None:
    clients = [ControlClient(Dialer()) for _ in range(50)]
    infos = await asyncio.gather(
        *(client.connect(server.endpoint, timeout=PATIENCE) for client in clients)
    )
    assert len({info.conn_id for info in infos}) == 50
    assert server.statistics().connections == 50
    await asyncio.gather(*(client.close() for client in clients))
    await listener.wait_for(lambda: len(listener.reasons) == 50)
    await settled(server)
    assert server.statistics().connections == 0


# -- addresses -------------------------------------------------------------


async def test_a_port_in_use_names_address_and_remedy(server: ControlServer) -> None:
    second = make_server(Listener(), port=server.port)
    with pytest.raises(AddressInUseError, match=f"127.0.0.1:{server.port}") as caught:
        await second.start()
    assert "choose another port" in str(caught.value)
    await second.close()


async def test_an_ipc_path_in_use_is_not_stolen(tmp_path: Path) -> None:
    host = f"ipc://{tmp_path}/c"
    async with make_server(Listener(), host) as first:
        second = make_server(Listener(), host)
        with pytest.raises(AddressInUseError, match="ipc://"):
            await second.start()
        async with dialed(first) as (client, _):
            assert client.is_established
        assert os.stat(f"{tmp_path}/c").st_mode & 0o077 == 0


async def test_a_stale_ipc_path_is_taken_and_a_file_is_not(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(f"{tmp_path}/stale")
    async with (
        make_server(Listener(), f"ipc://{tmp_path}/stale") as server,
        dialed(server) as (client, _),
    ):
        assert client.is_established
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ControlError, match="no socket"):
        await make_server(Listener(), f"ipc://{tmp_path}/file").start()
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "address", ["", "host", "::1:80", "h:70000", "h:", "[::1]", "ipc://", "h:1:2"]
)
async def test_an_address_that_is_none(address: str) -> None:
    client = ControlClient(Dialer())
    with pytest.raises(UsageError):
        await client.connect(address)
    await client.close()


async def test_an_address_of_nobody_here() -> None:
    server = make_server(Listener(), "192.0.2.1")
    with pytest.raises(ControlError, match="No interface of this host"):
        await server.start()
    await server.close()
    with pytest.raises(ControlError, match="cannot resolve"):
        await make_server(Listener(), "no-such-host.invalid").start()


# -- refusals --------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        GeometryMismatchError("block_bytes 1024 here, 2048 there"),
        DeviceUnavailableError("no device in common", hint="Load the driver."),
        RefusedError("not today", code="holiday"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_refusal_arrives_as_what_it_was(
    server: ControlServer, listener: Listener, error: Exception
) -> None:
    async def refuse(hello: wire.Hello) -> None:
        raise error

    listener.on_offer = refuse
    dialer = Dialer()
    with pytest.raises(type(error)) as caught:
        await ControlClient(dialer).connect(server.endpoint, timeout=PATIENCE)
    assert error.args[0] in str(caught.value)
    assert server.endpoint in str(caught.value)
    assert getattr(caught.value, "hint", "") == getattr(error, "hint", "")
    assert getattr(caught.value, "code", "") == getattr(error, "code", "")
    assert listener.calls == ["offer"] and dialer.calls == []
    assert server.statistics().refused == 1


async def test_a_bug_of_the_listener_stays_in_its_log(
    server: ControlServer, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    async def stumble() -> None:
        raise RuntimeError("secret detail")

    listener.on_accept = stumble
    dialer = Dialer()
    with pytest.raises(RefusedError) as caught:
        await ControlClient(dialer).connect(server.endpoint, timeout=PATIENCE)
    assert "secret" not in str(caught.value) and "secret detail" in caplog.text
    await listener.wait_for(lambda: "closed" in listener.calls)
    assert dialer.calls == ["accept", "closed"]


async def test_a_dialer_that_cannot_accept(
    server: ControlServer, listener: Listener
) -> None:
    async def stumble() -> None:
        raise DeviceUnavailableError("the NIC is gone")

    dialer = Dialer()
    dialer.on_accept = stumble
    with pytest.raises(DeviceUnavailableError, match="the NIC is gone"):
        await ControlClient(dialer).connect(server.endpoint, timeout=PATIENCE)
    assert dialer.calls == ["accept"]
    await listener.wait_for(lambda: "closed" in listener.calls)


async def test_versions_that_do_not_meet(server: ControlServer) -> None:
    with pytest.raises(VersionMismatchError, match="3 to 4"):
        await ControlClient(Dialer(versions=(3, 4))).connect(
            server.endpoint, timeout=PATIENCE
        )


async def test_pending_handshakes_are_bounded() -> None:
    listener = Listener()
    go = asyncio.Event()

    async def wait(hello: wire.Hello) -> None:
        await go.wait()

    listener.on_offer = wait
    async with make_server(listener, max_handshakes=2) as server:
        clients = [ControlClient(Dialer()) for _ in range(2)]
        waiting = [
            asyncio.ensure_future(c.connect(server.endpoint, timeout=PATIENCE))
            for c in clients
        ]
        await listener.wait_for(lambda: len(listener.calls) == 2)
        with pytest.raises(RefusedError, match="2 handshakes are pending"):
            await ControlClient(Dialer()).connect(server.endpoint, timeout=PATIENCE)
        go.set()
        await asyncio.gather(*waiting)
        async with dialed(server):
            assert len(server.connections) == 3
        for client in clients:
            await client.close()


async def test_a_slow_peer_delays_nobody(
    server: ControlServer, listener: Listener
) -> None:
    go = asyncio.Event()

    async def wait_for_the_first(hello: wire.Hello) -> None:
        if hello.agent == "slow":
            await go.wait()

    listener.on_offer = wait_for_the_first
    slow = ControlClient(Dialer(agent="slow"))
    pending = asyncio.ensure_future(slow.connect(server.endpoint, timeout=PATIENCE))
    await listener.wait_for(lambda: listener.calls == ["offer"])
    async with dialed(server):
        assert not pending.done()
    go.set()
    await pending
    await slow.close()


async def test_a_listener_too_slow_for_its_own_deadline() -> None:
    listener = Listener()
    go = asyncio.Event()

    async def wait(hello: wire.Hello) -> None:
        await go.wait()

    listener.on_offer = wait
    async with make_server(listener, connect_timeout=0.05) as server:
        with pytest.raises(ConnectTimeoutError, match="no handshake within"):
            await ControlClient(Dialer()).connect(server.endpoint, timeout=PATIENCE)
        assert listener.calls == ["offer"]
        go.set()
        await listener.wait_for(lambda: "closed" in listener.calls)
        assert listener.log[-1] == ("closed", CloseCause.TIMEOUT)


# -- strangers -------------------------------------------------------------


async def test_nobody_listens() -> None:
    address = f"127.0.0.1:{unused_port()}"
    with pytest.raises(ConnectTimeoutError) as caught:
        await ControlClient(Dialer()).connect(address, timeout=0.3)
    text = str(caught.value)
    assert address in text and "no offer from the listener within 0.3 s" in text
    assert "nobody accepts connections" in text and "server running there" in text


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b""],
    ids=["garbage", "silence"],
)
async def test_something_else_listens(answer: bytes) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    other = await asyncio.start_server(reply, "127.0.0.1", 0)
    address = f"127.0.0.1:{other.sockets[0].getsockname()[1]}"
    with pytest.raises(ConnectTimeoutError, match="no ZMTP greeting") as caught:
        await ControlClient(Dialer()).connect(address, timeout=0.5)
    assert address in str(caught.value)
    other.close()
    await other.wait_closed()


@pytest.fixture
async def raw(server: ControlServer) -> AsyncIterator[zmq.asyncio.Socket]:
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"tcp://{server.endpoint}")
        yield dealer


async def ask(dealer: zmq.asyncio.Socket, message: wire.Message) -> wire.Message:
    await dealer.send(wire.encode(message))
    return await hear(dealer)


async def hear(dealer: zmq.asyncio.Socket) -> wire.Message:
    return wire.decode(await asyncio.wait_for(dealer.recv(), PATIENCE))


async def test_garbage_is_counted_and_delays_nobody(
    server: ControlServer, raw: zmq.asyncio.Socket
) -> None:
    for frames in ([b""], [b"\x00" * 1000], [b"KVXF\x00\x01\xc1"], [b"a", b"b", b"c"]):
        await raw.send_multipart(frames)
    async with dialed(server) as (client, _):
        assert client.is_established
    reply = await ask(raw, wire.Ping(seq=1))
    assert isinstance(reply, wire.Refuse) and reply.code == "unknown-connection"
    statistics = server.statistics()
    assert (statistics.garbage, statistics.strangers) == (4, 1)
    assert statistics.pending == 0


async def test_a_frame_of_a_newer_version_is_answered(
    server: ControlServer, raw: zmq.asyncio.Socket
) -> None:
    await raw.send(wire.encode(wire.Ping(seq=1), version=9))
    reply = await hear(raw)
    assert isinstance(reply, wire.Refuse) and reply.code == "version"


async def test_an_oversized_message_ends_only_its_sender(
    server: ControlServer, raw: zmq.asyncio.Socket
) -> None:
    async with dialed(server) as (client, _):
        await raw.send(b"x" * (wire.MAX_MESSAGE_BYTES + 1))
        assert await client.request_fence("still there?", timeout=PATIENCE)
        async with dialed(server):
            assert server.statistics().garbage == 0


async def test_a_silent_dialer_is_dropped_at_the_deadline() -> None:
    listener = Listener()
    async with make_server(listener, connect_timeout=0.1) as server:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(f"tcp://{server.endpoint}")
            assert isinstance(await ask(dealer, make.hello()), wire.Offer)
            await listener.wait_for(lambda: "closed" in listener.calls)
            assert listener.log[-1] == ("closed", CloseCause.TIMEOUT)
            assert isinstance(await hear(dealer), wire.Refuse)
            await settled(server)


async def test_a_new_incarnation_ends_the_old_life(
    server: ControlServer, listener: Listener, raw: zmq.asyncio.Socket
) -> None:
    old = await ask(raw, make.hello())
    assert isinstance(old, wire.Offer)
    new = await ask(raw, make.hello(incarnation=b"j" * 16))
    assert isinstance(new, wire.Offer) and new.conn_id != old.conn_id
    await listener.wait_for(lambda: old.conn_id in listener.reasons)
    assert listener.reasons[old.conn_id].cause is CloseCause.SUPERSEDED
    # The old life's last words do not reach the new one.
    await raw.send(wire.encode(wire.Bye(conn_id=old.conn_id)))
    reply = await ask(raw, make.accept(conn_id=new.conn_id))
    assert reply == wire.Ready(conn_id=new.conn_id)


async def test_a_second_hello_is_a_violation(
    server: ControlServer, listener: Listener, raw: zmq.asyncio.Socket
) -> None:
    offer = await ask(raw, make.hello())
    assert isinstance(offer, wire.Offer)
    reply = await ask(raw, make.hello())
    assert isinstance(reply, wire.Bye) and "violation" in reply.reason
    await listener.wait_for(lambda: "closed" in listener.calls)
    assert listener.calls == ["offer", "closed"]


async def test_a_listener_that_answers_garbage() -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dialer = Dialer()
        connecting = asyncio.ensure_future(
            ControlClient(dialer).connect(f"127.0.0.1:{port}", timeout=PATIENCE)
        )
        identity, _ = await router.recv_multipart()
        await router.send_multipart([identity, b"what?"])
        with pytest.raises(ProtocolError, match="not a kvxfer control message"):
            await connecting
        assert dialer.calls == []


# -- close and cancel ------------------------------------------------------


async def test_close_twice_and_use_after(listener: Listener) -> None:
    server = make_server(listener)
    await server.start()
    with pytest.raises(UsageError):
        await server.start()
    client = ControlClient(Dialer())
    await client.connect(server.endpoint, timeout=PATIENCE)
    with pytest.raises(UsageError):
        await client.connect(server.endpoint)
    await asyncio.gather(client.close(), client.close(), server.close(), server.close())
    await client.close()
    await server.close()
    with pytest.raises(ClosedResourceError):
        await client.connect(server.endpoint)
    with pytest.raises(ClosedResourceError):
        await server.start()


async def test_closing_what_never_started() -> None:
    await make_server(Listener()).close()
    await ControlClient(Dialer()).close()


@pytest.mark.parametrize("stage", ["unanswered", "offering", "accepting"])
async def test_a_cancelled_connect_leaves_nothing(
    server: ControlServer, listener: Listener, stage: str
) -> None:
    stuck = asyncio.Event()

    async def block(*_: Any) -> None:
        stuck.set()
        await asyncio.Event().wait()

    dialer = Dialer()
    address = server.endpoint
    if stage == "unanswered":
        address = f"127.0.0.1:{unused_port()}"
        stuck.set()
    elif stage == "offering":
        never = asyncio.Event()

        async def hold(*_: Any) -> None:
            stuck.set()
            await never.wait()

        listener.on_offer = hold
    else:
        dialer.on_accept = block
    task = asyncio.ensure_future(
        ControlClient(dialer).connect(address, timeout=PATIENCE)
    )
    await stuck.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "closed" not in dialer.calls
    if stage == "offering":
        never.set()
        await listener.wait_for(lambda: bool(listener.conn_ids))


async def test_close_during_connect() -> None:
    client = ControlClient(Dialer())
    task = asyncio.ensure_future(
        client.connect(f"127.0.0.1:{unused_port()}", timeout=PATIENCE)
    )
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ClosedResourceError):
        await task


async def test_closing_from_a_callback(server: ControlServer) -> None:
    dialer = Dialer()
    client = ControlClient(dialer, options=FAST)
    done = asyncio.Event()

    async def closed(reason: CloseReason) -> None:
        await client.close()
        done.set()

    dialer.closed = closed  # type: ignore[method-assign]
    info = await client.connect(server.endpoint, timeout=PATIENCE)
    server.drop(info.conn_id, "go")
    await asyncio.wait_for(done.wait(), PATIENCE)
    await client.close()


async def test_a_cancelled_close_still_closes(listener: Listener) -> None:
    server = make_server(listener)
    await server.start()
    async with dialed(server):

        async def block() -> None:
            await asyncio.Event().wait()

        listener.on_fence = block
        link = next(iter(server._identities))
        link.receive(wire.Fence(conn_id=link.core.conn_id or 0))
        await listener.wait_for(lambda: "fence" in listener.calls)
        closing = asyncio.ensure_future(server.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert listener.calls[-1] == "closed"


def test_two_loops_and_uvloop() -> None:
    async def session() -> int:
        listener = Listener()
        async with (
            make_server(listener) as server,
            dialed(server) as (client, _),
        ):
            assert await client.request_fence("x", timeout=PATIENCE)
            return len(listener.log)

    results: list[int] = []

    def run(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        loop = new_loop()
        results.append(loop.run_until_complete(session()))
        loop.close()

    loops: list[Callable[[], asyncio.AbstractEventLoop]] = [
        asyncio.new_event_loop,
        uvloop.new_event_loop,
        asyncio.new_event_loop,
    ]
    threads = [threading.Thread(target=run, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4, 4, 4]


# -- peers in other processes ----------------------------------------------

DIALER = """
import asyncio, os, sys, time
from kvxfer.control import ControlClient
from tests.test_control import Dialer, FAST

async def main():
    client = ControlClient(Dialer(), options=FAST)
    await client.connect(sys.argv[1], timeout=20)
    if sys.argv[2] == "fork":
        pid = os.fork()
        if pid == 0:
            sys.stdin.buffer.raw.read()
            os._exit(0)
    print("up", flush=True)
    if sys.argv[2] == "busy":
        await asyncio.to_thread(sys.stdin.readline)
        print("busy", flush=True)
        # No await: the loop stands still until the test says more.
        sys.stdin.readline()
    await asyncio.sleep(60)

asyncio.run(main())
"""

LISTENER = """
import asyncio, sys
from tests.test_control import Listener, make_server

async def main():
    async with make_server(Listener(), port=int(sys.argv[1])) as server:
        print(server.endpoint, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@contextlib.contextmanager
def process(script: str, *args: str) -> Any:
    root = str(Path(__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        child.wait()


async def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return (await in_thread(child.stdout.readline)).strip()


@pytest.mark.parametrize(
    ("interval", "timeout"),
    [(1.0, 5.0), (0.3333, 1.0), (0.2, 0.25), (0.25, 0.2505), (0.01, 0.02), (9, 3600)],
)
def test_a_frozen_peer_is_noticed_within_ping_timeout(
    interval: float, timeout: float
) -> None:
    """By ZMQ's arithmetic: it froze at once after the last question was answered."""
    options = Options(ping_interval=interval, ping_timeout=timeout, loop_timeout=3600.0)
    asked_ms, silent_ms = heartbeat(options)
    assert min(asked_ms, silent_ms) >= 1
    # Each of the two timers counts whole milliseconds and ends up to one late.
    assert asked_ms + 1 + silent_ms + 1 <= timeout * 1000
    # Nor much sooner: a peer that is slow is not gone.
    assert asked_ms + silent_ms >= timeout * 1000 - 12


async def test_a_killed_dialer_is_noticed(
    server: ControlServer, listener: Listener
) -> None:
    with process(DIALER, server.endpoint, "plain") as child:
        assert await first_line(child) == "up"
        child.kill()
        await listener.wait_for(lambda: "closed" in listener.calls)
    assert listener.log[-1][1] is CloseCause.LOST


async def test_a_killed_dialer_whose_fork_lives_is_noticed(
    server: ControlServer, listener: Listener
) -> None:
    with process(DIALER, server.endpoint, "fork") as child:
        assert await first_line(child) == "up"
        child.kill()
        await listener.wait_for(lambda: "closed" in listener.calls)
        # The fork still holds the TCP connection; only silence can tell.
        assert listener.log[-1] == ("closed", CloseCause.LOST)


@pytest.mark.parametrize("loop_timeout", [20.0, 0.3])
async def test_a_dialer_whose_loop_is_busy_is_alive_for_longer(
    listener: Listener, loop_timeout: float
) -> None:
    """Many times ``ping_timeout``, and up to ``loop_timeout``."""
    async with make_server(listener, loop_timeout=loop_timeout) as server:
        with process(DIALER, server.endpoint, "busy") as child:
            assert await first_line(child) == "up"
            child.stdin.write("\n")
            child.stdin.flush()
            assert await first_line(child) == "busy"
            (conn_id,) = server.connections
            if loop_timeout < 1:
                await listener.wait_for(lambda: "closed" in listener.calls)
                assert listener.log[-1] == ("closed", CloseCause.DEAD)
                return
            assert not await server.fence(conn_id, "are you there?", timeout=1.5)
            assert server.connections == [conn_id]
            child.stdin.write("\n")
            child.stdin.flush()
            assert await server.fence(conn_id, "and now?", timeout=PATIENCE)


async def test_a_frozen_dialer_is_noticed_and_learns_of_it(
    server: ControlServer, listener: Listener
) -> None:
    with process(DIALER, server.endpoint, "plain") as child:
        assert await first_line(child) == "up"
        child.send_signal(signal.SIGSTOP)
        await listener.wait_for(lambda: "closed" in listener.calls)
        assert listener.log[-1] == ("closed", CloseCause.LOST)
        child.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_frozen_listener_is_noticed(how: signal.Signals) -> None:
    with process(LISTENER, "0") as child:
        address = await first_line(child)
        dialer = Dialer()
        client = ControlClient(dialer, options=FAST)
        await client.connect(address, timeout=PATIENCE)
        child.send_signal(how)
        await dialer.wait_for(lambda: "closed" in dialer.calls)
        assert dialer.log[-1] == ("closed", CloseCause.LOST)
        await client.close()


async def test_a_dialer_that_is_there_first_gets_through() -> None:
    port = unused_port()
    dialer = Dialer()
    client = ControlClient(dialer)
    connecting = asyncio.ensure_future(
        client.connect(f"127.0.0.1:{port}", timeout=PATIENCE)
    )
    await asyncio.sleep(0)
    async with make_server(Listener(), port=port):
        info = await connecting
        assert info.peer_address == "127.0.0.1"
        await client.close()
