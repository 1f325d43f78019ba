"""The digest of a layer's blocks as they lie in a cache: xxh3, 64 bits.

It covers the blocks in the order of their positions and, in each, the planes in the
order of their names, so both sides compute the same from different addresses. It
finds corruption; against somebody who wants to deceive it proves nothing.
"""

from __future__ import annotations

import ctypes

import xxhash

from kvxfer.blocks import Ids
from kvxfer.layout import Group

__all__ = ["digest"]


def digest(group: Group, layer: int, block_ids: Ids) -> int:
    """Return the digest of some blocks of one layer; reads their memory."""
    state = xxhash.xxh3_64()
    ids = block_ids.tolist()
    for _, place in sorted(group.rows(layer)):
        run = ctypes.c_char * place.block_bytes
        for block_id in ids:
            address = place.base + block_id * place.block_stride
            state.update(memoryview(run.from_address(address)))
    return int(state.intdigest())
