"""The parts that control messages are made of: fields, their limits, their checks.

Pure. What a field's type cannot say, a part's :meth:`Part.check` does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from kvxfer.errors import ProtocolError

__all__ = [
    "BlockBytes",
    "BlockCount",
    "BlockIds",
    "DeviceCandidate",
    "Endpoint",
    "FinalLayer",
    "GID",
    "GIDCandidate",
    "Generation",
    "Generations",
    "Geometry",
    "GroupGeometry",
    "GroupLayers",
    "Incarnation",
    "Label",
    "Layer",
    "Layers",
    "MAX_OFFERED_BLOCKS",
    "MAX_WINDOWS",
    "Name",
    "Nonce",
    "NotifyRing",
    "OfferedGroup",
    "Part",
    "PathMTU",
    "PlaneGeometry",
    "QPInfo",
    "QPNumber",
    "RequestId",
    "Role",
    "Seconds",
    "Shard",
    "Text",
    "Token",
    "U16",
    "U24",
    "U32",
    "U64",
    "Version",
    "VersionRange",
    "Window",
    "check_geometry",
    "require",
    "require_address",
    "require_range",
    "require_unique",
]

#: Blocks in one offer, all groups together.
MAX_OFFERED_BLOCKS = 1 << 19
MAX_WINDOWS = 4096
MAX_SLICES = 4096
_MULTICAST_PREFIX = 0xFF
_U64_END = 1 << 64

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


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(f"invalid control message: {what}")


def require_unique(keys: Iterable[_Key], what: str) -> None:
    seen: set[_Key] = set()
    for key in keys:
        require(key not in seen, f"{what} {key!r} occurs twice")
        seen.add(key)


def require_address(gid: bytes, lid: int) -> None:
    require(any(gid) or 0 < lid < 0xC000, "neither a GID nor a unicast LID")
    require(gid[0] != _MULTICAST_PREFIX, "a multicast GID")


def require_range(base: int, length: int, what: str) -> None:
    require(base + length <= _U64_END, f"{what} reaches beyond 64 bits")


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a message. Unknown fields are ignored."""

    def check(self) -> None:
        """Check what one field's type cannot say; raise ProtocolError."""


class QPInfo(Part, frozen=True, kw_only=True):
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
        require_address(self.gid, self.lid)
        require(len(self.token) in (0, 32), "a token of other than 32 bytes")

    def __repr__(self) -> str:
        return (
            f"QPInfo(qp_num={self.qp_num:#x}, gid={self.gid.hex()}, lid={self.lid}, "
            f"mtu={self.mtu}, port_num={self.port_num}, address={self.address!r})"
        )


class GIDCandidate(Part, frozen=True, kw_only=True):
    """A GID that one side could use; ``prefix_len`` 0: its network is not known."""

    gid: GID
    gid_type: Label = ""
    prefix_len: Annotated[int, Meta(ge=0, le=128)] = 0

    def check(self) -> None:
        mapped = self.gid.startswith(bytes(10) + b"\xff\xff")
        require(any(self.gid), "an empty GID")
        require(self.gid[0] != _MULTICAST_PREFIX, "a multicast GID")
        require(self.prefix_len <= (32 if mapped else 128), "a prefix too long")


class DeviceCandidate(Part, frozen=True, kw_only=True):
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
        require_address(self.gid, self.lid)
        for gid in self.gids:
            gid.check()

    @property
    def known(self) -> bool:
        """Whether this version knows what to do with such a device."""
        return self.kind in ("soft", "rdma", "null") and self.link_layer in (
            "ethernet",
            "infiniband",
        )


class PlaneGeometry(Part, frozen=True, kw_only=True):
    """The shape of one plane, the same in each layer it covers. No addresses."""

    name: Name
    layers: Layers
    block_bytes: BlockBytes
    dtype: Label
    n_blocks: BlockCount

    def check(self) -> None:
        require(bool(self.layers), f"plane {self.name!r} covers no layer")
        require_unique(self.layers, f"plane {self.name!r}: layer")
        require_range(0, self.block_bytes * self.n_blocks, f"plane {self.name!r}")


class GroupGeometry(Part, frozen=True, kw_only=True):
    """The planes that share one set of block ids."""

    name: Name
    planes: Annotated[list[PlaneGeometry], Meta(min_length=1, max_length=4096)]

    def check(self) -> None:
        for plane in self.planes:
            plane.check()


Geometry = Annotated[list[GroupGeometry], Meta(max_length=64)]


def check_geometry(groups: list[GroupGeometry]) -> None:
    for group in groups:
        group.check()
    require_unique((group.name for group in groups), "group")
    # A plane may occur several times, once for each run of layers that differs.
    count = sum(len(plane.layers) for group in groups for plane in group.planes)
    require(count <= MAX_WINDOWS, f"{count} planes times layers, at most 4096")
    require_unique(
        (
            (group.name, plane.name, layer)
            for group in groups
            for plane in group.planes
            for layer in plane.layers
        ),
        "group, plane, layer",
    )


class Shard(Part, frozen=True, kw_only=True):
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
        require(
            self.local_offset + self.length <= self.local_block_bytes
            and self.remote_offset + self.length <= self.remote_block_bytes,
            f"{what} leaves its block",
        )


class Window(Part, frozen=True, kw_only=True):
    """Where one layer of one plane may be written: ``n_blocks`` blocks from
    ``base``, each ``block_stride`` bytes after the one before.

    ``rkey`` is for all of them; or, under FEATURE_SLICES, for ``slice_blocks``, and
    each of ``more_rkeys`` for so many more.
    """

    group: Name
    plane: Name
    layer: Layer
    base: U64
    block_stride: BlockBytes
    block_bytes: BlockBytes
    n_blocks: BlockCount
    rkey: U32
    more_rkeys: Annotated[list[U32], Meta(max_length=MAX_SLICES)] = msgspec.field(
        default_factory=list
    )
    slice_blocks: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0

    def check(self) -> None:
        what = f"window {self.group}/{self.plane}/{self.layer}"
        n = -(-self.n_blocks // self.slice_blocks) if self.slice_blocks else 1
        require(n == 1 + len(self.more_rkeys), f"{what}: not a key for each slice")
        require(self.block_stride >= self.block_bytes, f"{what}: blocks overlap")
        length = self.block_stride * (self.n_blocks - 1) + self.block_bytes
        require_range(self.base, length, what)

    def __repr__(self) -> str:
        return (
            f"Window({self.group}/{self.plane}/{self.layer}, "
            f"n_blocks={self.n_blocks}, block_bytes={self.block_bytes})"
        )


class NotifyRing(Part, frozen=True, kw_only=True):
    """The target's descriptor ring: ``length`` bytes, ``receives`` posted."""

    address: U64
    length: Annotated[int, Meta(ge=1, le=1 << 32)]
    rkey: U32
    receives: Annotated[int, Meta(ge=1, le=1 << 20)]

    def check(self) -> None:
        require_range(self.address, self.length, "notify ring")

    def __repr__(self) -> str:
        return f"NotifyRing(length={self.length}, receives={self.receives})"


class Endpoint(Part, frozen=True, kw_only=True):
    """One side's QPs and, from the side whose memory is written, where to."""

    qps: Annotated[list[QPInfo], Meta(min_length=1, max_length=64)]
    windows: Annotated[list[Window], Meta(max_length=MAX_WINDOWS)] | None = None
    ring: NotifyRing | None = None

    def check(self) -> None:
        for qp in self.qps:
            qp.check()
        require_unique(
            ((qp.gid.hex(), qp.lid, qp.port_num, qp.qp_num) for qp in self.qps), "QP"
        )
        for window in self.windows or ():
            window.check()
        require_unique(
            ((w.group, w.plane, w.layer) for w in self.windows or ()), "window"
        )
        if self.ring is not None:
            self.ring.check()


class OfferedGroup(Part, frozen=True, kw_only=True):
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
        require(len(self.block_ids) % 4 == 0, "block ids of other than 4 bytes")


class FinalLayer(Part, frozen=True, kw_only=True):
    """A layer that is complete though no record says so: it had none at the end."""

    group: Name
    layer: Layer
    total: U64
    digest: U64 = 0


class GroupLayers(Part, frozen=True, kw_only=True):
    """Some layers of a group."""

    group: Name
    layers: Layers
