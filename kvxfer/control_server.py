"""The listening half of the control plane: one ROUTER, many connections.

The only reader hands each message to its connection and never waits for one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import warnings
from dataclasses import dataclass

import zmq
import zmq.asyncio

from kvxfer import wire
from kvxfer.auth import Doorkeeper
from kvxfer.control_delegate import ListenerDelegate
from kvxfer.control_io import (
    LINGER_MS,
    Address,
    Sockets,
    bind,
    parse_address,
    resolve,
    try_send,
)
from kvxfer.control_link import (
    FRAMES_A_TURN,
    Link,
    lost_text,
    refuse_of,
    run_closing,
    timing,
)
from kvxfer.control_strangers import Strangers
from kvxfer.control_watch import MONITORED, LinkWatch
from kvxfer.curve import server_keys
from kvxfer.descriptors import REMEDY, shortage
from kvxfer.errors import (
    ClosedResourceError,
    InternalError,
    ProtocolError,
    UsageError,
    VersionMismatchError,
)
from kvxfer.options import Options
from kvxfer.protocol import (
    Action,
    CloseCause,
    Closed,
    CloseReason,
    ConfirmWanted,
    CreditReceived,
    DrainedReceived,
    Established,
    FailedReceived,
    FenceWanted,
    ListenerConnection,
    OfferWanted,
    RequestReceived,
)
from kvxfer.rates import Bucket, Buckets

__all__ = ["ControlServer", "ControlStatistics", "ListenerDelegate"]

_log = logging.getLogger("kvxfer.control")

_PLAIN = (
    "control: %s is reachable from other hosts, without keys: whoever reaches it may "
    "write to the cache. Set secret_key_file and client_keys_dir, or listen on "
    "127.0.0.1 or ipc://; see docs/security.md"
)


@dataclass(frozen=True, slots=True)
class ControlStatistics:
    """Counts of a :class:`ControlServer` since its start.

    Attributes:
      connections: Established now.
      pending: Handshakes under way now.
      accepted: Handshakes completed.
      refused: Hellos refused.
      garbage: Frames that were no valid message.
      strangers: Messages of peers without a connection.
      floods: Connections that were ended since they said too much.
      denied: Links that were not let in, since their key is not known.
      links: TCP or Unix connections taken.
      links_ready: Of them, those that got through ZMQ's handshake and its keys.
      links_open: Of them, those that are open now.
    """

    connections: int
    pending: int
    accepted: int
    refused: int
    garbage: int
    strangers: int
    floods: int
    denied: int
    links: int
    links_ready: int
    links_open: int


class ControlServer:
    """Listen for dialers and do the listener's half of every handshake.

    Args:
      delegate: Makes and releases this side's ends.
      host: Address, host name, or ``ipc://path``.
      port: Port; 0 takes a free one. Ignored for ``ipc://``.
      incarnation: 16 random bytes, made once in this process.
      versions: Lowest and highest protocol version to speak.
      features: Feature bits to offer.
      options: ``ping_interval``, ``ping_timeout``, ``loop_timeout``,
        ``connect_timeout`` (a handshake's deadline here), the limits ``max_*`` and
        the keys are used.
    """

    # For __del__ of an object whose __init__ refused its arguments.
    _reader: asyncio.Task[None] | None = None
    _closing: asyncio.Task[None] | None = None

    def __init__(
        self,
        delegate: ListenerDelegate,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        incarnation: bytes,
        versions: tuple[int, int] = wire.VERSIONS,
        features: int = wire.FEATURES,
        options: Options | None = None,
    ) -> None:
        self._delegate = delegate
        self._address = _listen_address(host, port)
        self._incarnation = incarnation
        self._versions = versions
        self._features = features
        self._options = options if options is not None else Options()
        self._timing = timing(self._options, self._options.connect_timeout)
        self._sockets: Sockets | None = None
        self._router: zmq.asyncio.Socket | None = None
        self._doorkeeper: Doorkeeper | None = None
        self._by_identity: dict[bytes, Link] = {}
        self._by_conn_id: dict[int, Link] = {}
        self._identities: dict[Link, bytes] = {}
        self._pending: set[Link] = set()
        self._doors = LinkWatch()
        self._hellos = Buckets(self._options.max_handshake_rate)
        self._others = Strangers(self._options.max_handshake_rate)
        self._draining = ""
        self._monitor: zmq.asyncio.Socket | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._accepted = self._refused = self._garbage = 0
        self._floods_ended = 0

    # -- life --------------------------------------------------------------

    async def start(self) -> None:
        """Bind and begin to answer.

        Raises:
          AddressInUseError: Somebody listens there already.
          ControlError: The address cannot be bound.
          OptionError: The keys are not as they must be. Nothing is left open.
          ClosedResourceError: It was closed.
          UsageError: It runs already.
        """
        if self._closing is not None:
            raise ClosedResourceError("the control server is closed")
        if self._sockets is not None:
            raise UsageError("the control server runs already")
        keys = server_keys(self._options)
        self._sockets = Sockets(self._options, private=keys is not None)
        try:
            address = await resolve(self._address)
            if keys is not None and keys.clients is not None:
                self._doorkeeper = Doorkeeper(keys.clients)
                self._doorkeeper.start(self._sockets.socket(zmq.REP))
            router = self._sockets.socket(zmq.ROUTER)
            router.set(zmq.ROUTER_MANDATORY, 1)
            router.set(zmq.BACKLOG, 1024)
            self._monitor = self._sockets.monitor(router, MONITORED)
            self._address = bind(router, address, keys)
        except BaseException:
            sockets, self._sockets = self._sockets, None
            if self._doorkeeper is not None:
                await self._doorkeeper.close()
            await sockets.close()
            raise
        self._router = router
        loop = asyncio.get_running_loop()
        self._reader = loop.create_task(self._read(router))
        self._watcher = loop.create_task(self._watch(self._monitor))
        _log.info("control: listening on %s", self._address)
        if keys is None and not self._address.is_local:
            _log.warning(_PLAIN, self._address)

    async def __aenter__(self) -> ControlServer:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._reader is not None and self._closing is None:
            warnings.warn(
                f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self
            )

    def __repr__(self) -> str:
        return f"<ControlServer {self._address}, {len(self._by_conn_id)} connections>"

    @property
    def endpoint(self) -> str:
        """What to dial: ``host:port``, ``[ipv6]:port`` or ``ipc://path``."""
        return str(self._address)

    @property
    def port(self) -> int:
        """The port bound; 0 before ``start`` with port 0, and for ``ipc://``."""
        return self._address.port

    async def close(self, reason: str = "the server closed") -> None:
        """Say goodbye to every peer, release every end, stop listening.

        It always closes, twice is fine, and afterwards no task, thread or socket
        of it is left. A delegate call that takes longer than 5 s is cancelled.

        Cancellation:
          Running delegate calls are cancelled at once, the rest is done, and the
          cancellation goes on.
        """
        current = asyncio.current_task()
        if any(link.worker is current for link in self._identities):
            self._start_closing(reason)  # waiting here would wait for ourselves
            return
        await run_closing(lambda: self._start_closing(reason), self._hurry)

    def _start_closing(self, reason: str) -> asyncio.Task[None]:
        if self._closing is None:
            loop = asyncio.get_running_loop()
            self._closing = loop.create_task(self._close(reason))
        return self._closing

    def _hurry(self) -> None:
        for link in self._identities:
            link.cancel_job()

    async def _close(self, reason: str) -> None:
        links = list(self._identities)
        for link in links:
            link.apply(link.core.close(reason))
        if links:
            await asyncio.gather(*(link.wait_over() for link in links))
        for task in (self._reader, self._watcher):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._doorkeeper is not None:
            await self._doorkeeper.close()
        if self._sockets is not None:
            await self._sockets.close(linger_ms=LINGER_MS)

    # -- use ---------------------------------------------------------------

    @property
    def connections(self) -> list[int]:
        """The ``conn_id`` of every established connection; from any thread."""
        # Other threads look at copies: a loop here would meet what comes and goes.
        known = self._by_conn_id.copy()
        return [c for c, link in known.items() if link.core.is_established]

    def send_credit(
        self, conn_id: int, consumed_bytes: int, consumed_records: int
    ) -> bool:
        """Tell the initiator what was consumed; false if it is gone."""
        link = self._by_conn_id.get(conn_id)
        return link is not None and link.send_credit(consumed_bytes, consumed_records)

    def send_failed(
        self, conn_id: int, request_id: bytes, layers: list[int], reason: str
    ) -> bool:
        """Tell the peer which layers will not come; false if it is gone."""
        link = self._by_conn_id.get(conn_id)
        return link is not None and link.send_failed(request_id, layers, reason)

    def send_request(self, conn_id: int, message: wire.RequestMessage) -> bool:
        """Say something about a request; false if the peer is gone."""
        link = self._by_conn_id.get(conn_id)
        return link is not None and link.send_request(message)

    async def fence(self, conn_id: int, reason: str, *, timeout: float = 2.0) -> bool:
        """Ask the peer to let nothing land any more; true if it confirmed in time.

        Args:
          conn_id: The connection; an unknown one gives false.
          reason: For the peer's log.
          timeout: Seconds.
        """
        link = self._by_conn_id.get(conn_id)
        return link is not None and await link.fence(reason, timeout)

    def drain(self, reason: str) -> None:
        """Admit nobody any more, and tell the peers; what is under way goes on.

        Each peer answers by ``drained``, if its release knows how. Twice is fine.
        """
        if self._draining:
            return
        self._draining = reason
        for link in list(self._identities):
            if link.core.is_established:
                link.apply(link.core.drain(reason))

    def drop(self, conn_id: int, reason: str) -> bool:
        """Say goodbye; the delegate's ``closed`` follows. False if unknown."""
        link = self._by_conn_id.get(conn_id)
        if link is None:
            return False
        link.apply(link.core.close(reason))
        return True

    def statistics(self) -> ControlStatistics:
        """Return the counts of this moment; from any thread."""
        return ControlStatistics(
            connections=len(self.connections),
            pending=len(self._pending),
            accepted=self._accepted,
            refused=self._refused,
            garbage=self._garbage + self._others.garbage,
            strangers=self._others.strangers,
            floods=self._floods_ended,
            denied=0 if self._doorkeeper is None else self._doorkeeper.denied,
            links=self._doors.accepted,
            links_ready=self._doors.ready,
            links_open=self._doors.accepted - self._doors.closed,
        )

    # -- what comes in -----------------------------------------------------

    async def _read(self, router: zmq.asyncio.Socket) -> None:
        while True:
            for _ in range(FRAMES_A_TURN):
                frames = await router.recv_multipart(copy=False)
                try:
                    self._take(frames)
                except Exception:  # noqa: BLE001 - one peer must not stop the rest
                    _log.exception("control: a message could not be handled")
            # recv_multipart does not yield while messages are waiting.
            await asyncio.sleep(0)

    def _take(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        link = self._by_identity.get(identity)
        if link is None:
            self._take_other(identity, frames)
            return
        if self._floods(link):
            return
        try:
            message = _message(frames)
        except (ProtocolError, VersionMismatchError) as exc:
            self._garbage += 1
            link.apply(link.core.violation(str(exc)))
            return
        link.receive(message)
        core = link.core
        assert isinstance(core, ListenerConnection)
        if core.was_superseded and isinstance(message, wire.Hello):
            self._greet(identity, message, frames[1])

    def _take_other(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        """Take what is said without a connection."""
        client = self._client(frames[-1])
        if not self._others.reads(client, frames[-1].buffer, _now()):
            return
        answer: wire.Refuse | None
        try:
            message = _message(frames)
        except (ProtocolError, VersionMismatchError) as exc:
            answer = self._others.nonsense(client, exc, _now())
        else:
            if isinstance(message, wire.Hello):
                self._greet(identity, message, frames[1])
                return
            answer = self._others.says(client, message, _now())
        if answer is not None:
            self._answer(identity, answer)

    def _floods(self, link: Link) -> bool:
        """Put an end to a connection that says too much; its words are not read."""
        assert link.inbox is not None
        if link.inbox.take(asyncio.get_running_loop().time()):
            return False
        if not link.core.is_closed:
            self._floods_ended += 1
            limit = self._options.max_message_rate
            text = f"more than {limit} messages in a second (max_message_rate)"
            link.apply(link.core.violation(text))
        return True

    def _peer_address(self, frame: zmq.Frame) -> str:
        if self._address.is_ipc:
            return ""
        return str(frame.get("Peer-Address")).removeprefix("::ffff:")

    def _client(self, frame: zmq.Frame) -> str:
        """Return whose limits hold for it: a key's, or without keys an address's."""
        if self._doorkeeper is None:
            return self._peer_address(frame)
        return str(frame.get("User-Id"))

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            # Events are taken by _catch_up alone: one that waited in a future here
            # would be heard behind the Hello of a link that has its descriptor.
            await monitor.poll()
            self._catch_up()
            await asyncio.sleep(0)

    def _link_event(self, frames: list[bytes]) -> None:
        for link in self._doors.take(frames):
            link.apply(link.core.lost(lost_text(self._options)))

    def _catch_up(self) -> None:
        """Take what the monitor has to say now: a descriptor may have a new owner."""
        while self._monitor is not None:
            waiting = asyncio.ensure_future(
                self._monitor.recv_multipart(flags=zmq.NOBLOCK)
            )
            if not waiting.done() or waiting.exception() is not None:
                return
            self._link_event(waiting.result())

    def _too_many(self, client: str) -> str:
        """Return why one more connection with ``client`` is too many, or nothing."""
        options = self._options
        ours = [link for link in self._identities if link.client == client]
        pending = sum(link in self._pending for link in ours)
        if len(self._pending) >= options.max_handshakes:
            return f"{len(self._pending)} handshakes are pending (max_handshakes)"
        # Nobody fills the waiting room alone.
        if pending > options.max_handshakes // 2:
            return f"{pending} of {client}'s handshakes are pending"
        if len(self._identities) >= options.max_connections:
            return f"{len(self._identities)} connections (max_connections)"
        if len(ours) >= options.max_client_connections:
            return (
                f"{len(ours)} connections with {client or 'local processes'} "
                "(max_client_connections)"
            )
        if problem := shortage():
            self._doors.log_refused(f"{problem}. {REMEDY}")
            return f"the listener has no room: {problem}"
        return ""

    def _greet(self, identity: bytes, hello: wire.Hello, frame: zmq.Frame) -> None:
        if self._closing is not None or self._draining:
            text = self._draining or "the listener is closing"
            self._refuse(identity, wire.RefuseCode.CLOSING, text)
            return
        peer_address = self._peer_address(frame)
        client = self._client(frame)
        reason = self._too_many(client)
        if not self._hellos.take(client, _now()):
            limit = self._options.max_handshake_rate
            reason = f"more than {limit} handshakes in a second (max_handshake_rate)"
        if reason:
            text = f"{reason}; try again later"
            self._refuse(identity, wire.RefuseCode.BUSY, text)
            return
        self._catch_up()
        conn_id = secrets.randbits(64)
        while conn_id in self._by_conn_id:
            conn_id = secrets.randbits(64)
        core = ListenerConnection(
            conn_id,
            incarnation=self._incarnation,
            timing=self._timing,
            versions=self._versions,
            features=self._features,
        )
        link = Link(core, self, peer_address, client)
        link.inbox = Bucket(self._options.max_message_rate, _now())
        self._doors.add(frame.get(zmq.SRCFD), link)
        self._identities[link] = identity
        self._by_identity[identity] = link
        self._by_conn_id[conn_id] = link
        self._pending.add(link)
        link.worker.add_done_callback(lambda _: self._forget(link))
        link.receive(hello)

    def _refuse(self, identity: bytes, code: wire.RefuseCode, text: str) -> None:
        self._refused += 1
        self._answer(identity, wire.Refuse(code=code.value, message=text))

    def _answer(self, identity: bytes, message: wire.Message) -> None:
        if self._router is not None:
            problem = try_send(self._router, [identity, wire.encode(message)])
            if problem:
                _log.debug("control: answer not sent: %s", problem)

    def _forget(self, link: Link) -> None:
        self._doors.remove(link)
        self._identities.pop(link, None)
        self._pending.discard(link)

    # -- LinkOwner ---------------------------------------------------------

    def link_send(self, link: Link, frame: bytes) -> str:
        """Send one frame to the link's peer."""
        if self._router is None:
            return "not started"
        return try_send(self._router, [self._identities[link], frame])

    async def link_job(self, link: Link, job: Action) -> None:
        """Call the delegate's coroutine for ``job``."""
        core = link.core
        assert isinstance(core, ListenerConnection) and core.conn_id is not None
        if isinstance(job, FenceWanted):
            await self._delegate.fence(core.conn_id, job.reason)
            link.apply(core.fenced())
            return
        try:
            if isinstance(job, OfferWanted):
                parts = await self._delegate.offer(
                    job.hello, core.conn_id, link.peer_address
                )
                link.owned = True
                link.apply(core.offer(parts))
            elif isinstance(job, ConfirmWanted):
                await self._delegate.accept(core.conn_id, job.accept)
                link.apply(core.confirm(asyncio.get_running_loop().time()))
            else:
                raise InternalError(f"control: no job for a listener: {job!r}")
        except Exception as exc:
            # The dialer still waits, so it gets the reason and not just a Bye.
            link.apply(core.refuse(refuse_of(exc)))
            raise

    def link_event(self, link: Link, event: Action) -> None:
        """Tell the delegate what happened, and keep the books."""
        conn_id = link.core.conn_id
        assert conn_id is not None
        if isinstance(event, Established):
            self._pending.discard(link)
            self._accepted += 1
            self._delegate.established(conn_id)
            if self._draining:
                link.apply(link.core.drain(self._draining))
        elif isinstance(event, FailedReceived):
            self._delegate.failed(conn_id, event.message)
        elif isinstance(event, CreditReceived):
            self._delegate.credit(conn_id, event.consumed_bytes, event.consumed_records)
        elif isinstance(event, RequestReceived):
            self._delegate.request(conn_id, event.message)
        elif isinstance(event, DrainedReceived):
            self._delegate.drained(conn_id)
        elif isinstance(event, Closed):
            if event.reason.cause is CloseCause.REFUSED:
                self._refused += 1
            del self._by_conn_id[conn_id]
            del self._by_identity[self._identities[link]]
            _log.info(
                "control: %s %016x: %s", link.peer_address, conn_id, event.reason.text
            )

    async def link_over(self, link: Link, reason: CloseReason) -> None:
        """Let the delegate release its end, if it made one."""
        assert link.core.conn_id is not None
        if link.owned:
            await self._delegate.closed(link.core.conn_id, reason)


def _message(frames: list[zmq.Frame]) -> wire.Message:
    if len(frames) != 2:
        raise ProtocolError(f"a message of {len(frames) - 1} frames, not one")
    return wire.decode(frames[1].bytes)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _listen_address(host: str, port: int) -> Address:
    if host.startswith("ipc://"):
        return parse_address(host)
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} is not in 0..65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host:
        raise UsageError("an empty host; 0.0.0.0 or :: listen on every address")
    return Address(host=host, port=port)
