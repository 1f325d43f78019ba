"""``kvxfer demo``: an endpoint and a prefill client in two processes, verified."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kvxfer import command

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0


@dataclass
class _Report:
    """What the two processes said, by layer."""

    ready: dict[str, Any] = field(default_factory=dict)
    written: dict[int, dict[str, Any]] = field(default_factory=dict)
    arrived: dict[int, dict[str, Any]] = field(default_factory=dict)


async def _start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdout=asyncio.subprocess.PIPE
    )


async def _events(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async for line in process.stdout:
        yield json.loads(line)


async def _end(process: asyncio.subprocess.Process) -> int:
    """Ask a process to end and return its exit code."""
    if process.returncode is None:
        process.terminate()
    try:
        return await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except asyncio.TimeoutError:
        process.kill()
        return await process.wait()


async def _demo(shape: command.CacheShape, request_blocks: int) -> int:
    console = Console()
    report = _Report()
    geometry = [
        *("--layers", str(shape.layers), "--blocks", str(shape.blocks)),
        *("--block-bytes", str(shape.block_bytes), "--planes", ",".join(shape.planes)),
        *("--dtype", shape.dtype),
    ]
    serve = await _start("kvxfer.serve", "--port", "0", "--json", "--verify", *geometry)
    push: asyncio.subprocess.Process | None = None
    try:
        events = _events(serve)
        try:
            report.ready = await asyncio.wait_for(anext(events, {}), _START_SECONDS)
        except asyncio.TimeoutError:
            click.echo(
                f"kvxfer: the endpoint was not ready after {_START_SECONDS:g} s; a "
                "smaller cache is ready sooner: --blocks, --layers",
                err=True,
            )
            return command.EXIT_FAILED
        if not report.ready:
            click.echo("kvxfer: the endpoint did not start", err=True)
            return command.EXIT_FAILED
        console.print(
            f"decode endpoint: process {serve.pid} on {report.ready['endpoint']}"
        )
        push = await _start(
            "kvxfer.push",
            report.ready["endpoint"],
            *("--request-blocks", str(request_blocks), "--json"),
            *geometry,
        )
        console.print(f"prefill client:  process {push.pid}")
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
        ) as progress:
            writing = progress.add_task("layers written ", total=shape.layers)
            checking = progress.add_task("layers verified", total=shape.layers)

            async def follow_push() -> int:
                assert push is not None
                async for event in _events(push):
                    report.written[event["layer"]] = event
                    progress.advance(writing)
                return await push.wait()

            async def follow_serve() -> None:
                async for event in events:
                    if event["event"] == "arrival":
                        report.arrived[event["layer"]] = event
                        progress.advance(checking)
                    if len(report.arrived) == shape.layers:
                        return

            arrivals = asyncio.ensure_future(follow_serve())
            try:
                if await follow_push() == 0:
                    await arrivals
            finally:
                arrivals.cancel()
                await asyncio.wait({arrivals})
    finally:
        codes = [await _end(p) for p in (push, serve) if p is not None]
    _print(console, report, shape)
    complete = len(report.arrived) == shape.layers == len(report.written)
    verified = all(event["verified"] for event in report.arrived.values())
    if any(codes) or not complete or not verified:
        click.echo(
            f"kvxfer: failed: {len(report.written)} of {shape.layers} layers written, "
            f"{sum(e['verified'] for e in report.arrived.values())} verified",
            err=True,
        )
        return command.EXIT_FAILED
    return 0


def _print(console: Console, report: _Report, shape: command.CacheShape) -> None:
    table = Table(title=f"KV cache of one request: {shape}")
    for name in ("layer", "blocks", "bytes", "GB/s", "WRs", "device", "verified"):
        table.add_column(name, justify="left" if name == "device" else "right")
    for layer, event in sorted(report.written.items()):
        arrived = report.arrived.get(layer)
        table.add_row(
            str(layer),
            str(event["blocks"]),
            f"{event['bytes']:,}",
            f"{event['bytes'] / event['seconds'] / 1e9:.2f}",
            str(event["wrs"]),
            f"{event['device']} ({event['wire']})",
            "-" if arrived is None else "yes" if arrived["verified"] else "NO",
        )
    events = list(report.written.values())
    n_bytes = sum(event["bytes"] for event in events)
    seconds = sum(event["seconds"] for event in events)
    table.add_section()
    table.add_row(
        f"{len(events)} layers",
        str(sum(event["blocks"] for event in events)),
        f"{n_bytes:,}",
        f"{n_bytes / seconds / 1e9:.2f}" if seconds else "-",
        str(sum(event["wrs"] for event in events)),
        "",
        f"{sum(e['verified'] for e in report.arrived.values())} layers",
    )
    console.print(table)
    if any(event["device"].startswith("soft") for event in events):
        console.print("soft0 is kvxfer's software device: memory copies, not a NIC.")


@click.command()
@click.option(
    "--request-blocks",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Scattered blocks that the request has.",
)
@command.geometry_options
def main(shape: command.CacheShape, request_blocks: int, config: object) -> None:
    """Move and verify a request's KV cache between two processes."""

    async def until_stopped(stop: asyncio.Event) -> int:
        result: list[int] = []

        async def work() -> None:
            result.append(await _demo(shape, request_blocks))

        return result[0] if await command.until(stop, work()) else 130

    command.run(until_stopped)
