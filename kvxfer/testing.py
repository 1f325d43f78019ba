"""For your own tests: faults on purpose, a pair of endpoints, a count of what is left.

    async def test_a_write_whose_acknowledgement_is_lost() -> None:
        with no_leaks():
            async with loopback(client_faults="nth=1,act=ack_lost") as pair:
                with pytest.raises(RetryExceededError) as caught:
                    await pair.client.write_cache(pair.peer, [1, 2], [3, 4])
                assert caught.value.fenced

Everything runs on the software device, so it needs no NIC and no privileges. The
rules of a fault plan are in ``docs/testing.md``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from kvxfer import _verbs
from kvxfer.cache import KVCache
from kvxfer.client import Client
from kvxfer.devices import SOFTWARE_DEVICE
from kvxfer.peer import Peer
from kvxfer.server import Server

__all__ = [
    "Loopback",
    "check_plan",
    "faults",
    "live_objects",
    "loopback",
    "no_leaks",
    "set_faults",
    "strict",
]

_FAULT = "KVXFER_SOFT_FAULT"
_STRICT = "KVXFER_SOFT_STRICT"


def check_plan(plan: str) -> None:
    """Say whether a fault plan is well formed.

    Raises:
      UsageError: It is not; the message has the offset of what is wrong.
    """
    with _verbs.Device(SOFTWARE_DEVICE) as device:
        device.set_faults(plan)


@contextlib.contextmanager
def faults(plan: str) -> Iterator[None]:
    """Give a fault plan to the software devices that are opened inside.

    Each device counts for itself, and keeps the plan until it is closed, also after
    the end of the context. The plan is handed on by the environment, so programs
    started inside have it as well.

    Args:
      plan: See ``docs/testing.md``; ``""`` for none.

    Raises:
      UsageError: The plan is malformed; nothing has changed.
    """
    check_plan(plan)
    with _environment(_FAULT, plan):
        yield


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Have the software devices that are opened inside watch how they are used.

    What they watch for no status ever reports: two threads posting to one queue pair
    at a time, a send queue that is full with no signaled work request in it, bytes
    that change between post and completion, objects destroyed with events that
    nobody acknowledged, a device closed with objects alive. It is slow: all bytes
    are read twice more. Programs started inside report on their standard error.

    Raises:
      AssertionError: Something was seen in this process; the message says what. Not
        raised over an exception of the body.
    """
    _verbs.take_violations()
    with _environment(_STRICT, "report"):
        yield
    if found := _verbs.take_violations():
        raise AssertionError("strict mode saw:\n  " + "\n  ".join(found))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def set_faults(endpoint: Client | Server, plan: str) -> None:
    """Replace the fault plan of an open client or server; it counts from now.

    What the old plan has done stays done: a queue pair in ERR, a port that is down.

    Raises:
      UsageError: The plan is malformed, or the endpoint uses a NIC as well. The old
        plan stays in force.
    """
    for adapter in endpoint._host.adapters:
        adapter.engine.cq.device.set_faults(plan)


@dataclass(frozen=True, eq=False)
class Loopback:
    """A client connected to a server of the same process.

    Attributes:
      client: Writes from ``source``.
      server: Is written to, in ``target``.
      peer: The server, as the client's calls take it.
      source: The client's cache.
      target: The server's cache.
    """

    client: Client
    server: Server
    peer: Peer
    source: KVCache
    target: KVCache

    async def reconnect(self) -> Peer:
        """Connect again after a failure; the new peer, for the client's calls."""
        return await self.client.connect("127.0.0.1", self.server.port)


@contextlib.asynccontextmanager
async def loopback(
    source: KVCache | None = None,
    target: KVCache | None = None,
    *,
    client_faults: str = "",
    server_faults: str = "",
    **options: Any,
) -> AsyncIterator[Loopback]:
    """Connect a client to a server over the software device's loopback.

    Args:
      source: The client's cache; None: one of 16 blocks of 4096 bytes in each of two
        planes and four layers, closed at the end.
      target: The server's cache, likewise.
      client_faults: Plan for the client's device, from the first write on.
      server_faults: Plan for the server's device, from the first write on.
      **options: For both sides, by name.

    Raises:
      UsageError: A plan is malformed.
      KVXferError: What opening and connecting may raise. Nothing is left open.
    """
    async with contextlib.AsyncExitStack() as stack:
        if source is None:
            source = stack.enter_context(_small_cache())
        if target is None:
            target = stack.enter_context(_small_cache())
        options = {"device": SOFTWARE_DEVICE, **options}
        server = await stack.enter_async_context(
            Server(target, host="127.0.0.1", port=0, **options)
        )
        client = await stack.enter_async_context(Client(source, **options))
        peer = await client.connect("127.0.0.1", server.port)
        set_faults(server, server_faults)
        set_faults(client, client_faults)
        yield Loopback(client, server, peer, source, target)


def _small_cache() -> KVCache:
    return KVCache.allocate(n_blocks=16, block_bytes=4096, n_layers=4)


def live_objects() -> dict[str, int]:
    """Count the native objects of each kind that are alive in this process.

    Handles count under the name of their class, objects and threads of the software
    device as ``soft.<kind>``. What is not alive is not in it.
    """
    return _verbs.live_objects()


@contextlib.contextmanager
def no_leaks() -> Iterator[None]:
    """Fail if more native objects are alive at the end than at the beginning.

    Raises:
      AssertionError: Names the kinds and how many of each. Not raised over an
        exception of the body, which is the better one to see.
    """
    before = live_objects()
    yield
    left = {
        kind: count - before.get(kind, 0)
        for kind, count in live_objects().items()
        if count > before.get(kind, 0)
    }
    if left:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        raise AssertionError(f"left alive: {found}")
