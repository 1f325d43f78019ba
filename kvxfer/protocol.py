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

The names of :mod:`kvxfer.protocol_base` that an owner needs are exported here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar

from kvxfer import wire
from kvxfer.errors import InternalError, UsageError, VersionMismatchError
from kvxfer.protocol_base import (
    WHILE_ESTABLISHED,
    AcceptWanted,
    Action,
    CloseCause,
    Closed,
    CloseReason,
    ConfirmWanted,
    Connection,
    CreditReceived,
    DrainedReceived,
    DrainReceived,
    Established,
    FailedReceived,
    FenceConfirmed,
    FenceState,
    FenceWanted,
    OfferParts,
    OfferWanted,
    RequestReceived,
    Send,
    Timing,
)

__all__ = [
    "AcceptWanted",
    "Action",
    "CloseCause",
    "CloseReason",
    "Closed",
    "ConfirmWanted",
    "CreditReceived",
    "DrainReceived",
    "DrainedReceived",
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
    "RequestReceived",
    "Send",
    "Timing",
]


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


# How a listener calls the end of a connection towards a dialer that has no offer.
_REFUSE_CODES = {
    CloseCause.LOCAL: wire.RefuseCode.CLOSING,
    CloseCause.PROTOCOL: wire.RefuseCode.PROTOCOL,
    CloseCause.FAILED: wire.RefuseCode.INTERNAL,
}


def _other_role(role: wire.Role) -> wire.Role:
    return "target" if role == "initiator" else "initiator"


def _endpoint_fault(endpoint: wire.Endpoint, role: wire.Role) -> str:
    """Return what is wrong with an endpoint of a peer in ``role``, or nothing."""
    if role == "initiator" and (endpoint.windows is not None or endpoint.ring):
        return "an initiator with windows or a ring of its own"
    if role == "target" and endpoint.windows is None:
        return "a target without windows"
    return ""


class DialerProtocol(Connection):
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
        DialerState.ESTABLISHED: {**WHILE_ESTABLISHED, wire.Refuse: "_on_refuse"},
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
        text = wire.printable(refuse.message)
        if self.is_established:
            # It no longer knows us: it restarted, or took us for dead.
            return self._end(CloseReason(CloseCause.LOST, text, refuse))
        reason = f"refused by the peer: {text}"
        return self._end(CloseReason(CloseCause.REFUSED, reason, refuse))

    def _handshake_expired(self) -> list[Action]:
        awaited = {
            DialerState.HELLO_SENT: "no offer from the listener",
            DialerState.ACCEPTING: "this side's queue pairs were not ready",
            DialerState.ACCEPT_SENT: "no word that the listener is ready",
        }
        assert isinstance(self.state, DialerState)
        # What is left of a deadline has many digits.
        seconds = round(self._timing.handshake_timeout, 3)
        text = f"{awaited[self.state]} within {seconds:g} s"
        return self._leave(CloseCause.TIMEOUT, text)


class ListenerConnection(Connection):
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
            **WHILE_ESTABLISHED,
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
            dialer_gid=parts.dialer_gid,
            dialer_gid_type=parts.dialer_gid_type,
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

    def _farewell(self, text: str, cause: CloseCause) -> list[wire.Message]:
        # Before it has the offer, the dialer does not know the connection's id.
        if self.state in (ListenerState.NEW, ListenerState.OFFERING):
            code = _REFUSE_CODES.get(cause, wire.RefuseCode.REFUSED)
            return [wire.Refuse(code=code.value, message=text)]
        return super()._farewell(text, cause)

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
