"""What a listener's owner does for each of its connections."""

from __future__ import annotations

from typing import Protocol

from kvxfer import wire
from kvxfer.protocol import CloseReason, OfferParts

__all__ = ["ListenerDelegate"]


class ListenerDelegate(Protocol):
    """What a :class:`ControlServer` asks of its owner, one connection at a time.

    The coroutines of one connection never overlap. An exception in any of them
    ends that connection and no other. ``closed`` comes exactly once for each
    ``conn_id`` for which ``offer`` returned; an ``offer`` that raises, or is
    cancelled, releases what it made itself.
    """

    async def offer(
        self, hello: wire.Hello, conn_id: int, peer_address: str
    ) -> OfferParts:
        """Make this side's end (QPs in INIT); a KVXferError refuses the peer."""

    async def accept(self, conn_id: int, accept: wire.Accept) -> None:
        """Bring this side's QPs to RTS; Ready goes out when this returns."""

    def established(self, conn_id: int) -> None:
        """Ready is on its way: both sides are in RTS."""

    async def fence(self, conn_id: int, reason: str) -> None:
        """Let nothing of this connection land any more, then return."""

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        """The peer gave up these layers of this request."""

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        """The peer (a target) consumed so much of its ring since the start."""

    def request(self, conn_id: int, message: wire.RequestMessage) -> None:
        """The peer says something about a request."""

    def drained(self, conn_id: int) -> None:
        """The peer answers ``drain``: it has nothing under way any more."""

    async def closed(self, conn_id: int, reason: CloseReason) -> None:
        """The connection is over; release its end."""
