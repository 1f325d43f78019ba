"""Offers of blocks to writers that are invited, from the offer to the last byte.

The side that is written to says which blocks a request may be written to, and to
whom. Each writer is known by the address that it listens on; it is invited there,
dials, and is told all offers that stand for it. A ticket is one request seen from
here; it is over only when no byte of it can land any more.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Protocol

import numpy as np

from kvxfer import wire
from kvxfer.blocks import Ids
from kvxfer.control import Inviter
from kvxfer.errors import (
    NotQuiescentError,
    ProtocolError,
    UsageError,
)
from kvxfer.handover import Mailbox
from kvxfer.host import Host
from kvxfer.inbound import Announce, Complete, LayerDone, Quiet
from kvxfer.notify import Record
from kvxfer.positions import Window
from kvxfer.requests import End, EndCode, Key, end_code
from kvxfer.taken import Taken, as_windows
from kvxfer.ticket import Ticket
from kvxfer.waiting import MAX_FINISHED, Ending, take_all
from kvxfer.writers import Writer, Writers

__all__ = ["Offers"]

_log = logging.getLogger("kvxfer.offers")

# Endings that a writer may still ask for after a reconnection.
_MAX_ENDED = 65536


class Connections(Protocol):
    """What the offers need of the server's connections."""

    def send_request(self, conn_id: int, message: wire.RequestMessage) -> bool:
        """Say something about a request; false if the peer is gone."""

    def drop_peer(self, conn_id: int, reason: str) -> None:
        """Put an end to a connection: its QP goes to ERR first."""


class Offers:
    """All offers of one server.

    Args:
      where: Host, port and path at which writers dial this server.
    """

    def __init__(
        self,
        host: Host,
        connections: Connections,
        where: Callable[[], tuple[str, int, str]],
    ) -> None:
        self._host = host
        self._options = host.options
        self._connections = connections
        self._mailbox = Mailbox("server")
        self._lock = threading.Lock()
        self._live: dict[str, Ticket] = {}
        self._taken = Taken(host.cache)
        self._by_generation: dict[int, Ticket] = {}
        self._ended: collections.OrderedDict[int, End | None]
        self._ended = collections.OrderedDict()
        self.writers = Writers(host, self, where)
        self._finished: collections.deque[Ticket]
        self._finished = collections.deque(maxlen=MAX_FINISHED)
        self._closed = False
        self.stale = 0
        """Records dropped since their offer does not stand any more."""
        self.refused = 0
        """Records refused since they named what their offer does not cover."""

    # -- any thread ----------------------------------------------------------------

    def offer(
        self,
        peer: str | Iterable[str],
        request_id: str,
        blocks: Mapping[str, object],
        *,
        first_block: int | Mapping[str, int],
        sources: int | None,
        lease: float,
        checksum: bool,
    ) -> Ticket:
        """Make an offer, or extend one by a further writer; see ``Server.offer``."""
        addresses = [peer] if isinstance(peer, str) else list(peer)
        interval = self._options.ping_interval
        for address in addresses:
            Inviter(address, interval)  # says what is wrong with it, here and now
        needed = len(addresses) if sources is None else sources
        if not 1 <= len(set(addresses)) == len(addresses) <= needed:
            raise UsageError(
                f"{needed} sources, and {len(addresses)} addresses: give each source "
                "its own address"
            )
        windows = as_windows(self._host.cache, blocks, first_block)
        if checksum and not self._host.cache.on_host:
            raise UsageError(
                "checksum=True is for caches in host memory: the processor computes "
                "the digests, and this cache lies on a GPU"
            )
        with self._lock:
            if self._closed:
                raise UsageError("the server is closing")
            ticket = self._live.get(request_id)
            if ticket is None:
                ticket = Ticket(self, request_id, windows, needed, lease, checksum)
                self._taken.take(windows)
                self._live[request_id] = ticket
            elif not _extends(ticket, windows, needed, addresses):
                raise UsageError(f"request {request_id!r} is offered already")
            ticket.addresses += addresses
        found = ticket
        self._mailbox.post(lambda: self._start(found, addresses))
        return ticket

    def abort(self, ticket: Ticket, end: End) -> Ending:
        """See ``Ticket.abort``."""
        if not ticket._core.is_over:
            self._mailbox.post(lambda: self.stop(ticket, end))
        return Ending(ticket._over, self._mailbox.is_here, self._patience)

    @property
    def _patience(self) -> float:
        options = self._options
        return 2 * (options.fence_timeout + options.drain_timeout) + 5.0

    async def wait_idle(self) -> None:
        """Wait until every request that is offered now is over, well or badly."""
        with self._lock:
            tickets = list(self._live.values())
        for ticket in tickets:
            await ticket._over.wait()

    def finished(self) -> list[Ticket]:
        """Take the tickets that are over; see ``Server.finished``."""
        return take_all(self._finished)

    # -- looks ---------------------------------------------------------------------

    def check(self) -> None:
        """Raise unless this is the process and the loop of the server."""
        self._host.check("server")

    def check_elsewhere(self) -> None:
        """Raise on the loop's own thread, where nobody may wait."""
        self._mailbox.check_elsewhere()

    def layers(self, windows: Mapping[str, Window]) -> set[int]:
        """The layers of this cache in some groups."""
        cache = self._host.cache
        return {layer for name in windows for layer in cache.group(name).layers}

    def find(self, request_id: str) -> Ticket | None:
        """Find a ticket that is not over."""
        return self._live.get(request_id)

    def digest_of(self, key: Key, block_ids: Ids) -> int:
        """Compute the digest of blocks of this cache."""
        from kvxfer.digest import digest

        return digest(self._host.cache.group(key[0]), key[1], block_ids)

    # -- tickets -------------------------------------------------------------------

    def _start(self, ticket: Ticket, addresses: list[str]) -> None:
        if not ticket._core.is_live:
            return  # it was extended in the moment of its end
        loop = asyncio.get_running_loop()
        if ticket._lease is None:
            self._by_generation[ticket._generation] = ticket
            ticket._lease = loop.call_later(
                max(0.0, ticket._expires - time.monotonic()), self._expire, ticket
            )
        for address in addresses:
            writer = self.writers.offer(address, ticket)
            ticket._core.add_source(writer)
            self.writers.begin(writer, ticket)

    def _expire(self, ticket: Ticket) -> None:
        self.stop(ticket, End(EndCode.LEASE, "the lease of the offer has passed"))

    def stop(self, ticket: Ticket, end: End) -> None:
        """End a request badly; on the loop."""
        ticket._core.stop(end)
        self._drive(ticket)

    def _drive(self, ticket: Ticket) -> None:
        """Carry out what a request's state asks for."""
        while actions := ticket._core.take():
            for action in actions:
                if isinstance(action, Announce):
                    self._announce(ticket, action)
                elif isinstance(action, LayerDone):
                    self._layer_done(ticket, action.key)
                elif isinstance(action, Complete):
                    self._say_complete(ticket)
                elif isinstance(action, Quiet):
                    self._quiet(ticket, action.source)
                else:
                    self._finish(ticket)

    def left(self, writer: Writer, ticket: Ticket, *, quiet: bool) -> None:
        """A writer's connection is gone; ``quiet``: and nothing of it lands."""
        if not quiet and ticket in writer.told:
            ticket._quarantined = True
            self.stop(ticket, End(EndCode.FAILED, "its QP cannot be destroyed"))
        ticket._core.leave(writer)
        self._drive(ticket)

    def _send(self, writer: Writer, message: wire.RequestMessage) -> bool:
        assert writer.conn_id is not None
        return self._connections.send_request(writer.conn_id, message)

    def tell(self, writer: Writer, ticket: Ticket) -> None:
        """Say an offer to a writer that is connected."""
        if not ticket._core.is_live:
            return
        assert writer.conn_id is not None
        ticket._core.join(writer, writer.keys)
        writer.told.add(ticket)
        announced = ticket._core.announced_to(writer)
        self._send(
            writer,
            wire.OfferBlocks(
                conn_id=writer.conn_id,
                request_id=ticket.request_id.encode(),
                generation=ticket._generation,
                groups=[
                    wire.OfferedGroup(
                        group=name,
                        first_block=window.first_block,
                        block_ids=window.block_ids.astype("<u4").tobytes(),
                        announced=sorted(x for group, x in announced if group == name),
                    )
                    for name, window in ticket._windows.items()
                ],
                lease=max(0.0, ticket._expires - time.monotonic()),
                checksum=ticket._checksum,
            ),
        )
        # Layers may have waited for nothing but the word who can write them.
        self._drive(ticket)

    def _announce(self, ticket: Ticket, action: Announce) -> None:
        writer = action.source
        assert isinstance(writer, Writer)
        if writer.conn_id is None:
            return
        by_group: dict[str, list[int]] = {}
        for group, layer in action.keys:
            by_group.setdefault(group, []).append(layer)
        layers = [wire.GroupLayers(group=g, layers=x) for g, x in by_group.items()]
        self._send(
            writer,
            wire.Announced(
                conn_id=writer.conn_id, generation=ticket._generation, layers=layers
            ),
        )

    def _layer_done(self, ticket: Ticket, key: Key) -> None:
        layer = key[1]
        cache = self._host.cache
        for name in ticket._windows:
            held = layer in cache.group(name).layers
            if held and (name, layer) not in ticket._core.layers_done:
                return
        ticket.arrived[layer] = time.monotonic()
        waiters = ticket._layers.pop(layer, None)
        if waiters is not None:
            waiters.wake()

    def _say_complete(self, ticket: Ticket) -> None:
        for writer in self._present(ticket):
            assert writer.conn_id is not None
            message = wire.Announced(
                conn_id=writer.conn_id, generation=ticket._generation, complete=True
            )
            if not self._send(writer, message):
                writer.missed = True

    def _present(self, ticket: Ticket) -> list[Writer]:
        return [
            writer
            for writer in ticket._core.sources
            if isinstance(writer, Writer)
            and writer.conn_id is not None
            and ticket._core.present(writer)
        ]

    def _quiet(self, ticket: Ticket, source: Hashable) -> None:
        """Ask a writer to stop; without its word its connection ends."""
        writer, end = source, ticket._core.end
        assert isinstance(writer, Writer) and end is not None
        if writer.conn_id is None or not ticket._core.present(writer):
            return
        if not ticket._core.has_ended(writer):
            self._send(
                writer,
                wire.Abort(
                    conn_id=writer.conn_id,
                    generation=ticket._generation,
                    code=end.code.value,
                    reason=end.reason[:2000],
                    layer=end.layer,
                    bytes_done=end.bytes_done,
                ),
            )
        loop = asyncio.get_running_loop()
        ticket._fences.append(
            loop.call_later(
                self._options.fence_timeout, self._force, ticket, writer, writer.conn_id
            )
        )

    def _force(self, ticket: Ticket, writer: Writer, conn_id: int) -> None:
        if ticket._core.present(writer) and writer.conn_id == conn_id:
            self._connections.drop_peer(
                conn_id, f"no word that request {ticket.request_id} has ended"
            )

    def _finish(self, ticket: Ticket) -> None:
        """A request is over: its blocks are free."""
        core = ticket._core
        if core.end is not None:
            ticket._error = core.end.error(
                ticket.request_id, ", ".join(ticket.addresses)
            )
            ticket._error.fenced = True
        if ticket._quarantined:
            ticket._error = NotQuiescentError(
                "a QP of the writer could not be destroyed: bytes of this request may "
                "still land in its blocks, which are not offered again"
            )
        for timer in (ticket._lease, *ticket._fences):
            if timer is not None:
                timer.cancel()
        self._by_generation.pop(ticket._generation, None)
        self._ended[ticket._generation] = core.end
        while len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
        self.writers.over(ticket, well=core.end is None)
        with self._lock:
            self._live.pop(ticket.request_id, None)
            if not ticket._quarantined:
                self._taken.release(ticket._windows)
        self._finished.append(ticket)
        ticket._over.wake()
        for waiters in list(ticket._layers.values()):
            waiters.wake()

    # -- what writers say ------------------------------------------------------------

    def record(self, conn_id: int, record: Record) -> None:
        """Take the record of a write under an offer.

        Raises:
          ProtocolError: It was not the writer's to make. Its request has ended.
        """
        ticket = self._by_generation.get(record.generation)
        writer = self.writers.find(conn_id)
        if ticket is None:
            self.stale += 1
            return
        try:
            if writer is None or writer not in ticket._core.sources:
                raise ProtocolError("a record for an offer to somebody else")
            ticket._core.record(writer, record)
        except ProtocolError as error:
            self.refused += 1
            self.stop(ticket, End(EndCode.RULES, str(error), record.layer))
            raise
        finally:
            self._drive(ticket)

    def check_direct(self, record: Record) -> None:
        """Check a record under no offer: offered blocks are not its to write.

        Raises:
          ProtocolError: It has written where it must not.
        """
        block = self._taken.first_of(record.group, record.block_ids)
        if block is not None:
            self.refused += 1
            raise ProtocolError(
                f"a write under no offer names block {block} of group "
                f"{record.group!r}, which is offered to a request"
            )

    def message(self, conn_id: int, message: wire.RequestMessage) -> None:
        """Take what a writer says about a request."""
        writer = self.writers.find(conn_id)
        if writer is None:
            return
        if isinstance(message, wire.Resume):
            self._resume(writer, message)
            return
        ticket = self._by_generation.get(message.generation)
        if ticket is None or writer not in ticket._core.sources:
            return
        try:
            self._hear(writer, ticket, message)
        except ProtocolError as error:
            self.stop(ticket, End(EndCode.RULES, str(error)))
        self._drive(ticket)

    def _hear(
        self, writer: Writer, ticket: Ticket, message: wire.RequestMessage
    ) -> None:
        core = ticket._core
        if isinstance(message, wire.LayersFinal):
            for final in message.layers:
                key = (final.group, final.layer)
                core.final(writer, key, final.total, final.digest)
        elif isinstance(message, wire.Finish):
            core.finish(writer, message.total, message.aux)
        elif isinstance(message, wire.Ended):
            reason = wire.printable(message.reason)
            core.quiet(writer, message.records)
            core.stop(End(end_code(message.code), reason, message.layer, by_peer=True))

    def _resume(self, writer: Writer, message: wire.Resume) -> None:
        """Say what became of offers that a writer still knows of."""
        assert writer.conn_id is not None
        for generation in message.generations:
            ticket = self._by_generation.get(generation)
            if ticket is None:
                end = self._ended.get(
                    generation, End(EndCode.UNKNOWN, "no such offer stands here")
                )
            elif ticket._core.is_live:
                continue  # told again already
            else:  # it ends as soon as others have stopped
                end = ticket._core.end
            answer: wire.RequestMessage
            if end is None:
                answer = wire.Announced(
                    conn_id=writer.conn_id, generation=generation, complete=True
                )
            else:
                answer = wire.Abort(
                    conn_id=writer.conn_id,
                    generation=generation,
                    code=end.code.value,
                    reason=end.reason[:2000],
                    layer=end.layer,
                    bytes_done=end.bytes_done,
                )
            self._send(writer, answer)

    # -- the end ---------------------------------------------------------------------

    def begin_close(self) -> None:
        """Take no more offers and end those that stand."""
        with self._lock:
            self._closed = True
        self._mailbox.close()
        self.writers.begin_close()
        for ticket in list(self._live.values()):
            self.stop(ticket, End(EndCode.CLOSED, "the server was closed"))

    async def close(self) -> None:
        """Release what is left, when all connections are gone."""
        await self.writers.close()


def _extends(
    ticket: Ticket, windows: dict[str, Window], needed: int, addresses: list[str]
) -> bool:
    """Whether an offer only adds writers to one that stands."""
    return (
        ticket._core.is_live
        and ticket._needed == needed
        and len(ticket.addresses) + len(addresses) <= needed
        and not set(addresses) & set(ticket.addresses)
        and ticket._windows.keys() == windows.keys()
        and all(
            ticket._windows[name].first_block == window.first_block
            and np.array_equal(ticket._windows[name].block_ids, window.block_ids)
            for name, window in windows.items()
        )
    )
