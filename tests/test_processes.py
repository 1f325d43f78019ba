"""Two processes, one of which is killed, stopped or forked at a bad moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, Server
from kvxfer.errors import (
    BrokenPeerError,
    CompletionError,
    ConnectTimeoutError,
    WriteTimeoutError,
)
from kvxfer.options import Options
from tests.children import Child, Nursery
from tests.endpoints import QUICK, SOON, Arena, Bytes, arena, expected, until
from tests.patience import patient

SHAPE: dict[str, Any] = {"n_blocks": 64, "layers": 2, "planes": {"k": (32768, 33024)}}
#: A peer that is silent for so long is gone; writes give up a little later.
OPTIONS: dict[str, Any] = {
    "ping_interval": patient(0.1),
    "ping_timeout": patient(0.8),
    "drain_timeout": patient(0.3),
    "fence_timeout": patient(0.3),
}
#: The end of a peer is noticed by then, and what has to end with it has ended.
IN_TIME = patient(2.5)
ALL = range(64)
#: Over three wires and both tests 750 deaths where slow tests run, or else 60.
FEW_OR_MANY = pytest.mark.parametrize(
    "n", [10, pytest.param(125, marks=pytest.mark.slow)]
)


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


def of_the_blocks(target: Arena) -> Bytes:
    """Say of each byte of the memory whether it lies in a block."""
    inside: Bytes = np.zeros_like(target.memory)
    for group in target.cache.groups:
        for layer in group.layers:
            for _, place in group.rows(layer):
                target.blocks(place, inside)[:] = 1
    return inside


@contextlib.asynccontextmanager
async def serving(
    nursery: Nursery, path: Path, wire: str, **options: Any
) -> AsyncIterator[tuple[Child, int]]:
    """Run a server in a child, on the memory in ``path``; give it and its port."""
    async with nursery.start(
        "serve",
        path=str(path),
        shape={**SHAPE, "seed": 2},
        environ={"KVXFER_SOFT_WIRE": wire},
        **OPTIONS,
        **options,
    ) as child:
        yield child, (await child.event())["port"]


@contextlib.asynccontextmanager
async def writing(
    nursery: Nursery, port: int, wire: str, **arguments: Any
) -> AsyncIterator[tuple[Child, dict[str, Any]]]:
    """Run a client in a child that writes without end; give it and its greeting."""
    async with nursery.start(
        "write",
        port=port,
        shape={**SHAPE, "seed": 1},
        environ={"KVXFER_SOFT_WIRE": wire},
        **{**OPTIONS, **arguments},
    ) as child:
        greeting = await child.event()
        assert greeting["event"] == "connected"
        assert (await child.event())["event"] == "writing"
        yield child, greeting


async def test_two_processes(nursery: Nursery, wire: str, tmp_path: Path) -> None:
    target = arena(**SHAPE, seed=2, path=tmp_path / "memory")
    before = target.memory.copy()
    async with serving(nursery, tmp_path / "memory", wire) as (child, port):
        with arena(**SHAPE, seed=1) as source:
            async with Client(source.cache, **QUICK) as client:
                peer = await client.connect("127.0.0.1", port)
                result = await client.write_cache(peer, ALL, ALL, request_id="r")
                assert result.wire == wire
                wanted = expected(source, target, before, ALL, ALL)
                assert (target.memory == wanted).all()
                for layer in (0, 1):
                    event = await child.event()
                    assert event == {"layer": layer, "request_id": "r"}
    target.cache.close()


@FEW_OR_MANY
async def test_a_server_is_killed_at_random_moments(
    nursery: Nursery, wire: str, tmp_path: Path, n: int
) -> None:
    """Every write ends in time with a typed exception, and one client goes on."""
    rng = random.Random(n)
    with arena(**SHAPE, seed=1) as source:
        async with Client(source.cache, **QUICK | OPTIONS) as client:
            for round_ in range(n):
                path = tmp_path / f"memory{round_}"
                async with serving(nursery, path, wire) as (child, port):
                    peer = await client.connect("127.0.0.1", port)

                    async def write(peer: Any = peer) -> None:
                        while True:
                            await client.write_cache(peer, ALL, ALL, request_id="r")

                    writers = [asyncio.ensure_future(write()) for _ in range(4)]
                    asyncio.get_running_loop().call_later(
                        rng.random() * 0.05, child.signal, signal.SIGKILL
                    )
                    await child.ended()
                    start = time.monotonic()
                    ends = await asyncio.wait_for(
                        asyncio.gather(*writers, return_exceptions=True), SOON
                    )
                    assert time.monotonic() - start < IN_TIME
                    for end in ends:
                        assert isinstance(end, BrokenPeerError | CompletionError), end
                        # One that began after the end was refused: no fence needed.
                        assert end.fenced is not None or end.request_id is None
                    assert not peer.connected
                    target = arena(**SHAPE, seed=2, path=path)
                    outside = of_the_blocks(target) == 0
                    untouched = arena(**SHAPE, seed=2).memory
                    assert (target.memory == untouched)[outside].all()
                path.unlink()


@FEW_OR_MANY
async def test_a_client_is_killed_at_random_moments(
    nursery: Nursery, wire: str, n: int
) -> None:
    """The server learns within the ping timeout, and then nothing lands any more."""
    rng = random.Random(n)
    with arena(**SHAPE, seed=2) as target:
        outside = of_the_blocks(target) == 0
        untouched = target.memory.copy()
        async with Server(target.cache, port=0, **QUICK | OPTIONS) as server:
            for _ in range(n):
                async with writing(nursery, server.port, wire, n_tasks=4) as (child, _):
                    asyncio.get_running_loop().call_later(
                        rng.random() * 0.05, child.signal, signal.SIGKILL
                    )
                    await child.ended()
                    await until(lambda: not server.peers, IN_TIME)
                    before = target.memory.copy()
                    assert (before == untouched)[outside].all()
                assert (target.memory == before).all()


async def test_a_server_that_stands_still_for_a_moment(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    target = arena(**SHAPE, seed=2, path=tmp_path / "memory")
    with arena(**SHAPE, seed=1) as source:
        async with (
            serving(nursery, tmp_path / "memory", wire) as (child, port),
            Client(source.cache, **QUICK | OPTIONS) as client,
        ):
            peer = await client.connect("127.0.0.1", port)
            before = target.memory.copy()
            await child.stop()
            write = asyncio.ensure_future(client.write_cache(peer, ALL, ALL))
            done, _ = await asyncio.wait({write}, timeout=0.2)
            assert not done
            child.signal(signal.SIGCONT)
            await asyncio.wait_for(write, SOON)
            wanted = expected(source, target, before, ALL, ALL)
            assert (target.memory == wanted).all()
    target.cache.close()


async def test_a_server_that_stands_still_for_too_long(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    target = arena(**SHAPE, seed=2, path=tmp_path / "memory")
    with arena(**SHAPE, seed=1) as source:
        async with (
            serving(nursery, tmp_path / "memory", wire) as (child, port),
            Client(source.cache, **QUICK | OPTIONS) as client,
        ):
            peer = await client.connect("127.0.0.1", port)
            await client.write_cache(peer, ALL, ALL)
            await child.stop()
            start = time.monotonic()
            with pytest.raises(WriteTimeoutError) as caught:
                await client.write_cache(peer, ALL, ALL, timeout=0.3)
            # The deadline, the drain, the fence that is not answered.
            assert 0.3 <= time.monotonic() - start < patient(2.0)
            assert caught.value.fenced is False
            with pytest.raises(BrokenPeerError):
                await client.write_cache(peer, ALL, ALL)
            with pytest.raises(ConnectTimeoutError):
                await client.connect("127.0.0.1", port, timeout=0.2)
            child.signal(signal.SIGCONT)
            peer = await client.connect("127.0.0.1", port)
            before = target.memory.copy()
            await client.write_cache(peer, ALL, range(63, -1, -1))
            wanted = expected(source, target, before, ALL, range(63, -1, -1))
            assert (target.memory == wanted).all()
    target.cache.close()


async def test_an_idle_client_notices_a_frozen_server(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    with arena(**SHAPE, seed=1) as source:
        async with (
            serving(nursery, tmp_path / "memory", wire) as (child, port),
            Client(source.cache, **QUICK | OPTIONS) as client,
        ):
            peer = await client.connect("127.0.0.1", port)
            await child.stop()
            await until(lambda: not peer.connected, IN_TIME)
            assert not client.is_connected("127.0.0.1", port)


@pytest.mark.slow
async def test_how_soon_a_frozen_peer_is_noticed(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    """With the options' defaults. How long it took is shown by ``-rP``, not judged."""
    names = ("ping_interval", "ping_timeout")
    defaults = {name: getattr(Options(), name) for name in names}
    clock = time.monotonic
    one_at_a_time = asyncio.Lock()

    async def freeze_a_server(index: int, client: Client) -> float:
        async with contextlib.AsyncExitStack() as stack:
            async with one_at_a_time:
                starting = nursery.start(
                    "serve", path=str(tmp_path / str(index)), shape={**SHAPE, "seed": 2}
                )
                child = await stack.enter_async_context(starting)
            peer = await client.connect("127.0.0.1", (await child.event())["port"])
            # They are frozen at different moments between two signs of life.
            await asyncio.sleep(index * defaults["ping_interval"] / 5)
            began = clock()
            await child.stop()
            await until(lambda: not peer.connected, SOON)
            return clock() - began

    async def freeze_a_client(server: Server) -> float:
        async with writing(nursery, server.port, wire, **defaults) as (child, _):
            began = clock()
            await child.stop()
            await until(lambda: not server.peers, SOON)
            return clock() - began

    with arena(**SHAPE, seed=1) as source, arena(**SHAPE, seed=3) as target:
        async with Client(source.cache, **QUICK | defaults) as client:
            by_client = await asyncio.gather(
                *(freeze_a_server(i, client) for i in range(5))
            )
        async with Server(target.cache, port=0, **QUICK | defaults) as server:
            by_server = [await freeze_a_client(server) for _ in range(3)]
    for who, seconds in (("client", by_client), ("server", by_server)):
        sys.stdout.write(
            f"{wire}: a frozen peer noticed by the {who} after "
            f"{min(seconds):.2f} to {max(seconds):.2f} s\n"
        )


async def test_a_client_that_stands_still_writes_no_more(
    nursery: Nursery, wire: str
) -> None:
    """It is taken for gone; when it goes on, it learns that, and nothing lands."""
    with arena(**SHAPE, seed=2) as target:
        async with (
            Server(target.cache, port=0, **QUICK | OPTIONS) as server,
            writing(nursery, server.port, wire) as (child, _),
        ):
            await child.stop()
            await until(lambda: not server.peers, IN_TIME)
            before = target.memory.copy()
            child.signal(signal.SIGCONT)
            event = await child.event()
            assert event["event"] == "broken"
            assert (target.memory == before).all()


async def test_a_server_restarted_on_its_port_is_a_new_peer(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    with arena(**SHAPE, seed=1) as source:
        async with Client(source.cache, **QUICK | OPTIONS) as client:
            async with serving(nursery, tmp_path / "first", wire) as (child, port):
                old = await client.connect("127.0.0.1", port)
                await client.write_cache(old, ALL, ALL)
                child.signal(signal.SIGKILL)
                await child.ended()
            async with serving(nursery, tmp_path / "second", wire, port=port):
                target = arena(**SHAPE, seed=2, path=tmp_path / "second")
                before = target.memory.copy()
                with pytest.raises((BrokenPeerError, CompletionError)):
                    await client.write_cache(old, ALL, ALL)
                assert (target.memory == before).all()
                peer = await client.connect("127.0.0.1", port)
                assert peer is not old
                await client.write_cache(peer, ALL, ALL)
                wanted = expected(source, target, before, ALL, ALL)
                assert (target.memory == wanted).all()


async def test_a_killed_parent_whose_child_lives_is_noticed(
    nursery: Nursery, wire: str
) -> None:
    """The child holds copies of all descriptors; they must not keep links alive."""
    with arena(**SHAPE, seed=2) as target:
        async with Server(target.cache, port=0, **QUICK | OPTIONS) as server:
            async with writing(nursery, server.port, wire, fork=True) as (
                child,
                greeting,
            ):
                child.signal(signal.SIGKILL)
                try:
                    await until(lambda: not server.peers, IN_TIME)
                    before = target.memory.copy()
                finally:
                    os.kill(greeting["fork"], signal.SIGKILL)
            assert (target.memory == before).all()
