"""How long is too long, on this machine.

A deadline in a test says that something would have happened by then if it were going
to. How soon it happens depends on the machine, so every deadline is multiplied by one
factor: ``KVXFER_TEST_PATIENCE``, 1 where it is not set. ``scripts/rdma-guest`` sets
it, because there every instruction is emulated; on a machine that is much slower or
busier than a developer's set it yourself. What a test claims stays the same, and how
long one waits until it counts as broken is said at the top of each run.
"""

from __future__ import annotations

import os

#: How many times longer everything may take here.
FACTOR = float(os.environ.get("KVXFER_TEST_PATIENCE", "1"))
if not 1 <= FACTOR <= 100:
    raise SystemExit(f"KVXFER_TEST_PATIENCE={FACTOR:g} is not in [1, 100]")


def patient(seconds: float) -> float:
    """Return a deadline for this machine, from one for a developer's."""
    return seconds * FACTOR


def fewer(times: int) -> int:
    """Return how often to repeat here what is repeated ``times`` elsewhere."""
    return max(1, round(times / FACTOR))
