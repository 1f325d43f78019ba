"""Memory behind a cache: mapping our own, and what to register of any.

Nothing here registers or touches a byte; a :class:`Region` says what a device
should be given as one MR.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import weakref
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
    "page_bytes",
    "round_up",
]

_log = logging.getLogger("kvxfer.memory")

#: Bytes of GPU memory in one region: drivers give out no dma-buf of 4 GiB.
MAX_DEVICE_REGION = 7 << 29

_PLANE_ALIGN = 4096
_HUGE_PAGE = 2 << 20
# mmap exports it only from Python 3.13 on; the same on x86-64 and aarch64.
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
# fcntl exports them only where the C library that Python was built with has them.
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


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


def merge_regions(found: Iterable[tuple[PlaneLayer, Span]]) -> list[Region]:
    """Join ranges to regions; the rule is in :attr:`KVCache.regions`."""
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
    for low, high, span in joined:
        if span.on_host or high - low <= MAX_DEVICE_REGION:
            regions.append(_region(low, high, span))
        else:
            regions += _slices([p for p, _ in found if low <= p.base < high])
    _warn_of_long(regions)
    return regions


def _warn_of_long(regions: Iterable[Region]) -> None:
    """Say in the log which layers of GPU memory may be more than a driver exports."""
    long = [r for r in regions if not r.on_host and r.length > MAX_DEVICE_REGION]
    if long:
        _log.warning(
            "%d layers of GPU memory are longer than %d bytes, %d the longest at %#x: "
            "each is one region all the same, for which the driver may give out no "
            "dma-buf. Fewer blocks in a cache make its layers shorter",
            len(long),
            MAX_DEVICE_REGION,
            *max((r.length, r.addr) for r in long),
        )


def _region(low: int, high: int, span: Span) -> Region:
    if span.fd < 0 or span.allocation is None:
        return Region(low, high - low, span.on_host)
    return Region(low, high - low, True, span.fd, low - span.allocation[0])


def _slices(places: list[PlaneLayer]) -> list[Region]:
    """Cut device memory between entries, so that each lies in one region.

    An entry that is longer than a region may be is one by itself.
    """
    regions: list[Region] = []
    for place in sorted(places, key=lambda p: p.base):
        if regions:
            start, length = regions[-1][:2]
            end = max(start + length, place.end)
            if end - start <= MAX_DEVICE_REGION:
                regions[-1] = Region(start, end - start, on_host=False)
                continue
        regions.append(Region(place.base, place.length, on_host=False))
    return regions


def round_up(n: int) -> int:
    """Round bytes up to where a plane may begin."""
    return -(-n // _PLANE_ALIGN) * _PLANE_ALIGN


def map_memory(n_bytes: int) -> Span:
    """Map zeroed memory that peers on this host can map as well.

    Returns:
      A span whose ``allocation`` is the memory, ``n_bytes`` rounded up to whole
      pages, beginning on a huge page where it is big enough for some; ``owner``
      unmaps it when nobody refers to it any more, and closes ``fd`` then. Where the
      system gives no memory files, ``fd`` is -1 and the memory is private.

    Raises:
      LayoutError: There is not that much address space.
    """
    # Room to begin on a huge page: copies between small blocks run about twice
    # as fast there.
    align = _HUGE_PAGE if n_bytes >= 2 * _HUGE_PAGE else _PLANE_ALIGN
    length = round_up(n_bytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, length + align, flags=flags)
    except (OSError, OverflowError, ValueError) as exc:
        raise LayoutError(f"cannot allocate {n_bytes} bytes: {exc}") from exc
    owner = np.frombuffer(memory, dtype=np.uint8)
    start = address_range(owner)[0]
    base = -(-start // align) * align
    fd = _memory_file(length, base)
    if fd >= 0:
        weakref.finalize(memory, os.close, fd)
    # A kernel without huge pages refuses the advice, which changes nothing else.
    with contextlib.suppress(OSError):
        if align == _HUGE_PAGE:
            memory.madvise(mmap.MADV_HUGEPAGE, base - start, length)
    return Span((base, base + length), True, owner, fd)


def _memory_file(length: int, base: int) -> int:
    """Put a memory file in the place of the mapping at ``base``; -1: there is none.

    It is sealed: a peer that maps it must not have to fear that it shrinks.
    """
    try:
        fd = os.memfd_create("kvxfer-cache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return -1
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)
        _map_fixed(base, length, fd)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _map_fixed(base: int, length: int, fd: int) -> None:
    """mmap(2) with MAP_FIXED, which Python's own cannot."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if call(base, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != base:
        raise OSError(ctypes.get_errno(), "mmap")


def page_bytes(addr: int, length: int) -> int:
    """Tell the size of the pages that a range of memory is on now.

    2 MiB where nine tenths of what is in memory is on huge pages, else the
    system's page. 0 where nothing is in memory yet, or the system does not say.
    """
    present = huge = 0
    inside = False
    with contextlib.suppress(OSError), open("/proc/self/smaps") as smaps:
        for line in smaps:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                low, _, high = name.partition("-")
                inside = int(low, 16) < addr + length and addr < int(high, 16)
            elif inside and name == "Rss:":
                present += int(rest.split()[0])
            elif inside and name.endswith(("PmdMapped:", "AnonHugePages:")):
                huge += int(rest.split()[0])
    if not present:
        return 0
    return _HUGE_PAGE if huge * 10 >= present * 9 else mmap.PAGESIZE


def address_range(array: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Give first and last-plus-one address of a contiguous array."""
    start = int(array.__array_interface__["data"][0])
    return start, start + array.nbytes
