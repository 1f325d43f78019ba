"""Control messages: their form, and bytes to messages and back.

What they are made of, with its limits, is in :mod:`kvxfer.wire_parts`; all of it can
be had from here.

A frame is the magic ``KVXF``, the protocol version (two bytes, big-endian) and
one msgpack map. Nothing here does I/O, and no bytes of a peer get further than
:func:`decode` unless every number in them is within its limits.

How the format may grow: fields may be added with a default, since unknown ones
are ignored; messages may be added under a feature bit; anything else takes a new
version. :class:`Hello` and :class:`Refuse` travel in the form of version 1 for
ever, so that any two releases can at least tell why they cannot talk.

rkeys and tokens are capabilities. No ``repr`` shows them, so no log does either.
"""

from __future__ import annotations

import secrets
from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from kvxfer.errors import ProtocolError, VersionMismatchError
from kvxfer.wire_parts import (
    MAX_OFFERED_BLOCKS,
    MAX_WINDOWS,
    U16,
    U64,
    DeviceCandidate,
    Endpoint,
    FinalLayer,
    Generation,
    Generations,
    Geometry,
    GIDCandidate,
    GroupGeometry,
    GroupLayers,
    Incarnation,
    Label,
    Layer,
    Layers,
    Name,
    Nonce,
    NotifyRing,
    OfferedGroup,
    Part,
    PlaneGeometry,
    QPInfo,
    RequestId,
    Role,
    Seconds,
    Shard,
    Text,
    Version,
    VersionRange,
    Window,
    check_geometry,
    require,
    require_unique,
)

__all__ = [
    "FEATURES",
    "FEATURE_DRAIN",
    "FEATURE_FLUSH",
    "FEATURE_REQUESTS",
    "FEATURE_SHARDS",
    "FEATURE_SLICES",
    "FEATURE_WIRES",
    "HANDSHAKE_VERSION",
    "MAGIC",
    "MAX_AUX_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_OFFERED_BLOCKS",
    "MAX_WINDOWS",
    "VERSIONS",
    "Abort",
    "Accept",
    "Announced",
    "Bye",
    "Credit",
    "DeviceCandidate",
    "Ended",
    "Drain",
    "Drained",
    "Endpoint",
    "Failed",
    "Fence",
    "Fenced",
    "FinalLayer",
    "Finish",
    "GIDCandidate",
    "GroupGeometry",
    "GroupLayers",
    "Hello",
    "Invite",
    "LayersFinal",
    "Message",
    "NotifyRing",
    "Offer",
    "OfferBlocks",
    "OfferedGroup",
    "Ping",
    "PlaneGeometry",
    "Pong",
    "QPInfo",
    "Ready",
    "Refuse",
    "RefuseCode",
    "RequestMessage",
    "Resume",
    "Role",
    "Shard",
    "Window",
    "common_version",
    "decode",
    "encode",
    "new_nonce",
    "printable",
]

MAGIC = b"KVXF"
HANDSHAKE_VERSION = 1
#: Lowest and highest protocol version that this release speaks.
VERSIONS: tuple[int, int] = (1, 1)
#: Feature bit: parts of blocks may be written, see :class:`Shard`.
FEATURE_SHARDS = 1 << 0
#: Feature bit: requests, whose blocks are offered by the side that is written to.
FEATURE_REQUESTS = 1 << 1
#: Feature bit: Drain and Drained.
FEATURE_DRAIN = 1 << 2
#: Feature bit: the dialer reads some bytes of what it wrote, to have all in place.
FEATURE_FLUSH = 1 << 3
#: Feature bit: the dialer knows windows that have several keys.
FEATURE_SLICES = 1 << 4
#: Feature bit: on the software device there are twice as many QPs, for two wires.
FEATURE_WIRES = 1 << 5
#: Feature bits that this release knows.
FEATURES = (
    FEATURE_SHARDS
    | FEATURE_REQUESTS
    | FEATURE_DRAIN
    | FEATURE_FLUSH
    | FEATURE_SLICES
    | FEATURE_WIRES
)

MAX_MESSAGE_BYTES = 4 << 20
#: What a writer may send along behind a request's data.
MAX_AUX_BYTES = 1 << 16
_HEADER_BYTES = len(MAGIC) + 2


class RefuseCode(str, Enum):
    """Why a listener refuses, in one word; newer peers may send others."""

    REFUSED = "refused"
    VERSION = "version"
    GEOMETRY = "geometry"
    DEVICE = "device"
    PROTOCOL = "protocol"
    BUSY = "busy"
    TIMEOUT = "timeout"
    CLOSING = "closing"
    UNKNOWN_CONNECTION = "unknown-connection"
    INTERNAL = "internal"


class Hello(Part, frozen=True, kw_only=True, tag="hello"):
    """Dialer: who I am, what I speak, what I have.

    Attributes:
      incarnation: Random at the start of the process; another one is another life.
      versions: Lowest and highest protocol version spoken.
      features: Feature bits known.
      role: What the dialer is; the listener is the other.
      agent: The library's version, for logs.
      nonce: Random for each connection; the offer returns it.
      shards: The parts of blocks that will be written; none: whole blocks.
      invite: What the listener's Invite said, or nothing for who comes unasked.
      n_qps: QPs that the dialer would have; the listener offers so many or fewer, of
        each of two wires under FEATURE_WIRES.
    """

    incarnation: Incarnation
    versions: VersionRange
    features: U64 = 0
    role: Role
    agent: Label = ""
    geometry: Geometry
    devices: Annotated[list[DeviceCandidate], Meta(max_length=64)]
    nonce: Nonce
    shards: Annotated[list[Shard], Meta(max_length=4096)] = msgspec.field(
        default_factory=list
    )
    invite: Annotated[bytes, Meta(max_length=16)] = b""
    n_qps: Annotated[int, Meta(ge=1, le=64)] = 1

    def check(self) -> None:
        require(self.versions[0] <= self.versions[1], "an empty version range")
        check_geometry(self.geometry)
        for device in self.devices:
            device.check()
        for shard in self.shards:
            shard.check()
        require_unique((device.name for device in self.devices), "device")


class Offer(Part, frozen=True, kw_only=True, tag="offer"):
    """Listener: what we agreed on, and my end of it.

    Attributes:
      conn_id: Random, names this connection in all that follows.
      version: The highest version that both speak.
      features: The bits that both know.
      device: The listener's device of the chosen pair.
      dialer_device: The name of the dialer's, out of its Hello.
      dialer_gid: The GID that the dialer's packets should leave from; empty where
        its preferred one will do.
      dialer_gid_type: Its type; empty where that is not said, as by older releases.
      nonce: The Hello's.
    """

    conn_id: U64
    incarnation: Incarnation
    version: Version
    features: U64 = 0
    geometry: Geometry
    device: DeviceCandidate
    dialer_device: Name
    dialer_gid: Annotated[bytes, Meta(max_length=16)] = b""
    dialer_gid_type: Label = ""
    endpoint: Endpoint
    nonce: Nonce

    def check(self) -> None:
        check_geometry(self.geometry)
        self.device.check()
        require(len(self.dialer_gid) in (0, 16), "a GID of other than 16 bytes")
        require(self.device.known, f"device of an unknown kind {self.device.kind!r}")
        self.endpoint.check()


class Accept(Part, frozen=True, kw_only=True, tag="accept"):
    """Dialer: my end; my QPs are in RTS."""

    conn_id: U64
    endpoint: Endpoint

    def check(self) -> None:
        self.endpoint.check()


class Ready(Part, frozen=True, kw_only=True, tag="ready"):
    """Listener: my QPs are in RTS too; from now on writes may be posted."""

    conn_id: U64


class Refuse(Part, frozen=True, kw_only=True, tag="refuse"):
    """Listener: no, or no longer. ``code`` is for programs, see RefuseCode."""

    code: Name
    message: Text = ""
    detail: Text = ""


class Ping(Part, frozen=True, kw_only=True, tag="ping"):
    """Are you there?"""

    seq: U64


class Pong(Part, frozen=True, kw_only=True, tag="pong"):
    """I am."""

    seq: U64


class Credit(Part, frozen=True, kw_only=True, tag="credit"):
    """Target: how much of the notify ring is consumed, counted from the start."""

    conn_id: U64
    consumed_bytes: U64
    consumed_records: U64


class Fence(Part, frozen=True, kw_only=True, tag="fence"):
    """See to it that nothing of this connection lands any more, and say so."""

    conn_id: U64
    reason: Text = ""


class Fenced(Part, frozen=True, kw_only=True, tag="fenced"):
    """Nothing of this connection lands any more."""

    conn_id: U64


class Failed(Part, frozen=True, kw_only=True, tag="failed"):
    """These layers of this request will not come."""

    conn_id: U64
    request_id: RequestId = b""
    layers: Layers
    reason: Text = ""


class Bye(Part, frozen=True, kw_only=True, tag="bye"):
    """This connection is over."""

    conn_id: U64
    reason: Text = ""


class Drain(Part, frozen=True, kw_only=True, tag="drain"):
    """Listener: I am about to leave; begin nothing new with me. FEATURE_DRAIN."""

    conn_id: U64
    reason: Text = ""


class Drained(Part, frozen=True, kw_only=True, tag="drained"):
    """Dialer: nothing that I began on my own account is under way. FEATURE_DRAIN."""

    conn_id: U64


class Invite(Part, frozen=True, kw_only=True, tag="invite"):
    """Target to a prefill side that listens: dial me, I have blocks to offer.

    The only message outside of a connection; it is sent again until the connection
    is there. Its form is that of version 1 for ever, like Hello's.

    Attributes:
      invite: Random, 16 bytes: the Hello that follows it names it.
      host: Where to dial; empty for where this message comes from.
      port: The port there; 0 with a ``path``.
      path: Path of a Unix socket, on the same host.
    """

    incarnation: Incarnation
    invite: Nonce
    host: Annotated[str, Meta(max_length=255)] = ""
    port: U16 = 0
    path: Annotated[str, Meta(max_length=255)] = ""
    agent: Label = ""

    def check(self) -> None:
        require(bool(self.port) != bool(self.path), "neither or both of port and path")
        require(not self.path or not self.host, "a path on another host")


class OfferBlocks(Part, frozen=True, kw_only=True, tag="offer-blocks"):
    """Target: these blocks are for this request, write them.

    Attributes:
      generation: Random, names this offer in all that follows, records included.
      lease: Seconds that the offer stands from now on.
      checksum: Whether layers are to carry a digest.
    """

    conn_id: U64
    request_id: Annotated[bytes, Meta(min_length=1, max_length=256)]
    generation: Generation
    groups: Annotated[list[OfferedGroup], Meta(min_length=1, max_length=64)]
    lease: Seconds
    checksum: bool = False

    def check(self) -> None:
        for group in self.groups:
            group.check()
        require_unique((group.group for group in self.groups), "group")
        count = sum(len(group.block_ids) // 4 for group in self.groups)
        require(
            count <= MAX_OFFERED_BLOCKS,
            f"{count} blocks in one offer, at most {MAX_OFFERED_BLOCKS}",
        )


class Resume(Part, frozen=True, kw_only=True, tag="resume"):
    """Initiator on a new connection: what became of these offers?

    Of each that does not stand any more the target says how it ended.
    """

    conn_id: U64
    generations: Generations


class LayersFinal(Part, frozen=True, kw_only=True, tag="layers-final"):
    """Initiator: these layers are complete with so many records each."""

    conn_id: U64
    generation: Generation
    layers: Annotated[list[FinalLayer], Meta(max_length=MAX_WINDOWS)]


class Finish(Part, frozen=True, kw_only=True, tag="finish"):
    """Initiator: that was all, ``total`` records on this connection.

    It may overtake them, so the target counts.
    """

    conn_id: U64
    generation: Generation
    total: U64
    aux: Annotated[bytes, Meta(max_length=MAX_AUX_BYTES)] = b""


class Announced(Part, frozen=True, kw_only=True, tag="announced"):
    """Target: these layers are in place; with ``complete`` the whole request is."""

    conn_id: U64
    generation: Generation
    layers: Annotated[list[GroupLayers], Meta(max_length=64)] = msgspec.field(
        default_factory=list
    )
    complete: bool = False


class Abort(Part, frozen=True, kw_only=True, tag="abort"):
    """Target: this offer does not stand any more. Ended answers it.

    ``code`` is for programs, see ``kvxfer.requests``; newer peers may send others.
    """

    conn_id: U64
    generation: Generation
    code: Name
    reason: Text = ""
    layer: Layer | None = None
    bytes_done: U64 = 0


class Ended(Part, frozen=True, kw_only=True, tag="ended"):
    """Initiator: nothing of this offer is in flight any more, and nothing will be.

    All that was written on this connection was acknowledged, which is not yet to be
    in place: it is when ``records`` records of the offer have been taken.
    """

    conn_id: U64
    generation: Generation
    code: Name
    reason: Text = ""
    layer: Layer | None = None
    bytes_done: U64 = 0
    records: U64 = 0


#: What travels under FEATURE_REQUESTS: from the target, from the initiator.
RequestMessage = OfferBlocks | Announced | Abort | Resume | LayersFinal | Finish | Ended

Message = (
    Hello
    | Offer
    | Accept
    | Ready
    | Refuse
    | Ping
    | Pong
    | Credit
    | Fence
    | Fenced
    | Failed
    | Bye
    | Drain
    | Drained
    | Invite
    | OfferBlocks
    | Resume
    | LayersFinal
    | Finish
    | Announced
    | Abort
    | Ended
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message, *, version: int = HANDSHAKE_VERSION) -> bytes:
    """Make the frame of ``message``.

    The frame is decoded again before it is returned: what the other side would
    refuse is found here, where the culprit's traceback is.

    Args:
      message: Any message.
      version: The version agreed on. Hello, Refuse and Invite ignore it.

    Raises:
      ProtocolError: ``message`` breaks a limit. Nothing is kept.
    """
    if isinstance(message, (Hello, Refuse, Invite)):
        version = HANDSHAKE_VERSION
    try:
        body = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ProtocolError(f"cannot encode {type(message).__name__}: {exc}") from exc
    frame = MAGIC + version.to_bytes(2, "big") + body
    decode(frame, versions=(version, version))
    return frame


def decode(frame: bytes, *, versions: tuple[int, int] = VERSIONS) -> Message:
    """Turn the bytes of a peer into a message, all limits checked.

    Args:
      frame: One frame, whatever it holds.
      versions: Lowest and highest version that the caller understands.

    Raises:
      VersionMismatchError: It is a kvxfer frame of another version.
      ProtocolError: It is anything else but a valid message. No other exception
        leaves this function, and nothing of ``frame`` is kept.
    """
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"control message of {len(frame)} bytes; the limit is {MAX_MESSAGE_BYTES}"
        )
    if len(frame) < _HEADER_BYTES or frame[: len(MAGIC)] != MAGIC:
        raise ProtocolError("not a kvxfer control message")
    version = int.from_bytes(frame[len(MAGIC) : _HEADER_BYTES], "big")
    if version != HANDSHAKE_VERSION and not versions[0] <= version <= versions[1]:
        raise VersionMismatchError(
            f"control message of protocol version {version}; "
            f"this side speaks {versions[0]} to {versions[1]}"
        )
    try:
        message = _decoder.decode(memoryview(frame)[_HEADER_BYTES:])
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as exc:
        # UnicodeDecodeError would carry the whole frame in its attributes.
        raise ProtocolError(f"invalid control message: {printable(str(exc))}") from None
    if version == HANDSHAKE_VERSION < versions[0] and not isinstance(
        message, (Hello, Refuse, Invite)
    ):
        raise VersionMismatchError(
            f"{type(message).__name__} of protocol version {version}; "
            f"this side speaks {versions[0]} to {versions[1]}"
        )
    message.check()
    return message


def common_version(
    ours: tuple[int, int], theirs: tuple[int, int], *, peer: str = "the peer"
) -> int:
    """Return the highest version in both ranges.

    Raises:
      VersionMismatchError: There is none; the message has both ranges.
    """
    version = min(ours[1], theirs[1])
    if version < max(ours[0], theirs[0]):
        raise VersionMismatchError(
            f"no common protocol version: this side speaks {ours[0]} to {ours[1]}, "
            f"{peer} {theirs[0]} to {theirs[1]}",
            hint="Upgrade the older side.",
        )
    return version


def new_nonce() -> bytes:
    """Return 16 random bytes: a nonce, or a process's incarnation."""
    return secrets.token_bytes(16)


def printable(text: str, limit: int = 2000) -> str:
    """Return a peer's text fit for a log: no control characters, not endless."""
    clean = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return clean if len(clean) <= limit else clean[:limit] + "..."
