"""The decode process: takes KV caches into its blocks and goes on generating.

Started by the driver. It never sees a prompt: what it knows of one is the number
of its tokens, the first generated token, and the bytes that kvxfer wrote.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kvxfer

from .channel import Calls, Json
from .model import Model
from .paged import BlockAllocator, BlockPool, blocks_for


class Landing:
    """The blocks kept free for one request, and the layers that are in them."""

    def __init__(self, n_tokens: int, block_ids: list[int], n_layers: int) -> None:
        self.n_tokens = n_tokens
        self.block_ids = block_ids
        self.complete = asyncio.Event()
        self._missing = set(range(n_layers))

    def add(self, layer: int, block_ids: list[int]) -> None:
        if block_ids != self.block_ids:
            raise RuntimeError(
                f"layer {layer} came for blocks {block_ids}, not {self.block_ids}"
            )
        if layer not in self._missing:
            raise RuntimeError(f"layer {layer} was announced twice")
        self._missing.remove(layer)
        if not self._missing:
            self.complete.set()


class DecodeNode:
    """One model, one pool of blocks that peers write into, one server."""

    def __init__(
        self,
        model: Model,
        pool: BlockPool,
        allocator: BlockAllocator,
        server: kvxfer.Server,
    ) -> None:
        self._model = model
        self._pool = pool
        self._allocator = allocator
        self._server = server
        self._landings: dict[str, Landing] = {}
        # One thread computes for all requests, one token each in turn.
        self._compute = ThreadPoolExecutor(max_workers=1)

    async def where(self) -> Json:
        """Tell the driver where this node listens."""
        return {"port": self._server.port}

    async def reserve(self, request_id: str, n_tokens: int) -> Json:
        """Keep blocks for a prompt of ``n_tokens`` and say which."""
        block_ids = self._allocator.take(blocks_for(n_tokens))
        n_layers = self._model.shape.n_layers
        self._landings[request_id] = Landing(n_tokens, block_ids, n_layers)
        return {"block_ids": block_ids}

    async def generate(
        self, request_id: str, first_token: int, max_new_tokens: int
    ) -> Json:
        """Wait until every layer has landed, then continue after ``first_token``."""
        landing = self._landings[request_id]
        await landing.complete.wait()
        loop = asyncio.get_running_loop()
        cache = await loop.run_in_executor(self._compute, self._rebuild, landing)
        del self._landings[request_id]
        self._allocator.give(landing.block_ids)
        tokens = [first_token]
        while len(tokens) < max_new_tokens and tokens[-1] != self._model.eos_token:
            tokens.append(
                await loop.run_in_executor(
                    self._compute, self._model.step, cache, tokens[-1]
                )
            )
        return {"tokens": tokens}

    async def take_arrivals(self) -> None:
        """Note what the server says has landed, for as long as it is open."""
        async for arrival in self._server.arrivals():
            landing = self._landings.get(arrival.request_id or "")
            if landing is None:
                raise RuntimeError(f"nobody waits for request {arrival.request_id!r}")
            landing.add(arrival.layer, arrival.block_ids.tolist())

    def close(self) -> None:
        """Wait for the computation that still runs, if any."""
        self._compute.shutdown()

    def _rebuild(self, landing: Landing) -> Any:
        return self._model.cache_of(
            self._pool.read(layer, landing.block_ids, landing.n_tokens)
            for layer in range(self._model.shape.n_layers)
        )


async def run(options: argparse.Namespace, calls: Calls) -> None:
    model = await asyncio.to_thread(Model, options.checkpoint)
    pool = BlockPool(model.shape, options.blocks)
    allocator = BlockAllocator(options.blocks, seed=options.seed)
    with kvxfer.KVCache.from_tensors(pool.planes) as cache:
        async with kvxfer.Server(cache, host=options.host, port=0) as server:
            node = DecodeNode(model, pool, allocator, server)
            serving = asyncio.ensure_future(
                calls.serve(
                    {
                        "where": node.where,
                        "reserve": node.reserve,
                        "generate": node.generate,
                    }
                )
            )
            arriving = asyncio.ensure_future(node.take_arrivals())
            try:
                # Whichever ends first ends the process; a failure shows here.
                done, _ = await asyncio.wait(
                    {serving, arriving}, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
            finally:
                serving.cancel()
                arriving.cancel()
                await asyncio.gather(serving, arriving, return_exceptions=True)
                node.close()


def main() -> None:
    calls = Calls()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--host", required=True)
    options = parser.parse_args()
    try:
        asyncio.run(run(options, calls))
    except kvxfer.KVXferError as error:
        sys.exit(f"split_llm: decode: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
