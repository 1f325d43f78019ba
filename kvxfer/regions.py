"""What of a cache's memory is registered as one region, and what of it is in which.

A region is as long as may be: an allocation, or what touches. Where regions may not be
longer than some limit, they are cut between blocks, so that every block lies in one.
Pure arithmetic.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvxfer.errors import LayoutError
from kvxfer.layout import PlaneLayer

__all__ = [
    "MAX_DEVICE_REGION",
    "Keys",
    "Region",
    "Slices",
    "Span",
    "find_slices",
    "merge_regions",
]

_log = logging.getLogger("kvxfer.regions")

#: Bytes of GPU memory in one region: drivers give out no dma-buf of 4 GiB.
MAX_DEVICE_REGION = 7 << 29
# What a peer can be told of; a cache has no more planes times layers.
_MAX_REGIONS = 4096


class Region(NamedTuple):
    """A run of memory to register as one MR.

    Where it is a file mapped shared, peers on this host can map it as well:
    ``fd`` is the file, open as long as the memory is there, and ``offset`` where
    in it the run begins. -1: it is no file.
    """

    addr: int
    length: int
    on_host: bool = True
    fd: int = -1
    offset: int = 0


class Span(NamedTuple):
    """What is known about the memory behind one entry.

    ``allocation`` is its first and last-plus-one address, where known; ``owner``
    keeps it alive. ``fd`` is the file that the allocation is, from offset 0 on, or
    -1.
    """

    allocation: tuple[int, int] | None = None
    on_host: bool = True
    owner: object = None
    fd: int = -1


class Slices(NamedTuple):
    """Which regions hold the blocks of one plane in one layer.

    Block ``i`` is in number ``first + i // blocks``; there are ``n`` of them.
    """

    first: int
    n: int
    blocks: int

    def keys(self, key_of: Callable[[int], int]) -> Keys:
        """Return the keys of the regions, by what gives that of a number."""
        numbers = range(self.first, self.first + self.n)
        return Keys(self.blocks, tuple(key_of(number) for number in numbers))

    def holding(self, ids: NDArray[np.int64]) -> set[int]:
        """Return the numbers of those that hold some blocks."""
        if self.n == 1:
            return {self.first}
        return set((self.first + np.unique(ids // self.blocks)).tolist())


class Keys(NamedTuple):
    """The keys of one plane in one layer: block ``i`` has number ``i // blocks``."""

    blocks: int
    keys: tuple[int, ...]


def find_slices(regions: Sequence[Region], place: PlaneLayer) -> Slices:
    """Find the regions that hold ``place``, each of its blocks wholly.

    Args:
      regions: As of :func:`merge_regions`: ascending and disjoint.

    Raises:
      LayoutError: They do not hold it.
    """
    first = bisect_right(regions, place.base, key=lambda r: r.addr) - 1
    if first >= 0:
        region = regions[first]
        room = region.addr + region.length - place.base - place.block_bytes
        blocks = min(room // place.block_stride + 1, place.n_blocks)
        if blocks > 0:
            n = -(-place.n_blocks // blocks)
            found = Slices(first, n, blocks)
            if all(_holds(regions, place, found, i) for i in range(n)):
                return found
    raise LayoutError(f"no region of this cache holds {place}")


def _holds(
    regions: Sequence[Region], place: PlaneLayer, slices: Slices, i: int
) -> bool:
    """Say whether number ``i`` of some slices holds the blocks that it should."""
    if slices.first + i >= len(regions):
        return False
    region = regions[slices.first + i]
    last = min((i + 1) * slices.blocks, place.n_blocks) - 1
    begin, end = place.address(i * slices.blocks), place.address(last)
    return (
        region.addr <= begin and end + place.block_bytes <= region.addr + region.length
    )


def merge_regions(
    found: Iterable[tuple[PlaneLayer, Span]], limit: int = 0
) -> list[Region]:
    """Join ranges to regions; the rule is in :attr:`KVCache.regions`.

    Args:
      limit: Bytes in a region at most, of host memory as well; 0: of GPU memory
        :data:`MAX_DEVICE_REGION`, of host memory what there is.

    Raises:
      LayoutError: So short a limit makes too many regions of it.
    """
    found = list(found)
    hulls: dict[object, tuple[int, int, Span]] = {}
    for place, span in found:
        key = span.allocation or place
        low, high, _ = hulls.get(key, (place.base, place.end, span))
        hulls[key] = (min(low, place.base), max(high, place.end), span)
    joined: list[tuple[int, int, Span]] = []
    for low, high, span in sorted(hulls.values(), key=lambda hull: hull[:2]):
        if joined:
            start, end, before = joined[-1]
            on_host = span.on_host and before.on_host
            # A file that touches other memory is still not one with it.
            touching = low == end and on_host and max(span.fd, before.fd) < 0
            if low < end or touching:
                both = Span(on_host=on_host)
                if on_host and high <= end:
                    both = before
                elif on_host and low == start:
                    both = span
                joined[-1] = (start, max(end, high), both)
                continue
        joined.append((low, high, span))
    regions: list[Region] = []
    long: list[Region] = []
    for low, high, span in joined:
        most = limit or (high - low if span.on_host else MAX_DEVICE_REGION)
        if high - low <= most:
            regions.append(_region(low, high, span))
            continue
        cut = _cut([p for p, _ in found if low <= p.base < high], most)
        regions += (_region(start, end, span) for start, end in cut)
        long += (_region(a, b, span) for a, b in cut if b - a > most)
    if len(regions) > _MAX_REGIONS and limit:
        least = sum(region.length for region in regions) // _MAX_REGIONS
        raise LayoutError(
            f"region_bytes = {limit} makes {len(regions)} regions of this cache, at "
            f"most {_MAX_REGIONS}; it takes more than {least} bytes in each"
        )
    _warn_of_long(long, limit or MAX_DEVICE_REGION)
    return regions


def _warn_of_long(long: Sequence[Region], limit: int) -> None:
    """Say in the log what may be more than a driver takes."""
    if long:
        _log.warning(
            "%d regions are longer than %d bytes, %d the longest at %#x: what lies "
            "there cannot be cut between blocks, since one block is as long, or "
            "blocks of different strides overlap. The driver may refuse them",
            len(long),
            limit,
            *max((r.length, r.addr) for r in long),
        )


def _region(low: int, high: int, span: Span) -> Region:
    if span.fd < 0 or span.allocation is None:
        return Region(low, high - low, span.on_host)
    return Region(low, high - low, True, span.fd, low - span.allocation[0])


def _cut(places: list[PlaneLayer], limit: int) -> list[tuple[int, int]]:
    """Cut memory into ranges of at most ``limit`` bytes, none through a block.

    What does not overlap is put together as far as it goes; what does, as K and V in
    alternating blocks, is cut alone if it is too long. What cannot be cut is left.
    """
    ranges: list[tuple[int, int]] = []
    for entries in _overlapping(places):
        low, high = entries[0].base, max(place.end for place in entries)
        if high - low > limit:
            ranges += _cut_rows(entries, low, high, limit)
        elif ranges and high - ranges[-1][0] <= limit:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return ranges


def _overlapping(places: list[PlaneLayer]) -> Iterator[list[PlaneLayer]]:
    """Yield the places in ascending order, together where their ranges overlap."""
    entries: list[PlaneLayer] = []
    end = 0
    for place in sorted(places, key=lambda p: p.base):
        if entries and place.base >= end:
            yield entries
            entries = []
        end = max(end, place.end) if entries else place.end
        entries.append(place)
    if entries:
        yield entries


def _cut_rows(
    entries: list[PlaneLayer], low: int, high: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Yield ranges of whole rows: a row is one block of each of the entries."""
    row = entries[0].block_stride
    alike = all(
        place.block_stride == row and place.base - low + place.block_bytes <= row
        for place in entries
    )
    if not alike or row > limit:
        yield low, high
        return
    step = limit // row * row
    for start in range(low, high, step):
        yield start, min(start + step, high)
