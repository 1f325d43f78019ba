"""Token buckets, on a clock of the test's."""

from __future__ import annotations

from kvxfer import rates
from kvxfer.rates import Bucket, Buckets


def test_a_burst_then_so_many_a_second() -> None:
    bucket = Bucket(10.0, now=100.0)
    assert [bucket.take(100.0) for _ in range(11)] == [True] * 10 + [False]
    assert not bucket.take(100.09)
    assert not bucket.has(100.09)
    assert bucket.has(100.2) and bucket.has(100.2)
    assert bucket.take(100.2)
    assert not bucket.is_full(100.3)
    # A long silence saves up a second's worth and no more.
    assert bucket.is_full(200.0)
    assert sum(bucket.take(200.0) for _ in range(100)) == 10


def test_less_than_one_a_second() -> None:
    bucket = Bucket(0.5, now=0.0)
    assert bucket.take(0.0)
    assert not bucket.take(1.9)
    assert bucket.take(2.1)


def test_names_do_not_share_and_quiet_ones_are_forgotten() -> None:
    buckets = Buckets(2.0)
    assert [buckets.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert not buckets.has("a", 0.0)
    assert buckets.has("b", 0.0)
    assert buckets.take("b", 0.0)
    for i in range(2 * rates._MANY):
        buckets.take(f"n{i}", 10.0 + i)
    assert len(buckets) <= rates._MANY + 1
