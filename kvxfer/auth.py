"""Who may connect: the answers to ZMQ's question, by public key.

libzmq asks by the ZAP protocol (RFC 27) before it lets a peer's first message
through, so nothing of kvxfer runs for a stranger but this. The handler of pyzmq is
not used, since it lets plain connections in unless told otherwise, keeps its list
until told otherwise, and its task ends in silence at the first error.
"""

from __future__ import annotations

import asyncio
import logging

import zmq
import zmq.asyncio
from zmq.utils import z85

from kvxfer.curve import KeyDirectory

__all__ = ["DOMAIN", "Doorkeeper"]

_log = logging.getLogger("kvxfer.auth")

#: The name of our door; libzmq asks nobody where a socket has none.
DOMAIN = b"kvxfer"
_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_REQUEST_FRAMES = 7
# Lines in the log about those who were turned away, in this many seconds.
_LOG_INTERVAL = 10.0


class Doorkeeper:
    """Answers for all sockets of one context; see :class:`KeyDirectory`.

    Attributes:
      denied: Connections that were turned away.
    """

    def __init__(self, clients: KeyDirectory) -> None:
        self.denied = 0
        self._clients = clients
        self._task: asyncio.Task[None] | None = None
        self._next_log = 0.0
        self._unlogged = 0

    def start(self, socket: zmq.asyncio.Socket) -> None:
        """Answer on ``socket``, a REP of the context; closing it is the caller's."""
        socket.bind(_ENDPOINT)
        self._task = asyncio.get_running_loop().create_task(self._answer(socket))

    async def close(self) -> None:
        """Answer no more: from now on nobody is let in."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _answer(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            request = await socket.recv_multipart()
            name = self._who(request)
            code, text = (b"200", b"OK") if name else (b"400", b"no access")
            reply_to = request[1] if len(request) > 1 else b""
            await socket.send_multipart(
                [_VERSION, reply_to, code, text, name.encode(), b""]
            )

    def _who(self, request: list[bytes]) -> str:
        """Return the name of who asks to be let in, or nothing."""
        if len(request) != _REQUEST_FRAMES or request[0] != _VERSION:
            self._turn_away("an unknown form of request", "?")
            return ""
        _, _, domain, address, _, mechanism, key = request
        if domain != DOMAIN or mechanism != b"CURVE":
            self._turn_away("no CURVE", address.decode(errors="replace"))
            return ""
        public = z85.encode(key)
        name = self._clients.name_of(public)
        if not name:
            self._turn_away(
                f"public key {public.decode()}", address.decode(errors="replace")
            )
        return name

    def _turn_away(self, what: str, address: str) -> None:
        self.denied += 1
        self._unlogged += 1
        now = asyncio.get_running_loop().time()
        if now < self._next_log:
            return  # who knocks a thousand times does not fill the disk
        _log.warning(
            "%s is not let in: %s is not in %s (%d since the last such line)",
            address,
            what,
            self._clients.path,
            self._unlogged,
        )
        self._next_log = now + _LOG_INTERVAL
        self._unlogged = 0
