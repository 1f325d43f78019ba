"""The control protocol as two state machines without sockets, clock or tasks.

:class:`DialerProtocol` and :class:`ListenerConnection` take decoded messages and
the time and return actions: a message to send, a piece of work for the owner, or
the news that the connection is over. Who dials and who writes are two questions;
the role (initiator or target) is data here, not a class::

    dialer                    listener
    IDLE                      NEW
      start()      -- Hello -->
    HELLO_SENT                OFFERING     OfferWanted: make QPs (INIT)
                   <-- Offer --   offer()
    ACCEPTING                 OFFERED
      AcceptWanted: QPs to RTS
      accept()     -- Accept -->
    ACCEPT_SENT               CONFIRMING   ConfirmWanted: QPs to RTS
                   <-- Ready --   confirm()
    ESTABLISHED               ESTABLISHED
    CLOSED                    CLOSED       from any state, for ever

Every message is in one of three classes: legal in the state, foreign (it names
another connection; ignored and counted), or a violation, which ends the
connection. A violation never raises: a peer's bytes are data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from kvxfer import wire
from kvxfer.errors import InternalError, UsageError, VersionMismatchError

__all__ = [
    "AcceptWanted",
    "Action",
    "CloseCause",
    "CloseReason",
    "Closed",
    "ConfirmWanted",
    "CreditReceived",
    "DialerProtocol",
    "DialerState",
    "Established",
    "FailedReceived",
    "FenceConfirmed",
    "FenceState",
    "FenceWanted",
    "ListenerConnection",
    "ListenerState",
    "OfferParts",
    "OfferWanted",
    "Send",
    "Timing",
]


@dataclass(frozen=True, slots=True)
class Timing:
    """The deadlines of one connection, in seconds.

    Attributes:
      ping_interval: Silence after which the peer is asked for a sign of life.
      dead_after: Silence after which it is taken for dead.
      handshake_timeout: From the Hello to Ready.
    """

    ping_interval: float = 1.0
    dead_after: float = 5.0
    handshake_timeout: float = 10.0

    def __post_init__(self) -> None:
        for name in ("ping_interval", "dead_after", "handshake_timeout"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be positive and finite, not {value}")
        if self.dead_after <= self.ping_interval:
            raise UsageError(
                f"dead_after ({self.dead_after} s) must exceed "
                f"ping_interval ({self.ping_interval} s)"
            )


class DialerState(Enum):
    """Where the dialing side is."""

    IDLE = "idle"
    HELLO_SENT = "hello sent"
    ACCEPTING = "accepting"
    ACCEPT_SENT = "accept sent"
    ESTABLISHED = "established"
    CLOSED = "closed"


class ListenerState(Enum):
    """Where the listening side is, a connection."""

    NEW = "new"
    OFFERING = "offering"
    OFFERED = "offered"
    CONFIRMING = "confirming"
    ESTABLISHED = "established"
    CLOSED = "closed"


class FenceState(Enum):
    """How far one direction's fence is."""

    OPEN = "open"
    ASKED = "asked"
    DONE = "done"


class CloseCause(Enum):
    """Why a connection ended, for programs."""

    LOCAL = "closed here"
    BYE = "closed by the peer"
    REFUSED = "refused"
    TIMEOUT = "handshake deadline"
    DEAD = "silence"
    LOST = "link lost"
    PROTOCOL = "protocol violation"
    SUPERSEDED = "another incarnation"
    FAILED = "failed here"


@dataclass(frozen=True, slots=True)
class CloseReason:
    """Why a connection ended. ``str()`` gives the text for people."""

    cause: CloseCause
    text: str
    refuse: wire.Refuse | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Send:
    """Send this message, encoded in the connection's ``version``."""

    message: wire.Message


@dataclass(frozen=True, slots=True)
class OfferWanted:
    """Make this side's end, then call ``offer()`` or ``refuse()``."""

    hello: wire.Hello


@dataclass(frozen=True, slots=True)
class AcceptWanted:
    """Bring this side's QPs to RTS, then call ``accept()``."""

    offer: wire.Offer


@dataclass(frozen=True, slots=True)
class ConfirmWanted:
    """Bring this side's QPs to RTS, then call ``confirm()``."""

    accept: wire.Accept


@dataclass(frozen=True, slots=True)
class Established:
    """Both sides are in RTS."""


@dataclass(frozen=True, slots=True)
class FenceWanted:
    """Take the QPs out of RTS, then call ``fenced()``."""

    reason: str


@dataclass(frozen=True, slots=True)
class FenceConfirmed:
    """The peer did what ``request_fence()`` asked for."""


@dataclass(frozen=True, slots=True)
class FailedReceived:
    """The peer gave up these layers of this request."""

    message: wire.Failed


@dataclass(frozen=True, slots=True)
class CreditReceived:
    """The peer consumed this much of its ring, counted from the start."""

    consumed_bytes: int
    consumed_records: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over; it comes once, as the last of a list."""

    reason: CloseReason


Action = (
    Send
    | OfferWanted
    | AcceptWanted
    | ConfirmWanted
    | Established
    | FenceWanted
    | FenceConfirmed
    | FailedReceived
    | CreditReceived
    | Closed
)


@dataclass(frozen=True, slots=True)
class OfferParts:
    """What the listener's owner puts into an Offer; the rest is the protocol's."""

    geometry: list[wire.GroupGeometry] = field(repr=False)
    device: wire.DeviceCandidate
    dialer_device: str
    endpoint: wire.Endpoint = field(repr=False)


def _other_role(role: wire.Role) -> wire.Role:
    return "target" if role == "initiator" else "initiator"


def _endpoint_fault(endpoint: wire.Endpoint, role: wire.Role) -> str:
    """Return what is wrong with an endpoint of a peer in ``role``, or nothing."""
    if role == "initiator" and (endpoint.windows is not None or endpoint.ring):
        return "an initiator with windows or a ring of its own"
    if role == "target" and endpoint.windows is None:
        return "a target without windows"
    return ""


class _Connection:
    """What both sides have in common: liveness, fences, credits, the end.

    Attributes:
      state: Set by ``_set_state`` only.
      conn_id: The listener's choice; ``None`` at the dialer until the Offer.
      version: The protocol version to encode messages in.
      features: Feature bits both sides know.
      role: This side's role.
      ignored: Messages dropped since they name another connection, came after
        the end, or had lost their meaning.
    """

    _IDLE: ClassVar[Enum]
    _ESTABLISHED: ClassVar[Enum]
    _CLOSED: ClassVar[Enum]
    _MOVES: ClassVar[Mapping[Enum, frozenset[Enum]]]
    _LEGAL: ClassVar[Mapping[Enum, Mapping[type, str]]]

    def __init__(self, role: wire.Role, timing: Timing) -> None:
        self.state: Enum = self._IDLE
        self.conn_id: int | None = None
        self.version = wire.HANDSHAKE_VERSION
        self.features = 0
        self.role = role
        self.ignored = 0
        self.reason: CloseReason | None = None
        self.fence_out = FenceState.OPEN
        self.fence_in = FenceState.OPEN
        self._timing = timing
        self._handshake_end = math.inf
        self._last_heard = -math.inf
        self._last_ping = -math.inf
        self._ping_seq = 0
        self._credited = (0, 0)

    # -- the state ---------------------------------------------------------

    @property
    def is_established(self) -> bool:
        """Whether the handshake is done and the connection not over."""
        return self.state is self._ESTABLISHED

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over."""
        return self.state is self._CLOSED

    def _set_state(self, state: Enum) -> None:
        if state not in self._MOVES[self.state]:
            raise InternalError(f"control: no way from {self.state} to {state}")
        self.state = state

    def _expect(self, state: Enum) -> None:
        if self.state is not state:
            raise InternalError(f"control: in {self.state}, not in {state}")

    def _end(self, reason: CloseReason, *farewell: wire.Message) -> list[Action]:
        self._set_state(self._CLOSED)
        self.reason = reason
        return [*map(Send, farewell), Closed(reason)]

    def _farewell(self, text: str) -> list[wire.Message]:
        if self.conn_id is None:
            return []
        return [wire.Bye(conn_id=self.conn_id, reason=text[:2000])]

    # -- input -------------------------------------------------------------

    def receive(self, message: wire.Message, now: float) -> list[Action]:
        """Take one message of the peer at time ``now`` (seconds, monotonic)."""
        if self.is_closed or self._is_foreign(message):
            self.ignored += 1
            return []
        handler = self._LEGAL[self.state].get(type(message))
        if handler is None:
            return self._violation(f"{type(message).__name__} while {self.state.value}")
        self._last_heard = now
        method: Callable[[Any, float], list[Action]] = getattr(self, handler)
        return method(message, now)

    def _is_foreign(self, message: wire.Message) -> bool:
        conn_id = getattr(message, "conn_id", None)
        return (
            conn_id is not None
            and not isinstance(message, wire.Offer)
            and conn_id != self.conn_id
        )

    def tick(self, now: float) -> list[Action]:
        """Do what is due at ``now``. Harmless when nothing is."""
        if self.is_closed:
            return []
        if not self.is_established:
            if now < self._handshake_end:
                return []
            return self._handshake_expired()
        due = self.deadline
        if now < due:
            return []
        if now - due > self._timing.ping_interval:
            # We did not run for a while ourselves (a stopped process, a blocked
            # loop), so the silence proves nothing: what came meanwhile may still
            # be unread. Ask, and wait as long as for any other answer.
            grace = self._timing.dead_after - self._timing.ping_interval
            self._last_heard = max(self._last_heard, now - grace)
        elif now - self._last_heard >= self._timing.dead_after:
            text = f"nothing heard for {now - self._last_heard:.1f} s"
            return self._end(CloseReason(CloseCause.DEAD, text), *self._farewell(text))
        if now - max(self._last_heard, self._last_ping) < self._timing.ping_interval:
            return []
        self._last_ping = now
        self._ping_seq += 1
        return [Send(wire.Ping(seq=self._ping_seq))]

    @property
    def deadline(self) -> float:
        """When ``tick`` should be called next; infinity for never."""
        if self.is_closed or self.state is self._IDLE:
            return math.inf
        if not self.is_established:
            return self._handshake_end
        return min(
            self._last_heard + self._timing.dead_after,
            max(self._last_heard, self._last_ping) + self._timing.ping_interval,
        )

    def lost(self, text: str) -> list[Action]:
        """The link is gone; nothing can be sent any more."""
        if self.is_closed:
            return []
        return self._end(CloseReason(CloseCause.LOST, text))

    def close(self, text: str, *, cause: CloseCause = CloseCause.LOCAL) -> list[Action]:
        """End the connection from this side, in any state."""
        if self.is_closed:
            return []
        return self._end(CloseReason(cause, text), *self._farewell(text))

    def violation(self, text: str) -> list[Action]:
        """The peer sent bytes that are no message."""
        return [] if self.is_closed else self._violation(text)

    def _violation(self, text: str) -> list[Action]:
        text = f"protocol violation: {text}"
        return self._end(CloseReason(CloseCause.PROTOCOL, text), *self._farewell(text))

    def _handshake_expired(self) -> list[Action]:
        raise NotImplementedError

    # -- established -------------------------------------------------------

    def _establish(self, now: float) -> None:
        self._set_state(self._ESTABLISHED)
        self._last_heard = now

    def request_fence(self, reason: str) -> list[Action]:
        """Ask the peer to let nothing of this connection land any more.

        Asking again is harmless. Nothing is sent unless established.
        """
        if not self.is_established or self.fence_out is not FenceState.OPEN:
            return []
        self.fence_out = FenceState.ASKED
        return [Send(wire.Fence(conn_id=self._id, reason=reason[:2000]))]

    def fenced(self) -> list[Action]:
        """This side did what FenceWanted asked for."""
        if self.is_closed:
            return []
        if self.fence_in is FenceState.OPEN:
            raise InternalError("control: fenced, though nobody asked")
        self.fence_in = FenceState.DONE
        return [Send(wire.Fenced(conn_id=self._id))]

    def send_failed(
        self, request_id: bytes, layers: list[int], reason: str
    ) -> list[Action]:
        """Tell the peer that these layers will not come."""
        if not self.is_established:
            return []
        message = wire.Failed(
            conn_id=self._id,
            request_id=request_id,
            layers=layers,
            reason=reason[:2000],
        )
        return [Send(message)]

    def send_credit(self, consumed_bytes: int, consumed_records: int) -> list[Action]:
        """Tell the initiator how much of the ring is consumed."""
        if self.role != "target":
            raise InternalError("control: only a target gives credit")
        if not self.is_established:
            return []
        message = wire.Credit(
            conn_id=self._id,
            consumed_bytes=consumed_bytes,
            consumed_records=consumed_records,
        )
        return [Send(message)]

    @property
    def _id(self) -> int:
        if self.conn_id is None:
            raise InternalError("control: a connection without an id")
        return self.conn_id

    def _on_ping(self, message: wire.Ping, now: float) -> list[Action]:
        return [Send(wire.Pong(seq=message.seq))]

    def _on_pong(self, message: wire.Pong, now: float) -> list[Action]:
        return []

    def _on_bye(self, message: wire.Bye, now: float) -> list[Action]:
        text = wire.printable(message.reason) or "no reason given"
        return self._end(CloseReason(CloseCause.BYE, f"closed by the peer: {text}"))

    def _on_fence(self, message: wire.Fence, now: float) -> list[Action]:
        if self.fence_in is FenceState.DONE:
            return [Send(wire.Fenced(conn_id=self._id))]
        if self.fence_in is FenceState.ASKED:
            self.ignored += 1
            return []
        self.fence_in = FenceState.ASKED
        return [FenceWanted(wire.printable(message.reason))]

    def _on_fenced(self, message: wire.Fenced, now: float) -> list[Action]:
        if self.fence_out is not FenceState.ASKED:
            self.ignored += 1
            return []
        self.fence_out = FenceState.DONE
        return [FenceConfirmed()]

    def _on_failed(self, message: wire.Failed, now: float) -> list[Action]:
        return [FailedReceived(message)]

    def _on_credit(self, message: wire.Credit, now: float) -> list[Action]:
        if self.role != "initiator":
            return self._violation("credit from an initiator")
        credit = (message.consumed_bytes, message.consumed_records)
        if credit[0] < self._credited[0] or credit[1] < self._credited[1]:
            return self._violation("credit that goes backwards")
        self._credited = credit
        return [CreditReceived(*credit)]


_WHILE_ESTABLISHED: dict[type, str] = {
    wire.Ping: "_on_ping",
    wire.Pong: "_on_pong",
    wire.Fence: "_on_fence",
    wire.Fenced: "_on_fenced",
    wire.Failed: "_on_failed",
    wire.Credit: "_on_credit",
    wire.Bye: "_on_bye",
}


class DialerProtocol(_Connection):
    """The side that connects. One object is one connection's whole life.

    Args:
      hello: What this side will say first; its role is this side's role.
      timing: Deadlines; ``handshake_timeout`` is that of the connect.
    """

    _IDLE = DialerState.IDLE
    _ESTABLISHED = DialerState.ESTABLISHED
    _CLOSED = DialerState.CLOSED
    _MOVES: ClassVar[Mapping[Enum, frozenset[Enum]]] = {
        DialerState.IDLE: frozenset({DialerState.HELLO_SENT, DialerState.CLOSED}),
        DialerState.HELLO_SENT: frozenset({DialerState.ACCEPTING, DialerState.CLOSED}),
        DialerState.ACCEPTING: frozenset({DialerState.ACCEPT_SENT, DialerState.CLOSED}),
        DialerState.ACCEPT_SENT: frozenset(
            {DialerState.ESTABLISHED, DialerState.CLOSED}
        ),
        DialerState.ESTABLISHED: frozenset({DialerState.CLOSED}),
        DialerState.CLOSED: frozenset(),
    }
    _LEGAL: ClassVar[Mapping[Enum, Mapping[type, str]]] = {
        DialerState.IDLE: {},
        DialerState.HELLO_SENT: {wire.Offer: "_on_offer", wire.Refuse: "_on_refuse"},
        DialerState.ACCEPTING: {wire.Refuse: "_on_refuse", wire.Bye: "_on_bye"},
        DialerState.ACCEPT_SENT: {
            wire.Ready: "_on_ready",
            wire.Refuse: "_on_refuse",
            wire.Bye: "_on_bye",
        },
        DialerState.ESTABLISHED: {**_WHILE_ESTABLISHED, wire.Refuse: "_on_refuse"},
    }

    def __init__(self, hello: wire.Hello, timing: Timing) -> None:
        super().__init__(hello.role, timing)
        self.hello = hello
        self.offer: wire.Offer | None = None

    def start(self, now: float) -> list[Action]:
        """Begin: the Hello, and the handshake's deadline."""
        self._set_state(DialerState.HELLO_SENT)
        self._handshake_end = now + self._timing.handshake_timeout
        return [Send(self.hello)]

    def accept(self, accept: wire.Accept) -> list[Action]:
        """This side's QPs are in RTS; ``accept`` is its end.

        Does nothing if the connection ended meanwhile.

        Raises:
          UsageError: ``accept`` does not answer the offer. The state is as before.
        """
        if self.is_closed:
            return []
        self._expect(DialerState.ACCEPTING)
        fault = _endpoint_fault(accept.endpoint, self.role)
        if accept.conn_id != self.conn_id:
            fault = "an Accept for another connection"
        elif self.offer and len(accept.endpoint.qps) != len(self.offer.endpoint.qps):
            fault = "another number of QPs than was offered"
        if fault:
            raise UsageError(f"the Accept is not valid: {fault}")
        self._set_state(DialerState.ACCEPT_SENT)
        return [Send(accept)]

    def _on_offer(self, offer: wire.Offer, now: float) -> list[Action]:
        fault = self._offer_fault(offer)
        self.conn_id = offer.conn_id
        if fault:
            return self._violation(fault)
        self.version = offer.version
        self.features = offer.features
        self.offer = offer
        self._set_state(DialerState.ACCEPTING)
        return [AcceptWanted(offer)]

    def _offer_fault(self, offer: wire.Offer) -> str:
        low, high = self.hello.versions
        if offer.nonce != self.hello.nonce:
            return "the offer answers another Hello"
        if not low <= offer.version <= high:
            return f"version {offer.version} was offered, not {low} to {high}"
        if offer.features & ~self.hello.features:
            return "features were offered that nobody asked for"
        if offer.dialer_device not in {d.name for d in self.hello.devices}:
            return f"no device {wire.printable(offer.dialer_device)!r} here"
        return _endpoint_fault(offer.endpoint, _other_role(self.role))

    def _on_ready(self, message: wire.Ready, now: float) -> list[Action]:
        self._establish(now)
        return [Established()]

    def _on_refuse(self, refuse: wire.Refuse, now: float) -> list[Action]:
        text = f"refused by the peer: {wire.printable(refuse.message)}"
        return self._end(CloseReason(CloseCause.REFUSED, text, refuse))

    def _handshake_expired(self) -> list[Action]:
        awaited = {
            DialerState.HELLO_SENT: "no offer from the listener",
            DialerState.ACCEPTING: "this side's queue pairs were not ready",
            DialerState.ACCEPT_SENT: "no word that the listener is ready",
        }
        assert isinstance(self.state, DialerState)
        text = f"{awaited[self.state]} within {self._timing.handshake_timeout:g} s"
        return self._end(CloseReason(CloseCause.TIMEOUT, text), *self._farewell(text))


class ListenerConnection(_Connection):
    """The side that was connected to, one object a connection.

    Args:
      conn_id: Random, 64 bit, unique among the listener's connections.
      incarnation: This process's.
      versions: Lowest and highest protocol version spoken here.
      features: Feature bits known here.
      timing: Deadlines.
    """

    _IDLE = ListenerState.NEW
    _ESTABLISHED = ListenerState.ESTABLISHED
    _CLOSED = ListenerState.CLOSED
    _MOVES: ClassVar[Mapping[Enum, frozenset[Enum]]] = {
        ListenerState.NEW: frozenset({ListenerState.OFFERING, ListenerState.CLOSED}),
        ListenerState.OFFERING: frozenset(
            {ListenerState.OFFERED, ListenerState.CLOSED}
        ),
        ListenerState.OFFERED: frozenset(
            {ListenerState.CONFIRMING, ListenerState.CLOSED}
        ),
        ListenerState.CONFIRMING: frozenset(
            {ListenerState.ESTABLISHED, ListenerState.CLOSED}
        ),
        ListenerState.ESTABLISHED: frozenset({ListenerState.CLOSED}),
        ListenerState.CLOSED: frozenset(),
    }
    _LEGAL: ClassVar[Mapping[Enum, Mapping[type, str]]] = {
        ListenerState.NEW: {wire.Hello: "_on_hello"},
        ListenerState.OFFERING: {wire.Hello: "_on_second_hello", wire.Bye: "_on_bye"},
        ListenerState.OFFERED: {
            wire.Accept: "_on_accept",
            wire.Hello: "_on_second_hello",
            wire.Bye: "_on_bye",
        },
        ListenerState.CONFIRMING: {
            wire.Hello: "_on_second_hello",
            wire.Bye: "_on_bye",
        },
        ListenerState.ESTABLISHED: {
            **_WHILE_ESTABLISHED,
            wire.Hello: "_on_second_hello",
        },
    }

    def __init__(
        self,
        conn_id: int,
        *,
        incarnation: bytes,
        timing: Timing,
        versions: tuple[int, int] = wire.VERSIONS,
        features: int = wire.FEATURES,
    ) -> None:
        super().__init__("target", timing)
        self.conn_id = conn_id
        self.hello: wire.Hello | None = None
        self._incarnation = incarnation
        self._versions = versions
        self._features = features
        self._n_qps = 0

    @property
    def was_superseded(self) -> bool:
        """Whether a new life of the peer ended this connection."""
        return self.reason is not None and self.reason.cause is CloseCause.SUPERSEDED

    def offer(self, parts: OfferParts) -> list[Action]:
        """This side's end exists. Does nothing if the connection ended meanwhile.

        Raises:
          UsageError: ``parts`` are no valid offer. The state is as before.
        """
        if self.is_closed:
            return []
        self._expect(ListenerState.OFFERING)
        fault = _endpoint_fault(parts.endpoint, self.role)
        if self.hello is None:
            raise InternalError("control: an offer before the Hello")
        if parts.dialer_device not in {device.name for device in self.hello.devices}:
            fault = f"the dialer has no device {parts.dialer_device!r}"
        if fault:
            raise UsageError(f"the offer is not valid: {fault}")
        self._set_state(ListenerState.OFFERED)
        self._n_qps = len(parts.endpoint.qps)
        offer = wire.Offer(
            conn_id=self._id,
            incarnation=self._incarnation,
            version=self.version,
            features=self.features,
            geometry=parts.geometry,
            device=parts.device,
            dialer_device=parts.dialer_device,
            endpoint=parts.endpoint,
            nonce=self.hello.nonce,
        )
        return [Send(offer)]

    def confirm(self, now: float) -> list[Action]:
        """This side's QPs are in RTS. Does nothing if the connection ended."""
        if self.is_closed:
            return []
        self._expect(ListenerState.CONFIRMING)
        self._establish(now)
        return [Send(wire.Ready(conn_id=self._id)), Established()]

    def refuse(self, refuse: wire.Refuse) -> list[Action]:
        """Say no, in any state of the handshake."""
        if self.is_closed:
            return []
        reason = CloseReason(CloseCause.REFUSED, f"refused: {refuse.message}", refuse)
        return self._end(reason, refuse)

    def _farewell(self, text: str) -> list[wire.Message]:
        # Before it has the offer, the dialer does not know the connection's id.
        if self.state in (ListenerState.NEW, ListenerState.OFFERING):
            return [wire.Refuse(code=wire.RefuseCode.PROTOCOL.value, message=text)]
        return super()._farewell(text)

    def _on_hello(self, hello: wire.Hello, now: float) -> list[Action]:
        self.hello = hello
        self.role = _other_role(hello.role)
        try:
            self.version = wire.common_version(
                self._versions, hello.versions, peer="the dialer"
            )
        except VersionMismatchError as exc:
            code = wire.RefuseCode.VERSION.value
            return self.refuse(wire.Refuse(code=code, message=str(exc)))
        self.features = self._features & hello.features
        self._handshake_end = now + self._timing.handshake_timeout
        self._set_state(ListenerState.OFFERING)
        return [OfferWanted(hello)]

    def _on_second_hello(self, hello: wire.Hello, now: float) -> list[Action]:
        if self.hello is None or hello.incarnation == self.hello.incarnation:
            return self._violation("a second Hello")
        text = "the peer restarted: a Hello of another incarnation"
        return self._end(CloseReason(CloseCause.SUPERSEDED, text))

    def _on_accept(self, accept: wire.Accept, now: float) -> list[Action]:
        fault = _endpoint_fault(accept.endpoint, _other_role(self.role))
        if len(accept.endpoint.qps) != self._n_qps:
            fault = f"{len(accept.endpoint.qps)} QPs for the {self._n_qps} offered"
        if fault:
            return self._violation(fault)
        self._set_state(ListenerState.CONFIRMING)
        return [ConfirmWanted(accept)]

    def _handshake_expired(self) -> list[Action]:
        text = f"no handshake within {self._timing.handshake_timeout:g} s"
        refuse = wire.Refuse(code=wire.RefuseCode.TIMEOUT.value, message=text)
        return self._end(CloseReason(CloseCause.TIMEOUT, text, refuse), refuse)
