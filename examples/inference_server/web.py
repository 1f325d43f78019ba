"""What the three servers have in common: answers that end when their reader leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

# How long answers that are under way may take when a server ends.
GRACE_SECONDS = 5


class RefusedError(Exception):
    """A request that cannot be served, and why: the reader's mistake."""


async def body_of(request: Request, kind: type[T]) -> T:
    """Decode a JSON body.

    Raises:
      RefusedError: It is not what is expected.
    """
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.MsgspecError as error:
        raise RefusedError(f"the body is not understood: {error}") from error


async def _left(request: Request) -> None:
    """Wait until whoever asked has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """Wait for ``work``; cancel it when whoever asked for it has gone away.

    Raises:
      asyncio.CancelledError: Nobody is there. The work has ended.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
    return working.result()


async def while_there(
    request: Request, items: AsyncGenerator[T, None]
) -> AsyncGenerator[T, None]:
    """Hand items on until they end or whoever asked has gone away; close them."""
    leaving = asyncio.ensure_future(_left(request))
    try:
        while True:
            item = asyncio.ensure_future(anext(items))
            try:
                await asyncio.wait({item, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not item.done():
                    item.cancel()
                    await asyncio.wait({item})
            if item.cancelled() or leaving.done():
                return
            try:
                found = item.result()
            except StopAsyncIteration:
                return
            yield found
    finally:
        leaving.cancel()
        await items.aclose()


class Stream(Response):  # type: ignore[misc]  # untyped base
    """A streamed answer whose source is closed when it ends, however it does.

    The source is to end by itself when nobody reads any more: see ``while_there``.
    """

    def __init__(self, source: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._source):
            async for body in self._source:
                await send(
                    {"type": "http.response.body", "body": body, "more_body": True}
                )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def refusal(status: int, message: str) -> Response:
    """Make the answer that says what is wrong, as the API's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


async def _refused(request: Request, error: Exception) -> Response:
    return refusal(400, str(error))


def make_app(
    routes: Mapping[str, tuple[str, Endpoint]],
    lifespan: Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]],
) -> Starlette:
    """Make an application of ``{path: (method, endpoint)}``."""
    return Starlette(
        routes=[
            Route(path, endpoint, methods=[method])
            for path, (method, endpoint) in routes.items()
        ],
        lifespan=lifespan,
        exception_handlers={RefusedError: _refused},
    )


async def lines_of(
    items: AsyncGenerator[dict[str, object], None],
) -> AsyncGenerator[bytes, None]:
    """Write items as lines of JSON; close them at the end."""
    async with contextlib.aclosing(items):
        async for item in items:
            yield json.dumps(item).encode() + b"\n"


def server_of(app: Starlette) -> uvicorn.Server:
    """Make a server that says nothing but errors."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return uvicorn.Server(config)


def serve_child(app: Starlette, fd: int) -> None:
    """Serve on a socket that the parent has made, until standard input ends.

    That is how the parent says that it is over, and how its death says so.
    """
    server = server_of(app)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def end_of_input() -> None:
            if not os.read(sys.stdin.fileno(), 1):
                loop.remove_reader(sys.stdin.fileno())
                server.should_exit = True

        loop.add_reader(sys.stdin.fileno(), end_of_input)
        await server.serve(sockets=[socket.socket(fileno=fd)])

    asyncio.run(run())
