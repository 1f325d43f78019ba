"""KVCache: the memory of a cache, described for transfers.

It describes memory that others own (tensors, raw pointers) or owns memory of
its own (:meth:`KVCache.allocate`), and says what has to be registered with a
device. It performs no transfer and touches no byte.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kvxfer.attached import Attachment
from kvxfer.errors import ClosedResourceError, LayoutError, UsageError
from kvxfer.layout import (
    MAX_PLANE_LAYERS,
    Geometry,
    Group,
    Plane,
    PlaneLayer,
    describe,
    find_overlap,
    format_layers,
)
from kvxfer.memory import map_memory, page_bytes, round_up
from kvxfer.reach import check_gpu_memory
from kvxfer.regions import Region, Span, find_slices, merge_regions
from kvxfer.tensors import TensorMemory, inspect_tensor, is_tensor, place_blocks

__all__ = ["Entry", "KVCache", "Region"]

T = TypeVar("T")


class Entry(NamedTuple):
    """One plane of one layer, with its names."""

    group: str
    plane: str
    layer: int
    place: PlaneLayer


_Key = tuple[str, str, int]


class _Exposed:
    """Memory as numpy can see it; an array made of this keeps ``owner`` alive."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, place: PlaneLayer, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": (place.n_blocks, place.block_bytes),
            "strides": (place.block_stride, 1),
            "typestr": "|u1",
            "data": (place.base, False),
        }


class KVCache:
    """Paged key-value cache memory: groups of planes of layers of blocks.

    Usually made by :meth:`from_tensors`, :meth:`from_pointers`,
    :meth:`allocate` or :meth:`grouped`. Tensors are kept alive until
    :meth:`close`; memory behind raw pointers is the caller's to keep.

    Args:
      groups: The groups; block ranges in memory that nobody else moves.

    Raises:
      LayoutError: No group, a name twice, or blocks of one group that overlap.
        Different groups may share memory, as hybrid models do.
      DeviceUnavailableError: It lies in GPU memory, and there is no NIC that could
        reach it: the software device cannot. Says what to use instead.
    """

    def __init__(
        self, groups: Iterable[Group], *, _spans: Mapping[_Key, Span] | None = None
    ) -> None:
        self._groups = tuple(groups)
        names = [group.name for group in self._groups]
        if not names:
            raise LayoutError("a cache needs at least one group")
        if len(set(names)) != len(names):
            raise LayoutError(f"a group name occurs twice: {', '.join(names)}")
        self._entries = {
            (group.name, plane.name, layer): Entry(group.name, plane.name, layer, place)
            for group in self._groups
            for plane in group.planes
            for layer, place in plane.layers.items()
        }
        if len(self._entries) > MAX_PLANE_LAYERS:
            raise LayoutError(
                f"{len(self._entries)} planes times layers, at most {MAX_PLANE_LAYERS}"
            )
        for group in self._groups:
            _refuse_overlap(group)
        self._geometry = describe(self._groups)
        self._spans = dict(_spans or {})
        if not self.on_host:
            check_gpu_memory()
        self._regions = self._merged()
        self._lock = threading.Lock()
        self._pins = 0
        self._closed = False
        self.attachment: Attachment | None = None
        """The connection to the sidecar whose cache this is; None: it is no such."""

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Any],
        *,
        block_axis: int | Mapping[str, int] = 0,
        layer_axis: int | Mapping[str, int] | None = None,
        dtype: str | Mapping[str, str] | None = None,
        group: str = "main",
    ) -> KVCache:
        """Describe tensors that exist. Nothing is copied.

        Takes numpy, torch, and anything with the buffer protocol, DLPack,
        ``__array_interface__`` or ``__cuda_array_interface__``. The tensors
        must not be resized or moved while the cache is open.

        Args:
          tensors: For each plane its layers: a sequence with one tensor a layer
            from layer 0, or a dict from layer to tensor. K and V in one tensor
            ``[2, blocks, ...]`` are two planes, ``t[0]`` and ``t[1]``; in
            ``[blocks, 2, ...]`` they are ``t[:, 0]`` and ``t[:, 1]``.
          block_axis: The axis of one layer's tensor that counts blocks. The
            other axes are the block and must be contiguous.
          layer_axis: Where a plane is one tensor across all layers: its layer
            axis. ``block_axis`` then counts the axes that remain.
          dtype: Tag to announce instead of the tensors' own, for example
            ``"bf16"`` for bytes that numpy has to hold as ``uint16``.
          group: Name of the one group.

        Raises:
          LayoutError: A tensor is read-only or cannot be expressed; the message
            names plane and layer, shape, strides and the remedy.
        """
        planes: dict[str, dict[int, PlaneLayer]] = {}
        spans: dict[_Key, Span] = {}
        for name in _plane_names(tensors):
            axis = _for_plane("block_axis", block_axis, name, tensors)
            tag = _for_plane("dtype", dtype, name, tensors) if dtype else None
            across = None
            if layer_axis is not None:
                across = _for_plane("layer_axis", layer_axis, name, tensors)
            places = planes[name] = {}
            for layer, memory in _layer_memory(name, tensors[name], across):
                with _naming(name, layer):
                    places[layer] = place_blocks(memory, axis, tag)
                spans[group, name, layer] = Span(
                    memory.allocation, memory.on_host, memory.owner
                )
        return cls([_group(group, planes)], _spans=spans)

    @classmethod
    def from_pointers(
        cls,
        pointers: Mapping[
            str, Sequence[int] | Mapping[int, int] | npt.NDArray[np.integer[Any]]
        ],
        *,
        n_blocks: int,
        block_bytes: int | Mapping[str, int],
        block_stride: int | Mapping[str, int] | None = None,
        dtype: str | Mapping[str, str] = "u8",
        group: str = "main",
        host_memory: bool = True,
    ) -> KVCache:
        """Describe memory by its addresses. The caller keeps it alive.

        Nothing is or can be checked about the memory: wrong numbers here become
        a failed registration at best.

        Args:
          pointers: For each plane the address of block 0 in each layer: a
            sequence from layer 0, or a dict from layer to address.
          n_blocks: Blocks in each layer.
          block_bytes: Bytes of a block, the same or by plane.
          block_stride: Bytes from block to block; ``None`` is ``block_bytes``.
          dtype: Tag to announce.
          group: Name of the one group.
          host_memory: Whether the CPU can read it; :meth:`view` needs that.

        Raises:
          LayoutError: A null pointer or a number out of range.
        """
        planes: dict[str, dict[int, PlaneLayer]] = {}
        spans: dict[_Key, Span] = {}
        for name in _plane_names(pointers):
            size = _for_plane("block_bytes", block_bytes, name, pointers)
            stride = size
            if block_stride is not None:
                stride = _for_plane("block_stride", block_stride, name, pointers)
            tag = _for_plane("dtype", dtype, name, pointers)
            places = planes[name] = {}
            for layer, address in _layers(name, pointers[name]):
                with _naming(name, layer):
                    places[layer] = PlaneLayer(
                        base=_integer("address", address),
                        n_blocks=_integer("n_blocks", n_blocks),
                        block_bytes=_integer("block_bytes", size),
                        block_stride=_integer("block_stride", stride),
                        dtype=tag,
                    )
                spans[group, name, layer] = Span(on_host=host_memory)
        return cls([_group(group, planes)], _spans=spans)

    @classmethod
    def allocate(
        cls,
        *,
        n_blocks: int,
        block_bytes: int | Mapping[str, int],
        n_layers: int | None = None,
        layers: Iterable[int] | None = None,
        planes: Sequence[str] = ("k", "v"),
        dtype: str | Mapping[str, str] = "u8",
        group: str = "main",
    ) -> KVCache:
        """Make a cache in zeroed host memory of its own.

        The memory is one mapping that is filled in as it is touched. Each layer
        of each plane starts on a multiple of 4096 bytes; the planes of a layer
        follow one another. It is released when the cache is closed and the last
        array from :meth:`view` is gone. It is a memory file, which peers of the
        software device on this host can map as well; so a process forked from
        this one shares it, instead of getting a copy.

        Args:
          n_blocks: Blocks in each layer.
          block_bytes: Bytes of a block, the same or by plane.
          n_layers: Layers 0 to ``n_layers - 1``; or else
          layers: The layers held, for a pipeline stage.
          planes: Names of the planes.
          dtype: Tag to announce, the same or by plane.
          group: Name of the one group.

        Raises:
          LayoutError: A number is out of range, or there is no address space.
        """
        held = _held_layers(n_layers, layers)
        names = dict.fromkeys(planes)
        sizes = {
            name: _integer(
                "block_bytes", _for_plane("block_bytes", block_bytes, name, names)
            )
            for name in _plane_names(names)
        }
        if len(names) != len(planes):
            raise LayoutError(f"a plane name occurs twice: {', '.join(planes)}")
        count = _integer("n_blocks", n_blocks)
        if count < 1 or min(sizes.values()) < 1:
            raise LayoutError(
                f"{count} blocks of {min(sizes.values())} bytes: both must be 1 or more"
            )
        ranges = {name: round_up(count * size) for name, size in sizes.items()}
        span = map_memory(len(held) * sum(ranges.values()))
        assert span.allocation is not None
        base = span.allocation[0]
        places: dict[str, dict[int, PlaneLayer]] = {name: {} for name in names}
        for layer in held:
            for name, size in sizes.items():
                tag = _for_plane("dtype", dtype, name, names)
                places[name][layer] = PlaneLayer(base, count, size, size, tag)
                base += ranges[name]
        spans = {(group, name, layer): span for name in names for layer in held}
        return cls([_group(group, places)], _spans=spans)

    @classmethod
    def attach(cls, path: str | os.PathLike[str], *, timeout: float = 10.0) -> KVCache:
        """Map the cache of a sidecar on this host: ``kvxfer serve --share unix:PATH``.

        It is the same memory. The sidecar tells what lands in it, and takes offers of
        blocks for requests: :attr:`attachment`. Closing this cache ends that, and has
        what was offered and is not done fenced; so does the end of this process,
        however it ends.

        Args:
          path: Of the sidecar's socket, with or without ``unix:`` in front.
          timeout: Seconds for this, and for each answer of the sidecar later: one that
            takes longer counts as gone.

        Raises:
          ControlError: Nobody is there, or this user may not write to the path.
          ProtocolError: What is there is no sidecar of this release.
        """
        attachment = Attachment.open(os.fspath(path), timeout)
        try:
            cache = cls(attachment.groups, _spans=attachment.spans)
        except BaseException:
            attachment.close()
            raise
        cache.attachment = attachment
        return cache

    @classmethod
    def grouped(cls, caches: Mapping[str, KVCache]) -> KVCache:
        """Make one cache of several groups, each with block ids of its own.

        The new cache keeps the memory alive by itself; closing the caches it
        was made of changes nothing.

        Args:
          caches: Group name to a cache of one group.

        Raises:
          LayoutError: A cache has several groups already.
          ClosedResourceError: A cache is closed.
        """
        groups: list[Group] = []
        spans: dict[_Key, Span] = {}
        for name, cache in caches.items():
            cache._ensure_open()
            if len(cache._groups) != 1:
                raise LayoutError(f"the cache for group {name!r} has several groups")
            groups.append(Group(name, cache._groups[0].planes))
            for (_, plane, layer), span in cache._spans.items():
                spans[name, plane, layer] = span
        return cls(groups, _spans=spans)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in order."""
        return self._groups

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers held by any group, ascending."""
        return tuple(
            sorted({layer for group in self._groups for layer in group.layers})
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        places = (entry.place for entry in self._entries.values())
        return sum(place.n_blocks * place.block_bytes for place in places)

    @property
    def page_bytes(self) -> int:
        """Size of the memory pages that the cache is on now.

        2 MiB where (nearly) all of it is on huge pages, which the software device
        asks for when it registers memory of :meth:`allocate`; else the system's
        page. 0: nothing of it is in host memory yet.

        Raises:
          ClosedResourceError: The cache is closed.
        """
        sizes = {page_bytes(region.addr, region.length) for region in self.regions}
        return min(sizes - {0}, default=0)

    @property
    def in_use(self) -> int:
        """How many clients and servers use the cache now."""
        return self._pins

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def on_host(self) -> bool:
        """Whether the processor can read all of it, while it is open."""
        return all(span.on_host for span in self._spans.values())

    @property
    def regions(self) -> list[Region]:
        """What to register, ascending and disjoint: one region an allocation.

        The ranges of all entries, from the first byte of the first block to the
        last byte of the last, are joined where

        - they lie in the same allocation, as far as that is known: the whole
          of an :meth:`allocate`, a torch storage, a numpy array that others are
          views of; bytes between them are then part of the region;
        - they overlap, as K and V in alternating blocks do;
        - they touch and lie in host memory. On a GPU, allocations that happen
          to touch cannot be registered together.

        GPU memory is cut into regions of at most 3.5 GiB: between entries, and those
        that are longer between their blocks. What cannot be cut so, as one block of
        that length, is one region all the same, and a warning in the log.

        Raises:
          ClosedResourceError: The cache is closed.
        """
        self._ensure_open()
        return list(self._regions)

    def regions_within(self, limit: int) -> list[Region]:
        """The same, cut into regions of at most ``limit`` bytes, host memory as well.

        Args:
          limit: Bytes; 0: as :attr:`regions`.

        Raises:
          LayoutError: It would be more than 4096 regions.
          ClosedResourceError: The cache is closed.
        """
        self._ensure_open()
        return self._merged(limit) if limit else list(self._regions)

    def _merged(self, limit: int = 0) -> list[Region]:
        return merge_regions(
            (
                (entry.place, self._spans.get(key, Span()))
                for key, entry in self._entries.items()
            ),
            limit,
        )

    def region_index(self, place: PlaneLayer) -> int:
        """Give the index in :attr:`regions` of the region that holds ``place``.

        Raises:
          LayoutError: None does, or more than one.
        """
        slices = find_slices(self._regions, place)
        if slices.n > 1:
            raise LayoutError(f"{place} is in {slices.n} regions of this cache")
        return slices.first

    def describe(self) -> Geometry:
        """Describe the cache without addresses; works when closed, too."""
        return self._geometry

    def group(self, name: str | None = None) -> Group:
        """Give a group by name; ``None`` is the only one.

        Raises:
          LayoutError: There is no such group, or ``None`` is ambiguous.
        """
        if name is None and len(self._groups) == 1:
            return self._groups[0]
        for group in self._groups:
            if group.name == name:
                return group
        have = ", ".join(group.name for group in self._groups)
        if name is None:
            raise LayoutError(f"name the group: this cache has {have}")
        raise LayoutError(f"this cache has no group {name!r}, only {have}")

    def entries(
        self, layers: Iterable[int] | None = None, *, group: str | None = None
    ) -> list[Entry]:
        """List plane and layer pairs of one group, layer by layer.

        Args:
          layers: The layers wanted, in this order; ``None`` is all, ascending.
          group: Group name; ``None`` is the only group.

        Raises:
          LayoutError: A layer is not held, or the group is unknown.
        """
        chosen = self.group(group)
        wanted = chosen.layers if layers is None else layers
        return [
            Entry(chosen.name, plane, layer, place)
            for layer in wanted
            for plane, place in chosen.rows(layer)
        ]

    def view(
        self, layer: int, plane: str, group: str | None = None
    ) -> npt.NDArray[np.uint8]:
        """Give one layer of one plane as bytes: ``n_blocks`` x ``block_bytes``.

        The array is the memory itself, writable, and keeps it alive even after
        :meth:`close`, except where the cache was made of raw pointers.

        Raises:
          LayoutError: No such layer, plane or group, or not in host memory.
          ClosedResourceError: The cache is closed.
        """
        self._ensure_open()
        chosen = self.group(group)
        layers = chosen.plane(plane).layers
        if layer not in layers:
            raise LayoutError(
                f"plane {plane!r} of group {chosen.name!r} has no layer {layer!r}: "
                f"it holds layers {format_layers(layers)}"
            )
        span = self._spans.get((chosen.name, plane, layer), Span())
        if not span.on_host:
            raise LayoutError(f"plane {plane!r} layer {layer} is not in host memory")
        return np.asarray(_Exposed(layers[layer], span.owner))

    def close(self) -> None:
        """Let go of the memory. Closing twice is fine.

        Memory of ours goes back to the system at once, or with the last array
        that :meth:`view` gave out.

        Raises:
          UsageError: A client or server still uses the cache; it stays open.
        """
        with self._lock:
            if self._pins:
                raise UsageError(
                    f"the cache is used by {self._pins} open clients or servers",
                    hint="Close them first.",
                )
            self._closed = True
            self._spans.clear()
        if self.attachment is not None:
            self.attachment.close()

    def __enter__(self) -> KVCache:
        self._ensure_open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        parts = "; ".join(
            f"{g.name}: {'+'.join(p.name for p in g.planes)}, "
            f"layers {format_layers(g.layers)}, {g.n_blocks} blocks"
            for g in self._groups
        )
        return f"<KVCache{state} {parts}>"

    def _ensure_open(self) -> None:
        if self._closed:
            raise ClosedResourceError("the cache is closed")

    def _pin(self) -> None:
        """Keep the cache open; for clients and servers, from any thread."""
        with self._lock:
            self._ensure_open()
            self._pins += 1

    def _unpin(self) -> None:
        """Undo one :meth:`_pin`."""
        with self._lock:
            assert self._pins > 0
            self._pins -= 1


def _refuse_overlap(group: Group) -> None:
    names = [
        (plane.name, layer, place)
        for plane in group.planes
        for layer, place in plane.layers.items()
    ]
    pair = find_overlap([place for _, _, place in names])
    if pair is not None:
        (plane_a, layer_a, _), (plane_b, layer_b, _) = (names[i] for i in pair)
        raise LayoutError(
            f"group {group.name!r}: blocks of plane {plane_a!r} layer {layer_a} and "
            f"of plane {plane_b!r} layer {layer_b} overlap in memory"
        )


def _group(name: str, planes: Mapping[str, Mapping[int, PlaneLayer]]) -> Group:
    return Group(name, tuple(Plane(plane, places) for plane, places in planes.items()))


def _plane_names(planes: object) -> list[str]:
    if not isinstance(planes, Mapping) or not planes:
        raise LayoutError('planes: expected a dict such as {"k": [...], "v": [...]}')
    return list(planes)


def _for_plane(
    what: str, value: T | Mapping[str, T], plane: str, planes: Mapping[str, Any]
) -> T:
    """Pick a plane's value from one for all or one by plane."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != set(planes):
        raise LayoutError(
            f"{what} names planes {', '.join(map(str, value))}, but the cache has "
            f"{', '.join(map(str, planes))}"
        )
    found: T = value[plane]
    return found


def _layers(plane: str, given: Any) -> Iterator[tuple[int, Any]]:
    """Yield layer and item of a dict, or of a sequence from layer 0."""
    if isinstance(given, Mapping):
        yield from ((_integer("layer", layer), item) for layer, item in given.items())
        return
    try:
        yield from enumerate(given)
    except TypeError as exc:
        raise LayoutError(
            f"plane {plane!r}: expected one item a layer, in a list or a dict from "
            f"layer to item, got a {type(given).__name__}"
        ) from exc


def _layer_memory(
    plane: str, given: Any, layer_axis: int | None
) -> Iterator[tuple[int, TensorMemory]]:
    if layer_axis is None:
        if is_tensor(given):
            raise LayoutError(
                f"plane {plane!r} is one tensor, expected one a layer",
                hint="Pass a list of tensors, or say which axis of this one counts "
                "the layers with layer_axis=.",
            )
        for layer, tensor in _layers(plane, given):
            with _naming(plane, layer):
                memory = inspect_tensor(tensor)
            yield layer, memory
        return
    with _naming(plane, None):
        memory = inspect_tensor(given)
        n_axes = len(memory.shape)
        if not -n_axes <= layer_axis < n_axes:
            raise LayoutError(f"no axis {layer_axis} in shape {memory.shape}")
        axis = layer_axis % n_axes
    for layer in range(memory.shape[axis]):
        yield layer, memory.select(axis, layer)


@contextlib.contextmanager
def _naming(plane: str, layer: int | None) -> Iterator[None]:
    """Put plane and layer in front of a LayoutError's message."""
    try:
        yield
    except LayoutError as exc:
        where = (
            f"plane {plane!r}" if layer is None else f"plane {plane!r} layer {layer}"
        )
        raise LayoutError(f"{where}: {exc.args[0]}", hint=exc.hint) from exc


def _integer(what: str, value: object) -> int:
    try:
        if type(value) is bool:
            raise TypeError("a bool")
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as exc:
        raise LayoutError(f"{what} {value!r} is not an integer") from exc


def _held_layers(n_layers: int | None, layers: Iterable[int] | None) -> list[int]:
    if (n_layers is None) == (layers is None):
        raise LayoutError("give n_layers or layers, one of the two")
    held = range(_integer("n_layers", n_layers)) if layers is None else layers
    found = [_integer("layer", layer) for layer in held]
    if not found or len(set(found)) != len(found):
        raise LayoutError(f"layers {found}: expected at least one, none twice")
    return found
