"""``kvxfer bench scale``: what a large cache costs, before a byte of it has moved.

Two processes again, a client and a server, each over a cache of that many blocks and
layers whose memory is never touched. What their memory grows by is what kvxfer keeps
for it; a cache of a few blocks beside it shows how much of that is for each block.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
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
_MAP_NORESERVE = 0x4000  # mmap exports it only from Python 3.13 on
_PLANES = ("k", "v")
_PATIENCE = 120.0
_COLUMNS = {
    "cache_s": "cache made, ms",
    "open_s": "opened, ms",
    "connect_s": "connected, ms",
    "write_s": "first write, ms",
    "initiator_bytes": "client grew, KB",
    "target_bytes": "server grew, KB",
}


def resident_bytes() -> int:
    """Return the memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _cache(job: Job) -> KVCache:
    """Describe a cache in address space that has no memory yet."""
    layers, n_blocks, size = job["layers"], job["blocks"], job["block_bytes"]
    memory = mmap.mmap(
        -1,
        layers * len(_PLANES) * n_blocks * size,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
    )
    whole = np.frombuffer(memory, np.uint8).reshape(
        len(_PLANES), layers, n_blocks, size
    )
    return KVCache.from_tensors(dict(zip(_PLANES, whole, strict=True)), layer_axis=0)


class Scale(Initiator):
    """Opens a client, connects, writes one block of each layer."""

    def measure(self, case: Case) -> dict[str, Any]:
        """Do it all, once."""
        return asyncio.run(self._measure())

    def connect(self, hello: dict[str, Any]) -> None:
        """Keep where the target listens."""
        self._endpoint = hello["endpoint"]

    async def _measure(self) -> dict[str, Any]:
        clock, found = time.perf_counter, {}
        before = resident_bytes()
        start = clock()
        cache = _cache(self.job)
        found["cache_s"] = clock() - start
        async with contextlib.AsyncExitStack() as stack:
            start = clock()
            client = await stack.enter_async_context(
                Client(cache, options_of(self.job))
            )
            found["open_s"] = clock() - start
            host, _, port = self._endpoint.rpartition(":")
            start = clock()
            peer = await client.connect(host, int(port))
            found["connect_s"] = clock() - start
            found["initiator_bytes"] = resident_bytes() - before
            assert self.control is not None
            grown = await asyncio.to_thread(self.control.ask, "memory")
            found["target_bytes"] = grown["bytes"]
            start = clock()
            last = [self.job["blocks"] - 1]
            result = await client.write_cache(peer, last, last)
            found["write_s"] = clock() - start
        return {**found, "device": result.device, "wire": result.wire}


async def _serve(job: Job, control: Control) -> None:
    before = resident_bytes()
    async with Server(_cache(job), options_of(job), port=0) as server:
        control.send(endpoint=server.endpoint)

        def answer() -> None:
            while True:
                command_ = control.receive()["command"]
                control.send(bytes=resident_bytes() - before)
                if command_ == "quit":
                    return

        await asyncio.get_running_loop().run_in_executor(None, answer)


def serve(job: Job, control: Control) -> None:
    """Be the target until the initiator lets go."""
    asyncio.run(_serve(job, control))


async def _rounds(
    blocks: list[int], workload: Workload, settings: Settings
) -> list[dict[str, Any]]:
    rows = []
    for number in range(settings.rounds):
        for n_blocks in blocks:
            contender = Contender(
                f"{n_blocks} blocks", "scale", "", parameters={"blocks": n_blocks}
            )
            job = runner.job_for(contender, workload, settings, number)
            pair = Pair(contender, job, sys.executable, _PATIENCE)
            try:
                await pair.start()
                (case,) = workload.cases
                found = await pair.measure(case)
                rows.append({"round": number, "blocks": n_blocks, **found})
                await pair.finish()
            finally:
                await pair.kill()
    return rows


def _print(rows: list[dict[str, Any]], what: str) -> None:
    table = Table(title=f"{what}; medians", title_justify="left")
    table.add_column("blocks", justify="right")
    for name in _COLUMNS.values():
        table.add_column(name, justify="right")
    for n_blocks in dict.fromkeys(row["blocks"] for row in rows):
        own = [row for row in rows if row["blocks"] == n_blocks]
        cells = []
        for key in _COLUMNS:
            value = statistics.median(row[key] for row in own)
            cells.append(figure(value * 1e3 if key.endswith("_s") else value / 1e3))
        table.add_row(f"{n_blocks:,}", *cells)
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
    default="512",
    show_default=True,
    help="Bytes of a block; address space alone, unless a NIC pins it.",
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
    rounds: int,
    device: str | None,
    wire: str | None,
    json_path: Path | None,
) -> None:
    """Show what a cache of many blocks costs: connecting, and memory.

    Beside it stands a cache of a few blocks: the difference is what is kept for blocks.
    """
    given = {"device": device, "soft_wire": wire}
    options = {name: value for name, value in given.items() if value is not None}
    command.load_options(None, **options)
    workload = Workload((block_bytes,), (1,))
    extra = {"layers": layers, "block_bytes": block_bytes}
    settings = Settings(rounds=rounds, options=options, extra=extra)
    few = min(blocks, _FEW)
    sizes = list(dict.fromkeys([few, blocks]))

    async def until_stopped(stop: asyncio.Event) -> int:
        rows: list[dict[str, Any]] = []

        async def work() -> None:
            rows.extend(await _rounds(sizes, workload, settings))

        try:
            if not await command.until(stop, work()):
                return 130
        except runner.PairError as error:
            click.echo(f"kvxfer: {error}", err=True)
            return command.EXIT_FAILED
        what = (
            f"{layers} layers x {', '.join(_PLANES)}, blocks of "
            f"{format_size(block_bytes)}, {rows[-1]['device']} ({rows[-1]['wire']})"
        )
        _print(rows, what)
        if json_path is not None:
            document = {"schema": SCHEMA, "machine": machine(), **extra, "rows": rows}
            write_text(json_path, json.dumps(document, indent=1) + "\n")
        return 0

    command.run(until_stopped)
