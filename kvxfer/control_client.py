"""The dialing half of the control plane: one DEALER, one connection.

ZMQ connects again by itself and in silence. That suits a listener that is not up
yet; once it has answered, a broken link is the end of the connection.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from dataclasses import dataclass, field
from typing import Protocol

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from kvxfer import wire
from kvxfer.control_io import (
    LINGER_MS,
    Address,
    Sockets,
    parse_address,
    resolve,
    set_up,
    try_receive,
    try_send,
)
from kvxfer.control_link import (
    FRAMES_A_TURN,
    Link,
    end_error,
    lost_text,
    run_closing,
    timing,
)
from kvxfer.curve import CurveKeys
from kvxfer.errors import (
    AuthenticationError,
    ClosedResourceError,
    ConnectTimeoutError,
    ControlError,
    InternalError,
    UsageError,
)
from kvxfer.options import Options
from kvxfer.protocol import (
    AcceptWanted,
    Action,
    Closed,
    CloseReason,
    CreditReceived,
    DialerProtocol,
    DrainReceived,
    Established,
    FailedReceived,
    FenceWanted,
    RequestReceived,
)

__all__ = ["ControlClient", "DialerDelegate", "EstablishedInfo"]

_log = logging.getLogger("kvxfer.control")


class DialerDelegate(Protocol):
    """What a :class:`ControlClient` asks of its owner.

    ``closed`` comes exactly once if ``accept`` returned, also when ``connect`` then
    fails; an ``accept`` that raises, or is cancelled, releases what it made itself.
    """

    def hello(self) -> wire.Hello:
        """Say who dials, with a fresh nonce (``wire.new_nonce()``)."""

    async def accept(self, offer: wire.Offer) -> wire.Accept:
        """Make this side's end and bring its QPs to RTS."""

    async def fence(self, conn_id: int, reason: str) -> None:
        """Let nothing of this connection land any more, then return."""

    def failed(self, conn_id: int, message: wire.Failed) -> None:
        """The peer gave up these layers of this request."""

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        """The peer (a target) consumed so much of its ring since the start."""

    def request(self, conn_id: int, message: wire.RequestMessage) -> None:
        """The peer says something about a request."""

    def drain(self, conn_id: int, reason: str) -> None:
        """The listener is about to leave: answer by ``send_drained``."""

    async def closed(self, reason: CloseReason) -> None:
        """The connection is over; release its end."""


@dataclass(frozen=True, slots=True)
class EstablishedInfo:
    """What the dialer knows of an established connection.

    Attributes:
      conn_id: Names the connection at both ends.
      version: The protocol version in use.
      features: Feature bits both sides know.
      role: This side's role.
      peer_address: The host dialed, resolved; empty for ``ipc://``.
      offer: The listener's Offer: incarnation, geometry, device, endpoint.
    """

    conn_id: int
    version: int
    features: int
    role: wire.Role
    peer_address: str
    offer: wire.Offer = field(repr=False)


_MONITORED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_NOT_ZMQ = "something answers there that does not speak this protocol"
_NOTES: dict[int, str] = {
    zmq.EVENT_CONNECTED: "something accepts connections, but no ZMTP greeting came",
    zmq.EVENT_CONNECT_RETRIED: "nobody accepts connections",
    zmq.EVENT_DISCONNECTED: "something accepts connections and hangs up",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "connected, but no answer to the Hello",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: _NOT_ZMQ,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: _NOT_ZMQ,
}
# What a hang-up in the handshake most often means where there are keys.
_HANGS_UP_ON_KEYS = (
    "the listener hangs up in the handshake: is the server's public key right?"
)
_HANG_UPS = (
    zmq.EVENT_DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
)
_DENIED = 400
_MECHANISM_MISMATCH = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH


class ControlClient:
    """Dial one listener; one object is one connection's whole life.

    Args:
      delegate: Makes and releases this side's end.
      options: ``ping_interval``, ``ping_timeout``, ``loop_timeout`` and
        ``connect_timeout`` are used.
      keys: This side's and the listener's; ``None`` dials in the clear.
    """

    def __init__(
        self,
        delegate: DialerDelegate,
        *,
        options: Options | None = None,
        keys: CurveKeys | None = None,
    ) -> None:
        self._delegate = delegate
        self._keys = keys
        self._options = options if options is not None else Options()
        self._address = ""
        self._host = ""
        self._note = "no connection yet"
        self._sockets: Sockets | None = None
        self._dealer: zmq.asyncio.Socket | None = None
        self._link: Link | None = None
        self._ready: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._heard_zmq = False
        self._was_connected = False

    # -- life --------------------------------------------------------------

    async def connect(
        self, address: str, *, timeout: float | None = None
    ) -> EstablishedInfo:
        """Do the dialer's half of the handshake, once in this object's life.

        While nobody listens at ``address`` it goes on trying.

        Args:
          address: ``host:port``, ``[ipv6]:port`` or ``ipc://path``.
          timeout: Seconds for all of it; ``None`` takes ``connect_timeout``.

        Returns:
          What was agreed on; both sides are in RTS.

        Raises:
          ConnectTimeoutError: It took too long; the message says how far it got.
          GeometryMismatchError, VersionMismatchError, DeviceUnavailableError,
          RefusedError: The listener said no, with its reasons.
          AuthenticationError: It does not know this side's key, or only one side
            has keys.
          ProtocolError: What answers breaks the protocol.
          ControlError: The link broke, or the host's name is unknown.
          ClosedResourceError: It was closed, before or during the call.
          UsageError: A second call, or an address that is none.

        After any exception, and after cancellation, nothing is left open.
        """
        if self._closing is not None:
            raise ClosedResourceError("the control client is closed")
        if self._sockets is not None:
            raise UsageError("a control client connects once")
        parsed = parse_address(address)
        timeout = self._options.connect_timeout if timeout is None else timeout
        self._address = address
        loop = asyncio.get_running_loop()
        core = DialerProtocol(self._delegate.hello(), timing(self._options, timeout))
        self._ready = loop.create_future()
        self._sockets = Sockets(self._options)
        try:
            start = loop.time()
            await self._open(parsed, timeout)
            self._link = Link(core, self, self._host)
            self._link.apply(core.start(start))
            await self._ready
        except BaseException:
            if not self._ready.cancel() and not self._ready.cancelled():
                self._ready.exception()  # it is raised already, or outrun
            self._start_closing("connect failed or was cancelled")
            self._hurry()
            await self.close()
            raise
        return self._info(core)

    async def _open(self, parsed: Address, timeout: float) -> None:
        assert self._sockets is not None
        loop = asyncio.get_running_loop()
        lookup = loop.create_task(resolve(parsed))
        try:
            await asyncio.wait({lookup}, timeout=timeout)
            if not lookup.done():
                raise ConnectTimeoutError(
                    f"{self._address}: the name did not resolve within {timeout:g} s",
                    hint="Check the name, or give an IP address.",
                )
            resolved = lookup.result()
        finally:
            lookup.cancel()
        self._host = resolved.host
        dealer = self._sockets.socket(zmq.DEALER)
        set_up(dealer, resolved, self._keys)
        monitor = self._sockets.monitor(dealer, _MONITORED)
        try:
            dealer.connect(resolved.endpoint)
        except zmq.ZMQError as exc:
            raise ControlError(f"cannot dial {self._address}: {exc}") from exc
        self._dealer = dealer
        for coro in (self._read(dealer), self._watch(monitor)):
            self._tasks.add(loop.create_task(coro))

    def _info(self, core: DialerProtocol) -> EstablishedInfo:
        assert core.offer is not None
        return EstablishedInfo(
            conn_id=core.offer.conn_id,
            version=core.version,
            features=core.features,
            role=core.role,
            peer_address=self._host,
            offer=core.offer,
        )

    def __del__(self) -> None:
        if self._sockets is not None and self._closing is None:
            warnings.warn(
                f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self
            )

    def __repr__(self) -> str:
        state = self._link.core.state.value if self._link else "not connected"
        return f"<ControlClient {self._address or '-'}, {state}>"

    @property
    def peer_address(self) -> str:
        """The host dialed, resolved; empty before that and for ``ipc://``."""
        return self._host

    @property
    def conn_id(self) -> int:
        """What names the connection; 0 before the listener has answered."""
        return (self._link.core.conn_id or 0) if self._link is not None else 0

    @property
    def knows_requests(self) -> bool:
        """Whether the peer's release knows requests."""
        return self._link is not None and bool(
            self._link.core.features & wire.FEATURE_REQUESTS
        )

    @property
    def is_established(self) -> bool:
        """Whether the handshake is done and the connection not over."""
        return self._link is not None and self._link.core.is_established

    async def close(self, reason: str = "the client closed") -> None:
        """Say goodbye, release this side's end, close the socket.

        It always closes, twice is fine, and afterwards no task, thread or socket
        of it is left. A delegate call that takes longer than 5 s is cancelled.

        Cancellation:
          A running delegate call is cancelled at once, the rest is done, and the
          cancellation goes on.
        """
        if self._link is not None and self._link.worker is asyncio.current_task():
            self._start_closing(reason)  # waiting here would wait for ourselves
            return
        await run_closing(lambda: self._start_closing(reason), self._hurry)

    def _start_closing(self, reason: str) -> asyncio.Task[None]:
        if self._closing is None:
            loop = asyncio.get_running_loop()
            self._closing = loop.create_task(self._close(reason))
        return self._closing

    def _hurry(self) -> None:
        if self._link is not None:
            self._link.cancel_job()

    async def _close(self, reason: str) -> None:
        if self._link is not None:
            self._link.apply(self._link.core.close(reason))
            await self._link.wait_over()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._sockets is not None:
            linger_ms = LINGER_MS if self._heard_zmq else 0
            await self._sockets.close(linger_ms=linger_ms)

    # -- use ---------------------------------------------------------------

    def send_credit(self, consumed_bytes: int, consumed_records: int) -> bool:
        """Tell the initiator what was consumed; false if it is gone."""
        return self._link is not None and self._link.send_credit(
            consumed_bytes, consumed_records
        )

    def send_drained(self) -> bool:
        """Answer a listener that is about to leave; false if it is gone."""
        return self._link is not None and self._link.send_drained()

    def send_failed(self, request_id: bytes, layers: list[int], reason: str) -> bool:
        """Tell the peer which layers will not come; false if it is gone."""
        return self._link is not None and self._link.send_failed(
            request_id, layers, reason
        )

    def send_request(self, message: wire.RequestMessage) -> bool:
        """Say something about a request; false if the peer is gone."""
        return self._link is not None and self._link.send_request(message)

    async def request_fence(self, reason: str, *, timeout: float = 2.0) -> bool:
        """Ask the peer to let nothing land any more; true if it confirmed in time.

        Args:
          reason: For the peer's log.
          timeout: Seconds.
        """
        return self._link is not None and await self._link.fence(reason, timeout)

    def send_bye(self, reason: str) -> None:
        """End the connection without waiting; ``closed`` follows."""
        if self._link is not None:
            self._link.apply(self._link.core.close(reason))

    # -- what comes in -----------------------------------------------------

    async def _read(self, dealer: zmq.asyncio.Socket) -> None:
        while True:
            # Not recv: what it took would be heard behind what _lost reads.
            await dealer.poll()
            for _ in range(FRAMES_A_TURN):
                frames = try_receive(dealer)
                if frames is None:
                    break
                self._take(frames)
            await asyncio.sleep(0)  # see ControlServer._read

    def _take(self, frames: list[bytes]) -> None:
        if self._link is None:
            return
        if len(frames) == 1:
            self._link.feed(frames[0])
        else:
            text = f"a message of {len(frames)} frames, not one"
            self._link.apply(self._link.core.violation(text))

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())
            kind = int(event["event"])
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._heard_zmq = True
            if kind == zmq.EVENT_DISCONNECTED and self._heard_zmq:
                # ZMQ would connect again, to a listener that knows us no more.
                self._lost()
                return
            if self._link is not None and not self._heard_zmq:
                problem = self._key_problem(kind, int(event["value"]))
                if problem is not None:
                    self._link.fail(problem)
            if self._note != _NOT_ZMQ and not (
                # Trying again says nothing new of one who hung up.
                kind == zmq.EVENT_CONNECT_RETRIED and self._was_connected
            ):
                self._note = self._notes.get(kind, self._note)
            self._was_connected |= kind == zmq.EVENT_CONNECTED

    @property
    def _notes(self) -> dict[int, str]:
        if self._keys is None:
            return _NOTES
        return {**_NOTES, **dict.fromkeys(_HANG_UPS, _HANGS_UP_ON_KEYS)}

    def _key_problem(self, kind: int, value: int) -> AuthenticationError | None:
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == _DENIED:
            return AuthenticationError(
                f"{self._address} does not let this side's key in",
                hint="Put its public file (.key) into the server's client_keys_dir.",
            )
        mismatch = (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, _MECHANISM_MISMATCH)
        if (kind, value) != mismatch:
            return None
        if self._keys is None:
            return AuthenticationError(
                f"{self._address} wants keys, and this side has none",
                hint="Set secret_key_file and server_public_key.",
            )
        return AuthenticationError(
            f"{self._address} has no keys, and this side does not speak to it without",
            hint="Set secret_key_file and client_keys_dir at the server.",
        )

    def _lost(self) -> None:
        # What the peer said before it hung up may still be unread.
        while self._dealer is not None:
            frames = try_receive(self._dealer)
            if frames is None:
                break
            self._take(frames)
        if self._link is not None:
            self._link.apply(self._link.core.lost(lost_text(self._options)))

    # -- LinkOwner ---------------------------------------------------------

    def link_send(self, link: Link, frame: bytes) -> str:
        """Send one frame to the listener."""
        if self._dealer is None:
            return "not connected"
        problem = try_send(self._dealer, [frame])
        # ZMQ has already given up on a listener that refused this side's keys, and
        # the event that says so is about to be read: it has the better words.
        return problem if self._heard_zmq or self._keys is None else ""

    async def link_job(self, link: Link, job: Action) -> None:
        """Call the delegate's coroutine for ``job``."""
        core = link.core
        assert isinstance(core, DialerProtocol) and core.conn_id is not None
        if isinstance(job, AcceptWanted):
            accept = await self._delegate.accept(job.offer)
            link.owned = True
            link.apply(core.accept(accept))
        elif isinstance(job, FenceWanted):
            await self._delegate.fence(core.conn_id, job.reason)
            link.apply(core.fenced())
        else:
            raise InternalError(f"control: no job for a dialer: {job!r}")

    def link_event(self, link: Link, event: Action) -> None:
        """Tell the delegate, or whoever awaits ``connect``."""
        conn_id = link.core.conn_id
        if isinstance(event, Closed):
            self._settle(link, event.reason)
            return
        assert conn_id is not None
        if isinstance(event, Established):
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(event, FailedReceived):
            self._delegate.failed(conn_id, event.message)
        elif isinstance(event, CreditReceived):
            self._delegate.credit(conn_id, event.consumed_bytes, event.consumed_records)
        elif isinstance(event, RequestReceived):
            self._delegate.request(conn_id, event.message)
        elif isinstance(event, DrainReceived):
            self._delegate.drain(conn_id, event.reason)

    def _settle(self, link: Link, reason: CloseReason) -> None:
        _log.info("control: %s: %s", self._address, reason.text)
        if self._ready is None or self._ready.done():
            return
        if isinstance(link.failure, Exception):
            self._ready.set_exception(link.failure)
        else:
            self._ready.set_exception(end_error(self._address, reason, self._note))

    async def link_over(self, link: Link, reason: CloseReason) -> None:
        """Let the delegate release its end, if it made one, and close."""
        try:
            if link.owned:
                await self._delegate.closed(reason)
        finally:
            self._start_closing(reason.text)
