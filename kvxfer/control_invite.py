"""Invitations: how a side that is written to asks a writer that listens to dial it.

One message and no connection: whoever gets an :class:`~kvxfer.wire.Invite` dials the
address in it with a Hello that names it, and everything else happens there. An
invitation is sent again until that has happened, so none is ever acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from kvxfer import wire
from kvxfer.control_io import (
    Address,
    Sockets,
    bind,
    parse_address,
    resolve,
    set_up,
    try_send,
)
from kvxfer.errors import KVXferError, ProtocolError, UsageError, VersionMismatchError
from kvxfer.rates import Buckets

__all__ = ["InviteListener", "Inviter", "listen_address"]

_log = logging.getLogger("kvxfer.control")

#: Takes an invitation and the host that it came from.
OnInvite = Callable[[wire.Invite, str], None]


def listen_address(listen: str) -> Address:
    """Understand ``HOST:PORT``, ``PORT`` (all addresses) or ``ipc://path``.

    Raises:
      UsageError: It is none of them.
    """
    text = listen.strip()
    if text.isdecimal() or text.startswith(":"):
        text = f"0.0.0.0:{text.lstrip(':')}"
    return parse_address(text)


class InviteListener:
    """Listens for invitations; anything else that comes is counted and dropped.

    Args:
      listen: As for :func:`listen_address`.
      on_invite: Is given what is taken.
      rate: Messages that are read in a second, from each address. Invitations are
        sent again, so one that is not read is late and not lost.

    Attributes:
      garbage: Messages that were no invitation.
      unread: Messages of those that sent too many.

    Raises:
      UsageError: ``listen`` is no address.
    """

    def __init__(self, listen: str, on_invite: OnInvite, rate: float) -> None:
        self.garbage = self.unread = 0
        self._rates = Buckets(rate)
        self._address = listen_address(listen)
        self._on_invite = on_invite
        self._sockets: Sockets | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        """What to invite at: ``host:port``, ``[ipv6]:port`` or ``ipc://path``."""
        return str(self._address)

    async def open(self) -> None:
        """Bind and begin to listen.

        Raises:
          AddressInUseError: Somebody listens there already.
          ControlError: The address cannot be bound. Nothing is left open.
        """
        self._sockets = Sockets()
        try:
            address = await resolve(self._address)
            router = self._sockets.socket(zmq.ROUTER)
            self._address = bind(router, address)
        except BaseException:
            await self.close()
            raise
        if not self._address.is_local:
            _log.warning(
                "control: whoever reaches %s can have this side dial an address; see "
                "docs/security.md",
                self._address,
            )
        self._reader = asyncio.get_running_loop().create_task(self._read(router))

    async def close(self) -> None:
        """Stop listening. Twice is fine."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})
        if self._sockets is not None:
            sockets, self._sockets = self._sockets, None
            await sockets.close()

    async def _read(self, router: zmq.asyncio.Socket) -> None:
        while True:
            frames = await router.recv_multipart(copy=False)
            try:
                self._take(frames)
            except (ProtocolError, VersionMismatchError) as error:
                self.garbage += 1
                _log.debug("no invitation: %s", error)
            except Exception:  # noqa: BLE001 - one stranger must not stop the rest
                _log.exception("an invitation could not be handled")
            # recv_multipart does not yield while messages are waiting.
            await asyncio.sleep(0)

    def _take(self, frames: list[zmq.Frame]) -> None:
        host = ""
        if not self._address.is_ipc:
            host = str(frames[-1].get("Peer-Address")).removeprefix("::ffff:")
        if not self._rates.take(host, asyncio.get_running_loop().time()):
            self.unread += 1
            return
        if len(frames) != 2:
            raise ProtocolError(f"a message of {len(frames) - 1} frames, not one")
        message = wire.decode(frames[1].bytes)
        if not isinstance(message, wire.Invite):
            raise ProtocolError(f"{type(message).__name__} where invitations go")
        self._on_invite(message, host)


class Inviter:
    """Invites one listener, again and again, until it is stopped.

    Args:
      address: Where it listens: ``host:port``, ``[ipv6]:port`` or ``ipc://path``.
      interval: Seconds between two invitations.

    Raises:
      UsageError: The address is none.
    """

    def __init__(self, address: str, interval: float) -> None:
        self._parsed = parse_address(address)
        if not self._parsed.is_ipc and not self._parsed.port:
            raise UsageError(f"{address!r} has no port to invite at")
        self._interval = interval
        self._sending: asyncio.Task[None] | None = None

    def start(self, invite: wire.Invite) -> None:
        """Begin to invite; does nothing if it has begun."""
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send(invite))

    def stop(self) -> asyncio.Task[None] | None:
        """Stop inviting; what is returned ends when all is closed."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.cancel()
        return sending

    async def _send(self, invite: wire.Invite) -> None:
        frame = wire.encode(invite)
        while True:
            # A name that is not known yet, or too few descriptors at the moment.
            try:
                await self._repeat(frame)
            except (KVXferError, zmq.ZMQError) as error:
                _log.warning("%s cannot be invited yet: %s", self._parsed, error)
            await asyncio.sleep(self._interval)

    async def _repeat(self, frame: bytes) -> None:
        address = await resolve(self._parsed)  # before there are any sockets
        sockets = Sockets()
        try:
            dealer = sockets.socket(zmq.DEALER)
            dealer.set(zmq.SNDHWM, 1)
            set_up(dealer, address, None)
            dealer.connect(address.endpoint)
            while True:
                # One that still waits to leave will do.
                try_send(dealer, [frame])
                await asyncio.sleep(self._interval)
        finally:
            await sockets.close()
