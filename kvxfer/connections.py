"""The connections of a server: each writer's link, its fence and its end.

What a control connection asks of the side that is written to. What a writer has
written, and what it says about requests, goes on to the server.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from kvxfer import wire
from kvxfer._records import RecordReader
from kvxfer.adapter import Adapter
from kvxfer.control import CloseReason, ControlServer, OfferParts
from kvxfer.errors import (
    DeviceUnavailableError,
    KVXferError,
    LayoutError,
    RefusedError,
)
from kvxfer.flusher import Flusher
from kvxfer.host import Host
from kvxfer.layout import check_fit
from kvxfer.link import Link
from kvxfer.logs import Bound, bind
from kvxfer.offers import Offers
from kvxfer.route import (
    check_whole,
    geometry_from_wire,
    shards_from_wire,
    windows,
)
from kvxfer.sharding import check_shards
from kvxfer.verbs_types import Access

__all__ = ["Connections", "Incoming", "Losses"]

_log = logging.getLogger("kvxfer.server")


class Losses(Protocol):
    """What takes note of what writers give up."""

    def gave_up(
        self, peer: str, request_id: bytes, layers: list[int], reason: str
    ) -> None:
        """A writer will not bring these layers of this request."""


class Incoming:
    """One writer's connection: its link and what of its ring is consumed."""

    def __init__(
        self, conn_id: int, peer: str, link: Link, records: RecordReader
    ) -> None:
        self.conn_id = conn_id
        self.peer = peer
        self.link = link
        self.queue = (link.adapter, link.slot)
        """Whose queue it is, of which engine; the link forgets it when it closes."""
        self.records = records
        self.consumed_bytes = 0
        self.consumed_records = 0
        self.told_bytes = 0
        self.told_records = 0
        self.gone = asyncio.get_running_loop().create_future()
        self.released = asyncio.Event()
        """Set: nothing of it is heard of any more."""
        self.drained = asyncio.Event()
        self.flusher: Flusher | None = None
        """What reads back all that arrives, before anyone is told; None: nothing."""
        self.ending: asyncio.Task[None] | None = None
        self.admitting: asyncio.Task[None] | None = None

    @property
    def log(self) -> Bound:
        """A logger whose records say which connection they are about."""
        return bind(_log, peer=self.peer, **self.link.facts)


class Connections:
    """Makes, keeps and ends the connections of one server.

    Attributes:
      incoming: The writers, by the connection's id.
      control: The control server; set before it is started.
      offers: Told of connections and of what writers say about requests; set before.
    """

    control: ControlServer
    offers: Offers

    def __init__(self, host: Host, losses: Losses) -> None:
        self.incoming: dict[int, Incoming] = {}
        self._by_queue: dict[tuple[Adapter, int], Incoming] = {}
        self._host = host
        self._options = host.options
        self._portion_bytes = host.options.notify_ring_bytes // 4
        self._portion_records = max(1, host.options.notify_receives // 2)
        self._losses = losses
        self._flushers: dict[Adapter, Flusher] = {}
        self._broken_flushers: list[Flusher] = []
        self._opening_flusher = asyncio.Lock()

    # -- for the server ----------------------------------------------------------

    def find(self, adapter: Adapter, slot: int) -> Incoming | None:
        """Find the connection that has a queue of an engine."""
        return self._by_queue.get((adapter, slot))

    def consumed(self, incoming: Incoming, head: int) -> None:
        """Give credit back: for a quarter of the ring, or half of the receives.

        A record may be as long as a quarter of the ring, but needs one receive; and a
        message costs either event loop as much as several arrivals.
        """
        if incoming.released.is_set():
            return
        # Arrivals that waited for a consumer may come behind younger ones here.
        incoming.consumed_bytes = max(incoming.consumed_bytes, head)
        incoming.consumed_records += 1
        if (
            incoming.consumed_bytes - incoming.told_bytes >= self._portion_bytes
            or incoming.consumed_records - incoming.told_records
            >= self._portion_records
        ):
            incoming.told_bytes = incoming.consumed_bytes
            incoming.told_records = incoming.consumed_records
            self.control.send_credit(
                incoming.conn_id, incoming.told_bytes, incoming.told_records
            )

    def send_request(self, conn_id: int, message: wire.RequestMessage) -> bool:
        """Say something about a request; false if the peer is gone."""
        return self.control.send_request(conn_id, message)

    def drop_peer(self, conn_id: int, reason: str) -> None:
        """Put an end to a connection: its QP goes to ERR first."""
        incoming = self.incoming.get(conn_id)
        if incoming is not None and incoming.ending is None:
            incoming.log.warning("%s is dropped: %s", incoming.peer, reason)
            incoming.link.break_()
            incoming.ending = asyncio.get_running_loop().create_task(
                self._end(conn_id, incoming, reason)
            )

    async def _end(self, conn_id: int, incoming: Incoming, reason: str) -> None:
        # The writer is told, and not just left: it asks for a fence of its own for
        # the writes that it has in flight, and says goodbye when it has the answer.
        timeout = self._options.fence_timeout
        try:
            await incoming.link.fail()
        except KVXferError as error:
            # What the writer can do is asked of it all the more; closed() says the
            # rest.
            incoming.log.error("a QP of %s does not let go: %s", incoming.peer, error)
        if await self.control.fence(conn_id, reason, timeout=timeout):
            await asyncio.wait({incoming.gone}, timeout=timeout)
        self.control.drop(conn_id, reason)

    # -- for the control connection ------------------------------------------------

    async def offer(
        self, hello: wire.Hello, conn_id: int, peer_address: str
    ) -> OfferParts:
        """Make this side's end for a writer."""
        try:
            return await self._make(hello, conn_id, peer_address)
        except (DeviceUnavailableError, LayoutError) as error:
            self.offers.writers.misfit(hello, error)
            raise

    async def _make(
        self, hello: wire.Hello, conn_id: int, peer_address: str
    ) -> OfferParts:
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
        offered = windows(host.cache.groups, adapter.rkeys)
        if not hello.features & wire.FEATURE_SLICES:
            check_whole(offered, adapter.name)
        options = self._options
        access = Access.REMOTE_WRITE
        if hello.features & host.features & wire.FEATURE_FLUSH:
            access |= Access.REMOTE_READ
        flusher: Flusher | None = None
        if host.flushes_arrivals(hello.features) and not adapter.is_null:
            flusher = await self._flusher_on(adapter)
        link = await Link.open(
            adapter,
            access,
            receives=options.notify_receives,
            gid=agreed.our_gid.gid,
            gid_type=agreed.our_gid.gid_type,
            n_qps=adapter.n_qps(
                min(hello.n_qps, options.qps_per_connection),
                bool(hello.features & host.features & wire.FEATURE_WIRES),
            ),
        )
        try:
            ring = await link.start_target(
                options.notify_ring_bytes, options.notify_receives
            )
            self.offers.writers.hello(conn_id, hello)
            parts = OfferParts(
                geometry=host.wire_geometry,
                device=adapter.candidate,
                dialer_device=agreed.theirs.name,
                dialer_gid=agreed.their_gid.gid,
                dialer_gid_type=agreed.their_gid.gid_type,
                endpoint=wire.Endpoint(
                    qps=link.infos,
                    windows=offered,
                    ring=ring,
                ),
            )
        except BaseException:
            await link.close()
            raise
        records = RecordReader(host.cache.groups, shards)
        incoming = Incoming(conn_id, peer_address or "local", link, records)
        incoming.flusher = flusher
        self.incoming[conn_id] = incoming
        self._by_queue[incoming.queue] = incoming
        return parts

    async def _flusher_on(self, adapter: Adapter) -> Flusher:
        """Give what reads back on a device; made with the first writer."""
        async with self._opening_flusher:
            if adapter not in self._flushers:

                def failed(reason: str) -> None:
                    self._flusher_failed(adapter, reason)

                self._flushers[adapter] = await Flusher.open(
                    adapter, adapter.regions, failed
                )
            return self._flushers[adapter]

    def _flusher_failed(self, adapter: Adapter, reason: str) -> None:
        """Drop whose bytes cannot be told to be in place; the next get another."""
        broken = self._flushers.pop(adapter, None)
        if broken is None:
            return
        self._broken_flushers.append(broken)
        for conn_id, incoming in list(self.incoming.items()):
            if incoming.flusher is broken:
                self.drop_peer(conn_id, reason)

    async def close(self) -> None:
        """Close what is common to the connections, which must be gone."""
        flushers = [*self._flushers.values(), *self._broken_flushers]
        self._flushers.clear()
        self._broken_flushers.clear()
        for flusher in flushers:
            await flusher.close()

    async def accept(self, conn_id: int, accept: wire.Accept) -> None:
        """Bring this side's QPs to RTS."""
        incoming = self.incoming[conn_id]
        await incoming.link.connect(accept.endpoint.qps, incoming.peer)

    def established(self, conn_id: int) -> None:
        """Both sides are ready: a writer that was invited is told its offers."""
        incoming = self.incoming[conn_id]
        incoming.log.info(
            "%s connected by %s", incoming.peer, incoming.link.adapter.name
        )
        older = self.offers.writers.established(conn_id)
        if older is None or older not in self.incoming:
            self.offers.writers.admit(conn_id)
        else:
            incoming.admitting = asyncio.get_running_loop().create_task(
                self._admit_after(conn_id, self.incoming[older], older)
            )

    async def _admit_after(self, conn_id: int, older: Incoming, old_id: int) -> None:
        """Let a writer's older connection end before the new one is used.

        Bytes of the older one could otherwise land behind those of the new one.
        """
        self.drop_peer(old_id, "the writer has connected again")
        await older.released.wait()
        self.offers.writers.admit(conn_id)

    async def fence(self, conn_id: int, reason: str) -> None:
        """Let nothing of this writer land any more."""
        incoming = self.incoming[conn_id]
        incoming.log.info("%s asks for a fence: %s", incoming.peer, reason)
        await incoming.link.fail()

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        """A writer gave something up."""
        self._losses.gave_up(
            self.incoming[conn_id].peer,
            message.request_id,
            message.layers,
            message.reason,
        )

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        """This side writes nothing, so it needs no credit."""
        _log.debug("%s sends meaningless credit", self.incoming[conn_id].peer)

    def request(self, conn_id: int, message: wire.RequestMessage) -> None:
        """A writer says something about a request."""
        self.offers.message(conn_id, message)

    def drained(self, conn_id: int) -> None:
        """A writer has nothing under way that the server does not know of."""
        self.incoming[conn_id].drained.set()

    async def drain(self, reason: str) -> None:
        """Admit no writer any more, and wait until those that are here are done.

        A writer of a release that cannot be told is waited for until it has gone.
        """
        self.control.drain(reason)
        for incoming in list(self.incoming.values()):
            await incoming.drained.wait()

    async def closed(self, conn_id: int, reason: CloseReason) -> None:
        """A connection is over: release its end."""
        incoming = self.incoming[conn_id]
        incoming.log.info("%s disconnected: %s", incoming.peer, reason)
        incoming.gone.set_result(None)
        incoming.drained.set()
        quiet = False
        try:
            if incoming.admitting is not None:
                incoming.admitting.cancel()
                await asyncio.wait({incoming.admitting})
            if incoming.ending is not None:
                await asyncio.wait({incoming.ending})
            # Until its QP is gone, notifications of it are still taken.
            await incoming.link.close()
            quiet = True
            if incoming.flusher is not None:
                await asyncio.wait_for(
                    incoming.flusher.settle(), self._options.drain_timeout
                )
        except asyncio.TimeoutError:
            incoming.log.warning("the last of %s cannot be read back", incoming.peer)
        except KVXferError:
            incoming.log.exception("the QP of %s could not be destroyed", incoming.peer)
        finally:
            del self.incoming[conn_id]
            # Its queue may have become another connection's while it was waited.
            if self._by_queue.get(incoming.queue) is incoming:
                del self._by_queue[incoming.queue]
            self.offers.writers.closed(conn_id, reason, quiet=quiet)
            incoming.released.set()
