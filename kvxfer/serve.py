"""``python -m kvxfer.serve``: a standalone decode endpoint.

It owns a cache, lets clients write it, and says what has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click

from kvxfer import Arrival, KVCache, Server, command, metrics, pattern
from kvxfer.options import Options
from kvxfer.share import Share
from kvxfer.sizes import parse_sizes


async def _follow(
    server: Server,
    cache: KVCache,
    share: Share | None,
    *,
    verify: bool,
    machine: bool,
) -> int:
    """Say what arrives until the server closes; return how many blocks are wrong."""
    n_wrong = 0
    # Those of all groups.
    planes = {plane.name: i for i, plane in enumerate(cache.groups[0].planes)}
    async for arrival in server.arrivals():
        if share is not None:
            share.tell(arrival)
        event = _event(arrival)
        text = (
            f"arrival: {arrival.peer} request {arrival.request_id or '-'} "
            f"{_group(arrival)}layer {arrival.layer}, {len(arrival.block_ids)} blocks, "
            f"{arrival.bytes} bytes"
        )
        if verify:
            wrong = await asyncio.to_thread(_wrong_blocks, cache, planes, arrival)
            n_wrong += len(wrong)
            event["verified"] = not wrong
            event["wrong_blocks"] = wrong[:16]
            text += ", verified" if not wrong else f", WRONG in blocks {wrong[:16]}"
        command.say(machine, text, **event)
    return n_wrong


async def _follow_failures(server: Server, share: Share) -> None:
    """Hand on what writers give up, until the server closes."""
    async for failure in server.failures():
        share.tell(failure)


def _wrong_blocks(
    cache: KVCache, planes: dict[str, int], arrival: Arrival
) -> list[int]:
    found: set[int] = set()
    for name, index in planes.items():
        view = cache.view(arrival.layer, name, arrival.group)
        found.update(pattern.wrong(view, arrival.block_ids, index, arrival.layer))
    return sorted(found)


def _group(arrival: Arrival) -> str:
    return "" if arrival.group == "main" else f"group {arrival.group}, "


def _event(arrival: Arrival) -> dict[str, Any]:
    return {
        "event": "arrival",
        "peer": arrival.peer,
        "request_id": arrival.request_id,
        "group": arrival.group,
        "layer": arrival.layer,
        "blocks": len(arrival.block_ids),
        "bytes": arrival.bytes,
    }


async def _leave(server: Server, stop: asyncio.Event, grace: float) -> None:
    """Close when what is under way is done, after ``grace`` s, or a second signal."""
    stop.clear()
    leaving = asyncio.ensure_future(server.close(grace=grace))
    again = asyncio.ensure_future(stop.wait())
    await asyncio.wait({leaving, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not leaving.done():
        leaving.cancel()
        await asyncio.wait({leaving})


@contextlib.asynccontextmanager
async def _sharing(
    server: Server, cache: KVCache, path: str | None, mode: int
) -> AsyncIterator[Share | None]:
    """Share the cache with local processes, if a path is given."""
    if path is None:
        yield None
        return
    async with Share(server, cache, path, mode) as share:
        follower = asyncio.ensure_future(_follow_failures(server, share))
        try:
            yield share
        finally:
            follower.cancel()
            await asyncio.wait({follower})


@contextlib.asynccontextmanager
async def _metrics(server: Server) -> AsyncIterator[str | None]:
    """Give the server's metrics over HTTP, if the options say where."""
    options = server.options
    if options.metrics_port is None:
        yield None
        return
    exporter = metrics.Exporter(server, options.metrics_host, options.metrics_port)
    try:
        yield exporter.url
    finally:
        await asyncio.to_thread(exporter.close)


async def _serve(
    stop: asyncio.Event,
    shape: command.CacheShape,
    options: Options,
    verify: bool,
    machine: bool,
    grace: float,
    share_path: str | None,
    share_mode: int,
) -> int:
    n_wrong = 0
    with shape.allocate() as cache:
        if not await command.fill_in(cache, stop):
            return 0
        async with (
            Server(cache, options) as server,
            _metrics(server) as url,
            _sharing(server, cache, share_path, share_mode) as share,
        ):
            follower = asyncio.ensure_future(
                _follow(server, cache, share, verify=verify, machine=machine)
            )
            device = server.devices[0]
            command.say(
                machine,
                f"ready on {server.endpoint}, device {device}: {shape}",
                event="ready",
                endpoint=server.endpoint,
                port=server.port,
                devices=server.devices,
                metrics=url,
                share=None if share is None else share.path,
            )
            if url and not machine:
                command.say(machine, f"metrics at {url}")
            if share is not None and not machine:
                command.say(machine, f"shared by {share.path}")
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait(
                {follower, stopping}, return_when=asyncio.FIRST_COMPLETED
            )
            stopping.cancel()
            await _leave(server, stop, grace)
        # Closed by now: the arrivals end, and with them the follower.
        n_wrong = await follower
    command.say(machine, "closed", event="closed", wrong_blocks=n_wrong)
    return command.EXIT_FAILED if n_wrong else 0


def _octal(context: click.Context, option: click.Parameter, text: str) -> int:
    """Read permissions as chmod takes them, such as 660."""
    if not text.isdecimal() or set(text) - set("01234567") or int(text, 8) > 0o777:
        raise click.BadParameter(f"{text!r} is no octal number from 0 to 777")
    return int(text, 8)


@click.command()
@click.option("--host", help="Address to listen on, or ipc://PATH.  [127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on, 0: a free one.  [7777]")
@click.option("--secret-key-file", help="Secret key of this side; see kvxfer keys.")
@click.option("--client-keys-dir", help="Directory with the *.key of who may connect.")
@click.option("--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]")
@click.option("--require-rdma", is_flag=True, default=None, help="Refuse software.")
@click.option("--metrics-port", type=int, help="Port for Prometheus, 0: a free one.")
@click.option("--metrics-host", help="Address for Prometheus.  [127.0.0.1]")
@click.option(
    "--share",
    "share_path",
    metavar="unix:PATH",
    help="Share the cache with processes of this host: KVCache.attach(PATH).",
)
@click.option(
    "--share-mode",
    callback=_octal,
    default="600",
    show_default=True,
    metavar="OCTAL",
    help="Permissions of PATH: who may write to it may attach.",
)
@click.option(
    "--sizes",
    metavar="SIZES",
    callback=command.reading(parse_sizes),
    help="Instead of --block-bytes: a group of blocks of each size, as 1K,4K or "
    "1K..256K, all of as many bytes as --blocks of the largest; for kvxfer bench "
    "--target.",
)
@click.option("--verify", is_flag=True, help="Check every byte that kvxfer push sent.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for what is under way after the first signal; a second one ends it.",
)
@click.option("--json", "machine", is_flag=True, help="One JSON object a line.")
@click.option("-v", "--verbose", is_flag=True, help="Log everything to stderr.")
@command.geometry_options
def main(
    shape: command.CacheShape,
    config: Path | None,
    sizes: tuple[int, ...] | None,
    verify: bool,
    machine: bool,
    grace: float,
    share_path: str | None,
    share_mode: int,
    verbose: bool,
    **overrides: Any,
) -> None:
    """Run a decode endpoint until SIGINT or SIGTERM.

    Options not given come from KVXFER_* variables, then from --config.
    """
    options = command.load_options(config, **overrides)
    shape = dataclasses.replace(shape, sizes=sizes or ())
    command.log(options, verbose=verbose)
    command.run(
        lambda stop: _serve(
            stop, shape, options, verify, machine, grace, share_path, share_mode
        )
    )


if __name__ == "__main__":
    main(prog_name="python -m kvxfer.serve")
