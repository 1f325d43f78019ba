"""The same for programs without an event loop: engines made of threads.

    with kvxfer.blocking.Client(cache) as client:
        peer = client.connect("10.0.0.2", 7777)
        client.write_cache(peer, local_ids, remote_ids, layer_idx=3)

    with kvxfer.blocking.Server(cache, host="10.0.0.2", port=7777) as server:
        for arrival in server.arrivals():
            ...

Each call does what the method of the same name of :class:`kvxfer.Client` and
:class:`kvxfer.Server` does, raises what it raises, and waits for it. One thread with
an event loop serves all clients and servers of the process; there is no second data
path. Any number of threads may call at the same time. A thread that waits does not
hold the GIL; Ctrl-C ends the call as a cancellation does, so that the blocks are free
when it is raised.

What is still open when the interpreter exits is closed then, in an order that leaves
nothing; so is what nobody refers to any more, with a ``ResourceWarning``. A forked
child has to make its own: each call on what it inherited raises ClosedResourceError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import warnings
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from kvxfer.cache import KVCache
from kvxfer.client import Client as AsyncClient
from kvxfer.errors import ClosedResourceError, UsageError
from kvxfer.inbox import Arrival, Failure
from kvxfer.loop_thread import Expired, LoopThread, entered
from kvxfer.options import Options
from kvxfer.peer import Peer as AsyncPeer
from kvxfer.peer import WriteResult
from kvxfer.request import Request
from kvxfer.server import Server as AsyncServer
from kvxfer.sharding import Shard
from kvxfer.stream_statistics import ClientStatistics
from kvxfer.ticket import Ticket

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Arrival", "Client", "Failure", "Peer", "Server", "WriteResult"]

_log = logging.getLogger("kvxfer.blocking")

_Endpoint = TypeVar("_Endpoint", bound=AsyncClient | AsyncServer)
_T = TypeVar("_T")


class _Face(Generic[_Endpoint]):
    """An endpoint on the loop's thread, from its opening to its close."""

    _what: str

    def __init__(self, endpoint: _Endpoint) -> None:
        self._endpoint: _Endpoint = endpoint
        self._thread: LoopThread | None = None
        self._closed = False
        self._finalizer: weakref.finalize[Any, Any] | None = None

    @property
    def options(self) -> Options:
        """The options in force."""
        return self._endpoint.options

    @property
    def memory(self) -> dict[str, str]:
        """How the cache is registered, by the name of the device."""
        return self._endpoint.memory

    def open(self) -> None:
        """Open the devices and register the cache; a server listens, too.

        Raises:
          See the method of the asynchronous class. Nothing is left open.
        """
        if self._closed:
            raise UsageError(f"a {self._what} is opened once; this one is closed")
        endpoint = self._endpoint
        with entered() as thread:
            try:
                thread.run(self._opening())
            except UsageError:
                raise  # it was open before, and stays so
            except BaseException:
                # An interrupt may come when all was open.
                thread.run(endpoint.close)
                raise
            thread.adopt(endpoint)
            self._finalizer = weakref.finalize(
                self, _abandoned, thread, endpoint, self._what
            )
            self._finalizer.atexit = False
            self._thread = thread

    def _opening(self) -> Callable[[], Coroutine[Any, Any, None]]:
        return self._endpoint.open

    def close(self) -> None:
        """Close; what other threads wait for ends first. Twice is fine.

        When this returns nothing is left open: see the asynchronous class.

        Raises:
          ClosedResourceError: In a forked child, where there is nothing to close.
        """
        self._closed = True
        thread = self._thread
        if thread is None:
            return
        try:
            with entered(thread):
                thread.run(self._endpoint.close)
        except ClosedResourceError:
            if os.getpid() != thread.pid:
                raise
            # The thread has ended: another one, or the interpreter, has closed this.
        finally:
            if os.getpid() == thread.pid:
                if self._finalizer is not None:
                    self._finalizer.detach()
                thread.disown(self._endpoint)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self,
        make: Callable[[], Coroutine[Any, Any, _T]],
        timeout: float | None = None,
    ) -> _T:
        with entered(self._thread_now()) as thread:
            return thread.run(make, timeout)

    def _thread_now(self) -> LoopThread:
        if self._thread is None or self._closed:
            state = "closed" if self._closed else "new"
            raise ClosedResourceError(f"the {self._what} is {state}, not open")
        return self._thread


def _abandoned(
    thread: LoopThread, endpoint: AsyncClient | AsyncServer, what: str
) -> None:
    """Close what was not closed; runs in whatever thread collects garbage."""
    if thread.pid == os.getpid():
        thread.close_later(endpoint)
        warnings.warn(f"a {what} was not closed", ResourceWarning, stacklevel=2)


class Peer:
    """A connection to a server, as :meth:`Client.connect` returns it."""

    def __init__(self, client: Client, peer: AsyncPeer) -> None:
        self._client = client
        self._peer = peer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and other._peer is self._peer

    def __hash__(self) -> int:
        return hash(self._peer)

    def __repr__(self) -> str:
        return repr(self._peer)

    @property
    def address(self) -> str:
        """What was dialled."""
        return self._peer.address

    @property
    def connected(self) -> bool:
        """Whether writes are possible, as far as this side knows."""
        return self._peer.connected

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The parts of blocks that are written; empty: whole blocks."""
        return self._peer.shards

    @property
    def device(self) -> str:
        """Name of the device that reaches this peer."""
        return self._peer.device

    @property
    def wire(self) -> str:
        """How bytes travel to this peer, ``none`` before the first of them."""
        return self._peer.wire

    def layers(self, group: str | None = None) -> list[int]:
        """List the layers that both sides hold, of one group or of all."""
        return self._peer.layers(group)

    def n_blocks(self, group: str | None = None) -> int:
        """Return how many blocks the peer has in all of those layers."""
        return self._peer.n_blocks(group)

    def close(self) -> None:
        """Take the connection down and wait for it. Twice is fine.

        Raises:
          ClosedResourceError: The client is closed, and with it all connections.
        """
        self._client._call(self._peer.close)


class Client(_Face[AsyncClient]):
    """Writes blocks of one cache to any number of servers, from any thread.

    Arguments and exceptions are those of :class:`kvxfer.Client`.
    """

    _what = "client"

    def __init__(
        self, cache: KVCache, options: Options | None = None, **overrides: Any
    ) -> None:
        super().__init__(AsyncClient(cache, options, **overrides))

    def connect(
        self,
        host: str,
        port: int | None = None,
        *,
        timeout: float | None = None,
        shards: Iterable[Shard] = (),
    ) -> Peer:
        """Connect to a server, or return the connection that there is already.

        Threads that connect to the same server at the same time share one
        connection. See :meth:`kvxfer.Client.connect`.
        """
        connect = self._endpoint.connect
        peer = self._call(lambda: connect(host, port, timeout=timeout, shards=shards))
        return Peer(self, peer)

    @overload
    def open(self) -> None: ...

    @overload
    def open(
        self,
        request_id: str,
        *,
        deadline: float | None = None,
        priority: int = 0,
        lease: float | None = None,
    ) -> Request: ...

    def open(
        self,
        request_id: str | None = None,
        *,
        deadline: float | None = None,
        priority: int = 0,
        lease: float | None = None,
    ) -> Request | None:
        """Open the client (without arguments), or a request.

        See :meth:`kvxfer.Client.open`. The request is the same object; where its
        methods are to be awaited, use :meth:`kvxfer.Request.join`.
        """
        if request_id is None:
            super().open()
            return None
        return self._endpoint.open(
            request_id, deadline=deadline, priority=priority, lease=lease
        )

    def request(
        self,
        peer: Peer,
        request_id: str,
        remote_block_ids: object,
        *,
        first_block: int = 0,
        deadline: float | None = None,
        priority: int = 0,
        lease: float | None = None,
    ) -> Request:
        """Open a request without an offer; see :meth:`kvxfer.Client.request`."""
        if not isinstance(peer, Peer):
            raise UsageError(f"peer is {peer!r}, not what connect() returned")
        return self._endpoint.request(
            peer._peer,
            request_id,
            remote_block_ids,
            first_block=first_block,
            deadline=deadline,
            priority=priority,
            lease=lease,
        )

    @property
    def listening(self) -> str | None:
        """Where this client is invited, or None."""
        return self._endpoint.listening

    def finished(self) -> list[Request]:
        """Take the requests that have ended since the last call; does not wait."""
        return self._endpoint.finished()

    def statistics(self) -> ClientStatistics:
        """Say what the requests of this client do; does not wait."""
        return self._endpoint.statistics()

    def is_connected(self, host: str, port: int | None = None) -> bool:
        """Say whether writes to a server are possible; does not wait."""
        return self._endpoint.is_connected(host, port)

    def write_cache(
        self,
        peer: Peer,
        local_block_ids: object,
        remote_block_ids: object,
        layer_idx: int | Iterable[int] | None = None,
        *,
        request_id: str | None = None,
        group: str | None = None,
        timeout: float | None = None,
    ) -> WriteResult:
        """Copy local blocks into a peer's blocks, pair by pair, and wait for it.

        See :meth:`kvxfer.Client.write_cache`. The ids must not change meanwhile.
        """
        if not isinstance(peer, Peer):
            raise UsageError(f"peer is {peer!r}, not what connect() returned")

        def write() -> WriteResult | Coroutine[Any, Any, WriteResult]:
            begun = self._endpoint._begin_write(
                peer._peer,
                local_block_ids,
                remote_block_ids,
                layer_idx,
                request_id=request_id,
                group=group,
                timeout=timeout,
            )
            if isinstance(begun, WriteResult):
                return begun
            return peer._peer.finish(begun)

        with entered(self._thread_now()) as thread:
            return thread.run_begun(write, WriteResult)


class Server(_Face[AsyncServer]):
    """Lets clients write into one cache, and tells any thread what they wrote.

    Arguments and exceptions are those of :class:`kvxfer.Server`, and:

    Args:
      on_arrival: Called for each arrival, in the loop's thread, which it must not
        keep waiting; ``arrivals()`` then has nothing to yield. What it raises is
        logged.
    """

    _what = "server"

    def __init__(
        self,
        cache: KVCache,
        options: Options | None = None,
        *,
        on_arrival: Callable[[Arrival], None] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(AsyncServer(cache, options, **overrides))
        self._on_arrival = on_arrival
        self._followers: list[asyncio.Task[None]] = []

    def _opening(self) -> Callable[[], Coroutine[Any, Any, None]]:
        endpoint, on_arrival = self._endpoint, self._on_arrival
        if on_arrival is None:
            return endpoint.open

        followers = self._followers  # not self, which the loop must not keep alive

        async def open_and_follow() -> None:
            await endpoint.open()
            follow = _follow(endpoint.arrivals(), on_arrival)
            followers.append(asyncio.get_running_loop().create_task(follow))

        return open_and_follow

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._endpoint.port

    @property
    def endpoint(self) -> str:
        """What clients dial: ``host:port``, ``[ipv6]:port`` or ``ipc://path``."""
        return self._endpoint.endpoint

    @property
    def devices(self) -> list[str]:
        """Names of the open devices, best first."""
        return self._endpoint.devices

    @property
    def peers(self) -> list[str]:
        """Addresses of the connected writers."""
        return self._endpoint.peers

    def offer(
        self,
        peer: str | Iterable[str],
        request_id: str,
        blocks: Mapping[str, object],
        *,
        first_block: int | Mapping[str, int] = 0,
        sources: int | None = None,
        lease: float | None = None,
        checksum: bool = False,
    ) -> Ticket:
        """Offer blocks for a request; does not wait. See :meth:`kvxfer.Server.offer`.

        The ticket is the same object; where its methods are to be awaited, use
        :meth:`kvxfer.Ticket.join` and :meth:`kvxfer.Ticket.join_layer`.
        """
        return self._endpoint.offer(
            peer,
            request_id,
            blocks,
            first_block=first_block,
            sources=sources,
            lease=lease,
            checksum=checksum,
        )

    def finished(self) -> list[Ticket]:
        """Take the tickets that have ended since the last call; does not wait."""
        return self._endpoint.finished()

    def fence(self, request_id: str) -> None:
        """Return when no byte of an offered request can land any more.

        See :meth:`kvxfer.Server.fence`.
        """
        self._call(lambda: self._endpoint.fence(request_id))

    def arrivals(self, timeout: float | None = None) -> Iterator[Arrival]:
        """Yield what has landed until the close, or until nothing comes in time.

        Each arrival goes to one of the threads that iterate. Somebody has to take
        them: see :meth:`kvxfer.Server.arrivals`.

        Args:
          timeout: End when nothing has come for so many seconds; 0 takes what is
            there. ``None`` waits until the server is closed.
        """
        return self._iterate(self._endpoint.arrivals, timeout)

    def failures(self, timeout: float | None = None) -> Iterator[Failure]:
        """Yield what writers gave up; as :meth:`arrivals`."""
        return self._iterate(self._endpoint.failures, timeout)

    def _iterate(
        self, source: Callable[[], AsyncIterator[_T]], timeout: float | None
    ) -> Iterator[_T]:
        async def following() -> _T | None:
            # A generator that is cancelled has ended, so each call has its own; what
            # waits, waits in the server.
            generator = cast("AsyncGenerator[_T, None]", source())
            async with contextlib.aclosing(generator) as items:
                async for found in items:
                    return found
            return None

        while True:
            try:
                found = self._call(following, timeout)
            except Expired:
                return
            if found is None:
                return
            yield found


async def _follow(
    arrivals: AsyncIterator[Arrival], on_arrival: Callable[[Arrival], None]
) -> None:
    """Hand on what arrives until the server closes."""
    async for arrival in arrivals:
        try:
            on_arrival(arrival)
        except Exception:  # noqa: BLE001 - the next arrival is not at fault
            _log.exception("on_arrival failed on %r", arrival)
