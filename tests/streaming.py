"""A decode side and a prefill side in one process, for the tests of requests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvxfer import Client, Server
from tests.endpoints import QUICK, Arena, arena

#: Short deadlines for what ends badly.
HASTY: dict[str, Any] = {**QUICK, "request_lease": 20.0, "stall_timeout": 10.0}


@dataclass(eq=False)
class Streamed:
    """A server that offers, and a client that is invited."""

    source: Arena
    target: Arena
    server: Server
    client: Client

    @property
    def prefill(self) -> str:
        """Where the client is invited."""
        found = self.client.listening
        assert found is not None
        return found


@contextlib.asynccontextmanager
async def streamed(
    source: Arena | None = None,
    target: Arena | None = None,
    *,
    server_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Streamed]:
    """Give both sides; :data:`HASTY` and ``options`` hold for both.

    Nothing may be kept of the requests that the test has had.
    """
    options = {**HASTY, **options}
    with (
        source or arena(seed=1) as source,
        target or arena(seed=2) as target,
    ):
        async with (
            Server(
                target.cache,
                **{**options, "host": "127.0.0.1", "port": 0, **(server_options or {})},
            ) as server,
            Client(source.cache, **{**options, "listen": "127.0.0.1:0"}) as client,
        ):
            yield Streamed(source, target, server, client)
        streams = client._streams
        assert streams is None or not streams._dispatcher._owners, "of what is over"
