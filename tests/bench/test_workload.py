"""The tables: the right blocks, in disjoint sets, and what is wrong is seen."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvxfer.bench.workload import (
    MAX_SETS,
    Case,
    Tables,
    Workload,
    contents,
    parse_batches,
    parse_pattern,
    unseen_blocks,
    wrong_blocks,
)
from kvxfer.errors import UsageError
from kvxfer.sizes import format_size, parse_size, parse_sizes

SIZE = 1024


def workload(**changes: object) -> Workload:
    fields = {"sizes": (SIZE,), "batches": (10,), "pool_bytes": 1 << 20, **changes}
    return Workload(**fields)  # type: ignore[arg-type]


# -- reading ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4096", 4096), ("64K", 65536), ("2M", 2 << 20), ("1g", 1 << 30), ("8KiB", 8192)],
)
def test_sizes_are_powers_of_1024(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5K", "K", "12T", "4 K"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_lists_and_ranges_of_sizes() -> None:
    assert parse_sizes("1K..8K") == (1024, 2048, 4096, 8192)
    assert parse_sizes("64K,1K,64K") == (65536, 1024)
    assert parse_sizes("1K..3K") == (1024, 2048)
    with pytest.raises(UsageError, match="runs backwards"):
        parse_sizes("8K..1K")


def test_lists_and_ranges_of_batches() -> None:
    assert parse_batches("64..512,1538") == (64, 128, 256, 512, 1538)
    for text in ("", "0", "1K", "-1", "1.5", "64,"):
        with pytest.raises(UsageError, match="not a number of blocks"):
            parse_batches(text)
    with pytest.raises(UsageError, match="runs backwards"):
        parse_batches("64..8")


def test_every_size_is_measured_with_every_batch() -> None:
    load = workload(sizes=(8, 16), batches=(1, 2))
    assert load.cases == [Case(8, 1), Case(8, 2), Case(16, 1), Case(16, 2)]
    assert [load.tables(case).batch for case in load.cases] == [1, 2, 1, 2]


@pytest.mark.parametrize("n_bytes", [1, 1000, 1024, 65536, 3 << 20, 2 << 30])
def test_what_is_printed_can_be_read(n_bytes: int) -> None:
    assert parse_size(format_size(n_bytes)) == n_bytes


def test_patterns() -> None:
    assert [parse_pattern(p) for p in ("random", "contiguous", "runs:8")] == [1, 0, 8]
    for text in ("runs", "runs:0", "runs:x", "sequential", ""):
        with pytest.raises(UsageError, match="runs:N"):
            parse_pattern(text)


# -- tables -------------------------------------------------------------------------


def check_sets(tables: Tables, n_blocks: int) -> None:
    """Every id is a block of the pool, and no two of a table are the same."""
    for table in (tables.source, tables.target):
        assert table.dtype == np.int64
        assert len(np.unique(table)) == table.size
        assert table.min() >= 0 and table.max() < n_blocks


@pytest.mark.parametrize("pattern", ["random", "contiguous", "runs:4"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_sets_are_disjoint_and_of_the_pool(pattern: str, lanes: int) -> None:
    load = workload(pattern=pattern, lanes=lanes)
    tables = load.tables(Case(SIZE, 10))
    assert tables.source.shape == tables.target.shape == (tables.sets, 10)
    assert tables.sets % lanes == 0
    assert lanes < tables.sets <= MAX_SETS
    check_sets(tables, 1024)


def test_both_sides_make_the_same_tables() -> None:
    one, two = workload().tables(Case(SIZE, 10)), workload().tables(Case(SIZE, 10))
    assert (one.source == two.source).all() and (one.target == two.target).all()
    assert (one.source != one.target).any()
    assert (workload(seed=2).tables(Case(SIZE, 10)).source != one.source).any()


def steps(table: NDArray[np.int64]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.diff(table, axis=1) == 1
    return found


def test_how_blocks_lie() -> None:
    assert steps(workload(pattern="contiguous").tables(Case(SIZE, 10)).source).all()
    assert steps(workload(pattern="random").tables(Case(SIZE, 10)).source).mean() < 0.1
    runs = steps(workload(pattern="runs:5").tables(Case(SIZE, 10)).target)
    assert runs[:, [0, 1, 2, 3, 5, 6, 7, 8]].all()


def test_planes_share_the_pool() -> None:
    load = workload(planes=2)
    assert load.n_blocks(SIZE) == 512
    check_sets(load.tables(Case(SIZE, 10)), 512)


def test_a_target_set_never_gets_what_it_holds() -> None:
    tables = workload(pool_bytes=1 << 16, lanes=2).tables(Case(SIZE, 10))
    for lane in range(2):
        held: dict[int, int] = {}
        for n in range(6 * tables.sets_of_a_lane):
            source, target = tables.pick(lane, n)
            assert held.get(target) != source
            held[target] = source
    assert {tables.pick(lane, n) for lane in range(2) for n in range(50)} == set(
        tables.pairs()
    )


def test_lanes_keep_to_their_own_sets() -> None:
    tables = workload(lanes=3).tables(Case(SIZE, 10))
    used = [{tables.pick(lane, n)[1] for n in range(100)} for lane in range(3)]
    assert sum(map(len, used)) == len(set().union(*used)) == tables.sets


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6, 7, 11, 12, 13])
def test_the_last_batches_are_what_lies_there(n: int) -> None:
    tables = workload(pool_bytes=1 << 16).tables(Case(SIZE, 10))
    held = {}
    for i in range(n):
        source, target = tables.pick(0, i)
        held[target] = source
    last = list(tables.last(0, n, 3))
    assert len(last) == min(len(held), 3)
    assert all(held[target] == source for source, target in last)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="multiples of 8"):
        workload(sizes=(1001,)).check()
    workload(batches=(512,)).check()
    with pytest.raises(UsageError, match="--pool") as caught:
        workload(batches=(10, 513)).check()
    assert "1M" in str(caught.value) and "513" in str(caught.value)
    workload(batches=(512,), pattern="runs:512").check()
    with pytest.raises(UsageError, match="shorter runs"):
        workload(pattern="runs:513").check()
    with pytest.raises(UsageError, match="--threads"):
        workload(batches=(512,), lanes=2).check()


# -- contents -----------------------------------------------------------------------


def test_a_wrong_byte_is_seen() -> None:
    tables = workload().tables(Case(SIZE, 10))
    source = np.zeros(1 << 17, np.uint64)
    contents(source)
    target = np.zeros_like(source)
    words = SIZE // 8
    ours, theirs = tables.source[0], tables.target[1]
    assert wrong_blocks(target, SIZE, ours, theirs) == len(ours)
    assert unseen_blocks(target, SIZE, ours, theirs) == len(ours)
    target.reshape(-1, words)[theirs] = source.reshape(-1, words)[ours]
    assert wrong_blocks(target, SIZE, ours, theirs) == 0
    assert unseen_blocks(target, SIZE, ours, theirs) == 0
    target.view(np.uint8)[int(theirs[3]) * SIZE + 17] ^= 1
    assert wrong_blocks(target, SIZE, ours, theirs) == 1
    assert unseen_blocks(target, SIZE, ours, theirs) == 0
    target.view(np.uint8)[int(theirs[4]) * SIZE + SIZE - 1] ^= 1
    assert unseen_blocks(target, SIZE, ours, theirs) == 1


def test_contents_of_a_second_plane() -> None:
    tables = workload().tables(Case(SIZE, 10))
    target = np.zeros(1 << 17, np.uint64)
    rows = target.reshape(-1, SIZE // 8)
    ours, theirs = tables.source[0], tables.target[0]
    rows[theirs] = (
        5000 + np.arange(len(target), dtype=np.uint64).reshape(rows.shape)[ours]
    )
    assert wrong_blocks(target, SIZE, ours, theirs, first=5000) == 0
    assert wrong_blocks(target, SIZE, ours, theirs) == len(ours)
    assert unseen_blocks(target, SIZE, ours, theirs, first=5000) == 0
