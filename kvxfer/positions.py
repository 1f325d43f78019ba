"""Where the blocks of a request are: positions, what is skipped, what is covered.

A position counts the blocks of a request from its beginning, whatever the ids on
either side. An offer covers a window of positions; what a writer has ready is a run
of positions too, and only the part inside the window is written. Pure arithmetic.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvxfer.blocks import Ids
from kvxfer.errors import LayoutError

__all__ = ["Part", "Spans", "Window", "overlap", "runs_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a run of blocks that is to be written.

    Attributes:
      skip: Blocks at the run's beginning that the offer's window leaves out.
      start: Index of the first block that is written, among those offered.
      n: Blocks written.
    """

    skip: int
    start: int
    n: int


def overlap(first_block: int, n: int, offer_first: int, offer_n: int) -> Part:
    """Find the part of a run of positions that an offer's window wants.

    Args:
      first_block: Position of the run's first block.
      n: Blocks of the run.
      offer_first: Position of the first block offered; what is before it is there
        already and is skipped.
      offer_n: Blocks offered.

    Raises:
      LayoutError: The run goes beyond the window's end: those blocks are nobody's.
    """
    if n and first_block + n > offer_first + offer_n:
        raise LayoutError(
            f"blocks at positions {first_block} to {first_block + n - 1} are ready, "
            f"but only those up to {offer_first + offer_n - 1} are offered"
        )
    skip = min(n, max(0, offer_first - first_block))
    return Part(skip, max(0, first_block + skip - offer_first), n - skip)


class Spans:
    """A set of positions, kept as runs that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spans) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Spans({', '.join(f'{a}..{b - 1}' for a, b in self)})"

    def add(self, start: int, stop: int) -> None:
        """Add the positions ``start`` to ``stop - 1``."""
        if start >= stop:
            return
        # Runs that touch the new one become part of it.
        low = bisect_left(self._stops, start)
        high = bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]

    def update(self, other: Spans) -> None:
        """Add all positions of another set."""
        for start, stop in other:
            self.add(start, stop)

    def run_end(self, start: int) -> int:
        """Return where the run that begins at ``start`` or before it ends.

        ``start`` itself if that position is not in the set.
        """
        i = bisect_right(self._starts, start) - 1
        return self._stops[i] if i >= 0 and self._stops[i] > start else start

    def positions(self) -> Ids:
        """List the positions, ascending."""
        runs = [np.arange(start, stop, dtype=np.int64) for start, stop in self]
        return np.concatenate(runs) if runs else np.empty(0, np.int64)


class Window:
    """The blocks of one group that an offer covers, and the way back to positions.

    Args:
      first_block: Position of the first of them.
      block_ids: One id a position, none twice.

    Raises:
      LayoutError: An id occurs twice.
    """

    def __init__(self, first_block: int, block_ids: Ids) -> None:
        self.first_block = first_block
        self.block_ids = block_ids
        self._order = np.argsort(block_ids, kind="stable")
        self._sorted = block_ids[self._order]
        twice = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        if twice.size:
            raise LayoutError(f"block id {int(twice[0])} is offered twice")

    def __len__(self) -> int:
        return int(self.block_ids.size)

    @property
    def stop(self) -> int:
        """The position behind the last one offered."""
        return self.first_block + len(self)

    @property
    def ascending(self) -> Ids:
        """The block ids, sorted."""
        return self._sorted

    def positions_of(self, block_ids: Ids) -> Ids:
        """Return the positions of some of the blocks.

        Raises:
          LayoutError: A block is not among those offered; names the first.
        """
        at = np.searchsorted(self._sorted, block_ids)
        known = at < self._sorted.size
        known[known] = self._sorted[at[known]] == block_ids[known]
        if not known.all():
            stranger = int(block_ids[~known][0])
            raise LayoutError(f"block {stranger} is not among those offered")
        found: Ids = self._order[at].astype(np.int64) + self.first_block
        return found

    def ids_at(self, positions: Ids) -> Ids:
        """Return the block ids at some positions, all inside the window."""
        found: Ids = self.block_ids[positions - self.first_block]
        return found


def runs_of(positions: Ids) -> Iterator[tuple[int, int]]:
    """Yield the runs of consecutive positions, in their order, as start and stop."""
    if not positions.size:
        return
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    edges = [0, *breaks.tolist(), int(positions.size)]
    for low, high in itertools.pairwise(edges):
        start = int(positions[low])
        yield start, start + (high - low)
