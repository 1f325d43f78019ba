"""The decode server: offers blocks, and streams tokens when they are filled.

``POST /decode`` answers with lines of JSON, a token each; an error is the last line.
If whoever asked goes away, the offer is withdrawn: nothing lands in its blocks when
they are given to the next request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import kvxfer
from examples.split_llm.decode import DecodeNode
from examples.split_llm.model import Model
from examples.split_llm.paged import BlockAllocator, BlockPool

from .web import Stream, body_of, lines_of, make_app, serve_child, while_there


class Ask(msgspec.Struct, forbid_unknown_fields=True):
    """The body of ``POST /decode``; ``prefill`` is where the offer goes."""

    request_id: str
    n_tokens: int
    prefill: str
    max_new_tokens: int


class DecodeServer:
    """One node behind HTTP."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.app = make_app(
            {"/decode": ("POST", self.decode), "/stats": ("GET", self.stats)},
            self._lifespan,
        )
        self._ended: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        options = self._options
        model = await asyncio.to_thread(Model, options.checkpoint)
        self._eos_token = model.eos_token
        pool = BlockPool(model.shape, options.blocks)
        self._allocator = BlockAllocator(options.blocks, seed=2)
        with kvxfer.KVCache.from_tensors(pool.planes) as cache:
            async with kvxfer.Server(cache, host=options.host, port=0) as server:
                self._server = server
                self._node = DecodeNode(model, pool, self._allocator, server)
                try:
                    yield
                finally:
                    self._node.close()

    async def stats(self, request: Request) -> Response:
        """Say how requests ended, and how many blocks are free."""
        self._ended.update(t.state.value for t in self._server.finished())
        return JSONResponse(
            {"ended": self._ended, "free_blocks": self._allocator.n_free}
        )

    async def decode(self, request: Request) -> Response:
        """Stream the tokens of one request."""
        ask = await body_of(request, Ask)
        tokens = while_there(request, self._tokens(ask))
        return Stream(lines_of(tokens), "application/x-ndjson")

    async def _tokens(self, ask: Ask) -> AsyncGenerator[dict[str, object], None]:
        try:
            landing = await self._node.offer(ask.request_id, ask.n_tokens, ask.prefill)
            tokens = self._node.tokens(landing, ask.max_new_tokens)
            async with contextlib.aclosing(tokens):
                async for token in tokens:
                    is_end = token == self._eos_token
                    yield {"token": token, "is_end": is_end}
        except (MemoryError, kvxfer.KVXferError) as error:
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args()
    serve_child(DecodeServer(options).app, options.fd)


if __name__ == "__main__":
    main()
