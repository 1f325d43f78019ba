"""One of two processes is killed at each step of the handshake; the other goes on."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

from kvxfer import Client, Server, wire
from kvxfer.errors import ControlError
from tests.children import Child, Nursery
from tests.endpoints import QUICK, SOON, arena, expected, until
from tests.test_reconnect import held, more

SHAPE: dict[str, Any] = {"n_blocks": 8, "layers": 2, "planes": {"k": (512, 544)}}
ALL = range(8)
#: What the listener and the dialer do of a handshake, in turn. The QPs are made
#: before an Offer and brought to RTS before an Accept and a Ready.
LISTENER = [
    "received Hello",
    "sending Offer",
    "sent Offer",
    "received Accept",
    "sending Ready",
    "sent Ready",
]
DIALER = [
    "sending Hello",
    "sent Hello",
    "received Offer",
    "sending Accept",
    "sent Accept",
    "received Ready",
]


@pytest.fixture(
    params=["tcp", "shm", pytest.param("cma", marks=pytest.mark.slow)], autouse=True
)
def soft_wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages that this process has received, by name."""
    names: list[str] = []
    decode = wire.decode

    def listening(*arguments: Any, **named: Any) -> wire.Message:
        message = decode(*arguments, **named)
        names.append(type(message).__name__)
        return message

    monkeypatch.setattr(wire, "decode", listening)
    return names


async def is_back_at(before: dict[str, int], server: Server | None = None) -> None:
    """Wait until this process has no more than before."""
    with contextlib.suppress(asyncio.TimeoutError):
        await until(lambda: not more(server, before))
    assert not more(server, before)


async def kill_at(step: str, child: Child, heard: list[str]) -> None:
    """Kill a child that halts at a step, once what it has sent is here."""
    assert await child.event() == {"event": "halted"}
    when, name = step.split()
    if when == "sent":
        await until(lambda: name in heard)
    child.signal(signal.SIGKILL)
    await child.ended()


@pytest.mark.parametrize("step", LISTENER)
async def test_a_server_that_dies_of_a_handshake(
    nursery: Nursery, heard: list[str], step: str, soft_wire: str, tmp_path: Path
) -> None:
    serve: dict[str, Any] = {
        "shape": {**SHAPE, "seed": 2},
        "environ": {"KVXFER_SOFT_WIRE": soft_wire},
    }

    def path(name: str) -> str:
        return str(tmp_path / name)

    with arena(**SHAPE, seed=1) as source:
        async with Client(source.cache, **QUICK) as client:
            async with nursery.start("serve", path=path("0"), **serve) as child:
                port = (await child.event())["port"]
                peer = await client.connect("127.0.0.1", port)
                await client.write_cache(peer, ALL, ALL)
                await peer.close()
            serve["port"] = port
            before = held()
            heard.clear()
            starting = nursery.start("serve", path=path("1"), halt=step, **serve)
            async with starting as child:
                await child.event()
                connecting = asyncio.ensure_future(client.connect("127.0.0.1", port))
                await kill_at(step, child, heard)
                # Long before its deadline, of which it would say that it timed out.
                if step == "sent Ready":
                    # The client may have had the time to come to the end.
                    with contextlib.suppress(ControlError):
                        peer = await asyncio.wait_for(connecting, SOON)
                        await until(lambda: not peer.connected)
                        await peer.close()
                else:
                    with pytest.raises(ControlError, match="the link broke"):
                        await asyncio.wait_for(connecting, SOON)
            assert not client.is_connected("127.0.0.1", port)
            await is_back_at(before)
            async with nursery.start("serve", path=path("2"), **serve) as child:
                await child.event()
                target = arena(**SHAPE, seed=2, path=tmp_path / "2")
                untouched = target.memory.copy()
                peer = await client.connect("127.0.0.1", port)
                await client.write_cache(peer, ALL, ALL)
                wanted = expected(source, target, untouched, ALL, ALL)
                assert (target.memory == wanted).all()
                target.cache.close()


@pytest.mark.parametrize("step", DIALER)
async def test_a_client_that_dies_of_a_handshake(
    nursery: Nursery, heard: list[str], step: str, soft_wire: str
) -> None:
    write: dict[str, Any] = {
        "shape": {**SHAPE, "seed": 1},
        "environ": {"KVXFER_SOFT_WIRE": soft_wire},
    }
    with arena(**SHAPE, seed=2) as target:
        async with Server(target.cache, port=0, **QUICK) as server:

            async def one_writes() -> None:
                async with nursery.start("write", port=server.port, **write) as child:
                    while (await child.event())["event"] != "writing":
                        continue
                await until(lambda: not server.peers)

            await one_writes()
            before = held(server)
            heard.clear()
            starting = nursery.start("write", port=server.port, halt=step, **write)
            async with starting as child:
                await kill_at(step, child, heard)
            await is_back_at(before, server)
            await one_writes()
            await is_back_at(before, server)
