"""Move the KV cache of a language model into another node's blocks over RDMA.

    async with kvxfer.Client(cache) as client:              # prefill node
        peer = await client.connect("10.0.0.2", 7777)
        await client.write_cache(peer, local_ids, remote_ids, layer_idx=3)

    async with kvxfer.Server(cache, host="10.0.0.2", port=7777) as server:
        async for arrival in server.arrivals():             # decode node
            ...

Names are loaded when they are first used: parts that need no native code, such as
``kvxfer.kvbench``, work and start quickly without it.
"""

from typing import TYPE_CHECKING

from kvxfer._version import __version__

if TYPE_CHECKING:
    from kvxfer.cache import KVCache
    from kvxfer.client import Client
    from kvxfer.errors import KVXferError
    from kvxfer.inbox import Arrival, Failure
    from kvxfer.options import Options
    from kvxfer.peer import Peer, WriteResult
    from kvxfer.request import Request
    from kvxfer.requests import LayerState, RequestState, TicketState
    from kvxfer.server import Server
    from kvxfer.ticket import Ticket

__all__ = [
    "Arrival",
    "Client",
    "Failure",
    "KVCache",
    "KVXferError",
    "LayerState",
    "Options",
    "Peer",
    "Request",
    "RequestState",
    "Server",
    "Ticket",
    "TicketState",
    "WriteResult",
    "__version__",
]

_HOMES = {
    "Arrival": "kvxfer.inbox",
    "Client": "kvxfer.client",
    "Failure": "kvxfer.inbox",
    "KVCache": "kvxfer.cache",
    "KVXferError": "kvxfer.errors",
    "LayerState": "kvxfer.requests",
    "Options": "kvxfer.options",
    "Peer": "kvxfer.peer",
    "Request": "kvxfer.request",
    "RequestState": "kvxfer.requests",
    "Server": "kvxfer.server",
    "Ticket": "kvxfer.ticket",
    "TicketState": "kvxfer.requests",
    "WriteResult": "kvxfer.peer",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "errors":
        return importlib.import_module("kvxfer.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
