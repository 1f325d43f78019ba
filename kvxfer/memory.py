"""Memory behind a cache: mapping our own, and the pages that any is on."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

from kvxfer.errors import LayoutError
from kvxfer.regions import Span

__all__ = [
    "address_range",
    "map_memory",
    "page_bytes",
    "round_up",
]

_PLANE_ALIGN = 4096
_HUGE_PAGE = 2 << 20
# mmap exports it only from Python 3.13 on; the same on x86-64 and aarch64.
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
# fcntl exports them only where the C library that Python was built with has them.
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1, 2, 4


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
