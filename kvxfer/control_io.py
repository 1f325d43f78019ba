"""What the control plane needs of ZMQ: addresses, one context, bind and connect.

One ZMQ context serves the process, however many clients and servers and event
loops there are; it exists while somebody uses it and costs two threads.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket as _socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from kvxfer import wire
from kvxfer.auth import DOMAIN
from kvxfer.curve import CurveKeys
from kvxfer.descriptors import REMEDY, shortage
from kvxfer.errors import (
    AddressInUseError,
    ClosedResourceError,
    ControlError,
    UsageError,
)
from kvxfer.heartbeat import heartbeat
from kvxfer.options import Options

__all__ = [
    "Address",
    "Sockets",
    "bind",
    "in_thread",
    "parse_address",
    "resolve",
    "set_up",
    "try_receive",
    "try_send",
]

T = TypeVar("T")

# A ZMTP greeting takes a few round trips; who needs longer is no peer of ours.
_HANDSHAKE_MS = (1_000, 5_000)
# While nobody listens: a first try after this, then less often, with ZMQ's jitter.
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1_000
_SEND_QUEUE = 1000
# Messages of a peer that wait while the loop is busy; behind a full queue ZMQ reads
# no signs of life either.
_RECEIVE_QUEUE = 256
_MAX_SOCKETS = 16_384
#: How long a closing socket may go on sending its farewell, in milliseconds.
LINGER_MS = 200


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed control address: ``host`` and ``port``, or an ipc ``path``."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def is_ipc(self) -> bool:
        """Whether it is a Unix socket."""
        return bool(self.path)

    @property
    def is_local(self) -> bool:
        """Whether only processes of this host reach it; a name counts as foreign."""
        if self.path:
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    @property
    def endpoint(self) -> str:
        """As ZMQ writes it; the host must be a literal address."""
        return f"ipc://{self.path}" if self.path else f"tcp://{self}"

    def __str__(self) -> str:
        if self.path:
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(address: str) -> Address:
    """Parse ``host:port``, ``[ipv6]:port`` or ``ipc://path``.

    ``tcp://`` in front is accepted.

    Raises:
      UsageError: It is none of them.
    """
    if address.startswith("ipc://"):
        if len(address) == len("ipc://"):
            raise UsageError("an ipc:// address without a path")
        return Address(path=address[len("ipc://") :])
    text = address[len("tcp://") :] if address.startswith("tcp://") else address
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise UsageError(
            f"control address {address!r} is not HOST:PORT, [IPV6]:PORT or ipc://PATH, "
            "with a port of 0 to 65535"
        )
    return Address(host=match[1] or match[2], port=int(match[3]))


def _resolve(address: Address) -> Address:
    infos = _socket.getaddrinfo(address.host, address.port, type=_socket.SOCK_STREAM)
    # IPv4 first: "localhost" has both, and most servers bind 127.0.0.1.
    infos.sort(key=lambda info: info[0] != _socket.AF_INET)
    return Address(host=str(infos[0][4][0]), port=address.port)


def _is_literal(host: str) -> bool:
    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, host.partition("%")[0])
        except OSError:
            continue
        return True
    return False


async def resolve(address: Address) -> Address:
    """Turn a host name into an address, off the event loop.

    Raises:
      ControlError: The name is unknown.
    """
    if address.is_ipc or _is_literal(address.host):
        return address
    if address.host == "*":
        return Address(host="0.0.0.0", port=address.port)
    try:
        return await in_thread(_resolve, address)
    except (OSError, UnicodeError, RuntimeError) as exc:
        # The last: no thread could be started.
        raise ControlError(
            f"cannot resolve the host of {address}: {exc}",
            hint="Check the name, or give an IP address.",
        ) from exc


async def in_thread(func: Callable[..., T], *args: object) -> T:
    """Run a blocking call in a thread of its own, which ends with it.

    The loop's default executor would keep its threads for ever.

    Cancellation:
      The call goes on and its result is dropped.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        error: Exception | None = None
        try:
            result = func(*args)
        except Exception as exc:  # noqa: BLE001 - it is raised in the caller
            error = exc
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    thread = threading.Thread(target=run, name="kvxfer-control", daemon=True)
    thread.start()
    try:
        return await future
    finally:
        if future.done() and not future.cancelled():
            thread.join()


def _new_context() -> zmq.asyncio.Context:
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
    return context


class _SharedContext:
    """The process's ZMQ context, made for the first user, ended by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.asyncio.Context | None = None
        self._pid = 0
        self._users = 0

    def acquire(self) -> zmq.asyncio.Context:
        with self._lock:
            if self._context is None or self._pid != os.getpid():
                # In a forked child the parent's context has no threads; pyzmq
                # knows that it must not touch it.
                self._context = _new_context()
                self._pid = os.getpid()
                self._users = 0
            self._users += 1
            return self._context

    def release(self, context: zmq.asyncio.Context) -> zmq.asyncio.Context | None:
        """Give it up; returns the context if the caller must terminate it."""
        with self._lock:
            if context is not self._context or self._pid != os.getpid():
                return None
            self._users -= 1
            if self._users:
                return None
            self._context = None
            return context


_shared = _SharedContext()


class Sockets:
    """Sockets of one owner, closed together.

    ZMQ's own thread sends and answers the signs of life on each link, so a process
    whose event loop is busy is still alive; one that is frozen or gone is not. Within
    ``ping_timeout`` after that the link is closed, and the monitor says so.

    Args:
      options: ``ping_interval`` and ``ping_timeout`` are used.
      private: On a context of their own, which costs two more threads. ZMQ asks one
        doorkeeper a context, so a server with keys does not share.

    Raises:
      ControlError: There are too few file descriptors. ZMQ would end the process.
    """

    def __init__(
        self, options: Options | None = None, *, private: bool = False
    ) -> None:
        if problem := shortage():
            raise ControlError(f"no room for a connection: {problem}", hint=REMEDY)
        self._options = Options() if options is None else options
        self._private = private
        self._context: zmq.asyncio.Context | None = (
            _new_context() if private else _shared.acquire()
        )
        self._sockets: list[zmq.asyncio.Socket] = []
        self._monitors: list[zmq.asyncio.Socket] = []

    def socket(self, kind: int) -> zmq.asyncio.Socket:
        """Make a socket of ``kind`` with the options all of ours have."""
        if self._context is None:
            raise ClosedResourceError("closed before the connection was made")
        made = self._context.socket(kind)
        self._sockets.append(made)
        made.set(zmq.LINGER, 0)
        made.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        low, high = _HANDSHAKE_MS
        deadline_ms = round(self._options.connect_timeout * 1000)
        made.set(zmq.HANDSHAKE_IVL, min(high, max(low, deadline_ms)))
        interval_ms, silence_ms = heartbeat(self._options)
        made.set(zmq.HEARTBEAT_IVL, interval_ms)
        made.set(zmq.HEARTBEAT_TIMEOUT, silence_ms)
        made.set(zmq.RECONNECT_IVL, _RECONNECT_MS)
        made.set(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        made.set(zmq.SNDHWM, _SEND_QUEUE)
        made.set(zmq.RCVHWM, _RECEIVE_QUEUE)
        return made

    def monitor(self, socket: zmq.asyncio.Socket, events: int) -> zmq.asyncio.Socket:
        """Make the socket that tells what happens to ``socket``."""
        made = socket.get_monitor_socket(events)
        self._monitors.append(made)
        return made

    async def close(self, *, linger_ms: int = 0) -> None:
        """Close all of them. Twice is fine.

        Cancellation:
          The sockets are closed; the context ends in the background.
        """
        context, self._context = self._context, None
        for made in self._sockets:
            if self._monitors:
                made.disable_monitor()
            made.close(linger=linger_ms)
        for monitor in self._monitors:
            monitor.close(linger=0)
        self._sockets.clear()
        self._monitors.clear()
        if context is None:
            return
        last = context if self._private else _shared.release(context)
        if last is not None:
            # term() waits for the farewells, up to the sockets' linger.
            try:
                await in_thread(last.term)
            except RuntimeError:
                last.term()  # at its end Python 3.12 starts no thread any more


def set_up(
    socket: zmq.asyncio.Socket, address: Address, keys: CurveKeys | None
) -> None:
    """Set what depends on the address, and the keys."""
    socket.set(zmq.IPV6, int(":" in address.host))
    if keys is None:
        return
    socket.set(zmq.CURVE_PUBLICKEY, keys.public)
    socket.set(zmq.CURVE_SECRETKEY, keys.secret)
    if keys.clients is None:
        socket.set(zmq.CURVE_SERVERKEY, keys.server)
        return
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.ZAP_DOMAIN, DOMAIN)
    # Without it a door without a keeper is open.
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)


def bind(
    socket: zmq.asyncio.Socket, address: Address, keys: CurveKeys | None = None
) -> Address:
    """Bind; returns the address with the port it got.

    Raises:
      AddressInUseError: Somebody listens there.
      ControlError: It cannot be bound for another reason.
    """
    set_up(socket, address, keys)
    if address.is_ipc:
        _clear_ipc(address)
    endpoint = address.endpoint
    if not address.is_ipc and address.port == 0:
        endpoint = endpoint[: -len("0")] + "*"
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as exc:
        raise _bind_error(address, exc) from exc
    if address.is_ipc:
        os.chmod(address.path, stat.S_IRUSR | stat.S_IWUSR)
        return address
    bound = socket.get(zmq.LAST_ENDPOINT)
    text = bound.decode() if isinstance(bound, bytes) else str(bound)
    port = int(text.rstrip("\0").rpartition(":")[2])
    return Address(host=address.host, port=port)


def _bind_error(address: Address, exc: zmq.ZMQError) -> ControlError:
    if exc.errno == errno.EADDRINUSE:
        return _in_use(address)
    hints = {
        errno.EADDRNOTAVAIL: "No interface of this host has that address.",
        errno.ENODEV: "No interface of this host has that address.",
        errno.EACCES: "Ports below 1024 and foreign directories need privileges.",
        errno.ENAMETOOLONG: "A Unix socket's path has at most 107 bytes.",
        errno.EMFILE: REMEDY,
    }
    return ControlError(
        f"cannot listen on {address}: {exc}", hint=hints.get(exc.errno or 0, "")
    )


def _in_use(address: Address) -> AddressInUseError:
    if address.is_ipc:
        remedy = "Stop the server that has it, or choose another path."
    else:
        remedy = (
            f"`ss -ltnp 'sport = :{address.port}'` shows who has it; choose another "
            "port, or port 0 for a free one."
        )
    return AddressInUseError(f"cannot listen on {address}: already in use", hint=remedy)


def _clear_ipc(address: Address) -> None:
    """Make sure that binding takes the path from nobody.

    ZMQ unlinks whatever is at the path before it binds: a live server's socket,
    or a file that has nothing to do with us.
    """
    try:
        mode = os.stat(address.path).st_mode
    except OSError:
        return  # nothing there; if it cannot be made, bind says why
    if not stat.S_ISSOCK(mode):
        raise ControlError(
            f"cannot listen on {address}: a file is there that is no socket",
            hint="Choose another path.",
        )
    with _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # left over by a process that is gone
        except OSError as exc:
            if exc.errno != errno.EAGAIN:
                raise ControlError(f"cannot listen on {address}: {exc}") from exc
    raise _in_use(address)


def try_send(socket: zmq.asyncio.Socket, frames: list[bytes]) -> str:
    """Send without waiting; returns why it was not sent, or nothing."""
    if socket.closed:
        return "the socket is closed"
    sent: asyncio.Future[Any] = asyncio.ensure_future(
        socket.send_multipart(frames, flags=zmq.NOBLOCK)
    )
    error = sent.exception()
    if error is None:
        return ""
    if isinstance(error, zmq.Again):
        return "the peer does not read: the send queue is full"
    if isinstance(error, zmq.ZMQError) and error.errno == errno.EHOSTUNREACH:
        return "the peer closed the link"
    return f"cannot send: {error}"


def try_receive(socket: zmq.asyncio.Socket) -> list[bytes] | None:
    """Receive what has come, without waiting; None: nothing has, or ever will.

    What is waited for by ``recv_multipart`` is taken off the socket before the task
    that waits runs, and whoever reads meanwhile takes what came behind it. Where two
    read, both wait by ``poll`` and read by this.
    """
    received: asyncio.Future[Any] = asyncio.ensure_future(
        socket.recv_multipart(flags=zmq.NOBLOCK)
    )
    if isinstance(received.exception(), zmq.ZMQError):
        return None
    frames: list[bytes] = received.result()
    return frames
