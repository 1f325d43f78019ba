"""The prefill server: computes prompts and streams their KV cache.

``POST /prefill`` returns when the decode server has everything. If whoever asked goes
away, the request is aborted, and its blocks are free when that is done.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import kvxfer
from examples.split_llm.model import Model
from examples.split_llm.paged import BlockAllocator, BlockPool
from examples.split_llm.prefill import PrefillNode

from .web import body_of, make_app, refusal, serve_child, unless_left


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /prefill``."""

    request_id: str
    token_ids: list[int]
    chunk_tokens: int


class PrefillServer:
    """One node behind HTTP."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.app = make_app(
            {
                "/prefill": ("POST", self.prefill),
                "/where": ("GET", self.where),
                "/stats": ("GET", self.stats),
            },
            self._lifespan,
        )
        self._ended: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        options = self._options
        model = await asyncio.to_thread(Model, options.checkpoint)
        pool = BlockPool(model.shape, options.blocks)
        self._allocator = BlockAllocator(options.blocks, seed=1)
        with kvxfer.KVCache.from_tensors(pool.planes) as cache:
            async with kvxfer.Client(cache, listen=f"{options.host}:0") as client:
                self._client = client
                self._node = PrefillNode(model, pool, self._allocator, client)
                try:
                    yield
                finally:
                    self._node.close()

    async def where(self, request: Request) -> Response:
        """Say where offers go."""
        return JSONResponse({"address": self._client.listening})

    async def stats(self, request: Request) -> Response:
        """Say what is under way, and how requests ended."""
        self._ended.update(r.state.value for r in self._client.finished())
        return JSONResponse(
            {
                "under_way": self._client.statistics().requests,
                "ended": self._ended,
                "free_blocks": self._allocator.n_free,
            }
        )

    async def prefill(self, request: Request) -> Response:
        """Compute one prompt and stream its KV cache to whoever offers blocks."""
        ask = await body_of(request, Ask)
        work = self._node.prefill(ask.request_id, ask.token_ids, ask.chunk_tokens)
        try:
            done = await unless_left(request, work)
        except MemoryError as error:
            return refusal(400, str(error))
        except kvxfer.KVXferError as error:
            return refusal(502, f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            return refusal(499, "whoever asked has gone away")
        return JSONResponse({"bytes": done["bytes"], "wire": done["wire"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args()
    serve_child(PrefillServer(options).app, options.fd)


if __name__ == "__main__":
    main()
