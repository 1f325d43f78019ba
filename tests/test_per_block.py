"""What a write costs for a block: no Python object, no allocation, two ids of memory.

On the null device, so what is seen is the library's own and nothing of a wire's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.endpoints import Pair, arena, connected
from tests.patience import patient

FEW, MANY = 1_000, 100_000
ID_BYTES = 4  # an id as the engine keeps it, while it is under way


@contextlib.asynccontextmanager
async def idle_pair() -> AsyncIterator[Pair]:
    """Give a connected pair with MANY blocks on the null device."""
    planes = {"kv": (8, 24)}
    with (
        arena(n_blocks=MANY, layers=1, planes=planes, seed=1) as source,
        arena(n_blocks=MANY, layers=1, planes=planes, seed=2) as target,
    ):
        async with connected(source, target, device="null0", progress="event") as pair:
            yield pair


def tables(n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ids of ``n`` blocks on both sides, scattered: no two of them merge."""
    rng = np.random.default_rng(n)
    ours, theirs = (rng.permutation(MANY)[:n].copy() for _ in range(2))
    return ours, theirs


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
async def test_a_block_costs_no_python_object(dtype: type) -> None:
    """Neither while the write runs nor afterwards."""
    peaks, left = {}, {}
    async with idle_pair() as pair:
        ids: dict[int, list[NDArray[Any]]] = {
            n: [x.astype(dtype) for x in tables(n)] for n in (FEW, MANY)
        }
        for ours, theirs in ids.values():  # what is made once and kept
            await pair.client.write_cache(pair.peer, ours, theirs)
        tracemalloc.start()
        try:
            for n, (ours, theirs) in ids.items():
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                objects = sys.getallocatedblocks()
                result = await pair.client.write_cache(pair.peer, ours, theirs)
                assert result.wrs > 0.99 * n
                peaks[n] = tracemalloc.get_traced_memory()[1] - before
                left[n] = sys.getallocatedblocks() - objects
        finally:
            tracemalloc.stop()
    # The long one has to wait for its end, which takes a few objects.
    assert peaks[MANY] < peaks[FEW] + 8192
    assert left[MANY] < left[FEW] + 64


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="the C library does not tell what its heap holds: that takes glibc 2.33",
)
def test_a_block_costs_no_allocation_and_two_ids_of_memory() -> None:
    """In a process whose heap gives nothing back, so that it is as big as it ever was.

    A piece of memory for each block, freed again or not, would have 32 bytes.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_per_block"],
        capture_output=True,
        check=False,
        text=True,
        timeout=patient(60.0),
    )
    assert done.returncode == 0, done.stderr
    grown, kept = json.loads(done.stdout)
    assert grown < MANY * 2 * ID_BYTES + 65536
    assert kept < 4096


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


async def _measure() -> None:
    """Say by how much a write of MANY blocks lets C's heap grow, and what it keeps."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo
    async with idle_pair() as pair:
        few, many = tables(FEW), tables(MANY)
        for _ in range(2):
            await pair.client.write_cache(pair.peer, *few)
        assert libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        assert libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        while libc.mallinfo2().fordblks > 1 << 18:  # or that would be used first
            for _ in range(1000):
                libc.malloc(24)
        before = libc.mallinfo2()
        await pair.client.write_cache(pair.peer, *many)
        after = libc.mallinfo2()
    grown = after.arena + after.hblkhd - before.arena - before.hblkhd
    sys.stdout.write(json.dumps([grown, after.uordblks - before.uordblks]))


if __name__ == "__main__":
    asyncio.run(_measure())
