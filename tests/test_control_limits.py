"""What strangers, and friends that are too many, cannot do to a listener."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from kvxfer import curve
from kvxfer.control import ControlClient
from kvxfer.errors import RefusedError
from kvxfer.options import Options
from tests.endpoints import until
from tests.test_control import PATIENCE, Dialer, Listener, dialed, make_server


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
