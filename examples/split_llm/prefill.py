"""The prefill process: computes prompts and writes their KV cache to its peer.

Started by the driver. Each layer of a prompt leaves as soon as it is computed,
while the model works on the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

import kvxfer

from .channel import Calls, Json
from .model import Model
from .paged import BlockAllocator, BlockPool


class PrefillNode:
    """One model, one pool of blocks, one connected client."""

    def __init__(
        self,
        model: Model,
        pool: BlockPool,
        allocator: BlockAllocator,
        client: kvxfer.Client,
    ) -> None:
        self._model = model
        self._pool = pool
        self._allocator = allocator
        self._client = client
        self._peer: kvxfer.Peer | None = None
        # The model computes one prompt at a time, off the event loop, while the
        # loop moves what earlier layers and earlier prompts left behind.
        self._compute = ThreadPoolExecutor(max_workers=1)

    async def connect(self, host: str, port: int) -> Json:
        """Connect to the decode process that all prompts go to."""
        self._peer = await self._client.connect(host, port)
        return {}

    async def prefill(
        self, request_id: str, token_ids: list[int], remote_block_ids: list[int]
    ) -> Json:
        """Compute a prompt and write its KV cache, layer by layer, to the peer.

        Returns when every layer is in the peer's blocks. ``early_layers`` counts the
        layers whose write had ended before the computation did.
        """
        peer = self._peer
        if peer is None:
            raise RuntimeError("prefill came before connect")
        local_block_ids = self._allocator.take(len(remote_block_ids))
        loop = asyncio.get_running_loop()
        writes: list[Future[kvxfer.WriteResult]] = []

        def on_layer(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            self._pool.write(layer, local_block_ids, keys, values)
            write = self._client.write_cache(
                peer,
                local_block_ids,
                remote_block_ids,
                layer,
                request_id=request_id,
            )
            writes.append(asyncio.run_coroutine_threadsafe(write, loop))

        first_token = await loop.run_in_executor(
            self._compute, self._model.prefill, token_ids, on_layer
        )
        early = sum(write.done() for write in writes)
        results = await asyncio.gather(*map(asyncio.wrap_future, writes))
        # write_cache has returned: the device is done with the blocks.
        self._allocator.give(local_block_ids)
        return {
            "first_token": first_token,
            "early_layers": early,
            "local_block_ids": local_block_ids,
            "bytes": sum(result.bytes for result in results),
            "wrs": sum(result.wrs for result in results),
            "device": results[0].device,
            "wire": results[-1].wire,
        }

    def close(self) -> None:
        """Wait for the computation that still runs, if any."""
        self._compute.shutdown()


async def run(options: argparse.Namespace, calls: Calls) -> None:
    model = await asyncio.to_thread(Model, options.checkpoint)
    pool = BlockPool(model.shape, options.blocks)
    allocator = BlockAllocator(options.blocks, seed=options.seed)
    with kvxfer.KVCache.from_tensors(pool.planes) as cache:
        async with kvxfer.Client(cache) as client:
            node = PrefillNode(model, pool, allocator, client)
            try:
                await calls.serve({"connect": node.connect, "prefill": node.prefill})
            finally:
                node.close()


def main() -> None:
    calls = Calls()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    try:
        asyncio.run(run(options, calls))
    except kvxfer.KVXferError as error:
        sys.exit(f"split_llm: prefill: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
