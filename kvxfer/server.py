"""The target side: offers a cache to be written and tells what has landed."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from kvxfer import notify, wire
from kvxfer._engine import RingArrival
from kvxfer.adapter import Adapter, finish
from kvxfer.blocks import Ids
from kvxfer.cache import KVCache
from kvxfer.control import CloseReason, ControlServer, OfferParts
from kvxfer.errors import (
    ClosedResourceError,
    KVXferError,
    ProtocolError,
    RefusedError,
    UsageError,
)
from kvxfer.host import Host
from kvxfer.layout import check_fit
from kvxfer.link import Link, numeric_address
from kvxfer.options import Options
from kvxfer.route import geometry_from_wire, shards_from_wire, windows
from kvxfer.sharding import Shard, check_shards
from kvxfer.verbs_types import Access

_log = logging.getLogger("kvxfer.server")

# Arrivals kept for a consumer that is behind, before writers are held back.
_MAX_WAITING = 65536


@dataclass(frozen=True, eq=False)
class Arrival:
    """Blocks of one layer that have landed, every byte of them.

    Attributes:
      peer: Address of the writer.
      request_id: As the writer gave it, or None.
      layer: Model layer.
      block_ids: Blocks of this cache, in the writer's order.
      group: Whose block ids these are.
      bytes: Bytes written, all planes together.
    """

    peer: str
    request_id: str | None
    layer: int
    block_ids: Ids
    group: str
    bytes: int


@dataclass(frozen=True)
class Failure:
    """Layers of a request that a writer gave up: they will not arrive.

    Attributes:
      peer: Address of the writer.
      request_id: As the writer gave it, or None.
      layers: The layers concerned; what landed of them is undefined.
      reason: The writer's words.
    """

    peer: str
    request_id: str | None
    layers: tuple[int, ...]
    reason: str


class _Incoming:
    """One writer's connection: its link and what of its ring is consumed."""

    def __init__(self, peer: str, link: Link, shards: tuple[Shard, ...]) -> None:
        self.peer = peer
        self.link = link
        self.shards = shards
        self.consumed_bytes = 0
        self.consumed_records = 0
        self.told_bytes = 0
        self.told_records = 0
        self.gone = asyncio.get_running_loop().create_future()
        self.ending: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class _Waiting:
    """An arrival in the queue; credit for it may still be owed."""

    arrival: Arrival
    conn_id: int
    head: int
    credited: bool


class Server:
    """Lets clients write into one cache, and tells what they wrote.

    Use as ``async with Server(cache) as server``, or call :meth:`open` and
    :meth:`close`.

    Args:
      cache: Its blocks are the destination. It cannot be closed while this is open.
      options: Defaults for everything; ``None`` loads them from environment and
        config file.
      **overrides: Single options that take precedence, by name: ``host`` (an
        address, a name or ``ipc://path``), ``port`` (0 takes a free one), ...

    Raises:
      OptionError: An option is unknown or out of range.
    """

    def __init__(
        self, cache: KVCache, options: Options | None = None, **overrides: Any
    ) -> None:
        self.options = (
            Options.load(**overrides)
            if options is None
            else dataclasses.replace(options, **overrides)
        )
        self._host = Host(cache, Access.LOCAL_WRITE | Access.REMOTE_WRITE, self.options)
        self._control: ControlServer | None = None
        self._incoming: dict[int, _Incoming] = {}
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._failures: collections.deque[Failure] = collections.deque(maxlen=4096)
        self._news: set[asyncio.Future[None]] = set()
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._state = "new"

    # -- life ------------------------------------------------------------------

    async def open(self) -> None:
        """Open the devices, register the cache, listen.

        Raises:
          AddressInUseError: Somebody listens there already.
          DeviceUnavailableError: No device as the options want it.
          VerbsError: The cache cannot be registered.

        After any exception nothing is left open.
        """
        if self._state != "new":
            raise UsageError(f"a server is opened once; this one is {self._state}")
        self._state = "opening"
        self._opening = asyncio.get_running_loop().create_task(self._open())
        try:
            await finish(self._opening)
        except BaseException:
            if self._state == "open":  # cancelled, but it went on
                await self.close()
            raise

    async def _open(self) -> None:
        host = self.options.host
        try:
            control = ControlServer(
                self,
                host,
                self.options.port,
                incarnation=self._host.incarnation,
                options=self.options,
            )
            is_ipc = host.startswith("ipc://")
            address = None if is_ipc else await numeric_address(host)
            await self._host.open(address, self._on_arrival, self._on_failed)
            try:
                await control.start()
            except BaseException:
                await self._host.close()
                raise
        except BaseException:
            self._state = "new"
            raise
        self._control = control
        self._state = "open"

    async def __aenter__(self) -> Server:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fence and disconnect all writers, then close the devices. Twice is fine.

        When this returns no byte of any writer lands any more, and no thread,
        task, file descriptor or QP is left. ``arrivals()`` ends.

        Raises:
          ClosedResourceError: In a forked child, where there is nothing to close.
          UsageError: In another event loop. Nothing was closed.

        Cancellation:
          Raised when all is closed.
        """
        if self._state == "opening" and self._opening is not None:
            await asyncio.wait({self._opening})
        if self._state == "open":
            self._host.check("server")
            self._state = "closing"
            self._wake()
            self._closing = asyncio.get_running_loop().create_task(self._close())
        if self._closing is None:
            self._state = "closed"
        else:
            await finish(self._closing)

    async def _close(self) -> None:
        assert self._control is not None
        try:
            await self._control.close()
        finally:
            try:
                await self._host.close()
            finally:
                self._state = "closed"

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._listening().port

    @property
    def endpoint(self) -> str:
        """What clients dial: ``host:port``, ``[ipv6]:port`` or ``ipc://path``."""
        return self._listening().endpoint

    @property
    def devices(self) -> list[str]:
        """Names of the open devices, best first."""
        return [adapter.name for adapter in self._host.adapters]

    @property
    def peers(self) -> list[str]:
        """Addresses of the connected writers."""
        return [incoming.peer for incoming in self._incoming.values()]

    def _listening(self) -> ControlServer:
        if self._control is None:
            raise ClosedResourceError("the server is not open")
        return self._control

    def _ensure_usable(self) -> None:
        """Raise where the server was never open, or is another process's or loop's."""
        self._listening()
        if self._state == "open":
            self._host.check("server")

    # -- what landed -----------------------------------------------------------

    async def arrivals(self) -> AsyncIterator[Arrival]:
        """Yield what has landed, in the order of its arrival, until the close.

        Each arrival goes to one consumer. Up to 65536 wait for a consumer that is
        behind or not there yet; then writers are held back, and time out.

        Raises:
          ClosedResourceError: The server was never open, or not in this process.
        """
        self._ensure_usable()
        while True:
            while self._waiting:
                waiting = self._waiting.popleft()
                if not waiting.credited:
                    self._consumed(waiting.conn_id, waiting.head)
                yield waiting.arrival
            if self._state != "open":
                return
            await self._next_news()

    async def failures(self) -> AsyncIterator[Failure]:
        """Yield what writers gave up, until the close; the last 4096 are kept.

        Raises:
          ClosedResourceError: The server was never open, or not in this process.
        """
        self._ensure_usable()
        while True:
            while self._failures:
                yield self._failures.popleft()
            if self._state != "open":
                return
            await self._next_news()

    async def _next_news(self) -> None:
        news = asyncio.get_running_loop().create_future()
        self._news.add(news)
        try:
            await news
        finally:
            self._news.discard(news)

    def _wake(self) -> None:
        for news in self._news:
            if not news.done():
                news.set_result(None)

    def _on_arrival(self, adapter: Adapter, arrival: RingArrival) -> None:
        found = self._find(adapter, arrival.slot)
        if found is None:
            return
        conn_id, incoming = found
        try:
            if arrival.error is not None:
                raise ProtocolError(arrival.error)
            record = notify.decode(
                arrival.record, self._host.cache.groups, incoming.shards
            )
        except ProtocolError as error:
            self._drop(conn_id, f"broke the rules of the notify ring: {error}")
            return
        credited = len(self._waiting) < _MAX_WAITING
        if credited:
            self._consumed(conn_id, arrival.head)
        self._waiting.append(
            _Waiting(
                Arrival(
                    peer=incoming.peer,
                    request_id=record.request_id,
                    layer=record.layer,
                    block_ids=record.block_ids,
                    group=record.group,
                    bytes=record.n_bytes,
                ),
                conn_id,
                arrival.head,
                credited,
            )
        )
        self._wake()

    def _consumed(self, conn_id: int, head: int) -> None:
        """Give credit for the ring back, in portions of a quarter."""
        incoming = self._incoming.get(conn_id)
        if incoming is None or self._control is None:
            return
        # Arrivals that waited for a consumer may come behind younger ones here.
        incoming.consumed_bytes = max(incoming.consumed_bytes, head)
        incoming.consumed_records += 1
        options = self.options
        if (
            incoming.consumed_bytes - incoming.told_bytes
            >= options.notify_ring_bytes // 4
            or incoming.consumed_records - incoming.told_records
            >= max(1, options.notify_receives // 4)
        ):
            incoming.told_bytes = incoming.consumed_bytes
            incoming.told_records = incoming.consumed_records
            self._control.send_credit(
                conn_id, incoming.told_bytes, incoming.told_records
            )

    # -- connections: what the control connection asks for ---------------------

    async def offer(
        self, hello: wire.Hello, conn_id: int, peer_address: str
    ) -> OfferParts:
        """Make this side's end for a writer (for the control connection)."""
        host = self._host
        if hello.role != "initiator":
            raise RefusedError("this server is written to; it does not write")
        shards = shards_from_wire(hello.shards)
        geometry = geometry_from_wire(hello.geometry)
        if shards:
            names = ("at the peer", "here")
            check_shards(geometry, host.geometry, shards, names=names)
        else:
            check_fit(host.geometry, geometry)
        adapter, agreed = await host.agree(hello.devices)
        options = self.options
        link = await Link.open(
            adapter,
            Access.REMOTE_WRITE,
            receives=options.notify_receives,
            gid=agreed.our_gid,
        )
        try:
            ring = await link.start_target(
                options.notify_ring_bytes, options.notify_receives
            )
            parts = OfferParts(
                geometry=host.wire_geometry,
                device=adapter.candidate,
                dialer_device=agreed.theirs.name,
                dialer_gid=agreed.their_gid,
                endpoint=wire.Endpoint(
                    qps=[link.info],
                    windows=windows(host.cache.groups, host.rkey_of(adapter)),
                    ring=ring,
                ),
            )
        except BaseException:
            await link.close()
            raise
        self._incoming[conn_id] = _Incoming(peer_address or "local", link, shards)
        return parts

    async def accept(self, conn_id: int, accept: wire.Accept) -> None:
        """Bring this side's QP to RTS (for the control connection)."""
        incoming = self._incoming[conn_id]
        await incoming.link.connect(accept.endpoint.qps[0], incoming.peer)

    def established(self, conn_id: int) -> None:
        """Both sides are ready (for the control connection)."""
        incoming = self._incoming[conn_id]
        _log.info("%s connected by %s", incoming.peer, incoming.link.adapter.name)

    async def fence(self, conn_id: int, reason: str) -> None:
        """Let nothing of this writer land any more (for the control connection)."""
        incoming = self._incoming[conn_id]
        _log.info("%s asks for a fence: %s", incoming.peer, reason)
        await incoming.link.fail()

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        """A writer gave something up (for the control connection)."""
        incoming = self._incoming[conn_id]
        failure = Failure(
            peer=incoming.peer,
            request_id=message.request_id.decode(errors="replace") or None,
            layers=tuple(message.layers),
            reason=message.reason,
        )
        _log.warning(
            "%s gave up request %s, layers %s: %s",
            failure.peer,
            failure.request_id,
            list(failure.layers),
            failure.reason,
        )
        self._failures.append(failure)
        self._wake()

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        """This side writes nothing, so it needs no credit."""
        _log.debug("%s sends meaningless credit", self._incoming[conn_id].peer)

    async def closed(self, conn_id: int, reason: CloseReason) -> None:
        """A connection is over: release its end (for the control connection)."""
        incoming = self._incoming[conn_id]
        _log.info("%s disconnected: %s", incoming.peer, reason)
        incoming.gone.set_result(None)
        try:
            if incoming.ending is not None:
                await asyncio.wait({incoming.ending})
            # Until its QP is gone, notifications of it are still taken.
            await incoming.link.close()
        except KVXferError:
            _log.exception("the QP of %s could not be destroyed", incoming.peer)
        finally:
            del self._incoming[conn_id]

    def _find(self, adapter: Adapter, slot: int) -> tuple[int, _Incoming] | None:
        for conn_id, incoming in self._incoming.items():
            if incoming.link.adapter is adapter and incoming.link.slot == slot:
                return conn_id, incoming
        return None

    def _on_failed(self, adapter: Adapter, slot: int) -> None:
        found = self._find(adapter, slot)
        if found is not None and not found[1].gone.done():
            self._drop(found[0], "its QP failed")

    def _drop(self, conn_id: int, reason: str) -> None:
        """Put an end to a connection: its QP goes to ERR first."""
        incoming = self._incoming[conn_id]
        if incoming.ending is None:
            _log.warning("%s is dropped: %s", incoming.peer, reason)
            incoming.link.break_()
            incoming.ending = asyncio.get_running_loop().create_task(
                self._end(conn_id, incoming, reason)
            )

    async def _end(self, conn_id: int, incoming: _Incoming, reason: str) -> None:
        # The writer is told, and not just left: it asks for a fence of its own for
        # the writes that it has in flight, and says goodbye when it has the answer.
        assert self._control is not None
        timeout = self.options.fence_timeout
        await incoming.link.fail()
        if await self._control.fence(conn_id, reason, timeout=timeout):
            await asyncio.wait({incoming.gone}, timeout=timeout)
        self._control.drop(conn_id, reason)
