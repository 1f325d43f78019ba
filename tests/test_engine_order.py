"""What the engine posts next: keys, turns, windows; against a model where it can be."""

from __future__ import annotations

import select
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.scheduler import make_key
from kvxfer.verbs_types import QPLimits
from tests.endpoints import SOON
from tests.engine_rig import Rig, Shape, as_array

SUCCESS = 0

deadlines = st.none() | st.integers(0, 10**6).map(lambda ms: ms / 1e3)
urgencies = st.tuples(deadlines, st.integers(-512, 511), st.integers(0, 2**16 - 1))


def rank(urgency: tuple[float | None, int, int]) -> tuple[bool, float, int, int]:
    """What the words say: deadline, then priority, then layer."""
    deadline, priority, layer = urgency
    return (deadline is None, deadline or 0.0, -priority, layer)


@given(st.lists(urgencies, min_size=2, max_size=8))
def test_keys_sort_as_the_words_say(found: list[tuple[float | None, int, int]]) -> None:
    keys = [make_key(*urgency) for urgency in found]
    by_words = sorted(range(len(found)), key=lambda i: (rank(found[i]), i))
    assert sorted(range(len(found)), key=lambda i: (keys[i], i)) == by_words
    assert all(0 <= key < 2**64 for key in keys)


def test_keys_of_what_is_out_of_range() -> None:
    assert make_key(-1.0) == make_key(0.0)
    assert make_key(1e12) < make_key(None)
    assert make_key(None, 10**6) == make_key(None, 511)
    assert make_key(None, -(10**6)) == make_key(None, -512)
    assert make_key(None, 0, 10**6) == make_key(None, 0, 2**16 - 1)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_a_simple_model(data: st.DataObject) -> None:
    """Whatever waits when there is room: the smallest key, then the oldest.

    The first submission fills the CQ and stands still; those behind it are of a size
    that is posted in one turn.
    """
    n_queues = data.draw(st.integers(1, 3))
    keys = data.draw(
        st.lists(
            st.tuples(st.integers(0, n_queues - 1), st.integers(0, 4)),
            min_size=1,
            max_size=12,
        )
    )
    with Rig(depth=64, cq_depth=16, notify=False) as rig:
        source = rig.source
        slots = [rig.slot]
        pairs = []
        for _ in range(n_queues - 1):
            qp = source.new_qp(QPLimits(max_send_wr=16))
            other = rig.target.new_qp(QPLimits())
            source.connect(qp, rig.target, other)
            slots.append(source.engine.add_initiator(qp, rig.rows()))
            pairs.append((qp, other))
        # All of the CQ: nothing else can be posted until it completes.
        first = rig.submit(range(40), range(40), [0], key=0)
        ids = as_array(range(3))
        submitted = [
            (key, i, source.engine.submit(slots[q], [1], ids, ids, b"", key)[0], q)
            for i, (q, key) in enumerate(keys)
        ]
        assert source.engine.unretired(rig.slot) == source.engine.cq.depth
        for qp, other in pairs:
            rig.target.connect(other, source, qp)
        rig.let_go()
        ends = rig.finish([*first, *(op for _, _, op, _ in submitted)])
        found = [end.op_id for end in ends]
        # On each queue completions come in the order of posting.
        for queue in range(n_queues):
            mine = [op for _, _, op, q in submitted if q == queue]
            wanted = [op for _, _, op, q in sorted(submitted) if q == queue]
            assert [op for op in found if op in mine] == wanted


def test_a_large_submission_does_not_starve_a_small_one() -> None:
    """Of the same key: after 4 MiB the other has its turn."""
    size = 1 << 20
    shape = Shape(
        n_local=16,
        n_remote=16,
        block_bytes=size,
        local_stride=size,
        remote_stride=size,
        n_rows=1,
        n_planes=1,
    )
    with Rig(shape, depth=16, notify=False, merge_bytes=1, window_bytes=size) as rig:
        (large,) = rig.submit(range(16), range(16))
        (small,) = rig.submit([1], [0])
        rig.let_go()
        ends = rig.finish([large, small])
        assert [end.op_id for end in ends] == [small, large]


def test_the_layers_of_one_submission_go_in_order() -> None:
    with Rig(depth=16) as rig:
        ids = rig.submit(range(8), range(8), [2, 0, 1])
        rig.let_go()
        assert [end.op_id for end in rig.finish(ids)] == ids


@pytest.mark.parametrize(
    ("options", "n_posted"),
    [
        ({"window_bytes": 1000}, [16, 16]),
        ({"window_bytes": 1}, [1, 1]),
        ({"device_window_bytes": 1000}, [16, 0]),
        ({"device_window_bytes": 1 << 20}, [80, 80]),
    ],
)
def test_bytes_in_flight_are_bounded(
    options: dict[str, Any], n_posted: list[int]
) -> None:
    """A chunk is posted whole; the first on an idle QP has 16 WRs."""
    chain = 1 if options == {"window_bytes": 1} else 64
    with Rig(depth=128, notify=False, chain=chain, **options) as rig:
        source = rig.source
        qp = source.new_qp(QPLimits(max_send_wr=128))
        other = rig.target.new_qp(QPLimits())
        source.connect(qp, rig.target, other)
        slot = source.engine.add_initiator(qp, rig.rows())
        ids = rig.submit(range(40), range(40))
        ids += source.engine.submit(slot, [1], as_array(range(40)), as_array(range(40)))
        posted = [source.engine.unretired(s) for s in (rig.slot, slot)]
        assert posted == n_posted
        rig.let_go()
        rig.target.connect(other, source, qp)
        assert {end.status for end in rig.finish(ids)} == {SUCCESS}
        wanted = rig.expected(range(40), range(40), [0, 1])
        assert (rig.target.memory == wanted).all()


def test_what_ends_while_nobody_looks_is_told() -> None:
    """A call that takes completions on the way leaves none of them unannounced."""
    with Rig() as rig:
        rig.let_go()
        engine = rig.source.engine
        rig.source.wait(lambda: True)
        ids = rig.submit([1], [2])
        rig.target.wait(lambda: rig.target.found)
        deadline = time.monotonic() + SOON
        while engine.in_flight:
            assert time.monotonic() < deadline
            engine.grant(rig.slot, 0, 0)
        engine.cq.drain_events()
        assert select.select([engine.fd], [], [], 0)[0], "nobody is told"
        (end,) = rig.finish(ids)
        assert end.status == SUCCESS
        assert not select.select([engine.fd], [], [], 0)[0]
