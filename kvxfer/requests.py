"""What both ends of a streamed request have in common: names, states, endings. Pure.

:mod:`kvxfer.outbound` is the request at the side that writes, :mod:`kvxfer.inbound`
at the side that is written to.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvxfer.errors import (
    BrokenPeerError,
    ChecksumError,
    ClosedResourceError,
    KVXferError,
    ProtocolError,
    RequestAbortedError,
    RequestError,
    RequestExpiredError,
    RequestIncompleteError,
    RequestStalledError,
)

__all__ = [
    "End",
    "EndCode",
    "Key",
    "LayerState",
    "LayerTimes",
    "RequestState",
    "TicketState",
]

#: Group and layer.
Key = tuple[str, int]


class EndCode(str, enum.Enum):
    """Why a request ended before it was complete, in one word, as on the wire."""

    ABORTED = "aborted"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    LEASE = "lease"
    STALLED = "stalled"
    INCOMPLETE = "incomplete"
    CHECKSUM = "checksum"
    RULES = "rules"
    PEER_LOST = "peer-lost"
    CLOSED = "closed"
    UNKNOWN = "unknown"
    FAILED = "failed"


class RequestState(str, enum.Enum):
    """Where a request stands at the side that writes."""

    OPEN = "open"
    """No offer yet: what is ready waits."""
    STREAMING = "streaming"
    """Offered: what becomes ready is written."""
    FINISHING = "finishing"
    """Finished here; not all is confirmed by the other side yet."""
    ENDING = "ending"
    """Over, but writes of it are still in flight."""
    DONE = "done"
    """Every layer is visible to the other side, and so is the aux."""
    ABORTED = "aborted"
    """Given up by one of the sides; nothing of it is in flight."""
    FAILED = "failed"
    """It went wrong; nothing of it is in flight."""


class TicketState(str, enum.Enum):
    """Where a request stands at the side that is written to."""

    OFFERED = "offered"
    """Nothing has arrived yet."""
    ARRIVING = "arriving"
    """Something has."""
    ENDING = "ending"
    """Over, but bytes of it might still land."""
    DONE = "done"
    """All of it is in place."""
    ABORTED = "aborted"
    """Given up by one of the sides; no byte of it can land any more."""
    FAILED = "failed"
    """It went wrong; no byte of it can land any more."""


class LayerState(enum.IntEnum):
    """How far a layer is at the side that writes: the three are not the same."""

    WAITING = 0
    """Something of it has not been given to a device."""
    POSTED = 1
    """A device has all that is ready, and may still read the source blocks."""
    ACKNOWLEDGED = 2
    """The peer's device has taken every byte; the source blocks have been read."""
    VISIBLE = 3
    """The peer itself knows that the layer is complete, and may use it."""


@dataclass(frozen=True)
class LayerTimes:
    """When a layer got how far, by ``time.monotonic()``; None: not yet.

    Attributes:
      group: Its group.
      layer: Model layer.
      ready: When the last piece of it was said to be ready.
      posted: When the last piece of it was given to a device.
      acknowledged: When the device had acknowledged all that was posted.
      visible: When the other side said that it is complete.
    """

    group: str
    layer: int
    ready: float | None = None
    posted: float | None = None
    acknowledged: float | None = None
    visible: float | None = None


_ERRORS: dict[EndCode, type[KVXferError]] = {
    EndCode.ABORTED: RequestAbortedError,
    EndCode.CANCELLED: RequestAbortedError,
    EndCode.DEADLINE: RequestExpiredError,
    EndCode.LEASE: RequestExpiredError,
    EndCode.STALLED: RequestStalledError,
    EndCode.INCOMPLETE: RequestIncompleteError,
    EndCode.CHECKSUM: ChecksumError,
    EndCode.RULES: ProtocolError,
    EndCode.PEER_LOST: BrokenPeerError,
    EndCode.CLOSED: ClosedResourceError,
}
_GIVEN_UP = (EndCode.ABORTED, EndCode.CANCELLED)


@dataclass(frozen=True)
class End:
    """Why and how far: what both sides are told when a request ends badly.

    Attributes:
      code: Why, in one word.
      reason: The same for people.
      layer: The layer concerned, where there is one.
      bytes_done: Bytes of blocks that had been acknowledged (at the writer) or had
        arrived (at the other side).
      by_peer: Whether the other side ended it.
      cause: This side's exception behind it.
      block_ids: Blocks concerned, for a wrong digest.
    """

    code: EndCode
    reason: str
    layer: int | None = None
    bytes_done: int = 0
    by_peer: bool = False
    cause: BaseException | None = None
    block_ids: tuple[int, ...] = ()

    @property
    def given_up(self) -> bool:
        """Whether somebody wanted this end."""
        return self.code in _GIVEN_UP

    def error(self, request_id: str, peer: str) -> KVXferError:
        """Make the exception that says all this."""
        if self.by_peer and self.code is EndCode.CLOSED:
            kind: type[KVXferError] = BrokenPeerError
        else:
            kind = _ERRORS.get(self.code, RequestError)
        if isinstance(self.cause, KVXferError) and kind is RequestError:
            error: KVXferError = self.cause
        else:
            who = "the other side: " if self.by_peer else ""
            error = kind(f"{who}{self.reason}")
            error.__cause__ = self.cause
        if isinstance(error, RequestError):
            error.code = self.code.value
        if isinstance(error, ChecksumError):
            error.block_ids = self.block_ids
        error.bytes_done = self.bytes_done
        error.request_id = request_id
        error.peer = peer or None
        if error.layer is None:
            error.layer = self.layer
        return error


def end_code(word: str) -> EndCode:
    """Understand a peer's code; what is newer than this release is a failure."""
    try:
        return EndCode(word)
    except ValueError:
        return EndCode.FAILED
