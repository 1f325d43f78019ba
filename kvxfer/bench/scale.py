"""``kvxfer bench scale``: what a large cache costs, whatever is moved of it.

Two processes again, a client and a server, each over a cache of that many blocks and
layers. The same number of blocks is written and offered of a large cache and of a small
one, from the first to the last, so that whatever is kept for blocks is in memory. What
the memory of the processes grows by, that of the blocks themselves left out, is what
kvxfer keeps; the difference of the two caches is what it keeps for each block.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kvxfer import Client, KVCache, Server, command
from kvxfer.bench import runner
from kvxfer.bench.contenders import Contender
from kvxfer.bench.report import SCHEMA, figure, machine, write_text
from kvxfer.bench.runner import Pair, Settings
from kvxfer.bench.side import Control, Initiator, Job
from kvxfer.bench.transfer import options_of
from kvxfer.bench.workload import Case, Workload
from kvxfer.sizes import format_size, parse_size

_FEW = 1000
# Of 200,000 blocks one in 400: each page of what has 8 bytes a block is touched.
_USED = 500
_MAP_NORESERVE = 0x4000  # mmap exports it only from Python 3.13 on
_PLANES = ("k", "v")
_MEMORY = ("ordinary", "shared")
_REQUEST = "scale"
_PATIENCE = 120.0
_COLUMNS = {
    "cache_s": ("cache made, ms", 1e3),
    "open_s": ("opened, ms", 1e3),
    "connect_s": ("connected, ms", 1e3),
    "write_s": ("first write, ms", 1e3),
    "initiator_bytes": ("client grew, KB", 1e-3),
    "target_bytes": ("server grew, KB", 1e-3),
}


def resident_bytes(cache: KVCache | None = None) -> int:
    """Return what is in memory of this process, all but the blocks of caches.

    Args:
      cache: The only one of this process. Memory files of peers may be mapped as well.
    """
    low, high = (0, 0) if cache is None else _range(cache)
    found = 0
    of_blocks = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            name, *rest = line.split()
            if not name.endswith(":"):
                first, last = (int(end, 16) for end in name.split("-"))
                of_blocks = low <= first and last <= high
                of_blocks |= "/memfd:kvxfer-cache" in line
            elif name == "Rss:" and not of_blocks:
                found += int(rest[0]) * 1024
    return found


def _range(cache: KVCache) -> tuple[int, int]:
    """Return where the pages of a cache begin and end."""
    places = [
        place
        for group in cache.groups
        for layer in group.layers
        for _, place in group.rows(layer)
    ]
    end = max(place.end for place in places)
    return min(place.base for place in places), -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def _cache(job: Job) -> KVCache:
    """Make a cache of which nothing has been touched."""
    layers, n_blocks, size = job["layers"], job["blocks"], job["block_bytes"]
    if job["memory"] == "shared":
        return KVCache.allocate(
            n_layers=layers, n_blocks=n_blocks, block_bytes=size, planes=_PLANES
        )
    memory = mmap.mmap(
        -1,
        layers * len(_PLANES) * n_blocks * size,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
    )
    # The kernel makes one mapping of two alike that meet. No other is like this one,
    # so the blocks can be told from what lies beside them.
    memory.madvise(mmap.MADV_DONTFORK)
    whole = np.frombuffer(memory, np.uint8).reshape(
        len(_PLANES), layers, n_blocks, size
    )
    return KVCache.from_tensors(dict(zip(_PLANES, whole, strict=True)), layer_axis=0)


def _used(job: Job) -> NDArray[np.int64]:
    """Choose the blocks that are written and offered: the same number of any cache."""
    n_blocks = job["blocks"]
    return np.linspace(0, n_blocks - 1, min(n_blocks, _USED)).astype(np.int64)


class Scale(Initiator):
    """Opens a client, connects, writes blocks, and writes them again for an offer."""

    def measure(self, case: Case) -> dict[str, Any]:
        """Do it all, once."""
        return asyncio.run(self._measure())

    def connect(self, hello: dict[str, Any]) -> None:
        """Keep where the target listens."""
        self._endpoint = hello["endpoint"]

    async def _measure(self) -> dict[str, Any]:
        clock, found = time.perf_counter, {}
        ids, last = _used(self.job), [self.job["blocks"] - 1]
        before = resident_bytes()
        start = clock()
        cache = _cache(self.job)
        found["cache_s"] = clock() - start
        async with contextlib.AsyncExitStack() as stack:
            start = clock()
            client = await stack.enter_async_context(
                Client(cache, options_of(self.job), listen="127.0.0.1:0")
            )
            found["open_s"] = clock() - start
            host, _, port = self._endpoint.rpartition(":")
            start = clock()
            peer = await client.connect(host, int(port))
            found["connect_s"] = clock() - start
            start = clock()
            result = await client.write_cache(peer, last, last)
            found["write_s"] = clock() - start
            await client.write_cache(peer, ids, ids)
            request = client.open(_REQUEST)
            request.ready(None, ids, final=True)
            assert self.control is not None
            grown = await asyncio.to_thread(
                self.control.ask, "offer", address=client.listening
            )
            # The offer stands: both sides have all that they keep for it.
            after = resident_bytes(cache)
            request.finish()
            await request.sent()
        return {
            **found,
            "used": len(ids),
            "initiator_bytes": after - before,
            "target_bytes": grown["bytes"],
            "device": result.device,
            "wire": result.wire,
        }


def _offer(server: Server, job: Job, address: str) -> None:
    """Offer blocks and wait until they are written in all layers; in a thread."""
    ticket = server.offer(address, _REQUEST, {"main": _used(job)})
    for layer in range(job["layers"]):
        ticket.join_layer(layer, _PATIENCE)


async def _serve(job: Job, control: Control) -> None:
    before = resident_bytes()
    cache = _cache(job)
    async with Server(cache, options_of(job), port=0) as server:

        def answer() -> None:
            while (message := control.receive())["command"] != "quit":
                _offer(server, job, message["address"])
                control.send(bytes=resident_bytes(cache) - before)
            control.send()

        async def take() -> None:
            async for _ in server.arrivals():
                pass

        taking = asyncio.ensure_future(take())
        control.send(endpoint=server.endpoint)
        await asyncio.get_running_loop().run_in_executor(None, answer)
    await taking


def serve(job: Job, control: Control) -> None:
    """Be the target until the initiator lets go."""
    asyncio.run(_serve(job, control))


async def _rounds(
    caches: list[tuple[int, str]], workload: Workload, settings: Settings
) -> list[dict[str, Any]]:
    rows = []
    for number in range(settings.rounds):
        for n_blocks, memory in caches:
            contender = Contender(
                f"{n_blocks} blocks",
                "scale",
                "",
                memory=memory,
                parameters={"blocks": n_blocks},
            )
            job = runner.job_for(contender, workload, settings, number)
            pair = Pair(contender, job, sys.executable, _PATIENCE)
            try:
                await pair.start()
                (case,) = workload.cases
                found = await pair.measure(case)
                own = {"round": number, "blocks": n_blocks, "memory": memory}
                rows.append({**own, **found})
                await pair.finish()
            finally:
                await pair.kill()
    return rows


def _print(rows: list[dict[str, Any]], what: str) -> None:
    table = Table(title=f"{what}; medians", title_justify="left")
    for name in ("blocks", "of them used"):
        table.add_column(name, justify="right")
    for name in ("memory", "wire"):
        table.add_column(name)
    for name, _ in _COLUMNS.values():
        table.add_column(name, justify="right")
    for key in dict.fromkeys((row["blocks"], row["memory"]) for row in rows):
        own = [row for row in rows if (row["blocks"], row["memory"]) == key]
        n_blocks, memory = key
        cells = [f"{n_blocks:,}", f"{own[0]['used']:,}", memory, own[0]["wire"]]
        for name, (_, factor) in _COLUMNS.items():
            cells.append(figure(statistics.median(row[name] for row in own) * factor))
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


@click.command()
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    default=200_000,
    show_default=True,
    help="Blocks of each layer.",
)
@click.option(
    "--layers",
    type=click.IntRange(1, 1000),
    default=80,
    show_default=True,
    help="Layers, each of two planes.",
)
@click.option(
    "--block-bytes",
    metavar="SIZE",
    callback=command.reading(parse_size),
    default="16",
    show_default=True,
    help="Bytes of a block; of those that are not used no more than address space, "
    "unless the memory is shared or a NIC pins it.",
)
@click.option(
    "--memory",
    type=click.Choice(_MEMORY),
    help="shared: as KVCache.allocate makes it. ordinary: private memory.  [both]",
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]")
@click.option("--wire", help="Wire of the software device: auto, shm, cma, tcp.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all as JSON.",
)
def main(
    blocks: int,
    layers: int,
    block_bytes: int,
    memory: str | None,
    rounds: int,
    device: str | None,
    wire: str | None,
    json_path: Path | None,
) -> None:
    """Show what a cache of many blocks costs: connecting, and memory.

    A client writes some of its blocks, in all layers, and writes them again under an
    offer that the server makes; then the memory of both is looked at, that of the
    blocks themselves left out. Beside it stands a cache of a few blocks, of which as
    many are used: the difference is what is kept for blocks.
    """
    given = {"device": device, "soft_wire": wire}
    options = {name: value for name, value in given.items() if value is not None}
    command.load_options(None, **options)
    workload = Workload((block_bytes,), (1,))
    extra = {"layers": layers, "block_bytes": block_bytes}
    settings = Settings(rounds=rounds, options=options, extra=extra)
    few = min(blocks, _FEW)
    kinds = _MEMORY if memory is None else (memory,)
    caches = [(n, kind) for kind in kinds for n in dict.fromkeys([few, blocks])]

    async def until_stopped(stop: asyncio.Event) -> int:
        rows: list[dict[str, Any]] = []

        async def work() -> None:
            rows.extend(await _rounds(caches, workload, settings))

        try:
            if not await command.until(stop, work()):
                return 130
        except runner.PairError as error:
            click.echo(f"kvxfer: {error}", err=True)
            return command.EXIT_FAILED
        what = (
            f"{layers} layers x {', '.join(_PLANES)}, blocks of "
            f"{format_size(block_bytes)}, {rows[-1]['device']}; used: written, and "
            "written under an offer, in all layers"
        )
        _print(rows, what)
        if json_path is not None:
            document = {"schema": SCHEMA, "machine": machine(), **extra, "rows": rows}
            write_text(json_path, json.dumps(document, indent=1) + "\n")
        return 0

    command.run(until_stopped)
