"""Client and server as programs of their own, and what happens when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, KVCache, Peer, pattern
from kvxfer.errors import BrokenPeerError, KVXferError, RetryExceededError
from tests.endpoints import QUICK
from tests.patience import patient

pytestmark = pytest.mark.rdma

#: For a program to start, and to end.
STARTED = patient(20.0)

LAYERS, BLOCKS, BLOCK_BYTES = 3, 64, 16384
GEOMETRY = [
    *("--layers", str(LAYERS)),
    *("--blocks", str(BLOCKS)),
    *("--block-bytes", str(BLOCK_BYTES)),
]


class Endpoint:
    """A running ``python -m kvxfer.serve``."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.port = 0

    async def event(self, name: str) -> dict[str, Any]:
        """Return its next event of that name."""
        assert self.process.stdout is not None
        while True:
            line = await asyncio.wait_for(self.process.stdout.readline(), STARTED)
            assert line, f"the endpoint ended before saying {name!r}"
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event


@contextlib.asynccontextmanager
async def serving(device: str, port: int = 0) -> AsyncIterator[Endpoint]:
    """Run an endpoint that verifies; interrupt it in the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvxfer.serve", "--port", str(port)),
        *("--device", device, "--verify", "--json"),
        *GEOMETRY,
        stdout=PIPE,
    )
    endpoint = Endpoint(process)
    try:
        endpoint.port = (await endpoint.event("ready"))["port"]
        yield endpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.communicate(), STARTED)
        except asyncio.TimeoutError:
            process.kill()
            await process.communicate()
            raise


async def test_serve_and_push(device: str) -> None:
    async with serving(device) as endpoint:
        push = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvxfer", "push", f"127.0.0.1:{endpoint.port}"),
            *("--device", device, "--request-blocks", "50", "--json"),
            *GEOMETRY,
            stdout=PIPE,
        )
        out, _ = await asyncio.wait_for(push.communicate(), STARTED)
        assert push.returncode == 0
        written = [json.loads(line) for line in out.splitlines()]
        assert [event["layer"] for event in written] == list(range(LAYERS))
        for event in written:
            assert event["bytes"] == 50 * 2 * BLOCK_BYTES
            assert event["device"] == device.partition(":")[0]
            assert event["wire"] == "rdma"
        for layer in range(LAYERS):
            arrival = await endpoint.event("arrival")
            assert (arrival["layer"], arrival["verified"]) == (layer, True)
        endpoint.process.send_signal(signal.SIGINT)
        closed = await endpoint.event("closed")
        assert closed["wrong_blocks"] == 0
        assert await asyncio.wait_for(endpoint.process.wait(), STARTED) == 0


async def test_peers_that_freeze_and_die(device: str) -> None:
    """Either ends a write in time, and the next endpoint there is written again."""
    ids = np.arange(BLOCKS)
    with filled_cache() as cache:
        async with Client(cache, **QUICK) as client:

            async def write_until_it_fails(peer: Peer) -> KVXferError:
                while True:
                    try:
                        await client.write_cache(peer, ids, ids)
                    except KVXferError as error:
                        return error

            port = 0
            for how in (signal.SIGSTOP, signal.SIGKILL):
                async with serving(device, port) as endpoint:
                    port = endpoint.port
                    peer = await client.connect("127.0.0.1", port)
                    await client.write_cache(peer, ids, ids)
                    for _ in range(LAYERS):
                        assert (await endpoint.event("arrival"))["verified"]
                    endpoint.process.send_signal(how)
                    error = await asyncio.wait_for(
                        write_until_it_fails(peer), 5 * QUICK["ping_timeout"]
                    )
                    assert isinstance(error, BrokenPeerError | RetryExceededError)
                    assert not peer.connected


def filled_cache() -> KVCache:
    """Make a cache whose block ``i`` is what the endpoint expects in block ``i``."""
    cache = KVCache.allocate(
        n_layers=LAYERS, n_blocks=BLOCKS, block_bytes=BLOCK_BYTES, dtype="bf16"
    )
    ids = np.arange(BLOCKS)
    for layer in range(LAYERS):
        for index, name in enumerate("kv"):
            pattern.fill(cache.view(layer, name), ids, ids, index, layer)
    return cache
