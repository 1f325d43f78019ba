"""``kvxfer push``: the other side of ``kvxfer serve``, a prefill node for trying out.

It fills blocks with contents that the endpoint can check, and writes them layer by
layer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
import numpy as np

from kvxfer import Client, KVCache, command, pattern
from kvxfer.errors import UsageError
from kvxfer.options import Options


def _some_blocks(random: np.random.Generator, n: int, n_blocks: int, whose: str) -> Any:
    if n > n_blocks:
        raise UsageError(
            f"a request of {n} blocks does not fit {whose} {n_blocks} blocks; see "
            "--request-blocks and --blocks"
        )
    return random.permutation(n_blocks)[:n]


def _fill(cache: KVCache, layer: int, local: Any, remote: Any) -> None:
    for index, plane in enumerate(cache.group().planes):
        pattern.fill(cache.view(layer, plane.name), local, remote, index, layer)


async def _push(
    address: str,
    shape: command.CacheShape,
    options: Options,
    n_request_blocks: int,
    seed: int,
    request_id: str,
    machine: bool,
) -> None:
    random = np.random.default_rng(seed)
    local = _some_blocks(random, n_request_blocks, shape.blocks, "the cache")
    with shape.allocate() as cache:
        async with Client(cache, options) as client:
            host, _, port = address.rpartition(":")
            peer = (
                await client.connect(address)
                if address.startswith("ipc://")
                else await client.connect(host, int(port))
            )
            layers, n_theirs = peer.layers(), peer.n_blocks()
            remote = _some_blocks(random, n_request_blocks, n_theirs, "the endpoint's")
            for layer in layers:
                await asyncio.to_thread(_fill, cache, layer, local, remote)
            for layer in layers:
                result = await client.write_cache(
                    peer, local, remote, layer, request_id=request_id
                )
                rate = result.bytes / result.seconds / 1e9
                command.say(
                    machine,
                    f"layer {layer}: {n_request_blocks} blocks, {result.bytes} bytes, "
                    f"{rate:.2f} GB/s, {result.wrs} WRs, "
                    f"{result.device} ({result.wire})",
                    event="written",
                    layer=layer,
                    blocks=n_request_blocks,
                    bytes=result.bytes,
                    seconds=result.seconds,
                    wrs=result.wrs,
                    device=result.device,
                    wire=result.wire,
                )


@click.command()
@click.argument("address", metavar="HOST:PORT", callback=command.check_address)
@click.option(
    "--request-blocks",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Scattered blocks that the request has.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Which blocks.",
)
@click.option("--request-id", default="push", show_default=True)
@click.option("--secret-key-file", help="Secret key of this side; see kvxfer keys.")
@click.option("--server-public-key", help="The endpoint's .key file, or its text.")
@click.option("--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]")
@click.option("--require-rdma", is_flag=True, default=None, help="Refuse software.")
@click.option("--json", "machine", is_flag=True, help="One JSON object a line.")
@click.option("-v", "--verbose", is_flag=True, help="Log everything to stderr.")
@command.geometry_options
def main(
    shape: command.CacheShape,
    address: str,
    request_blocks: int,
    seed: int,
    request_id: str,
    config: Path | None,
    machine: bool,
    verbose: bool,
    **overrides: Any,
) -> None:
    """Write a request's KV cache into the endpoint at HOST:PORT, layer by layer.

    The geometry must be the endpoint's; numbers of blocks and of layers may differ,
    and the layers that both have are written.
    """
    options = command.load_options(config, **overrides)
    command.log(options, verbose=verbose)

    async def until_stopped(stop: asyncio.Event) -> int:
        ended = await command.until(
            stop,
            _push(address, shape, options, request_blocks, seed, request_id, machine),
        )
        return 0 if ended else 130

    command.run(until_stopped)


if __name__ == "__main__":
    main(prog_name="kvxfer push")
