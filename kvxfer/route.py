"""From two caches to the table that an engine writes by. Pure; no I/O.

The local side is known by its layout, the remote side by what the handshake told:
its geometry and, for each plane of each layer, a window with base, stride and rkey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvxfer import wire
from kvxfer.errors import LayoutError, ProtocolError, VersionMismatchError
from kvxfer.layout import (
    Geometry,
    Group,
    GroupGeometry,
    PlaneGeometry,
    PlaneLayer,
    check_fit,
    describe,
    format_layers,
)
from kvxfer.regions import Keys
from kvxfer.sharding import Shard, check_shards

#: Gives the keys of the memory regions that hold a plane's layer.
KeysOf = Callable[[PlaneLayer], Keys]

# As kvxfer._engine.Row, Pair and Key, which this module must not import.
Key = int | tuple[int, Sequence[int]]
Pair = tuple[int, int, int, int, int, Key, Key]
Row = tuple[int, int, int, int, list[Pair]]


def geometry_to_wire(geometry: Geometry) -> list[wire.GroupGeometry]:
    """Put a geometry into messages."""
    return [
        wire.GroupGeometry(
            name=group.name,
            planes=[
                wire.PlaneGeometry(
                    name=plane.name,
                    layers=list(plane.layers),
                    block_bytes=plane.block_bytes,
                    dtype=plane.dtype,
                    n_blocks=plane.n_blocks,
                )
                for plane in group.planes
            ],
        )
        for group in geometry.groups
    ]


def geometry_from_wire(groups: Iterable[wire.GroupGeometry]) -> Geometry:
    """Take a geometry out of a message."""
    return Geometry(
        tuple(
            GroupGeometry(
                group.name,
                tuple(
                    PlaneGeometry(
                        plane.name,
                        tuple(plane.layers),
                        plane.block_bytes,
                        plane.dtype,
                        plane.n_blocks,
                    )
                    for plane in group.planes
                ),
            )
            for group in groups
        )
    )


def shards_to_wire(shards: Iterable[Shard]) -> list[wire.Shard]:
    """Put shards into a message."""
    return [
        wire.Shard(
            group=shard.group,
            plane=shard.plane,
            local_offset=shard.local_offset,
            remote_offset=shard.remote_offset,
            length=shard.length,
            local_block_bytes=shard.local_block_bytes,
            remote_block_bytes=shard.remote_block_bytes,
        )
        for shard in shards
    ]


def shards_from_wire(shards: Iterable[wire.Shard]) -> tuple[Shard, ...]:
    """Take shards out of a message."""
    return tuple(
        Shard(
            plane=shard.plane,
            local_offset=shard.local_offset,
            remote_offset=shard.remote_offset,
            length=shard.length,
            local_block_bytes=shard.local_block_bytes,
            remote_block_bytes=shard.remote_block_bytes,
            group=shard.group,
        )
        for shard in shards
    )


def windows(groups: Iterable[Group], rkeys_of: KeysOf) -> list[wire.Window]:
    """List what a peer may write: every plane of every layer."""
    return [
        wire.Window(
            group=group.name,
            plane=plane.name,
            layer=layer,
            base=place.base,
            block_stride=place.block_stride,
            block_bytes=place.block_bytes,
            n_blocks=place.n_blocks,
            rkey=keys[0],
            more_rkeys=list(keys[1:]),
            slice_blocks=blocks if len(keys) > 1 else 0,
        )
        for group in groups
        for plane in group.planes
        for layer, place in plane.layers.items()
        for blocks, keys in [rkeys_of(place)]
    ]


def check_whole(windows: Iterable[wire.Window], device: str) -> None:
    """Refuse what is in slices, to a writer that knows one key a plane's layer.

    Raises:
      VersionMismatchError: A window has several keys.
    """
    for window in windows:
        if window.more_rkeys:
            raise VersionMismatchError(
                f"layer {window.layer} of plane {window.plane!r} is registered on "
                f"{device} in {1 + len(window.more_rkeys)} slices of "
                f"{window.slice_blocks} blocks, and the writer's release knows one key "
                "a layer",
                hint="Take this release there as well, or here fewer blocks, or a "
                "larger region_bytes.",
            )


@dataclass(frozen=True)
class Route:
    """Everything that may be written at one peer.

    Attributes:
      rows: One a layer and group, as the engine takes them.
      index: ``(group, layer)`` to the row's position.
    """

    rows: list[Row]
    index: dict[tuple[str, int], int]

    def layers(self, group: str) -> list[int]:
        """List the layers of a group that both sides hold, ascending."""
        return sorted(layer for name, layer in self.index if name == group)

    def find(self, group: str, layers: Iterable[int]) -> list[tuple[int, int]]:
        """Look up ``(row, layer)`` for some layers of a group.

        Raises:
          LayoutError: A layer is not on both sides.
        """
        try:
            return [(self.index[group, layer], layer) for layer in layers]
        except KeyError as error:
            have = self.layers(group)
            if not have:
                names = ", ".join(sorted({name for name, _ in self.index}))
                raise LayoutError(
                    f"no group {group!r} on both sides; there are: {names}"
                ) from None
            raise LayoutError(
                f"layer {error.args[0][1]!r} is not held by both sides in group "
                f"{group!r}, which has layers {format_layers(have)}"
            ) from None


def build(
    groups: Iterable[Group],
    lkeys_of: KeysOf,
    remote: Geometry,
    remote_windows: Iterable[wire.Window],
    shards: Sequence[Shard] = (),
) -> Route:
    """Match the local cache with a peer's windows.

    Args:
      shards: The parts of blocks to be written; none: whole blocks.

    Raises:
      GeometryMismatchError: The caches do not fit, or the shards do not fit them.
      ProtocolError: The peer's windows are not those of its own geometry.
    """
    groups = tuple(groups)
    if shards:
        check_shards(describe(groups), remote, shards)
    else:
        check_fit(describe(groups), remote)
    by_place = {(w.group, w.layer, w.plane): w for w in remote_windows}
    remote_layers = {layer for layer, _, _ in remote.entries()}
    position = {group.name: i for i, group in enumerate(remote.groups)}
    rows: list[Row] = []
    index: dict[tuple[str, int], int] = {}
    for group in groups:
        parts = _by_plane(group, shards)
        for layer in group.layers:
            found = [
                (name, place, by_place.get((group.name, layer, name)))
                for name, place in group.rows(layer)
                if layer in remote_layers and name in parts
            ]
            if not found:
                continue
            pairs: list[Pair] = []
            n_local: list[int] = []
            n_remote: list[int] = []
            for name, place, window in found:
                if window is None or window.block_bytes != _wanted(place, parts[name]):
                    raise ProtocolError(
                        f"the peer gave no fitting window for plane {name!r} of layer "
                        f"{layer} in group {group.name!r}, which its geometry has"
                    )
                keys = (_key(lkeys_of(place)), _key(_rkeys(window)))
                pairs += _pairs(place, window, keys, parts[name])
                n_local.append(place.n_blocks)
                n_remote.append(window.n_blocks)
            index[group.name, layer] = len(rows)
            rows.append(
                (layer, position[group.name], min(n_local), min(n_remote), pairs)
            )
    return Route(rows, index)


def _by_plane(group: Group, shards: Sequence[Shard]) -> dict[str, list[Shard]]:
    """Sort the shards of a group; without any, all its planes are written whole."""
    if not shards:
        return {plane.name: [] for plane in group.planes}
    parts: dict[str, list[Shard]] = {}
    for shard in shards:
        if shard.group == group.name:
            parts.setdefault(shard.plane, []).append(shard)
    return parts


def _wanted(place: PlaneLayer, shards: list[Shard]) -> int:
    """Say how many bytes the peer's blocks must have."""
    return shards[0].remote_block_bytes if shards else place.block_bytes


def _rkeys(window: wire.Window) -> Keys:
    return Keys(
        window.slice_blocks or window.n_blocks, (window.rkey, *window.more_rkeys)
    )


def _key(keys: Keys) -> Key:
    """Put keys as the engine takes them."""
    return keys.keys[0] if len(keys.keys) == 1 else keys


def _pairs(
    place: PlaneLayer,
    window: wire.Window,
    keys: tuple[Key, Key],
    shards: list[Shard],
) -> list[Pair]:
    """Give what of one plane's blocks goes where: all of them, or their parts."""
    runs = [(s.local_offset, s.remote_offset, s.length) for s in shards]
    if not shards:
        runs = [(0, 0, place.block_bytes)]
    return [
        (
            place.base + local,
            place.block_stride,
            window.base + remote,
            window.block_stride,
            length,
            *keys,
        )
        for local, remote, length in runs
    ]
