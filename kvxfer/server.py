"""The target side: offers a cache to be written and tells what has landed."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any

from kvxfer._engine import RingArrival
from kvxfer.adapter import Adapter, finish
from kvxfer.arguments import request_name, seconds_of
from kvxfer.cache import KVCache
from kvxfer.connections import Connections, Incoming
from kvxfer.control import ControlServer
from kvxfer.counters import Counters
from kvxfer.errors import (
    ClosedResourceError,
    NotQuiescentError,
    ProtocolError,
    UsageError,
)
from kvxfer.host import DeviceState, Host
from kvxfer.inbox import Arrival, Failure, Inbox
from kvxfer.interfaces import address_of
from kvxfer.link import numeric_address
from kvxfer.logs import bind
from kvxfer.notify import Record
from kvxfer.offers import Offers
from kvxfer.options import Options
from kvxfer.regions import find_slices
from kvxfer.requests import End, EndCode
from kvxfer.ticket import Ticket
from kvxfer.verbs_types import Access

_log = logging.getLogger("kvxfer.server")


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
        access = Access.LOCAL_WRITE | Access.REMOTE_WRITE
        self._host = Host(cache, access, self.options)
        self._control: ControlServer | None = None
        self._connections = Connections(self._host, self)
        self._offers: Offers | None = None
        self._inbox = Inbox(self._host.counters.stages["arrival_queue"])
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._draining = False
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
        ifname = self.options.socket_ifname
        if ifname is not None and host == Options().host:
            host = address_of(ifname)
        try:
            self._host.prepare()
            control = ControlServer(
                self._connections,
                host,
                self.options.port,
                incarnation=self._host.incarnation,
                features=self._host.features,
                options=self.options,
            )
            is_ipc = host.startswith("ipc://")
            address = None if is_ipc else await numeric_address(host)
            await self._host.open(
                address, self._on_arrival, self._on_failed, self._on_broken
            )
            offers = Offers(self._host, self._connections, self._where)
            self._connections.control = control
            self._connections.offers = offers
            try:
                await control.start()
            except BaseException:
                await self._host.close()
                raise
        except BaseException:
            self._state = "new"
            raise
        self._control = control
        self._offers = offers
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

    async def close(self, *, grace: float = 0.0) -> None:
        """Fence and disconnect all writers, then close the devices. Twice is fine.

        With ``grace`` nobody is admitted any more, the writers are told, and what is
        under way goes on: this waits until no write and no offered request is, for
        up to so many seconds, and then closes. Arrivals come until then.

        When this returns no byte of any writer lands any more, and no thread,
        task, file descriptor or QP is left. ``arrivals()`` ends.

        Raises:
          ClosedResourceError: In a forked child, where there is nothing to close.
          UsageError: In another event loop. Nothing was closed.

        Cancellation:
          Ends the grace; raised when all is closed.
        """
        if self._state == "opening" and self._opening is not None:
            await asyncio.wait({self._opening})
        try:
            if self._state == "open" and grace > 0:
                self._host.check("server")
                await self._drain(grace)
        finally:
            await self._close_now()

    async def _drain(self, grace: float) -> None:
        """Wait for what is under way, up to ``grace`` seconds, and admit no more."""
        assert self._offers is not None
        self._draining = True
        under_way = {
            asyncio.ensure_future(self._connections.drain("the server is closing")),
            asyncio.ensure_future(self._offers.wait_idle()),
        }
        try:
            _, left = await asyncio.wait(under_way, timeout=grace)
            if left:
                _log.warning("writes are under way after %g s, and are ended", grace)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.wait(under_way)

    async def _close_now(self) -> None:
        if self._state == "open":
            self._host.check("server")
            self._state = "closing"
            assert self._offers is not None
            self._offers.begin_close()
            self._inbox.end()
            self._closing = asyncio.get_running_loop().create_task(self._close())
        if self._closing is None:
            self._state = "closed"
        else:
            await finish(self._closing)

    async def _close(self) -> None:
        assert self._control is not None and self._offers is not None
        try:
            await self._control.close()
        finally:
            try:
                await self._offers.close()
                await self._connections.close()
                await self._host.close()
            finally:
                self._state = "closed"

    def _where(self) -> tuple[str, int, str]:
        """Say where to dial this server: host, port and path."""
        host = self.options.host
        if host.startswith("ipc://"):
            return "", 0, host.removeprefix("ipc://")
        anywhere = host in ("0.0.0.0", "::", "*")
        return "" if anywhere else host, self.port, ""

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
    def memory(self) -> dict[str, str]:
        """How the cache is registered, by the name of the device.

        ``host`` memory; on GPUs ``dmabuf``, or ``peermem`` where that failed.
        """
        return self._host.memory

    @property
    def peers(self) -> list[str]:
        """Addresses of the connected writers; from any thread."""
        return [i.peer for i in list(self._connections.incoming.values())]

    @property
    def counters(self) -> Counters:
        """What this server has done so far; readable from any thread."""
        return self._host.counters

    @property
    def n_waiting(self) -> int:
        """Arrivals that nobody has taken yet."""
        return len(self._inbox)

    def device_states(self) -> list[DeviceState]:
        """Describe the open devices; from any thread."""
        return self._host.device_states()

    def connection_states(self) -> dict[str, int]:
        """Count the connections by state; from any thread."""
        if self._control is None:
            return {"connecting": 0, "connected": 0}
        counts = self._control.statistics()
        return {"connecting": counts.pending, "connected": counts.connections}

    def handshakes(self) -> dict[str, int]:
        """Count what has come to the control port, by how it ended; any thread."""
        if self._control is None:
            return {}
        counts = self._control.statistics()
        names = ("accepted", "refused", "garbage", "strangers", "floods", "denied")
        return {name: getattr(counts, name) for name in names}

    def links(self) -> dict[str, int]:
        """Count the connections taken, and those that ZMQ let in; from any thread."""
        if self._control is None:
            return {}
        counts = self._control.statistics()
        return {"taken": counts.links, "ready": counts.links_ready}

    def _listening(self) -> ControlServer:
        if self._control is None:
            raise ClosedResourceError("the server is not open")
        return self._control

    def _ensure_usable(self) -> None:
        """Raise where the server was never open, or is another process's or loop's."""
        self._listening()
        if self._state == "open":
            self._host.check("server")

    # -- requests ----------------------------------------------------------------

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
        """Offer blocks for a request to a writer that listens for invitations.

        It may be called from any thread and never waits. The writer is invited, again
        and again, until it has dialed this server; if it is connected already it is
        told at once. The blocks belong to the request until the ticket is over.

        Args:
          peer: Where the writer listens: ``HOST:PORT``, ``[IPV6]:PORT`` or
            ``ipc://PATH``; several if several ranks write the request.
          request_id: What the writer opens; up to 256 bytes of UTF-8.
          blocks: Block ids by group, one a position, none twice.
          first_block: The position in the request of the first of them; what is
            before it is here already and is skipped. By group, or one for all.
          sources: How many writers must finish before the request is complete; None:
            as many as addresses. Where there are fewer addresses than sources, call
            again with the same request and the other addresses.
          lease: Seconds that it all may take; None takes ``request_lease``.
          checksum: Have each layer carry a digest, and check it before the layer
            counts as arrived. The cache must lie in host memory.

        Returns:
          The ticket, whose state may be read at any time.

        Raises:
          LayoutError: The cache has no such group or block, or one is named twice.
          UsageError: A block, or the request, is offered already; an address is none;
            a digest of GPU memory is asked for.
          ClosedResourceError: The server is not open.
        """
        if self._draining:
            raise ClosedResourceError("the server is closing")
        return self._offers_now().offer(
            peer,
            request_name(request_id),
            blocks,
            first_block=first_block,
            sources=sources,
            lease=seconds_of(lease, self.options.request_lease, "lease"),
            checksum=checksum,
        )

    def finished(self) -> list[Ticket]:
        """Take the tickets that have ended, well or badly, since the last call.

        May be called from any thread. The last 4096 are kept.
        """
        return self._offers_now().finished()

    async def fence(self, request_id: str) -> None:
        """Return when no byte of an offered request can land any more.

        A request that goes on is ended. If a writer does not confirm in
        ``fence_timeout`` that nothing of it is in flight, its connection is broken;
        what else it has to write here is repeated on the next one. A request that
        is over, or that is not known, is quiet already.

        Raises:
          NotQuiescentError: A QP could be neither stopped nor destroyed.

        Cancellation:
          The request ends nevertheless.
        """
        self._ensure_usable()
        ticket = self._offers_now().find(request_id)
        if ticket is None:
            return
        end = End(EndCode.ABORTED, "fenced by the side that is written to")
        await self._offers_now().abort(ticket, end)
        if isinstance(ticket.error, NotQuiescentError):
            raise ticket.error

    def _offers_now(self) -> Offers:
        if self._offers is None:
            raise ClosedResourceError("the server is not open")
        return self._offers

    # -- what landed -----------------------------------------------------------

    def arrivals(self) -> AsyncIterator[Arrival]:
        """Yield what has landed, in the order of its arrival, until the close.

        Each arrival goes to one consumer. Up to 65536 wait for a consumer that is
        behind or not there yet; then writers are held back, and time out.

        Raises:
          ClosedResourceError: The server was never open, or not in this process.
        """
        return self._inbox.arrivals(self._ensure_usable)

    def failures(self) -> AsyncIterator[Failure]:
        """Yield what writers gave up, until the close; the last 4096 are kept.

        Raises:
          ClosedResourceError: The server was never open, or not in this process.
        """
        return self._inbox.failures(self._ensure_usable)

    def _on_arrival(self, adapter: Adapter, arrival: RingArrival) -> None:
        incoming = self._connections.find(adapter, arrival.slot)
        if incoming is None:
            return
        try:
            if arrival.error is not None:
                raise ProtocolError(arrival.error)
            record = incoming.records.read(arrival.record)
        except ProtocolError as error:
            self._broke_rules(incoming, str(error))
            return
        if incoming.flusher is None:
            self._landed(incoming, record, arrival.head)
        else:
            incoming.flusher.after(
                self._regions_of(incoming.link.adapter, record),
                lambda: self._landed(incoming, record, arrival.head),
            )

    def _regions_of(self, adapter: Adapter, record: Record) -> set[int]:
        """Number the device's regions of the cache that a record is about."""
        rows = self._host.cache.group(record.group).rows(record.layer)
        slices = (find_slices(adapter.regions, place) for _, place in rows)
        return set().union(*(part.holding(record.block_ids) for part in slices))

    def _landed(self, incoming: Incoming, record: Record, head: int) -> None:
        """Tell of what is in place."""
        if incoming.released.is_set():
            return
        self._host.counters.arrived(len(record.block_ids), record.n_bytes)
        try:
            if record.generation:
                self._connections.consumed(incoming, head)
                self._offers_now().record(incoming.conn_id, record)
                return
            self._offers_now().check_direct(record)
        except ProtocolError as error:
            self._broke_rules(incoming, str(error))
            return
        arrival = Arrival(
            incoming.peer,
            record.request_id,
            record.layer,
            record.block_ids,
            record.group,
            record.n_bytes,
        )
        if self._inbox.is_full:
            self._inbox.land(
                arrival, lambda: self._connections.consumed(incoming, head)
            )
        else:
            self._connections.consumed(incoming, head)
            self._inbox.land(arrival)

    def _broke_rules(self, incoming: Incoming, reason: str) -> None:
        """Drop a writer that has written, or may have, where it must not."""
        reason = f"broke the rules of the notify ring: {reason}"
        self._inbox.lose(Failure(incoming.peer, None, (), reason))
        self._connections.drop_peer(incoming.conn_id, reason)

    def gave_up(
        self, peer: str, request_id: bytes, layers: list[int], reason: str
    ) -> None:
        """Take note of what a writer gave up (for the connections)."""
        self._host.counters.given_up += len(layers)
        failure = Failure(
            peer=peer,
            request_id=request_id.decode(errors="replace") or None,
            layers=tuple(layers),
            reason=reason,
        )
        bind(_log, peer=peer, request=failure.request_id).warning(
            "%s gave up request %s, layers %s: %s",
            failure.peer,
            failure.request_id,
            list(failure.layers),
            failure.reason,
        )
        self._inbox.lose(failure)

    async def disconnect(self, peer: str, reason: str) -> int:
        """Fence and disconnect a writer; returns when nothing of it can land.

        Args:
          peer: Its address, as in ``peers``; all its connections are meant.
          reason: Reaches it with the goodbye.

        Returns:
          How many connections that were.
        """
        self._ensure_usable()
        found = [
            (conn_id, incoming)
            for conn_id, incoming in self._connections.incoming.items()
            if incoming.peer == peer
        ]
        for conn_id, incoming in found:
            self._connections.drop_peer(conn_id, reason)
            await incoming.link.fail()
        return len(found)

    def _on_failed(self, adapter: Adapter, slot: int) -> None:
        incoming = self._connections.find(adapter, slot)
        if incoming is not None and not incoming.gone.done():
            self._connections.drop_peer(incoming.conn_id, "its QP failed")

    def _on_broken(self, adapter: Adapter, qp_num: int | None, why: str) -> None:
        for conn_id, incoming in list(self._connections.incoming.items()):
            if incoming.link.is_on(adapter, qp_num) and not incoming.gone.done():
                self._connections.drop_peer(conn_id, why)
