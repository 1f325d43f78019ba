"""Caches with red zones, connected pairs and processes, for the end-to-end tests.

An :class:`Arena` is one piece of memory with a cache described inside it. What a
transfer should have done is known from numpy alone (:func:`expected`), and tests
compare the whole arena, so a byte next to a block is looked at as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvxfer import Arrival, Client, KVCache, Peer, Server
from kvxfer.errors import KVXferError
from kvxfer.layout import PlaneLayer
from kvxfer.memory import address_range, map_memory
from kvxfer.regions import Span
from tests.patience import patient

Bytes = NDArray[np.uint8]

#: Every wait of a test ends; this is for those that should be over at once.
SOON = patient(20.0)

#: Deadlines short enough for a test that meets one of them.
QUICK: dict[str, Any] = {
    "connect_timeout": SOON,
    "write_timeout": SOON,
    "drain_timeout": patient(1.0),
    "fence_timeout": patient(1.0),
    "ping_interval": patient(0.2),
    "ping_timeout": patient(2.0),
}


@dataclass(eq=False)
class Arena:
    """Memory, and a cache that lies in it."""

    memory: Bytes
    cache: KVCache
    shared: bool = False
    """The memory is a file, which is open until its last view has gone."""

    @property
    def base(self) -> int:
        """Address of the first byte."""
        return int(self.memory.__array_interface__["data"][0])

    def blocks(self, place: PlaneLayer, memory: Bytes | None = None) -> Bytes:
        """Return the blocks of one plane and layer, ids x bytes, in ``memory``."""
        start = place.base - self.base
        found: Bytes = np.lib.stride_tricks.as_strided(
            (self.memory if memory is None else memory)[start:],
            (place.n_blocks, place.block_bytes),
            (place.block_stride, 1),
        )
        return found

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cache.close()
        if self.shared:  # this may be kept by the traceback of what a test expects
            self.memory = self.memory[:0].copy()


def noise(length: int, seed: int) -> Bytes:
    """Return bytes that differ from those of any other seed."""
    # By words: twice as fast as by bytes, and some tests want 100 MB of it.
    words = np.random.default_rng(seed).integers(0, 1 << 64, length // 8 + 1, np.uint64)
    return words.view(np.uint8)[:length]


def arena(
    *,
    n_blocks: int = 32,
    layers: int | Iterable[int] = 3,
    planes: Mapping[str, int | tuple[int, int]] | None = None,
    seed: int = 0,
    group: str = "main",
    path: Path | None = None,
    shared: bool | None = None,
) -> Arena:
    """Make a cache of scattered planes, with red zones around every block.

    Args:
      layers: How many, or which.
      planes: Name to ``block_bytes``, or to ``(block_bytes, block_stride)``; a
        stride of its own is made up otherwise.
      seed: For contents, order of the planes and gaps.
      path: A file that holds the memory, shared by all who map it. Whoever makes
        it fills it.
      shared: Whether the memory is one that peers on this host can map, as that of
        ``KVCache.allocate``; None: where ``KVXFER_SOFT_WIRE`` is ``shm``, whose
        bytes would all go through its ring otherwise.
    """
    held = range(layers) if isinstance(layers, int) else list(layers)
    sizes = {
        name: size if isinstance(size, tuple) else (size, size + 16 + 8 * i)
        for i, (name, size) in enumerate((planes or {"k": 256, "v": 256}).items())
    }
    rng = random.Random(seed)
    places = [(name, layer) for name in sizes for layer in held]
    rng.shuffle(places)
    at = 0
    offsets: dict[str, dict[int, int]] = {name: {} for name in sizes}
    for name, layer in places:
        at += 8 * rng.randrange(1, 40)
        offsets[name][layer] = at
        at += n_blocks * sizes[name][1]
    if shared is None:
        shared = path is None and os.environ.get("KVXFER_SOFT_WIRE") == "shm"
    span: Span | None = None
    if shared:
        memory, span = mappable(at + 64, seed)
    elif path is not None:
        memory = _mapped(path, at + 64, seed)
    else:
        memory = noise(at + 64, seed)
    base = int(memory.__array_interface__["data"][0])
    cache = KVCache.from_pointers(
        {
            name: {layer: base + offset for layer, offset in by_layer.items()}
            for name, by_layer in offsets.items()
        },
        n_blocks=n_blocks,
        block_bytes={name: size for name, (size, _) in sizes.items()},
        block_stride={name: stride for name, (_, stride) in sizes.items()},
        group=group,
    )
    if span is not None:
        spans = {(group, name, layer): span for name in sizes for layer in held}
        cache = KVCache(cache.groups, _spans=spans)
    return Arena(memory, cache, span is not None)


def big(seed: int) -> Arena:
    """Make a cache that takes a while to be written: 32 MiB."""
    return arena(n_blocks=64, layers=8, planes={"k": (65536, 65536 + 64)}, seed=seed)


def mappable(length: int, seed: int) -> tuple[Bytes, Span]:
    """Return noise in memory that peers on this host can map, and its span.

    It is unmapped with its last view.
    """
    span = map_memory(length)
    owner = span.owner
    assert span.fd >= 0 and span.allocation is not None
    assert isinstance(owner, np.ndarray)
    start = span.allocation[0] - address_range(owner)[0]
    memory: Bytes = owner[start : start + length]
    memory[:] = noise(length, seed)
    return memory, span


def _mapped(path: Path, length: int, seed: int) -> Bytes:
    if not path.exists():
        path.write_bytes(noise(length, seed).tobytes())
    return np.memmap(path, np.uint8, "r+", shape=length)


def expected(
    source: Arena,
    target: Arena,
    before: Bytes,
    local_ids: Sequence[int] | NDArray[Any],
    remote_ids: Sequence[int] | NDArray[Any],
    layers: Iterable[int] | None = None,
    group: str | None = None,
) -> Bytes:
    """Return the target's memory as one write leaves it, by numpy alone.

    Args:
      before: The target's memory before.
    """
    after: Bytes = before.copy()
    theirs = source.cache.group(group)
    ours = target.cache.group(group)
    if layers is None:
        layers = sorted(set(theirs.layers) & set(ours.layers))
    for layer in layers:
        for (_, from_), (_, to) in zip(
            sorted(theirs.rows(layer)), sorted(ours.rows(layer)), strict=True
        ):
            blocks = source.blocks(from_)[np.asarray(local_ids, int)]
            target.blocks(to, after)[np.asarray(remote_ids, int)] = blocks
    return after


def scattered(n_blocks: int, n: int, seed: int) -> list[int]:
    """Return ``n`` block ids, none twice, in no order."""
    return random.Random(seed).sample(range(n_blocks), n)


@dataclass(eq=False)
class Pair:
    """A client connected to a server of the same process."""

    source: Arena
    target: Arena
    server: Server
    client: Client
    peer: Peer

    async def check_write(
        self,
        local_ids: Sequence[int],
        remote_ids: Sequence[int],
        layers: int | list[int] | None = None,
        **arguments: Any,
    ) -> None:
        """Write, and compare every byte of the target's memory."""
        wanted = expected(
            self.source,
            self.target,
            self.target.memory,
            local_ids,
            remote_ids,
            [layers] if isinstance(layers, int) else layers,
            arguments.get("group"),
        )
        result = await self.client.write_cache(
            self.peer, local_ids, remote_ids, layers, **arguments
        )
        assert (self.target.memory == wanted).all()
        assert result.bytes == len(local_ids) * sum(
            place.block_bytes
            for layer in result.layers
            for _, place in self.source.cache.group(arguments.get("group")).rows(layer)
        )


@contextlib.asynccontextmanager
async def connected(
    source: Arena | None = None,
    target: Arena | None = None,
    *,
    host: str = "127.0.0.1",
    server_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Pair]:
    """Give a connected pair; :data:`QUICK` and ``options`` hold for both sides."""
    options = {**QUICK, **options}
    with (
        source or arena(seed=1) as source,
        target or arena(seed=2) as target,
    ):
        async with (
            Server(
                target.cache, host=host, port=0, **{**options, **(server_options or {})}
            ) as server,
            Client(source.cache, **options) as client,
        ):
            peer = await dial(client, server)
            yield Pair(source, target, server, client, peer)


async def dial(client: Client, server: Server) -> Peer:
    """Connect a client to a server by what the server says of itself."""
    host, _, port = server.endpoint.rpartition(":")
    if server.endpoint.startswith("ipc://"):
        return await client.connect(server.endpoint)
    return await client.connect(host, int(port))


async def take(server: Server, n: int, seconds: float = SOON) -> list[Arrival]:
    """Wait for ``n`` arrivals."""
    found: list[Arrival] = []

    async def collect() -> None:
        async for arrival in server.arrivals():
            found.append(arrival)
            if len(found) == n:
                return

    if n:
        await asyncio.wait_for(collect(), seconds)
    return found


async def until(
    condition: Callable[[], object], seconds: float = SOON, every: float = 0.001
) -> None:
    """Wait until ``condition()`` is true, for what has no event of its own.

    Args:
      every: Seconds from one look to the next, where a look costs something.
    """

    async def look() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(every)

    await asyncio.wait_for(look(), seconds)


async def check_reconnects(pair: Pair) -> None:
    """Connect again with the same client and write."""
    pair.peer = await dial(pair.client, pair.server)
    await pair.check_write([1, 2], [3, 4])
    await until(lambda: len(pair.server.peers) == 1)


async def failure_of(call: Awaitable[Any], seconds: float = SOON) -> KVXferError:
    """Return the exception that a call ends with, before a deadline."""
    with pytest.raises(KVXferError) as caught:
        await asyncio.wait_for(call, seconds)
    return caught.value
