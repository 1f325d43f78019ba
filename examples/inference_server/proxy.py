"""The proxy: ``/v1/completions`` in front of a prefill and a decode server.

It tokenizes, tells both servers of a request at the same time, and turns the tokens
that come back into text. The KV cache does not pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from examples.split_llm.model import Tokenizer

from .web import RefusedError, Stream, body_of, make_app, unless_left, while_there

CONTEXT_TOKENS = 2048
CHUNK_TOKENS = 256


class Completion(msgspec.Struct):
    """The body of ``POST /v1/completions``, as far as it is understood here."""

    prompt: str
    model: str = ""
    max_tokens: int = 16
    temperature: float = 0.0
    stream: bool = False


class UpstreamError(Exception):
    """A server behind the proxy failed a request."""


class Upstream:
    """Both servers behind the proxy."""

    def __init__(self, prefill: str, decode: str) -> None:
        self.urls = {"prefill": prefill, "decode": decode}
        # Connections are opened as they are needed, and an answer may take long.
        self.http = httpx.AsyncClient(timeout=None, limits=httpx.Limits())
        self._address = ""

    async def connect(self) -> None:
        """Wait until both servers are there."""
        where = await self.http.get(f"{self.urls['prefill']}/where")
        self._address = where.raise_for_status().json()["address"]
        (await self.http.get(f"{self.urls['decode']}/stats")).raise_for_status()

    async def generate(
        self, token_ids: list[int], max_new_tokens: int
    ) -> AsyncGenerator[tuple[int, bool], None]:
        """Yield tokens, and with each whether it is the end of the text.

        Closing the generator leaves both servers, which abort the request.

        Raises:
          UpstreamError: One of them failed it.
        """
        request_id = uuid.uuid4().hex
        prefill = asyncio.ensure_future(
            self.http.post(
                f"{self.urls['prefill']}/prefill",
                json={
                    "request_id": request_id,
                    "token_ids": token_ids,
                    "chunk_tokens": CHUNK_TOKENS,
                },
            )
        )
        try:
            async with self.http.stream(
                "POST",
                f"{self.urls['decode']}/decode",
                json={
                    "request_id": request_id,
                    "n_tokens": len(token_ids),
                    "prefill": self._address,
                    "max_new_tokens": max_new_tokens,
                },
            ) as answer:
                lines = answer.aiter_lines()
                while (line := await _next_line(lines, prefill)) is not None:
                    found = json.loads(line)
                    if "error" in found:
                        raise UpstreamError(found["error"])
                    yield found["token"], found["is_end"]
        except httpx.HTTPError as error:
            raise UpstreamError(f"a server does not answer: {error!r}") from error
        finally:
            prefill.cancel()
            await asyncio.wait({prefill})
            if not prefill.cancelled():
                prefill.exception()  # the other server's word is the better one


async def _next_line(
    lines: AsyncIterator[str], prefill: asyncio.Future[httpx.Response]
) -> str | None:
    """Wait for a line of the decode server, but not if the prefill has failed."""
    line = asyncio.ensure_future(anext(lines, None))
    try:
        if not prefill.done():
            await asyncio.wait({line, prefill}, return_when=asyncio.FIRST_COMPLETED)
        if prefill.done() and prefill.result().is_error:
            raise UpstreamError(f"prefill: {prefill.result().text}")
        found: str | None = await line
    finally:
        if not line.done():
            line.cancel()
            await asyncio.wait({line})
    return found


class Text:
    """Tokens as they come, in pieces of text that can be shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Take a token; return what text it adds, with whole characters only."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new


class Proxy:
    """The application."""

    def __init__(self, upstream: Upstream, tokenizer: Tokenizer, model: str) -> None:
        self._upstream = upstream
        self._tokenizer = tokenizer
        self._model = model
        self.app = make_app(
            {
                "/v1/completions": ("POST", self.completions),
                "/v1/models": ("GET", self.models),
                "/stats": ("GET", self.stats),
            },
            self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._upstream.http.aclose()

    async def models(self, request: Request) -> Response:
        """List the one model."""
        model = {"id": self._model, "object": "model", "owned_by": "kvxfer"}
        return JSONResponse({"object": "list", "data": [model]})

    async def stats(self, request: Request) -> Response:
        """Say what both servers say of themselves."""
        found = {}
        for name, url in self._upstream.urls.items():
            answer = await self._upstream.http.get(f"{url}/stats")
            found[name] = answer.json()
        return JSONResponse(found)

    async def completions(self, request: Request) -> Response:
        """Complete one prompt, at once or as server-sent events."""
        ask = await body_of(request, Completion)
        token_ids = self._check(ask)
        # A request that fails before its first token gets an error and its status.
        tokens = self._upstream.generate(token_ids, ask.max_tokens)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
        }
        if ask.stream:
            events = while_there(request, self._events(head, tokens, ask.max_tokens))
            return Stream(events, "text/event-stream")
        try:
            whole = await unless_left(request, self._whole(tokens, ask.max_tokens))
        except asyncio.CancelledError:
            return Response(status_code=499)
        except UpstreamError as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=502)
        text, reason, n = whole
        choices = [_choice(text, reason)]
        usage = {
            "prompt_tokens": len(token_ids),
            "completion_tokens": n,
            "total_tokens": len(token_ids) + n,
        }
        return JSONResponse({**head, "choices": choices, "usage": usage})

    def _check(self, ask: Completion) -> list[int]:
        if ask.temperature:
            raise RefusedError("this server is greedy: temperature must be 0")
        if ask.model not in ("", self._model):
            raise RefusedError(f"no model {ask.model!r} here, but {self._model!r}")
        token_ids = self._tokenizer.encode(ask.prompt)
        if not token_ids:
            raise RefusedError("the prompt is empty")
        if ask.max_tokens < 1 or len(token_ids) + ask.max_tokens > CONTEXT_TOKENS:
            raise RefusedError(
                f"max_tokens is {ask.max_tokens}: at least 1, and at most "
                f"{CONTEXT_TOKENS} with the {len(token_ids)} tokens of the prompt"
            )
        return token_ids

    async def _pieces(
        self, tokens: AsyncGenerator[tuple[int, bool], None], max_tokens: int
    ) -> AsyncGenerator[tuple[str, str | None], None]:
        """Yield text, and with the last piece why it is the last."""
        text, n = Text(self._tokenizer), 0
        async with contextlib.aclosing(tokens):
            async for token, is_end in tokens:
                n += 1
                reason = "stop" if is_end else "length" if n == max_tokens else None
                yield ("" if is_end else text.add(token)), reason

    async def _whole(
        self, tokens: AsyncGenerator[tuple[int, bool], None], max_tokens: int
    ) -> tuple[str, str | None, int]:
        pieces = self._pieces(tokens, max_tokens)
        async with contextlib.aclosing(pieces):
            found = [piece async for piece in pieces]
        return "".join(text for text, _ in found), found[-1][1], len(found)

    async def _events(
        self,
        head: dict[str, object],
        tokens: AsyncGenerator[tuple[int, bool], None],
        max_tokens: int,
    ) -> AsyncGenerator[bytes, None]:
        pieces = self._pieces(tokens, max_tokens)
        try:
            async with contextlib.aclosing(pieces):
                async for text, reason in pieces:
                    if text or reason:
                        yield _event({**head, "choices": [_choice(text, reason)]})
        except UpstreamError as error:
            yield _event({"error": {"message": str(error), "type": "server_error"}})
        yield b"data: [DONE]\n\n"


def _choice(text: str, reason: str | None) -> dict[str, object]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


def _event(data: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
