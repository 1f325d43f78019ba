"""Memory behind a cache: mapping our own, and what to register of any.

Nothing here registers or touches a byte; a :class:`Region` says what a device
should be given as one MR.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvxfer.errors import LayoutError
from kvxfer.layout import PlaneLayer

__all__ = [
    "MAX_DEVICE_REGION",
    "Region",
    "Span",
    "address_range",
    "map_memory",
    "merge_regions",
    "round_up",
]

#: Bytes of GPU memory in one region: drivers give out no dma-buf of 4 GiB.
MAX_DEVICE_REGION = 7 << 29

_PLANE_ALIGN = 4096
_HUGE_PAGE = 2 << 20
# mmap exports it only from Python 3.13 on; the same on x86-64 and aarch64.
_MAP_NORESERVE = 0x4000


class Region(NamedTuple):
    """A run of memory to register as one MR."""

    addr: int
    length: int
    on_host: bool = True


class Span(NamedTuple):
    """What is known about the memory behind one entry.

    ``allocation`` is its first and last-plus-one address, where known; ``owner``
    keeps it alive.
    """

    allocation: tuple[int, int] | None = None
    on_host: bool = True
    owner: object = None


def merge_regions(found: Iterable[tuple[PlaneLayer, Span]]) -> list[Region]:
    """Join ranges to regions; the rule is in :attr:`KVCache.regions`."""
    found = list(found)
    hulls: dict[object, tuple[int, int, bool]] = {}
    for place, span in found:
        key = span.allocation or place
        low, high, _ = hulls.get(key, (place.base, place.end, True))
        hulls[key] = (min(low, place.base), max(high, place.end), span.on_host)
    joined: list[tuple[int, int, bool]] = []
    for low, high, on_host in sorted(hulls.values()):
        if joined:
            start, end, before_on_host = joined[-1]
            touching = low == end and on_host and before_on_host
            if low < end or touching:
                joined[-1] = (start, max(end, high), on_host and before_on_host)
                continue
        joined.append((low, high, on_host))
    regions: list[Region] = []
    for low, high, on_host in joined:
        if on_host or high - low <= MAX_DEVICE_REGION:
            regions.append(Region(low, high - low, on_host))
        else:
            regions += _slices([p for p, _ in found if low <= p.base < high])
    return regions


def _slices(places: list[PlaneLayer]) -> list[Region]:
    """Cut device memory between entries, so that each lies in one region.

    An entry that is longer than a region may be is one by itself.
    """
    regions: list[Region] = []
    for place in sorted(places, key=lambda p: p.base):
        if regions:
            start, length, _ = regions[-1]
            end = max(start + length, place.end)
            if end - start <= MAX_DEVICE_REGION:
                regions[-1] = Region(start, end - start, on_host=False)
                continue
        regions.append(Region(place.base, place.length, on_host=False))
    return regions


def round_up(n: int) -> int:
    """Round bytes up to where a plane may begin."""
    return -(-n // _PLANE_ALIGN) * _PLANE_ALIGN


def map_memory(n_bytes: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Map anonymous memory; the array owns it. Returns it and where to begin."""
    # Room to begin on a huge page: copies between small blocks run about twice
    # as fast there.
    huge = n_bytes >= 2 * _HUGE_PAGE
    length = n_bytes + (_HUGE_PAGE if huge else 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, length, flags=flags)
    except (OSError, OverflowError, ValueError) as exc:
        raise LayoutError(f"cannot allocate {n_bytes} bytes: {exc}") from exc
    # A kernel without huge pages refuses the advice, which changes nothing else.
    with contextlib.suppress(OSError):
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
    owner = np.frombuffer(memory, dtype=np.uint8)
    base = address_range(owner)[0]
    if huge:
        base = -(-base // _HUGE_PAGE) * _HUGE_PAGE
    return owner, base


def address_range(array: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Give first and last-plus-one address of a contiguous array."""
    start = int(array.__array_interface__["data"][0])
    return start, start + array.nbytes
