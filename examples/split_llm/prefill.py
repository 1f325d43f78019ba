"""The prefill process: computes prompts and streams their KV cache to its peer.

Started by the driver. A hook behind each decoder layer puts the layer's K and V into
blocks and says so to kvxfer, which sends them while the next layer runs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kvxfer
from kvxfer.errors import NotQuiescentError

from .channel import Calls, Json
from .model import ComputedLayer, Model
from .paged import BLOCK_TOKENS, BlockAllocator, BlockPool, blocks_for

TOKEN_BYTES = 4


class Prompt:
    """One prompt on its way through the model, chunk by chunk.

    The calls to the model are made in the compute thread. What they say to the
    request they say from there: ``ready`` never waits.
    """

    def __init__(
        self,
        model: Model,
        pool: BlockPool,
        request: kvxfer.Request,
        token_ids: list[int],
        block_ids: list[int],
        *,
        streamed: bool,
    ) -> None:
        self.computed: list[tuple[int, float, float]] = []
        self.handed_over: dict[int, float] = {}
        self.n_computed = 0
        self._model = model
        self._pool = pool
        self._request = request
        self._token_ids = token_ids
        self._block_ids = block_ids
        self._streamed = streamed
        self._cache = model.new_cache()

    @property
    def is_over(self) -> bool:
        """Whether all is computed, or nobody wants the rest."""
        return (
            self.n_computed == len(self._token_ids) or self._request.error is not None
        )

    def compute(self, n_tokens: int) -> int:
        """Run the next ``n_tokens``; return the likeliest token behind them."""
        first = self.n_computed
        token_ids = self._token_ids[first : first + n_tokens]
        stop = first + len(token_ids)

        def on_layer(computed: ComputedLayer) -> None:
            self.computed.append((computed.layer, computed.began, computed.ended))
            self._pool.write(
                computed.layer, self._block_ids, computed.keys, computed.values, first
            )
            self._say_ready(computed.layer, first, stop)

        token = self._model.prefill(self._cache, token_ids, on_layer)
        self.n_computed = stop
        return token

    def _say_ready(self, layer: int, first: int, stop: int) -> None:
        """Tell the request which blocks have got something of this chunk.

        A block that is only partly filled goes out as it is, and again when the next
        chunk has filled it further.
        """
        is_last = stop == len(self._token_ids)
        if self._streamed:
            first_block = first // BLOCK_TOKENS
            self._request.ready(
                layer,
                self._block_ids[first_block : blocks_for(stop)],
                first_block=first_block,
                final=is_last,
            )
            self.handed_over[layer] = time.monotonic()
        elif is_last and layer == self._model.shape.n_layers - 1:
            self._request.ready(None, self._block_ids, final=True)
            layers = range(self._model.shape.n_layers)
            self.handed_over = dict.fromkeys(layers, time.monotonic())


class PrefillNode:
    """One model, one pool of blocks, one client that decode processes invite."""

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
        # The model computes one chunk at a time, off the event loop, and prompts
        # take turns; the loop moves what earlier layers left behind.
        self._compute = ThreadPoolExecutor(max_workers=1)

    async def where(self) -> Json:
        """Tell the driver where offers for this node go."""
        return {"address": self._client.listening}

    async def prefill(
        self,
        request_id: str,
        token_ids: list[int],
        chunk_tokens: int = 0,
        streamed: bool = True,
    ) -> Json:
        """Compute a prompt, in chunks, and stream its KV cache to who offers blocks.

        Returns when all of it is there, and with it the first token that the model
        gives. Without ``streamed`` everything goes out behind the last layer, in one
        piece, which is what streaming is compared with.

        Raises:
          kvxfer.KVXferError: The request ended badly, here or on the other side.

        Cancellation:
          Aborts the request. Raised when its blocks are free.
        """
        block_ids = await self._allocator.take_later(blocks_for(len(token_ids)))
        request = self._client.open(request_id)
        prompt = Prompt(
            self._model, self._pool, request, token_ids, block_ids, streamed=streamed
        )
        try:
            token = await self._run(prompt, chunk_tokens or len(token_ids))
            if not request.error:
                request.finish(aux=token.to_bytes(TOKEN_BYTES, "little"))
            await request.sent()
        finally:
            await request.abort()
            if not isinstance(request.error, NotQuiescentError):
                self._allocator.give(block_ids)
        metrics = request.metrics
        return {
            "local_block_ids": block_ids,
            "bytes": metrics.bytes,
            "wrs": metrics.wrs,
            "device": metrics.device,
            "wire": metrics.wire,
            "computed": prompt.computed,
            "acknowledged": [times.acknowledged for times in metrics.layers],
            "handed_over": [at for _, at in sorted(prompt.handed_over.items())],
        }

    async def _run(self, prompt: Prompt, chunk_tokens: int) -> int:
        """Compute chunk after chunk, as long as the request is wanted."""
        loop = asyncio.get_running_loop()
        token = 0
        while not prompt.is_over:
            chunk = loop.run_in_executor(self._compute, prompt.compute, chunk_tokens)
            try:
                token = await asyncio.shield(chunk)
            except asyncio.CancelledError:
                # The model cannot be stopped, and it writes to the blocks.
                await asyncio.wait({chunk})
                raise
        return token

    def close(self) -> None:
        """Wait for the computation that still runs, if any."""
        self._compute.shutdown()


async def run(options: argparse.Namespace, calls: Calls) -> None:
    model = await asyncio.to_thread(Model, options.checkpoint)
    pool = BlockPool(model.shape, options.blocks)
    allocator = BlockAllocator(options.blocks, seed=options.seed)
    listen = f"{options.host}:0"
    with kvxfer.KVCache.from_tensors(pool.planes) as cache:
        async with kvxfer.Client(cache, listen=listen) as client:
            node = PrefillNode(model, pool, allocator, client)
            try:
                await calls.serve({"where": node.where, "prefill": node.prefill})
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
        sys.exit(f"split_llm: prefill: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
