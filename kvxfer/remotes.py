"""Decode sides that have invited this client: their connections and their offers.

An invitation names a decode side's life; its connection may break and come back, and
what was not announced is then written again. A decode side that does not come back
within the liveness interval is lost, and so are the requests it had offered.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from typing import Protocol

from kvxfer import wire
from kvxfer._transfer import Transfer
from kvxfer.control import Address, InviteListener
from kvxfer.curve import CurveKeys, client_keys
from kvxfer.errors import BrokenPeerError, KVXferError
from kvxfer.host import Host
from kvxfer.peer import Peer
from kvxfer.request import Home, Request
from kvxfer.requests import End, EndCode, RequestState, end_code

__all__ = ["Remote", "Remotes", "Stream"]

_log = logging.getLogger("kvxfer.streams")

_MAX_PARKED = 65536
_MAX_REMOTES = 4096


class Owner(Protocol):
    """What the remotes need of the streams."""

    def find(self, request_id: str) -> Stream | None:
        """Find a request that is not over."""

    def tombstone(self, request_id: str) -> End | None:
        """Say how a request ended lately, if badly."""

    def attach(self, request: Stream, remote: Remote, offer: wire.OfferBlocks) -> None:
        """Let an offer and a request come together."""

    def detach(self, request: Stream) -> None:
        """The connection of a request is gone; it may come back."""

    def stop(self, request: Stream, end: End) -> None:
        """End a request badly."""

    def drive(self, request: Stream) -> None:
        """Carry out what a request's state asks for."""


class Stream(Request):
    """A request with what belongs to the streams, on their loop.

    Attributes:
      remote: Who has offered, once somebody has.
      checksum: Whether layers carry a digest.
      transfers: What a device has of it, and the connection that it goes by.
      timers: Its deadline.
      lease: Its lease.
      waits: Events that are waited for.
      abandoned: A device does not let go of its blocks.
    """

    def __init__(
        self, streams: Home, request_id: str, *, deadline: float, priority: int
    ) -> None:
        super().__init__(streams, request_id, deadline=deadline, priority=priority)
        self.remote: Remote | None = None
        self.checksum = False
        self.transfers: dict[Transfer, Peer] = {}
        self.timers: list[asyncio.TimerHandle] = []
        self.lease: asyncio.TimerHandle | None = None
        self.waits: set[asyncio.Task[None]] = set()
        self.abandoned = False


class Remote:
    """A decode side and its connection, as long as there is one."""

    def __init__(self, address: str, incarnation: bytes, is_direct: bool) -> None:
        self.address = address
        self.incarnation = incarnation
        self.is_direct = is_direct
        self.peer: Peer | None = None
        self.dialing: Peer | None = None
        """The connection that is being made; what it says already waits."""
        self.requests: dict[int, Stream] = {}
        """Generation to request, of those that it has offered."""
        self.early: list[wire.RequestMessage] = []
        self.connecting: asyncio.Task[None] | None = None
        self.losing: asyncio.TimerHandle | None = None

    @classmethod
    def of_peer(cls, peer: Peer) -> Remote:
        """Make what a request without an offer needs."""
        self = cls(peer.address, b"", True)
        self.peer = peer
        return self

    @property
    def live_peer(self) -> Peer:
        """The connection; there must be one."""
        if self.peer is None:
            raise BrokenPeerError(f"{self.address} is not connected")
        return self.peer

    @property
    def conn_id(self) -> int:
        """What names the connection; 0 without one."""
        return self.peer.conn_id if self.peer is not None else 0

    def send(self, message: wire.RequestMessage) -> bool:
        """Say something about a request; false if nobody is there.

        A connection that has begun to break says no more: its end, which is a fence,
        says it all.
        """
        peer = self.peer
        return peer is not None and peer.connected and peer.send_request(message)


class Remotes:
    """All decode sides of one client."""

    def __init__(self, host: Host, owner: Owner) -> None:
        self._host = host
        self._owner = owner
        self._options = host.options
        self._listener: InviteListener | None = None
        self._keys: CurveKeys | None = None
        self._by_invite: dict[bytes, Remote] = {}
        self._parked: collections.OrderedDict[
            str, tuple[Remote, wire.OfferBlocks, float]
        ] = collections.OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- life --------------------------------------------------------------------

    async def open(self) -> None:
        """Listen, where the options say so; see ``InviteListener.open``.

        Raises:
          OptionError: This side's keys are not as they must be.
        """
        if self._options.listen is not None:
            self._keys = client_keys(self._options, None)
            listener = InviteListener(
                self._options.listen, self._on_invite, self._options.max_handshake_rate
            )
            await listener.open()
            self._listener = listener

    @property
    def endpoint(self) -> str | None:
        """Where this client is invited, or None."""
        return self._listener.endpoint if self._listener is not None else None

    @property
    def n_parked(self) -> int:
        """Offers to requests that have not been opened."""
        return len(self._parked)

    def peers(self) -> list[Peer]:
        """The connections, those being made left out; from any thread."""
        # A copy, and each looked at once: another thread's event loop goes on.
        known = [remote.peer for remote in list(self._by_invite.values())]
        return [peer for peer in known if peer is not None]

    async def close(self) -> None:
        """Close all connections. Twice is fine."""
        self._closed = True
        if self._listener is not None:
            await self._listener.close()
        for remote in list(self._by_invite.values()):
            if remote.losing is not None:
                remote.losing.cancel()
            if remote.connecting is not None:
                remote.connecting.cancel()
                await asyncio.wait({remote.connecting})
        for peer in self.peers():
            await peer.close()
        while self._closing:
            await asyncio.wait(self._closing)

    # -- connections ---------------------------------------------------------------

    def _on_invite(self, invite: wire.Invite, host: str) -> None:
        if self._closed:
            return
        remote = self._by_invite.get(invite.invite)
        if remote is None:
            if len(self._by_invite) >= _MAX_REMOTES and not self._forget_one():
                _log.warning("an invitation of %s is one too many", host)
                return
            address = str(Address(invite.host or host, invite.port, invite.path))
            remote = Remote(address, invite.incarnation, False)
            self._supersede(remote)
            self._by_invite[invite.invite] = remote
        if remote.peer is None and remote.connecting is None:
            remote.connecting = asyncio.get_running_loop().create_task(
                self._connect(remote, invite.invite)
            )

    def _supersede(self, new: Remote) -> None:
        """Another life listens at that address: the one before is over."""
        for remote in list(self._by_invite.values()):
            if remote.address == new.address and remote.incarnation != new.incarnation:
                self._lose(remote, f"{remote.address} has restarted")

    def _forget_one(self) -> bool:
        """Forget a decode side that is not there and of which nothing is open."""
        for name, remote in self._by_invite.items():
            if (
                remote.peer is None
                and remote.connecting is None
                and not remote.requests
            ):
                del self._by_invite[name]
                return True
        return False

    async def _connect(self, remote: Remote, invite: bytes) -> None:
        peer = Peer(
            self._host,
            remote.address,
            keys=self._keys,
            invite=invite,
            on_request=lambda message: self._on_message(remote, peer, message),
            on_broken=lambda: self._on_broken(remote, peer),
        )
        remote.dialing, remote.early = peer, []
        try:
            try:
                await peer.connect(self._options.connect_timeout)
            except BaseException:
                await peer.close()
                raise
        except KVXferError as error:
            # It invites again for as long as it offers anything.
            _log.warning("%s invites, but: %s", remote.address, error)
            return
        finally:
            remote.connecting = remote.dialing = None
        remote.peer = peer
        if remote.losing is not None:
            remote.losing.cancel()
            remote.losing = None
        if remote.requests:
            generations = list(remote.requests)
            remote.send(
                wire.Resume(conn_id=peer.conn_id, generations=generations[:65536])
            )
        early, remote.early = remote.early, []
        for message in early:
            self._on_message(remote, peer, message)
        if not peer.connected:
            self._on_broken(remote, peer)

    def _on_broken(self, remote: Remote, peer: Peer) -> None:
        """A connection has begun to end."""
        if remote.peer is not peer:
            return
        remote.peer = None
        for request in list(remote.requests.values()):
            self._owner.detach(request)
        for name, (other, _, _) in list(self._parked.items()):
            if other is remote:
                del self._parked[name]
        loop = asyncio.get_running_loop()
        if remote.requests and remote.losing is None:
            remote.losing = loop.call_later(
                self._options.ping_timeout,
                self._lose,
                remote,
                f"{remote.address} did not come back: {peer.error}",
            )
        task = loop.create_task(_close(peer))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _lose(self, remote: Remote, reason: str) -> None:
        """A decode side's life is over, and with it what it had offered."""
        for request in list(remote.requests.values()):
            self._owner.stop(request, End(EndCode.PEER_LOST, reason))

    # -- offers ----------------------------------------------------------------------

    def opened(self, request: Stream) -> None:
        """A request is open: there may be an offer already."""
        self._drop_expired()
        parked = self._parked.pop(request.request_id, None)
        if parked is not None:
            remote, offer, _ = parked
            self._attach(request, remote, offer)

    def _attach(self, request: Stream, remote: Remote, offer: wire.OfferBlocks) -> None:
        remote.requests[offer.generation] = request
        self._owner.attach(request, remote, offer)

    def refuse(self, remote: Remote, offer: wire.OfferBlocks, end: End) -> None:
        """An offer cannot be taken: say so, and know it no longer."""
        remote.requests.pop(offer.generation, None)
        self._say_ended(remote, offer.generation, end)

    def ended(self, request: Stream, remote: Remote) -> None:
        """A request is over; its decode side is told, unless all is well."""
        offer, end = request._core.offer, request._core.end
        generation = offer.generation if offer is not None else 0
        remote.requests.pop(generation, None)
        if end is not None and generation:
            self._say_ended(remote, generation, end, request._core.records)

    def _say_ended(
        self, remote: Remote, generation: int, end: End, records: int = 0
    ) -> None:
        remote.send(
            wire.Ended(
                conn_id=remote.conn_id,
                generation=generation,
                code=end.code.value,
                reason=end.reason[:2000],
                layer=end.layer,
                bytes_done=end.bytes_done,
                records=records,
            )
        )

    def _on_message(
        self, remote: Remote, peer: Peer, message: wire.RequestMessage
    ) -> None:
        if remote.dialing is peer:
            remote.early.append(message)
        elif isinstance(message, wire.Announced):
            # What has landed has landed, though the connection has begun to end.
            self._on_announced(remote, message)
        elif remote.peer is not peer:
            return  # of a connection that has begun to end: what it says is past
        elif isinstance(message, wire.OfferBlocks):
            self._on_offer(remote, message)
        elif isinstance(message, wire.Abort):
            self._on_abort(remote, message)

    def _on_offer(self, remote: Remote, offer: wire.OfferBlocks) -> None:
        try:
            name = offer.request_id.decode()
        except UnicodeDecodeError:
            end = End(EndCode.RULES, "a request id that is not UTF-8")
            self._say_ended(remote, offer.generation, end)
            return
        request = self._owner.find(name)
        if request is None:
            tombstone = self._owner.tombstone(name)
            if tombstone is not None:
                self._say_ended(remote, offer.generation, tombstone)
            else:
                self._park(remote, name, offer)
            return
        known = remote.requests.get(offer.generation)
        if known is request and request._core.is_live:
            if request._core.state is RequestState.OPEN:
                self._owner.attach(request, remote, offer)
        elif request.remote is None and request._core.state is RequestState.OPEN:
            self._attach(request, remote, offer)
        else:
            end = End(EndCode.FAILED, f"request {name!r} is another offer's already")
            self._say_ended(remote, offer.generation, end)

    def _park(self, remote: Remote, name: str, offer: wire.OfferBlocks) -> None:
        self._drop_expired()
        if len(self._parked) >= _MAX_PARKED:
            end = End(EndCode.FAILED, f"{_MAX_PARKED} offers wait here already")
            self._say_ended(remote, offer.generation, end)
            return
        self._parked[name] = (remote, offer, time.monotonic() + offer.lease)

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for name, (_, _, expires) in list(self._parked.items()):
            if expires < now:
                del self._parked[name]

    def _on_announced(self, remote: Remote, message: wire.Announced) -> None:
        request = remote.requests.get(message.generation)
        if request is not None:
            keys = [(g.group, layer) for g in message.layers for layer in g.layers]
            request._core.announced(keys, complete=message.complete)
            self._owner.drive(request)

    def _on_abort(self, remote: Remote, message: wire.Abort) -> None:
        request = remote.requests.get(message.generation)
        end = End(
            end_code(message.code),
            wire.printable(message.reason),
            message.layer,
            by_peer=True,
        )
        if request is not None:
            self._owner.stop(request, end)
            return
        for name, (_, offer, _) in list(self._parked.items()):
            if offer.generation == message.generation:
                del self._parked[name]
        self._say_ended(remote, message.generation, end)


async def _close(peer: Peer) -> None:
    """Close a connection that is broken; its requests have heard what is wrong."""
    try:
        await peer.close()
    except KVXferError:
        _log.exception("the connection to %s could not be closed", peer.address)
