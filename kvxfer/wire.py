"""Control messages: their form, their limits, and bytes to messages and back.

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
from collections.abc import Hashable, Iterable
from enum import Enum
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from kvxfer.errors import ProtocolError, VersionMismatchError

__all__ = [
    "FEATURES",
    "FEATURE_DRAIN",
    "FEATURE_FLUSH",
    "FEATURE_REQUESTS",
    "FEATURE_SHARDS",
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
#: Feature bits that this release knows.
FEATURES = FEATURE_SHARDS | FEATURE_REQUESTS | FEATURE_DRAIN | FEATURE_FLUSH

MAX_MESSAGE_BYTES = 4 << 20
#: Blocks in one offer, all groups together.
MAX_OFFERED_BLOCKS = 1 << 19
#: What a writer may send along behind a request's data.
MAX_AUX_BYTES = 1 << 16
MAX_WINDOWS = 4096
_MULTICAST_PREFIX = 0xFF
_U64_END = 1 << 64
_HEADER_BYTES = len(MAGIC) + 2

# msgpack has no integer above 2**64 - 1 and msgspec no bound above 2**63 - 1, so
# ge=0 is the whole check for a u64.
U64 = Annotated[int, Meta(ge=0)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U24 = Annotated[int, Meta(ge=0, le=0xFF_FFFF)]
QPNumber = Annotated[int, Meta(ge=1, le=0xFF_FFFF)]
PathMTU = Annotated[int, Meta(ge=1, le=5)]
Version = Annotated[int, Meta(ge=1, le=0xFFFF)]
Layer = Annotated[int, Meta(ge=0, le=1023)]
Layers = Annotated[list[Layer], Meta(max_length=1024)]
BlockBytes = Annotated[int, Meta(ge=1, le=1 << 40)]
BlockCount = Annotated[int, Meta(ge=1, le=0x7FFF_FFFF)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Label = Annotated[str, Meta(max_length=128)]
Text = Annotated[str, Meta(max_length=8192)]
GID = Annotated[bytes, Meta(min_length=16, max_length=16)]
Incarnation = Annotated[bytes, Meta(min_length=16, max_length=16)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Token = Annotated[bytes, Meta(max_length=32)]
RequestId = Annotated[bytes, Meta(max_length=256)]
Generation = Annotated[int, Meta(ge=1)]
Generations = Annotated[list[Generation], Meta(max_length=65536)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
BlockIds = Annotated[bytes, Meta(max_length=4 * MAX_OFFERED_BLOCKS)]
VersionRange = tuple[Version, Version]
Role = Literal["initiator", "target"]
_Key = TypeVar("_Key", bound=Hashable)


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


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(f"invalid control message: {what}")


def _require_unique(keys: Iterable[_Key], what: str) -> None:
    seen: set[_Key] = set()
    for key in keys:
        _require(key not in seen, f"{what} {key!r} occurs twice")
        seen.add(key)


def _require_address(gid: bytes, lid: int) -> None:
    _require(any(gid) or 0 < lid < 0xC000, "neither a GID nor a unicast LID")
    _require(gid[0] != _MULTICAST_PREFIX, "a multicast GID")


def _require_range(base: int, length: int, what: str) -> None:
    _require(base + length <= _U64_END, f"{what} reaches beyond 64 bits")


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message. Unknown fields are ignored."""

    def check(self) -> None:
        """Check what one field's type cannot say; raise ProtocolError."""


class QPInfo(_Part, frozen=True, kw_only=True):
    """One queue pair as the peer needs it for RTR and RTS.

    Attributes:
      qp_num: 24 bit.
      psn: The first packet sequence number this side sends; random, 24 bit.
      gid: 16 bytes; zeros where only the LID counts.
      lid: The port's LID; 0 on Ethernet.
      mtu: ``enum ibv_mtu``, 1 (256 bytes) to 5 (4096 bytes).
      port_num: The port of the device, from 1.
      address: Where the software device listens, as a host; empty for the host
        of the control connection.
      token: What the software device's wire asks for: 32 bytes, or none.
      max_rd_atomic: READs this side takes at a time.
    """

    qp_num: QPNumber
    psn: U24
    gid: GID
    lid: U16 = 0
    mtu: PathMTU
    port_num: Annotated[int, Meta(ge=1, le=255)] = 1
    address: Annotated[str, Meta(max_length=255)] = ""
    token: Token = b""
    max_rd_atomic: Annotated[int, Meta(ge=0, le=255)] = 1

    def check(self) -> None:
        _require_address(self.gid, self.lid)
        _require(len(self.token) in (0, 32), "a token of other than 32 bytes")

    def __repr__(self) -> str:
        return (
            f"QPInfo(qp_num={self.qp_num:#x}, gid={self.gid.hex()}, lid={self.lid}, "
            f"mtu={self.mtu}, port_num={self.port_num}, address={self.address!r})"
        )


class GIDCandidate(_Part, frozen=True, kw_only=True):
    """A GID that one side could use; ``prefix_len`` 0: its network is not known."""

    gid: GID
    gid_type: Label = ""
    prefix_len: Annotated[int, Meta(ge=0, le=128)] = 0

    def check(self) -> None:
        mapped = self.gid.startswith(bytes(10) + b"\xff\xff")
        _require(any(self.gid), "an empty GID")
        _require(self.gid[0] != _MULTICAST_PREFIX, "a multicast GID")
        _require(self.prefix_len <= (32 if mapped else 128), "a prefix too long")


class DeviceCandidate(_Part, frozen=True, kw_only=True):
    """A port of a device that one side could use.

    ``gid`` is the one that is preferred; ``gids`` has all that would do, best first,
    and may be empty.

    ``kind`` is ``"soft"``, ``"rdma"`` or ``"null"`` and ``link_layer``
    ``"ethernet"`` or ``"infiniband"`` in this version. Other values are a newer
    release's and pass the decoder; whoever chooses skips what it does not know.
    """

    name: Name
    kind: Name
    link_layer: Name
    gid: GID
    gid_type: Label = ""
    lid: U16 = 0
    mtu: PathMTU
    gids: Annotated[list[GIDCandidate], Meta(max_length=64)] = []

    def check(self) -> None:
        _require_address(self.gid, self.lid)
        for gid in self.gids:
            gid.check()

    @property
    def known(self) -> bool:
        """Whether this version knows what to do with such a device."""
        return self.kind in ("soft", "rdma", "null") and self.link_layer in (
            "ethernet",
            "infiniband",
        )


class PlaneGeometry(_Part, frozen=True, kw_only=True):
    """The shape of one plane, the same in each layer it covers. No addresses."""

    name: Name
    layers: Layers
    block_bytes: BlockBytes
    dtype: Label
    n_blocks: BlockCount

    def check(self) -> None:
        _require(bool(self.layers), f"plane {self.name!r} covers no layer")
        _require_unique(self.layers, f"plane {self.name!r}: layer")
        _require_range(0, self.block_bytes * self.n_blocks, f"plane {self.name!r}")


class GroupGeometry(_Part, frozen=True, kw_only=True):
    """The planes that share one set of block ids."""

    name: Name
    planes: Annotated[list[PlaneGeometry], Meta(min_length=1, max_length=4096)]

    def check(self) -> None:
        for plane in self.planes:
            plane.check()


Geometry = Annotated[list[GroupGeometry], Meta(max_length=64)]


def _check_geometry(groups: list[GroupGeometry]) -> None:
    for group in groups:
        group.check()
    _require_unique((group.name for group in groups), "group")
    # A plane may occur several times, once for each run of layers that differs.
    count = sum(len(plane.layers) for group in groups for plane in group.planes)
    _require(count <= MAX_WINDOWS, f"{count} planes times layers, at most 4096")
    _require_unique(
        (
            (group.name, plane.name, layer)
            for group in groups
            for plane in group.planes
            for layer in plane.layers
        ),
        "group, plane, layer",
    )


class Shard(_Part, frozen=True, kw_only=True):
    """A run of bytes that the dialer writes inside every block of a plane.

    ``local`` is the dialer's side, ``remote`` the listener's.
    """

    group: Name
    plane: Name
    local_offset: U64
    remote_offset: U64
    length: BlockBytes
    local_block_bytes: BlockBytes
    remote_block_bytes: BlockBytes

    def check(self) -> None:
        what = f"shard of {self.group}/{self.plane}"
        _require(
            self.local_offset + self.length <= self.local_block_bytes
            and self.remote_offset + self.length <= self.remote_block_bytes,
            f"{what} leaves its block",
        )


class Window(_Part, frozen=True, kw_only=True):
    """Where one layer of one plane may be written: ``n_blocks`` blocks from
    ``base``, each ``block_stride`` bytes after the one before."""

    group: Name
    plane: Name
    layer: Layer
    base: U64
    block_stride: BlockBytes
    block_bytes: BlockBytes
    n_blocks: BlockCount
    rkey: U32

    def check(self) -> None:
        what = f"window {self.group}/{self.plane}/{self.layer}"
        _require(self.block_stride >= self.block_bytes, f"{what}: blocks overlap")
        length = self.block_stride * (self.n_blocks - 1) + self.block_bytes
        _require_range(self.base, length, what)

    def __repr__(self) -> str:
        return (
            f"Window({self.group}/{self.plane}/{self.layer}, "
            f"n_blocks={self.n_blocks}, block_bytes={self.block_bytes})"
        )


class NotifyRing(_Part, frozen=True, kw_only=True):
    """The target's descriptor ring: ``length`` bytes, ``receives`` posted."""

    address: U64
    length: Annotated[int, Meta(ge=1, le=1 << 32)]
    rkey: U32
    receives: Annotated[int, Meta(ge=1, le=1 << 20)]

    def check(self) -> None:
        _require_range(self.address, self.length, "notify ring")

    def __repr__(self) -> str:
        return f"NotifyRing(length={self.length}, receives={self.receives})"


class Endpoint(_Part, frozen=True, kw_only=True):
    """One side's QPs and, from the side whose memory is written, where to."""

    qps: Annotated[list[QPInfo], Meta(min_length=1, max_length=64)]
    windows: Annotated[list[Window], Meta(max_length=MAX_WINDOWS)] | None = None
    ring: NotifyRing | None = None

    def check(self) -> None:
        for qp in self.qps:
            qp.check()
        _require_unique(
            ((qp.gid.hex(), qp.lid, qp.port_num, qp.qp_num) for qp in self.qps), "QP"
        )
        for window in self.windows or ():
            window.check()
        _require_unique(
            ((w.group, w.plane, w.layer) for w in self.windows or ()), "window"
        )
        if self.ring is not None:
            self.ring.check()


class Hello(_Part, frozen=True, kw_only=True, tag="hello"):
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
      n_qps: QPs that the dialer would have; the listener offers so many or fewer.
    """

    incarnation: Incarnation
    versions: VersionRange
    features: U64 = 0
    role: Role
    agent: Label = ""
    geometry: Geometry
    devices: Annotated[list[DeviceCandidate], Meta(max_length=64)]
    nonce: Nonce
    shards: Annotated[list[Shard], Meta(max_length=4096)] = []
    invite: Annotated[bytes, Meta(max_length=16)] = b""
    n_qps: Annotated[int, Meta(ge=1, le=64)] = 1

    def check(self) -> None:
        _require(self.versions[0] <= self.versions[1], "an empty version range")
        _check_geometry(self.geometry)
        for device in self.devices:
            device.check()
        for shard in self.shards:
            shard.check()
        _require_unique((device.name for device in self.devices), "device")


class Offer(_Part, frozen=True, kw_only=True, tag="offer"):
    """Listener: what we agreed on, and my end of it.

    Attributes:
      conn_id: Random, names this connection in all that follows.
      version: The highest version that both speak.
      features: The bits that both know.
      device: The listener's device of the chosen pair.
      dialer_device: The name of the dialer's, out of its Hello.
      dialer_gid: The GID that the dialer's packets should leave from; empty where
        its preferred one will do.
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
    endpoint: Endpoint
    nonce: Nonce

    def check(self) -> None:
        _check_geometry(self.geometry)
        self.device.check()
        _require(len(self.dialer_gid) in (0, 16), "a GID of other than 16 bytes")
        _require(self.device.known, f"device of an unknown kind {self.device.kind!r}")
        self.endpoint.check()


class Accept(_Part, frozen=True, kw_only=True, tag="accept"):
    """Dialer: my end; my QPs are in RTS."""

    conn_id: U64
    endpoint: Endpoint

    def check(self) -> None:
        self.endpoint.check()


class Ready(_Part, frozen=True, kw_only=True, tag="ready"):
    """Listener: my QPs are in RTS too; from now on writes may be posted."""

    conn_id: U64


class Refuse(_Part, frozen=True, kw_only=True, tag="refuse"):
    """Listener: no, or no longer. ``code`` is for programs, see RefuseCode."""

    code: Name
    message: Text = ""
    detail: Text = ""


class Ping(_Part, frozen=True, kw_only=True, tag="ping"):
    """Are you there?"""

    seq: U64


class Pong(_Part, frozen=True, kw_only=True, tag="pong"):
    """I am."""

    seq: U64


class Credit(_Part, frozen=True, kw_only=True, tag="credit"):
    """Target: how much of the notify ring is consumed, counted from the start."""

    conn_id: U64
    consumed_bytes: U64
    consumed_records: U64


class Fence(_Part, frozen=True, kw_only=True, tag="fence"):
    """See to it that nothing of this connection lands any more, and say so."""

    conn_id: U64
    reason: Text = ""


class Fenced(_Part, frozen=True, kw_only=True, tag="fenced"):
    """Nothing of this connection lands any more."""

    conn_id: U64


class Failed(_Part, frozen=True, kw_only=True, tag="failed"):
    """These layers of this request will not come."""

    conn_id: U64
    request_id: RequestId = b""
    layers: Layers
    reason: Text = ""


class Bye(_Part, frozen=True, kw_only=True, tag="bye"):
    """This connection is over."""

    conn_id: U64
    reason: Text = ""


class Drain(_Part, frozen=True, kw_only=True, tag="drain"):
    """Listener: I am about to leave; begin nothing new with me. FEATURE_DRAIN."""

    conn_id: U64
    reason: Text = ""


class Drained(_Part, frozen=True, kw_only=True, tag="drained"):
    """Dialer: nothing that I began on my own account is under way. FEATURE_DRAIN."""

    conn_id: U64


class Invite(_Part, frozen=True, kw_only=True, tag="invite"):
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
        _require(bool(self.port) != bool(self.path), "neither or both of port and path")
        _require(not self.path or not self.host, "a path on another host")


class OfferedGroup(_Part, frozen=True, kw_only=True):
    """The blocks of one group that a request may be written to.

    Attributes:
      first_block: The position in the request of the first of them.
      block_ids: The target's ids as little-endian uint32, one a position.
      announced: Layers that are complete already: they are not sent again.
    """

    group: Name
    first_block: Annotated[int, Meta(ge=0, le=0x7FFF_FFFF)] = 0
    block_ids: BlockIds
    announced: Layers = []

    def check(self) -> None:
        _require(len(self.block_ids) % 4 == 0, "block ids of other than 4 bytes")


class OfferBlocks(_Part, frozen=True, kw_only=True, tag="offer-blocks"):
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
        _require_unique((group.group for group in self.groups), "group")
        count = sum(len(group.block_ids) // 4 for group in self.groups)
        _require(
            count <= MAX_OFFERED_BLOCKS,
            f"{count} blocks in one offer, at most {MAX_OFFERED_BLOCKS}",
        )


class Resume(_Part, frozen=True, kw_only=True, tag="resume"):
    """Initiator on a new connection: what became of these offers?

    Of each that does not stand any more the target says how it ended.
    """

    conn_id: U64
    generations: Generations


class FinalLayer(_Part, frozen=True, kw_only=True):
    """A layer that is complete though no record says so: it had none at the end."""

    group: Name
    layer: Layer
    total: U64
    digest: U64 = 0


class LayersFinal(_Part, frozen=True, kw_only=True, tag="layers-final"):
    """Initiator: these layers are complete with so many records each."""

    conn_id: U64
    generation: Generation
    layers: Annotated[list[FinalLayer], Meta(max_length=MAX_WINDOWS)]


class Finish(_Part, frozen=True, kw_only=True, tag="finish"):
    """Initiator: that was all, ``total`` records on this connection.

    It may overtake them, so the target counts.
    """

    conn_id: U64
    generation: Generation
    total: U64
    aux: Annotated[bytes, Meta(max_length=MAX_AUX_BYTES)] = b""


class GroupLayers(_Part, frozen=True, kw_only=True):
    """Some layers of a group."""

    group: Name
    layers: Layers


class Announced(_Part, frozen=True, kw_only=True, tag="announced"):
    """Target: these layers are in place; with ``complete`` the whole request is."""

    conn_id: U64
    generation: Generation
    layers: Annotated[list[GroupLayers], Meta(max_length=64)] = []
    complete: bool = False


class Abort(_Part, frozen=True, kw_only=True, tag="abort"):
    """Target: this offer does not stand any more. Ended answers it.

    ``code`` is for programs, see ``kvxfer.requests``; newer peers may send others.
    """

    conn_id: U64
    generation: Generation
    code: Name
    reason: Text = ""
    layer: Layer | None = None
    bytes_done: U64 = 0


class Ended(_Part, frozen=True, kw_only=True, tag="ended"):
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
