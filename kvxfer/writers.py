"""The writers that are invited: how they are asked, come, go and are lost.

A writer is known by the address that it listens on and by the invitation that it was
sent; its connection names that invitation. While it is not connected and something
stands for it, it is invited, again and again. So it is for a while if it may not have
heard that all it wrote is in place: it asks when it is here again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

from kvxfer import wire
from kvxfer._version import __version__
from kvxfer.control import CloseCause, CloseReason, Inviter
from kvxfer.errors import KVXferError, RefusedError
from kvxfer.host import Host
from kvxfer.requests import End, EndCode, Key
from kvxfer.ticket import Ticket

__all__ = ["Writer", "Writers"]


class Owner(Protocol):
    """What the writers need of the offers."""

    def tell(self, writer: Writer, ticket: Ticket) -> None:
        """Say an offer to a writer that is connected."""

    def left(self, writer: Writer, ticket: Ticket, *, quiet: bool) -> None:
        """A writer's connection is gone; ``quiet``: and nothing of it lands."""

    def stop(self, ticket: Ticket, end: End) -> None:
        """End a request badly."""


class Writer:
    """A writer that is invited, by the address that it listens on."""

    def __init__(self, address: str, interval: float) -> None:
        self.address = address
        self.invite = wire.new_nonce()
        self.inviter = Inviter(address, interval)
        self.conn_id: int | None = None
        self.incarnation = b""
        self.keys: frozenset[Key] = frozenset()
        self.tickets: set[Ticket] = set()
        self.told: set[Ticket] = set()
        """Tickets that the present or the last incarnation knows of."""
        self.losing: asyncio.TimerHandle | None = None
        self.done_at = -math.inf
        """When a ticket that it knows of last ended well."""
        self.missed = False
        """It could not be told so."""
        self.owing: asyncio.TimerHandle | None = None
        """It is invited to hear of it."""


class Writers:
    """All writers of one server.

    Args:
      where: Host, port and path at which writers dial this server.
    """

    def __init__(
        self, host: Host, owner: Owner, where: Callable[[], tuple[str, int, str]]
    ) -> None:
        self._host = host
        self._options = host.options
        self._owner = owner
        self._where = where
        self._by_address: dict[str, Writer] = {}
        self._by_invite: dict[bytes, Writer] = {}
        self._by_conn: dict[int, Writer] = {}
        self._arriving: dict[int, tuple[Writer, bytes, frozenset[Key]]] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._closed = False

    def find(self, conn_id: int) -> Writer | None:
        """Find the writer of a connection."""
        return self._by_conn.get(conn_id)

    def offer(self, address: str, ticket: Ticket) -> Writer:
        """Let something stand for a writer: it is told, or invited."""
        writer = self._by_address.get(address)
        if writer is None:
            writer = Writer(address, self._options.ping_interval)
            self._by_address[address] = writer
            self._by_invite[writer.invite] = writer
        writer.tickets.add(ticket)
        return writer

    def begin(self, writer: Writer, ticket: Ticket) -> None:
        """Tell a writer of what stands for it now, or invite it."""
        if writer.conn_id is not None:
            self._owner.tell(writer, ticket)
        else:
            self._ask(writer)

    def over(self, ticket: Ticket, *, well: bool) -> None:
        """A ticket is over: it stands for nobody any more."""
        for writer in list(self._by_address.values()):
            if well and ticket in writer.told:
                writer.done_at = asyncio.get_running_loop().time()
                if writer.conn_id is None:
                    self._owe(writer)
            writer.tickets.discard(ticket)
            writer.told.discard(ticket)
            self._let_go(writer)

    def _owe(self, writer: Writer) -> None:
        """Let a writer be invited for as long as it waits for that."""
        self._settle(writer)
        if not self._closed:
            writer.owing = asyncio.get_running_loop().call_later(
                self._options.ping_timeout, self._give_up, writer
            )

    def _settle(self, writer: Writer) -> None:
        writer.missed = False
        if writer.owing is not None:
            writer.owing.cancel()
            writer.owing = None

    def _give_up(self, writer: Writer) -> None:
        self._settle(writer)
        self._let_go(writer)

    def _ask(self, writer: Writer) -> None:
        host, port, path = self._where()
        writer.inviter.start(
            wire.Invite(
                incarnation=self._host.incarnation,
                invite=writer.invite,
                host=host,
                port=port,
                path=path,
                agent=f"kvxfer {__version__}",
            )
        )

    def _stop_asking(self, writer: Writer) -> None:
        task = writer.inviter.stop()
        if task is not None:
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    def _let_go(self, writer: Writer) -> None:
        """Forget a writer that nothing is offered to and that is not there."""
        if writer.tickets or writer.owing is not None:
            return
        self._stop_asking(writer)
        if writer.conn_id is None:
            if writer.losing is not None:
                writer.losing.cancel()
            self._by_address.pop(writer.address, None)
            self._by_invite.pop(writer.invite, None)

    def hello(self, conn_id: int, hello: wire.Hello) -> None:
        """A dialer that names an invitation is making a connection.

        Raises:
          RefusedError: Nobody was invited so.
        """
        if not hello.invite:
            return
        writer = self._by_invite.get(hello.invite)
        if writer is None:
            raise RefusedError("that invitation does not stand any more")
        keys = frozenset(
            (group.name, layer)
            for group in hello.geometry
            for plane in group.planes
            for layer in plane.layers
        )
        ours = self._host.cache
        mine = {(g.name, layer) for g in ours.groups for layer in g.layers}
        self._arriving[conn_id] = (writer, hello.incarnation, keys & mine)

    def misfit(self, hello: wire.Hello, error: KVXferError) -> None:
        """A writer that was invited cannot be connected, and never will be."""
        writer = self._by_invite.get(hello.invite)
        if writer is not None:
            for ticket in list(writer.tickets):
                self._owner.stop(ticket, End(EndCode.FAILED, str(error), cause=error))

    def established(self, conn_id: int) -> int | None:
        """A writer is connected.

        Returns:
          An older connection of the same writer that has to be gone first; call
          :meth:`admit` when it is.
        """
        if conn_id not in self._arriving:
            return None
        return self._arriving[conn_id][0].conn_id

    def admit(self, conn_id: int) -> None:
        """Tell a writer what stands for it."""
        arriving = self._arriving.pop(conn_id, None)
        if arriving is None:
            return
        writer, incarnation, keys = arriving
        writer.keys = keys
        if writer.incarnation not in (b"", incarnation):
            self._lose(writer, f"{writer.address} has restarted")
        if writer.losing is not None:
            writer.losing.cancel()
            writer.losing = None
        writer.incarnation = incarnation
        writer.conn_id = conn_id
        self._by_conn[conn_id] = writer
        self._stop_asking(writer)
        self._settle(writer)
        for ticket in list(writer.tickets):
            self._owner.tell(writer, ticket)

    def closed(self, conn_id: int, reason: CloseReason, *, quiet: bool) -> None:
        """A connection is over; ``quiet``: and nothing of it lands any more."""
        self._arriving.pop(conn_id, None)
        writer = self._by_conn.pop(conn_id, None)
        if writer is None:
            return
        writer.conn_id = None
        for ticket in list(writer.tickets):
            self._owner.left(writer, ticket, quiet=quiet)
        if reason.cause is CloseCause.DEAD:
            self._lose(writer, f"{writer.address}: {reason}")
        if writer.told:
            # It may come back at once: only then are the rest repeated.
            writer.losing = asyncio.get_running_loop().call_later(
                self._options.ping_timeout,
                self._lose,
                writer,
                f"{writer.address} did not come back: {reason}",
            )
        # Silence is noticed after one such interval; its end here may take as long.
        # A link that ends later than that was not broken when it was done.
        since = asyncio.get_running_loop().time() - writer.done_at
        recent = since < 2 * self._options.ping_timeout
        if writer.missed or (recent and reason.cause is CloseCause.LOST):
            self._owe(writer)
        if (writer.tickets or writer.owing is not None) and not self._closed:
            self._ask(writer)
        self._let_go(writer)

    def _lose(self, writer: Writer, reason: str) -> None:
        """A writer's life is over, and with it what it had begun."""
        for ticket in list(writer.told):
            self._owner.stop(ticket, End(EndCode.PEER_LOST, reason))
        writer.told.clear()

    def begin_close(self) -> None:
        """Invite nobody any more."""
        self._closed = True
        for writer in list(self._by_address.values()):
            self._give_up(writer)

    async def close(self) -> None:
        """Release what is left, when all connections are gone."""
        for writer in list(self._by_address.values()):
            if writer.losing is not None:
                writer.losing.cancel()
            self._stop_asking(writer)
        if self._stopping:
            await asyncio.wait(self._stopping)
