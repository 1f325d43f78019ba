"""What one ``write_cache`` of many small blocks costs, and where.

Counts the Python calls that a write makes before it first waits, and measures, in
one run, the submission alone, the whole write, and a plain copy of the same blocks
by numpy. Medians over rounds in which the three take turns.

    python examples/profile_write.py [--blocks 1538] [--block-bytes 1024]

With ``--device null0`` every WR completes when it is posted and no byte moves: what is
left is the library's own cost, and the whole write is its submission.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
import types
from collections.abc import Coroutine
from typing import Any

import numpy as np

import kvxfer


def calls_until_first_wait(start: Coroutine[Any, Any, object]) -> tuple[int, Any]:
    """Run a coroutine up to its first wait; count the calls that it makes."""
    n_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n_calls
        n_calls += event in ("call", "c_call")

    waits_for: Any = DONE
    sys.setprofile(count)
    try:
        waits_for = start.send(None)
    except StopIteration:
        pass
    finally:
        sys.setprofile(None)
    return n_calls, waits_for


DONE = object()
"""Instead of what a coroutine waits for: it has ended without waiting."""


@types.coroutine
def resume(coroutine: Coroutine[Any, Any, object], waits_for: Any) -> Any:
    """Go on with a coroutine that was run up to its first wait by hand."""
    while waits_for is not DONE:
        yield waits_for
        try:
            waits_for = coroutine.send(None)
        except StopIteration as end:
            return end.value


def median_us(seconds: list[float]) -> float:
    """Return the median in microseconds."""
    return statistics.median(seconds) * 1e6


async def profile(n_blocks: int, block_bytes: int, rounds: int, device: str) -> None:
    """Print the figures for one size."""
    pool = max(2 * n_blocks, (256 << 20) // block_bytes)

    def allocate() -> kvxfer.KVCache:
        return kvxfer.KVCache.allocate(
            n_layers=1, n_blocks=pool, block_bytes=block_bytes, planes=("kv",)
        )

    random = np.random.default_rng(1)
    with (
        allocate() as source,
        allocate() as target,
    ):
        source.view(0, "kv")[:] = 1
        target.view(0, "kv")[:] = 0
        async with (
            kvxfer.Server(target, port=0, device=device) as server,
            kvxfer.Client(source, device=device) as client,
        ):
            peer = await client.connect("127.0.0.1", server.port)

            def write(n: int = n_blocks) -> Coroutine[Any, Any, kvxfer.WriteResult]:
                ours = random.permutation(pool)[:n]
                theirs = random.permutation(pool)[:n]
                return client.write_cache(peer, ours, theirs, 0)

            await write()
            counts = []
            for n in (1, n_blocks):
                coroutine = write(n)
                n_calls, waits_for = calls_until_first_wait(coroutine)
                counts.append(n_calls)
                await resume(coroutine, waits_for)
            submit: list[float] = []
            whole: list[float] = []
            copy: list[float] = []
            for _ in range(rounds):
                coroutine = write()
                start = time.perf_counter()
                try:
                    waits_for = coroutine.send(None)
                except StopIteration:
                    waits_for = DONE
                submit.append(time.perf_counter() - start)
                await resume(coroutine, waits_for)
                coroutine = write()
                start = time.perf_counter()
                await coroutine
                whole.append(time.perf_counter() - start)
                ours = random.permutation(pool)[:n_blocks]
                theirs = random.permutation(pool)[:n_blocks]
                start = time.perf_counter()
                target.view(0, "kv")[theirs] = source.view(0, "kv")[ours]
                copy.append(time.perf_counter() - start)
            print(f"{n_blocks} scattered blocks of {block_bytes} bytes, {peer.wire}")
            print(
                f"  Python calls before the first wait: {counts[0]} for 1 block, "
                f"{counts[1]} for {n_blocks}"
            )
            for name, seconds in (("submission", submit), ("whole write", whole)):
                us = median_us(seconds)
                print(
                    f"  {name}: {us:.0f} us, {us * 1e3 / n_blocks:.0f} ns a block, "
                    f"{us / median_us(copy):.2f} of numpy's copy"
                )


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1538)
    parser.add_argument("--block-bytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="soft0")
    options = parser.parse_args()
    asyncio.run(
        profile(options.blocks, options.block_bytes, options.rounds, options.device)
    )


if __name__ == "__main__":
    main()
