"""Where the blocks of a cache lie. Pure arithmetic: no I/O, no clock.

A cache is made of groups. A group has its own block ids and one or more
planes (``k``, ``v``, a scale, ...). A plane covers some model layers, and for
each of them a :class:`PlaneLayer` says where block 0 is and how far apart the
blocks are. Block ``i`` of a layer is ``block_bytes`` bytes at
``base + i * block_stride``.

:class:`Geometry` is the same without addresses: what the two sides of a
connection tell each other and compare with :func:`fit`. Block ids and the byte
ranges that they stand for are in :mod:`kvxfer.blocks`, whose names are here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from kvxfer.blocks import Extent, Ids, PlanePair, as_ids, check_ids, extents
from kvxfer.errors import GeometryMismatchError, LayoutError

__all__ = [
    "Extent",
    "Geometry",
    "Group",
    "GroupGeometry",
    "Ids",
    "Mismatch",
    "Plane",
    "PlaneGeometry",
    "PlaneLayer",
    "PlanePair",
    "as_ids",
    "check_fit",
    "check_ids",
    "describe",
    "extents",
    "find_overlap",
    "fit",
    "format_layers",
    "normalize_dtype",
]

# What a control message can carry; beyond these a cache could not be announced.
MAX_BLOCKS = 0x7FFF_FFFF
MAX_BLOCK_BYTES = 1 << 40
MAX_LAYER = 1023
MAX_NAME_CHARS = 128
MAX_PLANE_LAYERS = 4096

_ADDRESS_END = 1 << 64

_DTYPE_NAMES = {
    "half": "f16",
    "float": "f32",
    "double": "f64",
    "bfloat16": "bf16",
    "byte": "u8",
    "char": "i8",
}
_DTYPE_STEMS = (("uint", "u"), ("int", "i"), ("float", "f"), ("complex", "c"))


def normalize_dtype(name: str) -> str:
    """Give the short tag for a dtype's name, the same whatever library named it.

    ``"torch.bfloat16"``, ``"bfloat16"`` and ``"bf16"`` all give ``"bf16"``.
    Names that are not known stay as they are: a tag is compared, never
    interpreted.

    Raises:
      LayoutError: The name is empty or too long.
    """
    tag = str(name).strip().lower().rpartition(".")[2]
    if not 0 < len(tag) <= MAX_NAME_CHARS:
        raise LayoutError(f"dtype {name!r} is not a name")
    if tag in _DTYPE_NAMES:
        return _DTYPE_NAMES[tag]
    for stem, short in _DTYPE_STEMS:
        if tag.startswith(stem) and tag[len(stem) : len(stem) + 1].isdigit():
            return short + tag[len(stem) :]
    return tag


def format_layers(layers: Iterable[int]) -> str:
    """Write layers as ranges: ``[0, 1, 2, 5]`` gives ``"0-2, 5"``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LayoutError(message)


def _check_name(kind: str, name: object) -> None:
    good = isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS
    _require(
        good and cast(str, name).isprintable(),
        f"{kind} name {name!r} must be 1 to {MAX_NAME_CHARS} printable characters",
    )


@dataclass(frozen=True, slots=True)
class PlaneLayer:
    """The blocks of one plane in one layer. Owns no memory.

    Attributes:
      base: Address of block 0.
      n_blocks: How many blocks, at least 1.
      block_bytes: Bytes of one block, contiguous.
      block_stride: Bytes from one block to the next, at least ``block_bytes``.
      dtype: Tag of the element type, as of :func:`normalize_dtype`.

    Raises:
      LayoutError: A number is out of range, blocks overlap, or the range
        leaves the address space.
    """

    base: int
    n_blocks: int
    block_bytes: int
    block_stride: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("base", "n_blocks", "block_bytes", "block_stride"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and not isinstance(value, bool),
                f"{name} {value!r} is not an integer",
            )
        object.__setattr__(self, "dtype", normalize_dtype(self.dtype))
        _require(self.base > 0, f"base {self.base:#x} is not an address")
        _require(
            1 <= self.n_blocks <= MAX_BLOCKS,
            f"{self.n_blocks} blocks: expected 1 to {MAX_BLOCKS}",
        )
        _require(
            1 <= self.block_bytes <= MAX_BLOCK_BYTES,
            f"blocks of {self.block_bytes} bytes: expected 1 to {MAX_BLOCK_BYTES}",
        )
        _require(
            self.block_bytes <= self.block_stride <= MAX_BLOCK_BYTES,
            f"blocks of {self.block_bytes} bytes every {self.block_stride} bytes "
            "overlap or are too far apart",
        )
        _require(
            self.end <= _ADDRESS_END,
            f"{self.length} bytes from {self.base:#x} leave the address space",
        )

    @property
    def length(self) -> int:
        """Bytes from the start of the first block to the end of the last."""
        return (self.n_blocks - 1) * self.block_stride + self.block_bytes

    @property
    def end(self) -> int:
        """Address behind the last block."""
        return self.base + self.length

    def address(self, block_id: int) -> int:
        """Give the address of a block, unchecked."""
        return self.base + block_id * self.block_stride


@dataclass(frozen=True, slots=True)
class Plane:
    """A named plane and its layers, in ascending order.

    Raises:
      LayoutError: Bad name, no layer, or a layer index out of range.
    """

    name: str
    layers: Mapping[int, PlaneLayer]

    def __post_init__(self) -> None:
        _check_name("plane", self.name)
        _require(bool(self.layers), f"plane {self.name!r} has no layer")
        for layer in self.layers:
            _require(
                type(layer) is int and 0 <= layer <= MAX_LAYER,
                f"plane {self.name!r}: layer {layer!r} is not in 0 to {MAX_LAYER}",
            )
        # Our own copy, so that the caller's dict can change.
        object.__setattr__(self, "layers", dict(sorted(self.layers.items())))


@dataclass(frozen=True, slots=True)
class Group:
    """Planes that share one set of block ids.

    Raises:
      LayoutError: Bad name, no plane, or a plane name twice.
    """

    name: str
    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        _check_name("group", self.name)
        object.__setattr__(self, "planes", tuple(self.planes))
        _require(bool(self.planes), f"group {self.name!r} has no plane")
        names = [plane.name for plane in self.planes]
        _require(
            len(set(names)) == len(names),
            f"group {self.name!r} has a plane name twice: {', '.join(names)}",
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that any plane covers, ascending."""
        return tuple(sorted({layer for p in self.planes for layer in p.layers}))

    @property
    def n_blocks(self) -> int:
        """Block ids valid in every plane and layer: ``range(n_blocks)``."""
        return min(pl.n_blocks for p in self.planes for pl in p.layers.values())

    def plane(self, name: str) -> Plane:
        """Give a plane by name.

        Raises:
          LayoutError: There is none; the message lists what there is.
        """
        for plane in self.planes:
            if plane.name == name:
                return plane
        have = ", ".join(plane.name for plane in self.planes)
        raise LayoutError(f"group {self.name!r} has no plane {name!r}, only {have}")

    def rows(self, layer: int) -> list[tuple[str, PlaneLayer]]:
        """List the planes of one layer with their places, in plane order.

        Raises:
          LayoutError: No plane covers the layer.
        """
        found = [(p.name, p.layers[layer]) for p in self.planes if layer in p.layers]
        if not found:
            have = format_layers(self.layers)
            raise LayoutError(
                f"layer {layer!r} is not in group {self.name!r}, which holds "
                f"layers {have}"
            )
        return found


def find_overlap(places: Sequence[PlaneLayer]) -> tuple[int, int] | None:
    """Find two entries that share a byte; give their indices, or ``None``.

    Blocks of several entries may alternate in memory, as K and V of one tensor
    do: only the blocks count, not what lies between them.
    """
    order = sorted(range(len(places)), key=lambda i: places[i].base)
    open_ranges: list[int] = []
    for i in order:
        base = places[i].base
        open_ranges = [j for j in open_ranges if places[j].end > base]
        for j in open_ranges:
            if _share_a_byte(places[j], places[i]):
                return j, i
        open_ranges.append(i)
    return None


def _share_a_byte(first: PlaneLayer, second: PlaneLayer) -> bool:
    """Tell whether two entries overlap; ``second`` begins inside ``first``."""
    if first.block_stride == second.block_stride:
        ahead = second.base - first.base
        index, phase = divmod(ahead, first.block_stride)
        if phase < first.block_bytes:
            return True
        follows = index + 1 < first.n_blocks
        return follows and phase + second.block_bytes > first.block_stride
    # Offsets from first, since addresses need not fit into int64.
    starts = second.base - first.base + np.arange(second.n_blocks) * second.block_stride
    # The block of first that begins at or before each start, and the next one.
    before = np.minimum(starts // first.block_stride, first.n_blocks - 1)
    inside = starts < before * first.block_stride + first.block_bytes
    after = (before + 1) * first.block_stride
    reaches = (before + 1 < first.n_blocks) & (starts + second.block_bytes > after)
    return bool((inside | reaches).any())


class PlaneGeometry(NamedTuple):
    """Layers of one plane that have the same figures. No addresses."""

    name: str
    layers: tuple[int, ...]
    block_bytes: int
    dtype: str
    n_blocks: int


class GroupGeometry(NamedTuple):
    """A group without addresses.

    A plane occurs several times if its layers differ in their figures.
    """

    name: str
    planes: tuple[PlaneGeometry, ...]


class Geometry(NamedTuple):
    """A cache without addresses: what is announced to a peer."""

    groups: tuple[GroupGeometry, ...]

    def entries(self) -> Iterator[tuple[int, str, PlaneGeometry]]:
        """Yield layer, group name and plane, once for each layer of each plane."""
        for group in self.groups:
            for plane in group.planes:
                for layer in plane.layers:
                    yield layer, group.name, plane


def describe(groups: Iterable[Group]) -> Geometry:
    """Describe groups without their addresses, for the wire and for :func:`fit`."""
    return Geometry(
        tuple(
            GroupGeometry(
                group.name,
                tuple(run for plane in group.planes for run in _runs(plane)),
            )
            for group in groups
        )
    )


def _runs(plane: Plane) -> Iterator[PlaneGeometry]:
    by_figures: dict[tuple[int, str, int], list[int]] = {}
    for layer, place in plane.layers.items():
        figures = (place.block_bytes, place.dtype, place.n_blocks)
        by_figures.setdefault(figures, []).append(layer)
    for (block_bytes, dtype, n_blocks), layers in by_figures.items():
        yield PlaneGeometry(plane.name, tuple(layers), block_bytes, dtype, n_blocks)


class Mismatch(NamedTuple):
    """One reason why two caches do not fit; ``str()`` makes a sentence of it.

    Attributes:
      what: The property: ``layers``, ``plane``, ``block_bytes`` or ``dtype``.
      where: Group, plane and layers concerned, as text.
      local: This side's figure.
      remote: The other side's figure.
    """

    what: str
    where: str
    local: str
    remote: str

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{where}{self.what} is {self.local} here, {self.remote} at the peer"


def fit(local: Geometry, remote: Geometry) -> list[Mismatch]:
    """Compare two caches; an empty list means that blocks can move.

    They fit if they have a layer in common and if, for every layer that both
    hold, they have the same planes in the same groups with the same
    ``block_bytes`` and dtype. Numbers of blocks may differ, and so may layers:
    pipeline stages hold some of them.
    """
    ours = {(layer, group, p.name): p for layer, group, p in local.entries()}
    theirs = {(layer, group, p.name): p for layer, group, p in remote.entries()}
    our_layers = {layer for layer, _, _ in ours}
    their_layers = {layer for layer, _, _ in theirs}
    common = our_layers & their_layers
    if not common:
        figures = (format_layers(our_layers), format_layers(their_layers))
        return [Mismatch("set of layers", "no layer in common", *figures)]

    found: dict[tuple[str, str, str, str, str], list[int]] = {}
    for key in sorted(ours.keys() | theirs.keys()):
        layer, group, plane = key
        if layer not in common:
            continue
        mine, other = ours.get(key), theirs.get(key)
        for what, a, b in _differences(mine, other):
            found.setdefault((group, plane, what, a, b), []).append(layer)
    return [
        Mismatch(what, f"group {group}, plane {plane}, {_layers(layers)}", a, b)
        for (group, plane, what, a, b), layers in found.items()
    ]


def _layers(layers: list[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {format_layers(layers)}"


def _differences(
    mine: PlaneGeometry | None, other: PlaneGeometry | None
) -> Iterator[tuple[str, str, str]]:
    if mine is None or other is None:
        words = ("missing", "present")
        yield "plane", words[mine is not None], words[other is not None]
        return
    if mine.block_bytes != other.block_bytes:
        yield "block_bytes", str(mine.block_bytes), str(other.block_bytes)
    if mine.dtype != other.dtype:
        yield "dtype", mine.dtype, other.dtype


def check_fit(local: Geometry, remote: Geometry) -> None:
    """Refuse two caches that do not fit.

    Raises:
      GeometryMismatchError: With every mismatch and both sides' figures.
    """
    mismatches = fit(local, remote)
    if mismatches:
        raise GeometryMismatchError(
            "the caches do not fit: " + "; ".join(map(str, mismatches))
        )
