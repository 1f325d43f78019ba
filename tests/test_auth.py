"""Who is let in, who is not, and what somebody who is in still may not do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvxfer import Client, Server, curve, wire
from kvxfer.control import CloseReason, ControlClient, ControlServer
from kvxfer.errors import (
    AuthenticationError,
    ConnectTimeoutError,
    KVXferError,
    OptionError,
)
from kvxfer.options import Options
from kvxfer.route import geometry_to_wire
from kvxfer.verbs_types import Access, Opcode, PeerHint
from tests.device_ends import REM_ACCESS, REM_INV_REQ, RETRY_EXC, End, Spec, Target
from tests.endpoints import QUICK, SOON, Arena, arena, take, until
from tests.test_control import PATIENCE, Dialer, Listener, make_server


@dataclasses.dataclass
class Keys:
    """Keys of one server and of one client that it knows."""

    home: Path

    def __post_init__(self) -> None:
        self.allowed = self.home / "allowed"
        self.server_public, self.server_secret = curve.generate("server", self.home)
        self.client_public, self.client_secret = curve.generate("client", self.home)
        self.allowed.mkdir()
        self.admit("client")

    def admit(self, name: str) -> None:
        (self.allowed / f"{name}.key").write_bytes(
            (self.home / f"{name}.key").read_bytes()
        )

    @property
    def server(self) -> dict[str, Any]:
        """Options of the server."""
        return {
            "secret_key_file": self.server_secret,
            "client_keys_dir": self.allowed,
        }

    @property
    def client(self) -> dict[str, Any]:
        """Options of the client."""
        return {
            "secret_key_file": self.client_secret,
            "server_public_key": self.server_public,
        }

    def of_client(self, **changes: Any) -> curve.CurveKeys | None:
        return curve.client_keys(Options(**{**self.client, **changes}))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
async def listener() -> Listener:
    return Listener()


@pytest.fixture
async def server(keys: Keys, listener: Listener) -> AsyncIterator[ControlServer]:
    async with make_server(listener, **keys.server) as server:
        yield server


async def dial(
    address: str, keys: curve.CurveKeys | None, timeout: float = PATIENCE
) -> None:
    """Connect and leave again."""
    client = ControlClient(Dialer(), keys=keys)
    try:
        await client.connect(address, timeout=timeout)
    finally:
        await client.close()


# -- the door ------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "ipc"])
async def test_who_has_a_key_is_let_in(keys: Keys, host: str, tmp_path: Path) -> None:
    if host == "ipc":
        host = f"ipc://{tmp_path}/control"
    listener = Listener()
    async with make_server(listener, host, **keys.server) as server:
        await dial(server.endpoint, keys.of_client())
        await listener.wait_for(lambda: "closed" in listener.calls)
        assert server.statistics().denied == 0


async def test_two_servers_in_one_process_have_doors_of_their_own(keys: Keys) -> None:
    other = Keys(keys.home / "other")
    async with (
        make_server(Listener(), **keys.server) as one,
        make_server(Listener(), **other.server) as two,
        make_server(Listener()) as plain,
    ):
        await dial(one.endpoint, keys.of_client())
        await dial(two.endpoint, other.of_client())
        await dial(plain.endpoint, None)
        with pytest.raises(AuthenticationError):
            await dial(
                two.endpoint, keys.of_client(server_public_key=other.server_public)
            )
        assert [s.statistics().denied for s in (one, two, plain)] == [0, 1, 0]


async def test_a_stranger_is_told_at_once(
    server: ControlServer, listener: Listener, keys: Keys
) -> None:
    _, secret = curve.generate("stranger", keys.home)
    with pytest.raises(AuthenticationError, match="client_keys_dir") as caught:
        await dial(server.endpoint, keys.of_client(secret_key_file=secret))
    assert server.endpoint in str(caught.value)
    assert server.statistics().denied == 1
    assert listener.calls == []
    keys.admit("stranger")  # from the next attempt on
    await dial(server.endpoint, keys.of_client(secret_key_file=secret))
    (keys.allowed / "stranger.key").unlink()
    with pytest.raises(AuthenticationError):
        await dial(server.endpoint, keys.of_client(secret_key_file=secret))


async def test_a_server_that_is_another_is_not_spoken_to(
    server: ControlServer, listener: Listener, keys: Keys
) -> None:
    impostor, _ = curve.generate("impostor", keys.home)
    with pytest.raises(ConnectTimeoutError, match="server's public key right"):
        await dial(server.endpoint, keys.of_client(server_public_key=impostor), 0.5)
    counts = server.statistics()
    assert listener.calls == [] and (counts.denied, counts.links_ready) == (0, 0)
    assert counts.links > 0


async def test_keys_on_one_side_only(
    server: ControlServer, listener: Listener, keys: Keys
) -> None:
    with pytest.raises(AuthenticationError, match="wants keys"):
        await dial(server.endpoint, None)
    assert listener.calls == []
    async with make_server(listener) as plain:
        with pytest.raises(AuthenticationError, match="has no keys"):
            await dial(plain.endpoint, keys.of_client())
    assert listener.calls == []


async def test_strangers_by_the_hundred_are_one_line_of_log(
    server: ControlServer, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    _, secret = curve.generate("stranger", keys.home)
    stranger = keys.of_client(secret_key_file=secret)
    results = await asyncio.gather(
        *(dial(server.endpoint, stranger) for _ in range(20)), return_exceptions=True
    )
    assert {type(result) for result in results} == {AuthenticationError}
    assert server.statistics().denied == 20
    assert sum(r.name == "kvxfer.auth" for r in caplog.records) == 1
    await dial(server.endpoint, keys.of_client())


async def test_a_server_with_bad_keys_does_not_listen(keys: Keys) -> None:
    server = make_server(Listener(), secret_key_file=keys.server_secret)
    with pytest.raises(OptionError, match="client_keys_dir is not set"):
        await server.start()
    await server.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "ipc"])
@pytest.mark.parametrize("keyed", [False, True])
async def test_a_plain_port_that_others_reach_is_warned_of(
    keys: Keys,
    host: str,
    keyed: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = f"ipc://{tmp_path}/c" if host == "ipc" else host
    options = keys.server if keyed else {}
    async with make_server(Listener(), address, **options):
        pass
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert bool(warned) == (host == "0.0.0.0" and not keyed)
    assert all("without keys" in record.getMessage() for record in warned)


# -- end to end ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def endpoints(
    keys: Keys, **options: Any
) -> AsyncIterator[tuple[Arena, Arena, Client, Server]]:
    options = {**QUICK, "device": "soft", **options}
    with arena(seed=1) as source, arena(seed=2) as target:
        async with (
            Server(target.cache, port=0, **keys.server, **options) as server,
            Client(
                source.cache, secret_key_file=keys.client_secret, **options
            ) as client,
        ):
            yield source, target, client, server


@pytest.mark.parametrize("soft_wire", ["tcp", "cma", "shm"])
async def test_no_secret_is_ever_in_a_log(
    keys: Keys, soft_wire: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor a key to memory, whether things go well or not."""
    caplog.set_level(logging.DEBUG)
    async with endpoints(keys, soft_wire=soft_wire, ib_timeout=14) as (
        _,
        _,
        client,
        server,
    ):
        with pytest.raises(OptionError, match="server_public_key is not set") as bare:
            await client.connect("127.0.0.1", server.port)
        server_key = keys.server_public.read_text().split('"')[1]
        peer = await client.connect("127.0.0.1", server.port, server_key=server_key)
        await client.write_cache(peer, [1, 2], [3, 4], request_id="r")
        assert len(await take(server, 3)) == 3
        (adapter,) = server._host.adapters
        links = [peer.link, *(i.link for i in server._connections.incoming.values())]
        assert links[0]._tokens != links[1]._tokens
        secrets = {str(adapter.region(0).rkey), f"{adapter.region(0).rkey:x}"}
        for link in links:
            secrets |= {link._tokens[0].hex(), repr(link._tokens[0])}
            assert link._ring is not None
            secrets |= {str(link._ring.mr.rkey), f"{link._ring.mr.rkey:x}"}
        links[1].break_()
        with pytest.raises(KVXferError) as failed:
            while True:
                await client.write_cache(peer, [1, 2], [3, 4])
        await until(lambda: not server.peers)
    for path in (keys.server_secret, keys.client_secret):
        secrets.add(curve.load_secret(path)[1].decode())
    assert "connected by soft" in caplog.text
    told = "\n".join(
        [caplog.text, str(bare.value), str(failed.value), repr(client.options)]
    )
    assert [secret for secret in secrets if secret in told] == []


class Intruder:
    """A delegate of a peer that is let in, and then does as it likes."""

    def __init__(self, end: End, target: Arena) -> None:
        self.end = end
        self.target = target
        self.offer: wire.Offer | None = None
        self.token: bytes | None = None

    def hello(self) -> wire.Hello:
        device = wire.DeviceCandidate(
            name="soft0",
            kind="soft",
            link_layer="ethernet",
            gid=self.end.gid,
            gid_type="software",
            mtu=5,
        )
        return wire.Hello(
            incarnation=wire.new_nonce(),
            versions=wire.VERSIONS,
            role="initiator",
            geometry=geometry_to_wire(self.target.cache.describe()),
            devices=[device],
            nonce=wire.new_nonce(),
        )

    async def accept(self, offer: wire.Offer) -> wire.Accept:
        self.offer = offer
        (theirs,) = offer.endpoint.qps
        token = wire.new_nonce() * 2
        end = self.end
        path = dataclasses.replace(
            end.path_to(end),
            qp_num=theirs.qp_num,
            psn=theirs.psn,
            gid=theirs.gid,
            mtu=theirs.mtu,
            retry_cnt=1,
        )
        end.qp.to_init(access=Access(0))
        end.qp.bind_peer(
            PeerHint("127.0.0.1", token, theirs.token if not self.token else self.token)
        )
        end.qp.to_rtr(path)
        end.qp.to_rts(path)
        info = wire.QPInfo(
            qp_num=end.qp.qp_num, psn=end.psn, gid=end.gid, mtu=5, token=token
        )
        return wire.Accept(conn_id=offer.conn_id, endpoint=wire.Endpoint(qps=[info]))

    async def fence(self, conn_id: int, reason: str) -> None:
        return

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        return

    def request(self, conn_id: int, message: wire.RequestMessage) -> None: ...

    def drain(self, conn_id: int, reason: str) -> None: ...

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        return

    async def closed(self, reason: CloseReason) -> None:
        return

    def status_of(self, window: wire.Window, opcode: Opcode) -> int:
        """Post one WR to a window and return how it ended."""
        write = self.end.write(self.end, 0, 0, 64, opcode=opcode)
        self.end.post(
            dataclasses.replace(write, remote_addr=window.base, rkey=window.rkey)
        )
        return self.end.reap_one().status


@contextlib.asynccontextmanager
async def intruding(
    server: Server, target: Arena, token: bytes | None = None
) -> AsyncIterator[Intruder]:
    end = End(Target("soft0", "soft", wire="tcp"), Spec())
    intruder = Intruder(end, target)
    intruder.token = token
    control = ControlClient(intruder)
    try:
        await control.connect(server.endpoint, timeout=SOON)
        yield intruder
    finally:
        end.close()
        await control.close()


def server_of(target: Arena) -> Server:
    return Server(target.cache, port=0, device="soft", soft_wire="tcp", **QUICK)


async def test_a_peer_that_is_let_in_cannot_read() -> None:
    with arena(seed=2) as target:
        async with (
            server_of(target) as server,
            intruding(server, target) as intruder,
        ):
            assert intruder.offer and intruder.offer.endpoint.windows
            window = intruder.offer.endpoint.windows[0]
            status = intruder.status_of(window, Opcode.RDMA_READ)
            assert status in (REM_INV_REQ, REM_ACCESS)
            assert not intruder.end.buffer.any()


async def test_the_keys_to_one_servers_memory_open_no_other() -> None:
    """One server is one trust domain: a protection domain of its own."""
    with arena(seed=2) as target, arena(seed=3) as private:
        before = private.memory.copy()
        async with (
            server_of(target) as server,
            server_of(private) as other,
            intruding(server, target) as intruder,
            intruding(other, private) as spy,
        ):
            assert spy.offer and spy.offer.endpoint.windows
            window = spy.offer.endpoint.windows[0]
            assert intruder.status_of(window, Opcode.RDMA_WRITE) == REM_ACCESS
            assert (private.memory == before).all()


async def test_who_does_not_have_the_token_gets_no_wire() -> None:
    with arena(seed=2) as target:
        before = target.memory.copy()
        async with (
            server_of(target) as server,
            intruding(server, target, token=bytes(32)) as intruder,
        ):
            assert intruder.offer and intruder.offer.endpoint.windows
            window = intruder.offer.endpoint.windows[0]
            assert intruder.status_of(window, Opcode.RDMA_WRITE) == RETRY_EXC
            assert (target.memory == before).all()
