"""The decode process: offers its blocks and goes on generating.

Started by the driver. It never sees a prompt: what it knows of one is the number
of its tokens, and what kvxfer brings: the bytes, and behind them the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kvxfer
from kvxfer.errors import NotQuiescentError

from .channel import Calls, Json
from .model import Model
from .paged import BlockAllocator, BlockPool, blocks_for


class Landing:
    """The blocks offered for one request, and when what happened to it.

    Attributes:
      first_step: When the first step of the model began, by ``time.monotonic()``.
    """

    def __init__(
        self, n_tokens: int, block_ids: list[int], ticket: kvxfer.Ticket
    ) -> None:
        self.n_tokens = n_tokens
        self.block_ids = block_ids
        self.ticket = ticket
        self.first_step = 0.0

    @property
    def arrived(self) -> list[float]:
        """When each layer was in place."""
        return [self.ticket.arrived[layer] for layer in self.ticket.layers_done]


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
        # One thread computes for all requests, one token each in turn.
        self._compute = ThreadPoolExecutor(max_workers=1)

    async def offer(self, request_id: str, n_tokens: int, prefill: str) -> Landing:
        """Keep blocks for a prompt of ``n_tokens`` and offer them to ``prefill``.

        Waits until so many are free. ``tokens`` has to follow, which gives them back.
        """
        block_ids = await self._allocator.take_later(blocks_for(n_tokens))
        try:
            ticket = self._server.offer(prefill, request_id, {"main": block_ids})
        except BaseException:
            self._allocator.give(block_ids)
            raise
        return Landing(n_tokens, block_ids, ticket)

    async def tokens(
        self, landing: Landing, max_new_tokens: int
    ) -> AsyncGenerator[int, None]:
        """Generate greedily, from the moment the last layer is in place.

        The first token comes with the cache. The iterator must be run to its end or
        closed: the blocks are given back then.

        Raises:
          kvxfer.KVXferError: The request ended badly.

        Cancellation:
          Aborts the request; so does closing the iterator. Raised when nothing of it
          can land any more.
        """
        try:
            cache = await self._gather(landing)
            await landing.ticket.wait()
            token = int.from_bytes(landing.ticket.aux, "little")
        finally:
            await landing.ticket.abort()
            if not isinstance(landing.ticket.error, NotQuiescentError):
                self._allocator.give(landing.block_ids)
        loop = asyncio.get_running_loop()
        yield token
        for _ in range(max_new_tokens - 1):
            if token == self._model.eos_token:
                return
            landing.first_step = landing.first_step or time.monotonic()
            token = await loop.run_in_executor(
                self._compute, self._model.step, cache, token
            )
            yield token

    async def _gather(self, landing: Landing) -> Any:
        """Take each layer out of its blocks as soon as it is in place."""
        layers = []
        for layer in range(self._model.shape.n_layers):
            await landing.ticket.wait_layer(layer)
            layers.append(
                await asyncio.to_thread(
                    self._pool.read, layer, landing.block_ids, landing.n_tokens
                )
            )
        return self._model.cache_of(layers)

    def close(self) -> None:
        """Wait for the computation that still runs, if any."""
        self._compute.shutdown()


class Desk:
    """What the driver asks of the node, as calls that it can answer with JSON."""

    def __init__(self, node: DecodeNode) -> None:
        self._node = node

    async def generate(
        self, request_id: str, n_tokens: int, prefill: str, max_new_tokens: int
    ) -> Json:
        """Offer blocks to a prefill process, and generate when they are filled."""
        landing = await self._node.offer(request_id, n_tokens, prefill)
        tokens = [t async for t in self._node.tokens(landing, max_new_tokens)]
        return {
            "tokens": tokens,
            "remote_block_ids": landing.block_ids,
            "arrived": landing.arrived,
            "first_step": landing.first_step,
        }


async def run(options: argparse.Namespace, calls: Calls) -> None:
    model = await asyncio.to_thread(Model, options.checkpoint)
    pool = BlockPool(model.shape, options.blocks)
    allocator = BlockAllocator(options.blocks, seed=options.seed)
    with kvxfer.KVCache.from_tensors(pool.planes) as cache:
        async with kvxfer.Server(cache, host=options.host, port=0) as server:
            node = DecodeNode(model, pool, allocator, server)
            try:
                await calls.serve({"generate": Desk(node).generate})
            finally:
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
