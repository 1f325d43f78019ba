"""Which blocks are offered now, against a plain set; and what that takes to keep."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer import KVCache
from kvxfer.errors import UsageError
from kvxfer.positions import Window
from kvxfer.taken import Taken

N = 40


def a_cache(n_blocks: int = N, at: int = 1 << 40) -> KVCache:
    """Describe a cache of one layer whose memory nobody looks at."""
    return KVCache.from_pointers({"k": [at]}, n_blocks=n_blocks, block_bytes=1)


def windows(ids: list[int], group: str = "main") -> dict[str, Window]:
    return {group: Window(0, np.array(ids, np.int64))}


#: Two blocks of a byte of marks, and of the last one, are often among them.
some_ids = st.lists(st.integers(0, N - 1), unique=True, max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(some_ids, st.integers(0, 12)), max_size=8))
def test_what_is_taken_is_a_set(offers: list[tuple[list[int], int]]) -> None:
    with a_cache() as cache:
        taken = Taken(cache)
        held: list[list[int]] = []
        for ids, over in offers:
            plain = {block for other in held for block in other}
            both = [block for block in ids if block in plain]
            if both:
                with pytest.raises(UsageError, match=f"block {both[0]} of group"):
                    taken.take(windows(ids))
            else:
                taken.take(windows(ids))
                held.append(ids)
            if over < len(held):
                taken.release(windows(held.pop(over)))
            plain = {block for other in held for block in other}
            for block in range(N):
                found = taken.first_of("main", np.array([block], np.int64))
                assert found == (block if block in plain else None)
        for ids in held:
            taken.release(windows(ids))
        assert taken.first_of("main", np.arange(N)) is None


def test_the_first_is_named_in_the_order_of_the_ids() -> None:
    with a_cache() as cache:
        taken = Taken(cache)
        taken.take(windows([3, 4, 17]))
        assert taken.first_of("main", np.array([5, 17, 3], np.int64)) == 17
        assert taken.first_of("other", np.array([3], np.int64)) is None


def test_a_bit_is_kept_for_a_block_and_nothing_when_none_is_offered() -> None:
    n_blocks = 8_000_000
    with a_cache(n_blocks) as cache:
        taken = Taken(cache)
        ends = windows([n_blocks - 1, 0])
        tracemalloc.start()
        try:
            taken.take(ends)
            kept = tracemalloc.get_traced_memory()[0]
            assert n_blocks // 8 <= kept < n_blocks // 8 + 10_000
            taken.release(ends)
            assert tracemalloc.get_traced_memory()[0] < 10_000
        finally:
            tracemalloc.stop()


def test_an_offer_that_is_refused_leaves_no_mark() -> None:
    parts = {"a": a_cache(), "b": a_cache(at=1 << 41)}
    with parts["a"], parts["b"], KVCache.grouped(parts) as cache:
        taken = Taken(cache)
        taken.take(windows([2], "b"))
        with pytest.raises(UsageError, match="block 2 of group 'b' is offered to"):
            taken.take(windows([1], "a") | windows([2], "b"))
        assert taken.first_of("a", np.array([1], np.int64)) is None
