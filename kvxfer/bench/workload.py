"""Which blocks a batch moves: the tables that every contender is given.

Pure arithmetic over numpy. A pool is divided into blocks; a table is a list of block
ids for each *set*, a set being the blocks of one batch. The sets of a table are
disjoint, so that successive batches touch other memory: it is cold as long as the
pool is larger than the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvxfer.errors import UsageError
from kvxfer.sizes import format_size, parse_list

Ids = NDArray[np.int64]

MAX_SETS = 64
"""Sets of a table; with more the tables themselves would fill the caches."""

_WORD = 8
_PAGE = 4096


def parse_count(text: str) -> int:
    """Read how many blocks a batch has.

    Raises:
      UsageError: It is no number, or 0.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise UsageError(f"{text!r} is not a number of blocks such as 1538")
    return int(text)


def parse_batches(text: str) -> tuple[int, ...]:
    """Read numbers of blocks by commas; ``64..1024`` goes up by doubling.

    Raises:
      UsageError: A part is no such number, or a range runs backwards.
    """
    return parse_list(text, parse_count)


def parse_pattern(text: str) -> int:
    """Return how many blocks lie together: 1 ``random``, N ``runs:N``, 0 all of them.

    Raises:
      UsageError: It is neither ``random``, ``contiguous`` nor ``runs:N``.
    """
    if text == "random":
        return 1
    if text == "contiguous":
        return 0
    name, _, number = text.partition(":")
    if name != "runs" or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"{text!r} is not random, contiguous or runs:N (N from 1)")
    return int(number)


@dataclass(frozen=True, order=True)
class Case:
    """One measurement of a sweep.

    Attributes:
      block_bytes: Bytes of a block.
      batch: Blocks of one batch, in each plane.
    """

    block_bytes: int
    batch: int


@dataclass(frozen=True)
class Workload:
    """What is moved, the same for every contender.

    Attributes:
      sizes: Bytes of a block.
      batches: Blocks of one batch, in each plane; each with every size.
      pool_bytes: Memory of each side, all planes together.
      pattern: How the blocks of a batch lie: ``random``, ``contiguous``, ``runs:N``.
      planes: Planes of a block: 2 moves K and V of the same ids.
      lanes: Batches in flight, over all threads.
      seed: For the tables.
    """

    sizes: tuple[int, ...]
    batches: tuple[int, ...] = (1538,)
    pool_bytes: int = 2 << 30
    pattern: str = "random"
    planes: int = 1
    lanes: int = 1
    seed: int = 1

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
          UsageError: A block is not made of words of 8 bytes, or the pool does not
            hold two batches for each one in flight. Two, since otherwise what an
            earlier batch left could not be told from what the last one wrote.
        """
        parse_pattern(self.pattern)
        for case in self.cases:
            size, batch = case.block_bytes, case.batch
            if size % _WORD:
                raise UsageError(f"blocks of {size} bytes: multiples of {_WORD} only")
            run = parse_pattern(self.pattern) or batch
            in_runs = -(-batch // run) * run
            need = 2 * self.lanes * in_runs * size * self.planes
            if need > self.plane_bytes * self.planes:
                raise UsageError(
                    f"a pool of {format_size(self.pool_bytes)} does not hold twice the "
                    f"{self.lanes} x {in_runs} blocks of {format_size(size)} in "
                    f"flight, which take {need} bytes: a larger --pool, fewer --batch, "
                    "--depth or --threads, smaller --sizes, or shorter runs"
                )

    @property
    def cases(self) -> list[Case]:
        """List what is measured: every size with every number of blocks."""
        return [Case(size, batch) for size in self.sizes for batch in self.batches]

    @property
    def plane_bytes(self) -> int:
        """Return the bytes of each plane of the pool: whole pages."""
        return self.pool_bytes // self.planes // _PAGE * _PAGE

    def n_blocks(self, size: int) -> int:
        """Return how many blocks of ``size`` bytes a plane of the pool has."""
        return self.plane_bytes // size

    def tables(self, case: Case) -> Tables:
        """Make the tables of a case, the same in every process."""
        size, batch = case.block_bytes, case.batch
        slots = self.n_blocks(size)
        run = parse_pattern(self.pattern) or batch
        n_runs = -(-batch // run)
        sets = max(1, min(MAX_SETS, slots // run // n_runs))
        sets = max(1, sets // self.lanes) * self.lanes
        random = np.random.default_rng([self.seed, size])

        def one() -> Ids:
            runs = random.permutation(slots // run)[: sets * n_runs]
            ids = runs[:, None] * run + np.arange(run)[None, :]
            table = ids.reshape(sets, n_runs * run)[:, :batch]
            return np.ascontiguousarray(table, dtype=np.int64)

        return Tables(size, one(), one(), self.lanes)


@dataclass(frozen=True, eq=False)
class Tables:
    """The ids of one block size, ``sets`` x ``batch``, on both sides."""

    block_bytes: int
    source: Ids
    target: Ids
    lanes: int = 1

    @property
    def batch(self) -> int:
        """Blocks of one batch, in each plane."""
        return int(self.source.shape[1])

    @property
    def sets(self) -> int:
        """How many batches there are before memory is used again."""
        return len(self.source)

    @property
    def sets_of_a_lane(self) -> int:
        """As many belong to each batch in flight."""
        return self.sets // self.lanes

    def pick(self, lane: int, n: int) -> tuple[int, int]:
        """Return the source and the target set of a lane's ``n``-th batch.

        Every other time that the lane goes through its sets, the target sets are
        moved on by one: a target set is never given the contents that it holds
        already, and what an earlier batch left there is not taken for the last one's.
        """
        mine = self.sets_of_a_lane
        moved = n // mine % 2
        return lane * mine + n % mine, lane * mine + (n + moved) % mine

    def pairs(self) -> list[tuple[int, int]]:
        """List all pairs of sets that :meth:`pick` can give."""
        mine = self.sets_of_a_lane
        return sorted(
            {self.pick(lane, n) for lane in range(self.lanes) for n in range(2 * mine)}
        )

    def last(self, lane: int, n: int, at_most: int) -> Iterator[tuple[int, int]]:
        """Give the sets of the last of ``n`` batches that no later one wrote over.

        Args:
          at_most: How many; there are as many if the lane has moved so many sets.
        """
        seen: set[int] = set()
        for i in range(n - 1, -1, -1):
            source, target = self.pick(lane, i)
            if len(seen) == at_most:
                return
            if target not in seen:
                seen.add(target)
                yield source, target


def contents(words: NDArray[np.uint64]) -> None:
    """Fill a source: every word holds its own index."""
    step = 1 << 20
    for start in range(0, len(words), step):
        part = words[start : start + step]
        part[:] = np.arange(start, start + len(part), dtype=np.uint64)


def wrong_blocks(
    plane: NDArray[np.uint64], size: int, source: Ids, target: Ids, first: int = 0
) -> int:
    """Count the target's blocks that do not hold, byte for byte, the source's.

    Args:
      plane: Words of the target's plane.
      size: Bytes of a block.
      source: Ids of the source's blocks.
      target: Where each of them must be.
      first: Index of the plane's first word in the source.
    """
    n_words = size // _WORD
    rows = plane[: len(plane) // n_words * n_words].reshape(-1, n_words)
    step = max(1, (4 << 20) // size)
    counting = np.arange(n_words, dtype=np.uint64)
    found = 0
    for at in range(0, len(target), step):
        words = source[at : at + step].astype(np.uint64) * np.uint64(n_words)
        expected = (words + np.uint64(first))[:, None] + counting
        found += int((rows[target[at : at + step]] != expected).any(axis=1).sum())
    return found


def unseen_blocks(
    plane: NDArray[np.uint64], size: int, source: Ids, target: Ids, first: int = 0
) -> int:
    """Count the target's blocks whose last word is not the source's yet."""
    n_words = size // _WORD
    rows = plane[: len(plane) // n_words * n_words].reshape(-1, n_words)
    expected = source.astype(np.uint64) * np.uint64(n_words) + np.uint64(
        first + n_words - 1
    )
    return int((rows[target, n_words - 1] != expected).sum())
