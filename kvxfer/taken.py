"""The blocks that an offer names, checked; and which blocks are offered now.

What is kept of them is a bit a block, for as long as any block of its group is
offered. Which request has a block is known by its ticket, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvxfer import wire
from kvxfer.blocks import Ids, as_ids
from kvxfer.cache import KVCache
from kvxfer.errors import LayoutError, UsageError
from kvxfer.layout import Group
from kvxfer.positions import Window

__all__ = ["Taken", "as_windows"]


def as_windows(
    cache: KVCache, blocks: Mapping[str, object], first_block: int | Mapping[str, int]
) -> dict[str, Window]:
    """Check the blocks of an offer and give them as windows, by group.

    Args:
      cache: Whose blocks they are.
      blocks: Block ids by group, one a position.
      first_block: The position of the first of them, by group or one for all.

    Raises:
      LayoutError: The cache has no such group or block, or one is named twice.
      UsageError: It is no mapping, too many, or a position is none.
    """
    given: object = blocks
    if not isinstance(given, Mapping) or not given:
        raise UsageError(
            "the blocks offered are a mapping of group to block ids, such as "
            '{"main": [3, 5]}'
        )
    windows = {}
    for name, ids in blocks.items():
        group = cache.group(name)
        first = first_block
        if isinstance(first, Mapping):
            first = first.get(name, 0)
        if isinstance(first, bool) or not 0 <= first < 1 << 31:
            raise UsageError(f"first_block is {first!r}, not a position")
        found = np.array(as_ids(ids, f"block ids of group {name!r}"))
        limit = min(_sizes(group))
        if found.size and not 0 <= found.min() <= found.max() < limit:
            raise LayoutError(
                f"group {name!r}: block ids {int(found.min())} to "
                f"{int(found.max())} are offered, of {limit} blocks"
            )
        windows[name] = Window(first, found)
    total = sum(map(len, windows.values()))
    if total > wire.MAX_OFFERED_BLOCKS:
        raise UsageError(
            f"{total} blocks in one offer, at most {wire.MAX_OFFERED_BLOCKS}"
        )
    return windows


class Taken:
    """The blocks that are offered now. Whoever changes it holds the owner's lock."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._marks: dict[str, _Marks] = {}

    def take(self, windows: Mapping[str, Window]) -> None:
        """Mark the blocks of an offer.

        Raises:
          UsageError: One is offered already; nothing has changed.
        """
        for name, window in windows.items():
            block = self.first_of(name, window.block_ids)
            if block is not None:
                raise UsageError(
                    f"block {block} of group {name!r} is offered to another "
                    "request that is not over"
                )
        for name, window in windows.items():
            if not len(window):
                continue
            marks = self._marks.get(name)
            if marks is None:
                # Layers may differ, and a direct write may name any block of its own.
                n_blocks = max(_sizes(self._cache.group(name)))
                marks = self._marks[name] = _Marks(n_blocks)
            marks.set(window.ascending)

    def release(self, windows: Mapping[str, Window]) -> None:
        """Take back the marks of an offer whose blocks were all marked."""
        for name, window in windows.items():
            if len(window) and self._marks[name].clear(window.ascending):
                del self._marks[name]

    def first_of(self, group: str, block_ids: Ids) -> int | None:
        """Find the first of some blocks that is offered; any thread, no lock."""
        marks = self._marks.get(group)
        return None if marks is None else marks.first_of(block_ids)


class _Marks:
    """A bit for each block of one group."""

    def __init__(self, n_blocks: int) -> None:
        self._bytes = np.zeros(-(-n_blocks // 8), np.uint8)
        self._n = 0

    def set(self, ascending: Ids) -> None:
        """Mark blocks that are not marked."""
        self._n += ascending.size
        at, bits = _by_byte(ascending)
        self._bytes[at] |= bits

    def clear(self, ascending: Ids) -> bool:
        """Take back marks; return whether there are none any more."""
        self._n -= ascending.size
        at, bits = _by_byte(ascending)
        self._bytes[at] &= ~bits
        return self._n == 0

    def first_of(self, block_ids: Ids) -> int | None:
        """Find the first block that is marked, in the order of the ids."""
        marked = self._bytes[block_ids >> 3] >> (block_ids & 7).astype(np.uint8) & 1
        if not marked.any():
            return None
        return int(block_ids[marked.argmax()])


def _by_byte(ascending: Ids) -> tuple[Ids, npt.NDArray[np.uint8]]:
    """Give the bytes that hold some blocks, none twice, and their bits in each.

    There is a block at least.
    """
    at = ascending >> 3
    bits = np.left_shift(np.uint8(1), (ascending & 7).astype(np.uint8))
    begins = np.ones(at.size, np.bool_)
    np.not_equal(at[1:], at[:-1], out=begins[1:])
    first = np.flatnonzero(begins)
    return at[first], np.bitwise_or.reduceat(bits, first)


def _sizes(group: Group) -> list[int]:
    """The numbers of blocks of a group's planes, layer by layer."""
    return [place.n_blocks for layer in group.layers for _, place in group.rows(layer)]
