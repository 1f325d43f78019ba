"""Positions, what is skipped and what is covered, against plain sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.errors import LayoutError
from kvxfer.positions import Spans, Window, overlap, runs_of

small = st.integers(0, 40)


@settings(deadline=None)
@given(small, small, small, small)
def test_overlap_is_the_intersection(
    first: int, n: int, offer_first: int, offer_n: int
) -> None:
    run = range(first, first + n)
    window = range(offer_first, offer_first + offer_n)
    if n and run[-1] >= window.stop:
        with pytest.raises(LayoutError, match="only those up to"):
            overlap(first, n, offer_first, offer_n)
        return
    part = overlap(first, n, offer_first, offer_n)
    written = [position for position in run if position in window]
    assert list(run[part.skip : part.skip + part.n]) == written
    assert list(window[part.start : part.start + part.n]) == written
    assert part.skip + part.n == n


@settings(deadline=None)
@given(st.lists(st.tuples(small, st.integers(0, 12))), small)
def test_spans_are_a_set(runs: list[tuple[int, int]], start: int) -> None:
    spans = Spans()
    plain: set[int] = set()
    for first, n in runs:
        spans.add(first, first + n)
        plain |= set(range(first, first + n))
    assert spans.positions().tolist() == sorted(plain)
    assert len(spans) == len(plain)
    kept = list(spans)
    assert all(a < b for a, b in kept)
    assert all(kept[i][1] < kept[i + 1][0] for i in range(len(kept) - 1))
    end = start
    while end in plain:
        end += 1
    assert spans.run_end(start) == end
    copy = Spans()
    copy.update(spans)
    assert copy == spans


@settings(deadline=None)
@given(st.lists(small), st.integers(0, 9))
def test_runs_are_what_is_consecutive(positions: list[int], _: int) -> None:
    found = list(runs_of(np.array(positions, np.int64)))
    assert [p for start, stop in found for p in range(start, stop)] == positions
    assert all(found[i][1] != found[i + 1][0] for i in range(len(found) - 1))


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), unique=True), small, st.data())
def test_a_window_knows_its_blocks(
    ids: list[int], first: int, data: st.DataObject
) -> None:
    window = Window(first, np.array(ids, np.int64))
    some = data.draw(st.lists(st.sampled_from(ids), unique=True)) if ids else []
    positions = window.positions_of(np.array(some, np.int64))
    assert positions.tolist() == [first + ids.index(block) for block in some]
    assert window.ids_at(positions).tolist() == some
    stranger = data.draw(st.integers(0, 120).filter(lambda x: x not in ids))
    with pytest.raises(LayoutError, match=f"block {stranger} is not among"):
        window.positions_of(np.array([*some, stranger], np.int64))


def test_a_window_has_no_block_twice() -> None:
    with pytest.raises(LayoutError, match="block id 4 is offered twice"):
        Window(0, np.array([4, 3, 4], np.int64))
