"""What pages memory is on: huge ones where the kernel gives them, and told as they are.

What is told is held against the kernel's own account, ``/proc/self/smaps``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvxfer import KVCache
from kvxfer._verbs import Device, MemoryRegion, ProtectionDomain
from kvxfer.errors import ClosedResourceError
from tests.patience import patient
from tests.seccomp import can_deny, deny

HUGE = 2 << 20
MADV_COLLAPSE = 25
N_HUGE = 4


def account(cache: KVCache) -> tuple[int, int]:
    """Bytes of a cache that are in memory, and how many of those on huge pages."""
    (region,) = cache.regions
    present = huge = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            first, _, past = words[0].partition("-")
            inside = int(first, 16) <= region.addr < int(past, 16)
        elif inside and words[0] == "Rss:":
            present += int(words[1]) << 10
        elif inside and words[0] == "ShmemPmdMapped:":
            huge += int(words[1]) << 10
    return present, huge


def allocate() -> KVCache:
    """Make a cache of four huge pages, none of them touched."""
    return KVCache.allocate(n_layers=1, n_blocks=N_HUGE, block_bytes=HUGE, planes=["k"])


def collapses() -> bool:
    """Whether this kernel puts a memory file on huge pages on request."""
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with allocate() as cache:
        cache.view(0, "k")[0] = 1
        return int(call(cache.regions[0].addr, HUGE, MADV_COLLAPSE)) == 0


def given_at_first_touch() -> bool:
    """Whether memory files have huge pages without anybody's request."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return setting.exists() and "[never]" not in setting.read_text()


def register(cache: KVCache, length: int | None = None) -> None:
    """Register a cache with the software device, or its beginning, and take it back."""
    (region,) = cache.regions
    with (
        Device("soft0") as device,
        ProtectionDomain(device) as pd,
        MemoryRegion(pd, region.addr, length or region.length, fd=region.fd),
    ):
        pass


def test_memory_that_nobody_has_touched_is_on_no_pages() -> None:
    with allocate() as cache:
        assert account(cache) == (0, 0)
        assert cache.page_bytes == 0


@pytest.mark.skipif(given_at_first_touch(), reason="all memory files have huge pages")
def test_memory_that_is_touched_is_on_the_systems_pages() -> None:
    with allocate() as cache:
        cache.view(0, "k")[:] = 7
        assert account(cache) == (N_HUGE * HUGE, 0)
        assert cache.page_bytes == mmap.PAGESIZE


@pytest.mark.skipif(not collapses(), reason="this kernel gives no huge pages")
@pytest.mark.parametrize("touched", [0, N_HUGE])
def test_registered_memory_is_on_huge_pages_and_keeps_its_bytes(touched: int) -> None:
    with allocate() as cache:
        cache.view(0, "k")[:touched] = np.arange(touched)[:, None] + 1
        register(cache)
        assert account(cache) == (N_HUGE * HUGE, N_HUGE * HUGE)
        assert cache.page_bytes == HUGE
        for i, block in enumerate(cache.view(0, "k")):
            assert set(block[:: mmap.PAGESIZE]) == {i + 1 if i < touched else 0}


@pytest.mark.skipif(not collapses(), reason="this kernel gives no huge pages")
@pytest.mark.skipif(given_at_first_touch(), reason="all memory files have huge pages")
def test_memory_of_which_a_quarter_is_on_small_pages_is_not_called_huge() -> None:
    for n_small, told in ((1, mmap.PAGESIZE), (0, HUGE)):
        with allocate() as cache:
            cache.view(0, "k")[:] = 1
            length = (N_HUGE - n_small) * HUGE
            register(cache, length)
            assert account(cache) == (N_HUGE * HUGE, length)
            assert cache.page_bytes == told


def test_memory_of_more_than_half_of_what_is_free_is_left_as_it_is() -> None:
    """To have it on huge pages would be to take it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = [int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")]
    n_blocks = free * 6 // 10 // HUGE
    with KVCache.allocate(
        n_layers=1, n_blocks=n_blocks, block_bytes=HUGE, planes=["k"]
    ) as cache:
        register(cache)
        assert account(cache) == (0, 0)
        assert cache.page_bytes == 0


@pytest.mark.skipif(not can_deny(), reason="the numbers of its calls are not known")
@pytest.mark.skipif(given_at_first_touch(), reason="all memory files have huge pages")
def test_where_the_kernel_refuses_it_is_told_and_nothing_else_changes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_pages"],
        capture_output=True,
        check=False,
        text=True,
        timeout=patient(60.0),
    )
    assert done.returncode == 0, done.stderr
    present, huge, told = json.loads(done.stdout)
    # A page of each huge one was touched in vain, before the kernel was asked.
    assert present == N_HUGE * mmap.PAGESIZE
    assert (huge, told) == (0, mmap.PAGESIZE)


def test_a_closed_cache_tells_nothing() -> None:
    cache = allocate()
    cache.close()
    with pytest.raises(ClosedResourceError):
        assert cache.page_bytes


if __name__ == "__main__":
    deny("madvise", errno.EINVAL)
    with allocate() as refused:
        register(refused)
        sys.stdout.write(json.dumps([*account(refused), refused.page_bytes]))
