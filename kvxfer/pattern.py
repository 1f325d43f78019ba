"""Block contents that can be told apart: no two blocks hold the same bytes.

Every 64-bit word of a block is a mix of where the block goes (plane, layer, block
of the target) and of its position in the block. Whoever knows the place can fill a
block, and check it later without having seen the source.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_WORD = 8
# Odd constants of the splitmix64 generator (Steele, Lea and Flood, OOPSLA 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_CHUNK_BYTES = 8 << 20


def contents(
    plane: int, layer: int, block_ids: Ids, block_bytes: int, seed: int = 0
) -> NDArray[np.uint8]:
    """Return what the blocks of one plane and layer hold: ids x bytes."""
    n_words = -(-block_bytes // _WORD)
    place = (seed << 52) ^ (plane << 44) ^ (layer << 32)
    start = (block_ids.astype(np.uint64) ^ np.uint64(place & (2**64 - 1))) * _STEP
    words = start[:, None] + np.arange(n_words, dtype=np.uint64)[None, :] * _STEP
    words ^= words >> np.uint64(30)
    words *= _MIX
    words ^= words >> np.uint64(27)
    rows: NDArray[np.uint8] = words.view(np.uint8).reshape(len(block_ids), -1)
    return rows[:, :block_bytes]


def _chunks(block_ids: Ids, block_bytes: int) -> list[Ids]:
    n = max(1, _CHUNK_BYTES // block_bytes)
    return [block_ids[i : i + n] for i in range(0, len(block_ids), n)]


def fill(
    view: NDArray[np.uint8],
    local_ids: Ids,
    target_ids: Ids,
    plane: int,
    layer: int,
    seed: int = 0,
) -> None:
    """Fill local blocks with what belongs into the target's blocks."""
    size = view.shape[1]
    for ours, theirs in zip(
        _chunks(local_ids, size), _chunks(target_ids, size), strict=True
    ):
        view[ours] = contents(plane, layer, theirs, size, seed)


def wrong(
    view: NDArray[np.uint8], block_ids: Ids, plane: int, layer: int, seed: int = 0
) -> list[int]:
    """Return the blocks that do not hold, byte for byte, what they should."""
    found: list[int] = []
    for ids in _chunks(block_ids, view.shape[1]):
        expected = contents(plane, layer, ids, view.shape[1], seed)
        differs = (view[ids] != expected).any(axis=1)
        found.extend(int(i) for i in ids[differs])
    return found
