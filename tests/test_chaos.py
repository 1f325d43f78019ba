"""The chaos of :mod:`tests.chaos`, for seconds here and a minute in CI."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.chaos import chaos, say


@pytest.mark.parametrize(
    "seconds",
    [6.0, pytest.param(60.0, marks=pytest.mark.slow)],
    ids=["brief", "minute"],
)
def test_chaos_moves_no_foreign_byte(seconds: float) -> None:
    seed = int(os.environ.get("KVXFER_CHAOS_SEED", "0")) or int.from_bytes(
        os.urandom(4), "little"
    )
    say(f"KVXFER_CHAOS_SEED={seed}")
    counts = asyncio.run(chaos(seconds, seed))
    assert counts.ends["done"] and counts.ends["aborted"] and counts.faults
