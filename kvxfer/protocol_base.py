"""What both sides of the control protocol share: actions, liveness, the end.

:mod:`kvxfer.protocol` has the two state machines and the picture of them. This
module has what they return (the actions), what limits them (:class:`Timing`) and
their common base: who is alive, who is fenced, how a connection ends.

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
from kvxfer.errors import InternalError, UsageError

__all__ = [
    "WHILE_ESTABLISHED",
    "AcceptWanted",
    "Action",
    "CloseCause",
    "CloseReason",
    "Closed",
    "ConfirmWanted",
    "Connection",
    "CreditReceived",
    "DrainReceived",
    "DrainedReceived",
    "Established",
    "FailedReceived",
    "FenceConfirmed",
    "FenceState",
    "FenceWanted",
    "OfferParts",
    "OfferWanted",
    "RequestReceived",
    "Send",
    "Timing",
]


@dataclass(frozen=True, slots=True)
class Timing:
    """The deadlines of one connection, in seconds.

    Attributes:
      ping_interval: Silence after which the peer is asked for a sign of life.
      ping_timeout: Silence after which it is taken for dead.
      handshake_timeout: From the Hello to Ready.
    """

    ping_interval: float
    ping_timeout: float
    handshake_timeout: float

    def __post_init__(self) -> None:
        for name in ("ping_interval", "ping_timeout", "handshake_timeout"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be positive and finite, not {value}")
        if self.ping_timeout <= self.ping_interval:
            raise UsageError(
                f"ping_timeout ({self.ping_timeout} s) must exceed "
                f"ping_interval ({self.ping_interval} s)"
            )


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
class RequestReceived:
    """The peer says something about a request."""

    message: wire.RequestMessage


@dataclass(frozen=True, slots=True)
class DrainReceived:
    """The peer is about to leave."""

    reason: str


@dataclass(frozen=True, slots=True)
class DrainedReceived:
    """The peer has nothing under way any more."""


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
    | DrainReceived
    | DrainedReceived
    | RequestReceived
    | Closed
)


@dataclass(frozen=True, slots=True)
class OfferParts:
    """What the listener's owner puts into an Offer; the rest is the protocol's."""

    geometry: list[wire.GroupGeometry] = field(repr=False)
    device: wire.DeviceCandidate
    dialer_device: str
    endpoint: wire.Endpoint = field(repr=False)
    dialer_gid: bytes = b""
    dialer_gid_type: str = ""


class Connection:
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

    def _leave(self, cause: CloseCause, text: str) -> list[Action]:
        farewell = self._farewell(text, cause)
        return self._end(CloseReason(cause, text), *farewell)

    def _farewell(self, text: str, cause: CloseCause) -> list[wire.Message]:
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
            # be unread. Ask, and give the answer one more interval.
            grace = self._timing.ping_timeout - self._timing.ping_interval
            self._last_heard = max(self._last_heard, now - grace)
        elif now >= self._last_heard + self._timing.ping_timeout:
            text = f"nothing heard for {now - self._last_heard:.1f} s"
            return self._leave(CloseCause.DEAD, text)
        last = max(self._last_heard, self._last_ping)
        if now < last + self._timing.ping_interval:
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
            self._last_heard + self._timing.ping_timeout,
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
        return self._leave(cause, text)

    def violation(self, text: str) -> list[Action]:
        """The peer sent bytes that are no message."""
        return [] if self.is_closed else self._violation(text)

    def _violation(self, text: str) -> list[Action]:
        text = f"protocol violation: {text}"
        return self._leave(CloseCause.PROTOCOL, text)

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

    def send_request(self, message: wire.RequestMessage) -> list[Action]:
        """Say something about a request; nothing is sent unless established.

        Raises:
          UsageError: The peer knows no requests.
        """
        if not self.is_established:
            return []
        if not self.features & wire.FEATURE_REQUESTS:
            raise UsageError("the peer's release knows no requests")
        return [Send(message)]

    @property
    def knows_drain(self) -> bool:
        """Whether the peer can be told that this side is about to leave."""
        return self.is_established and bool(self.features & wire.FEATURE_DRAIN)

    def drain(self, reason: str) -> list[Action]:
        """Tell the peer that this side is about to leave, if it knows what that is."""
        if not self.knows_drain:
            return []
        return [Send(wire.Drain(conn_id=self._id, reason=reason[:2000]))]

    def drained(self) -> list[Action]:
        """Tell the peer that nothing is under way any more."""
        if not self.knows_drain:
            return []
        return [Send(wire.Drained(conn_id=self._id))]

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

    def _on_drain(self, message: wire.Drain, now: float) -> list[Action]:
        if not self.knows_drain:
            return self._violation("Drain without its feature")
        return [DrainReceived(wire.printable(message.reason))]

    def _on_drained(self, message: wire.Drained, now: float) -> list[Action]:
        if not self.knows_drain:
            return self._violation("Drained without its feature")
        return [DrainedReceived()]

    def _on_request(self, message: wire.RequestMessage, now: float) -> list[Action]:
        theirs = _FROM_INITIATOR if self.role == "target" else _FROM_TARGET
        if not isinstance(message, theirs):
            return self._violation(f"{type(message).__name__} to a {self.role}")
        if not self.features & wire.FEATURE_REQUESTS:
            return self._violation(f"{type(message).__name__} without its feature")
        return [RequestReceived(message)]

    def _on_credit(self, message: wire.Credit, now: float) -> list[Action]:
        if self.role != "initiator":
            return self._violation("credit from an initiator")
        credit = (message.consumed_bytes, message.consumed_records)
        if credit[0] < self._credited[0] or credit[1] < self._credited[1]:
            return self._violation("credit that goes backwards")
        self._credited = credit
        return [CreditReceived(*credit)]


_FROM_TARGET = (wire.OfferBlocks, wire.Announced, wire.Abort)
_FROM_INITIATOR = (wire.Resume, wire.LayersFinal, wire.Finish, wire.Ended)

WHILE_ESTABLISHED: dict[type, str] = {
    wire.Ping: "_on_ping",
    wire.Pong: "_on_pong",
    wire.Fence: "_on_fence",
    wire.Fenced: "_on_fenced",
    wire.Failed: "_on_failed",
    wire.Credit: "_on_credit",
    wire.Bye: "_on_bye",
    wire.Drain: "_on_drain",
    wire.Drained: "_on_drained",
    **dict.fromkeys((*_FROM_TARGET, *_FROM_INITIATOR), "_on_request"),
}
