"""The pauses between attempts: longer, bounded, spread, and forgotten."""

from __future__ import annotations

import random

import pytest

from kvxfer.backoff import Backoff, Backoffs


def test_pauses_double_up_to_five_seconds_and_are_spread() -> None:
    rng = random.Random(1)
    many = [Backoff(rng) for _ in range(200)]
    now = [0.0] * len(many)
    for attempt in range(12):
        middle = min(5.0, 0.05 * 2**attempt)
        pauses = [b.failed(t) for b, t in zip(many, now, strict=True)]
        now = [t + pause for t, pause in zip(now, pauses, strict=True)]
        assert all(0.5 * middle <= pause <= 1.5 * middle for pause in pauses)
        assert max(pauses) - min(pauses) > 0.8 * middle


def test_an_old_failure_is_forgotten() -> None:
    backoff = Backoff()
    for _ in range(8):
        backoff.failed(0.0)
    assert backoff.failed(1000.0) <= 0.075


def test_an_address_waits_for_itself_only() -> None:
    backoffs = Backoffs()
    pause = backoffs.failed("a", 10.0)
    assert backoffs.wait("a", 10.0) == pytest.approx(pause)
    assert backoffs.wait("a", 10.001 + pause) == backoffs.wait("b", 10.0) == 0.0
    backoffs.worked("a")
    assert backoffs.wait("a", 10.0) == 0.0


def test_addresses_that_failed_long_ago_are_dropped() -> None:
    backoffs = Backoffs()
    for i in range(5000):
        backoffs.failed(str(i), float(i))
    assert len(backoffs._by_address) <= 1025
