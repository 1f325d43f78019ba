"""kvxfer itself as a contender: ``await client.write_cache(...)``, as users call it.

The initiator has a thread, an event loop, a client and a connection for each of the
threads asked for, all over one cache; each of them keeps so many writes in flight. The
target is a server that takes its arrivals, as a decode node does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvxfer import Client, KVCache, Options, Peer, Server, WriteResult, pattern
from kvxfer.bench.side import (
    Control,
    Initiator,
    Job,
    Target,
    Window,
    address_of,
    map_pool,
    workload_of,
)
from kvxfer.bench.workload import Ids, Tables, contents
from kvxfer.errors import UsageError
from kvxfer.sizes import format_size

T = TypeVar("T")

_CHUNK = 4096
_LEAD = 2 << 20


class Pool:
    """A side's memory, and the cache over it: a group for each block size.

    So one registration and one connection serve the whole sweep.

    Args:
      shared: Let ``KVCache.allocate`` make the memory, which other processes of this
        host can map; else it is ordinary memory of this process.
    """

    def __init__(self, job: Job, *, shared: bool) -> None:
        workload = workload_of(job)
        names = job["plane_names"]
        length = workload.plane_bytes
        groups: dict[str, KVCache] = {}
        if shared:
            # The whole of it is a group as well, and begins first: what peers can
            # map is an allocation, and the groups lie inside it.
            whole = KVCache.allocate(
                n_layers=1,
                n_blocks=(length + _LEAD) // _CHUNK,
                block_bytes=_CHUNK,
                planes=names,
            )
            groups["whole"] = whole
            words = [
                whole.view(0, name).reshape(-1)[_LEAD:].view(np.uint64)
                for name in names
            ]
        else:
            words = np.split(map_pool(length * len(names)), len(names))
        #: Words of each plane, and the index of the first in the pool.
        self.planes: list[tuple[NDArray[np.uint64], int]] = [
            (plane, i * length // 8) for i, plane in enumerate(words)
        ]
        self.bases = [address_of(plane) for plane in words]
        for size in workload.sizes:
            groups[str(size)] = KVCache.from_pointers(
                dict(zip(names, ([base] for base in self.bases), strict=True)),
                n_blocks=workload.n_blocks(size),
                block_bytes=size,
            )
        self.cache = KVCache.grouped(groups)

    def fill(self) -> None:
        """Give every word its index in the pool."""
        for plane, first in self.planes:
            contents(plane)
            plane += np.uint64(first)

    def touch(self) -> None:
        """Have all of the memory there, before a device is given it."""
        for plane, _ in self.planes:
            plane[:] = 0


def options_of(job: Job) -> Options:
    """Return the options of both sides of a job."""
    return Options.load(**job["options"])


class Lane:
    """One thread with its event loop, client and connection."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name=f"bench-{number}", daemon=True
        )
        self.client: Client
        self.peer: Peer
        self.last: WriteResult | None = None
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Any:
        """Begin to run a coroutine in the thread; return its future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def connect(self, cache: KVCache, options: Options, address: str) -> None:
        """Open the client and connect."""
        self.client = Client(cache, options)
        await self.client.open()
        host, _, port = address.rpartition(":")
        self.peer = (
            await self.client.connect(address)
            if address.startswith("ipc://")
            else await self.client.connect(host, int(port))
        )

    def close(self) -> None:
        """Close the client and end the thread."""
        self.start(self.client.close()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Transfer(Initiator):
    """Writes with ``write_cache``."""

    _page_bytes: int

    def open(self) -> None:
        """Map the source, start the target, connect every thread."""
        job = self.job
        self.pool = Pool(job, shared=job["memory"] == "shared")
        self.pool.fill()
        self.options = options_of(job)
        self.lanes = [Lane(i) for i in range(job["threads"])]
        super().open()

    def connect(self, hello: dict[str, Any]) -> None:
        """Connect to where the target listens."""
        self.join(self.pool.cache, hello["endpoint"])
        self._page_bytes = min(self._page_bytes, hello["page_bytes"])

    def join(self, cache: KVCache, address: str) -> None:
        """Connect every thread, one after the other."""
        for lane in self.lanes:
            lane.start(lane.connect(cache, self.options, address)).result()
        # Registering it may have put it on larger ones.
        self._page_bytes = cache.page_bytes

    def prepare(self, tables: Tables) -> None:
        """Choose the group of this size."""
        self.group = str(tables.block_bytes)
        self.layer = 0

    def pick(self, tables: Tables, flight: int, n: int) -> tuple[Ids, Ids]:
        """Return the blocks of the ``n``-th batch of those that fly one by one."""
        source, target = tables.pick(flight, n)
        return tables.source[source], tables.target[target]

    async def _write(self, lane: Lane, source: Ids, target: Ids) -> None:
        lane.last = await lane.client.write_cache(
            lane.peer, source, target, self.layer, group=self.group
        )

    async def _keep_writing(
        self, lane: Lane, flight: int, tables: Tables, window: Window
    ) -> None:
        """Keep one batch in flight until the window is over."""
        clock = time.perf_counter
        while window.more():
            source, target = self.pick(tables, flight, window.next(flight))
            start = clock()
            await self._write(lane, source, target)
            window.note(clock() - start)

    async def _lane(self, lane: Lane, tables: Tables, window: Window) -> None:
        depth = self.job["depth"]
        first = lane.number * depth
        if depth == 1:
            await self._keep_writing(lane, first, tables, window)
            return
        await asyncio.gather(
            *(self._keep_writing(lane, first + i, tables, window) for i in range(depth))
        )

    def run_batches(self, tables: Tables, window: Window) -> None:
        """Have every thread write until the window is over."""
        running = [lane.start(self._lane(lane, tables, window)) for lane in self.lanes]
        for work in running:
            work.result()

    def facts(self) -> dict[str, Any]:
        """Say which device moved the blocks, by which wire, in how many WRs."""
        last = self.lanes[0].last
        assert last is not None
        return {
            "device": last.device,
            "wire": last.wire,
            "page_bytes": self._page_bytes,
            "wrs_per_block": last.wrs / self.blocks_of_batch,
        }

    def close(self) -> None:
        """Close the clients, then let the target go."""
        for lane in self.lanes:
            lane.close()
        super().close()


class Writes(Transfer):
    """Writes so many pieces at once, each an await of its own.

    A batch is all of them. They go through the blocks of the workload's batch, again
    and again where they are more; a block always gets the same contents.
    """

    def prepare(self, tables: Tables) -> None:
        """Cut the pieces.

        Raises:
          UsageError: They are no whole blocks, or a piece is more than a batch.
        """
        super().prepare(tables)
        size, batch = tables.block_bytes, tables.batch
        each, rest = divmod(self.job["write_bytes"], size * self.workload.planes)
        if rest or not 0 < each <= batch:
            raise UsageError(
                f"a write of {self.job['write_bytes']} bytes is not 1 to {batch} "
                f"blocks of {size} bytes: see --batch and --sizes"
            )
        self._pieces = [
            np.arange(i * each, (i + 1) * each) % batch
            for i in range(self.job["writes"])
        ]

    @property
    def blocks_of_batch(self) -> int:
        """How many blocks all pieces have."""
        return sum(map(len, self._pieces)) * self.workload.planes

    async def _write(self, lane: Lane, source: Ids, target: Ids) -> None:
        results = await asyncio.gather(
            *(
                lane.client.write_cache(
                    lane.peer,
                    source[piece],
                    target[piece],
                    0,
                    group=self.group,
                )
                for piece in self._pieces
            )
        )
        lane.last = results[0]
        self._wrs = sum(result.wrs for result in results)

    def facts(self) -> dict[str, Any]:
        """Say also how many WRs all of them took."""
        return {**super().facts(), "wrs_per_block": self._wrs / self.blocks_of_batch}


class Remote(Transfer):
    """Writes into a ``kvxfer serve`` that somebody else runs.

    A workload of one size of blocks is for its group ``main``; for several it must have
    been started with the same sizes. Whether the bytes are right is checked there, with
    ``--verify``.
    """

    has_target = False

    def open(self) -> None:
        """Map the source, in the geometry of the target, and connect."""
        job, workload = self.job, self.workload
        self.options = options_of(job)
        self.lanes = [Lane(i) for i in range(job["threads"])]
        self.planes = job["plane_names"]
        several = len(workload.sizes) > 1
        self.cache = KVCache.grouped(
            {
                format_size(size) if several else "main": KVCache.allocate(
                    n_layers=1,
                    n_blocks=workload.n_blocks(size),
                    block_bytes=size,
                    planes=self.planes,
                    dtype=job["dtype"],
                )
                for size in workload.sizes
            }
        )
        for group in self.cache.groups:
            for name in self.planes:
                view = self.cache.view(0, name, group.name)
                view.reshape(-1)[::_CHUNK] = 0
        self.join(self.cache, job["target"])

    def prepare(self, tables: Tables) -> None:
        """Fill the blocks with what belongs where they go."""
        size = tables.block_bytes
        several = len(self.workload.sizes) > 1
        self.group = format_size(size) if several else "main"
        peer = self.lanes[0].peer
        here, there = self.workload.n_blocks(size), peer.n_blocks(self.group)
        if there < here:
            raise UsageError(
                f"the target has {there} blocks of {format_size(size)}, and --pool "
                f"asks for {here}: start it with more --blocks, or make --pool smaller"
            )
        self.layer = peer.layers(self.group)[0]
        for number, name in enumerate(self.planes):
            view = self.cache.view(0, name, self.group)
            for ours, theirs in zip(tables.source, tables.target, strict=True):
                pattern.fill(view, ours, theirs, number, self.layer)

    def pick(self, tables: Tables, flight: int, n: int) -> tuple[Ids, Ids]:
        """Return blocks of the same set: the contents belong to the pair of ids."""
        mine = tables.sets_of_a_lane
        at = flight * mine + n % mine
        return tables.source[at], tables.target[at]

    def verify(self, sets: list[tuple[int, int]]) -> int | None:
        """Leave it to the target."""
        return None


async def _serve(job: Job, control: Control) -> None:
    pool = Pool(job, shared=job["memory"] == "shared")
    pool.touch()
    target = Target(job, pool.planes)
    async with Server(pool.cache, options_of(job), port=0) as server:

        async def take() -> None:
            async for _ in server.arrivals():
                pass

        taking = asyncio.ensure_future(take())
        control.send(endpoint=server.endpoint, page_bytes=pool.cache.page_bytes)
        # In a thread: the server must go on answering while the initiator thinks.
        await asyncio.get_running_loop().run_in_executor(None, target.serve, control)
    await taking


def serve(job: Job, control: Control) -> None:
    """Be the target until the initiator lets go."""
    asyncio.run(_serve(job, control))
