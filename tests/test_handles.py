"""Handles of verbs objects: closed in order, also by the garbage collector."""

from __future__ import annotations

import gc
import itertools
import warnings

import numpy as np
import pytest

from kvxfer._verbs import (
    CompletionQueue,
    Device,
    MemoryRegion,
    ProtectionDomain,
    QueuePair,
    live_objects,
)
from kvxfer.errors import ClosedResourceError
from kvxfer.verbs_types import QPLimits

MEMORY = np.zeros(4096, np.uint8)


class Tree:
    """A device and one of everything, in the order in which they are made."""

    def __init__(self) -> None:
        device = Device("soft0")
        pd = ProtectionDomain(device)
        cq = CompletionQueue(device, 16)
        mr = MemoryRegion(pd, MEMORY.ctypes.data, MEMORY.nbytes)
        qp = QueuePair(pd, cq, QPLimits())
        self.handles = [device, pd, cq, mr, qp]


def test_a_parent_closes_its_children() -> None:
    before = live_objects()
    tree = Tree()
    tree.handles[0].close()
    assert all(handle.closed for handle in tree.handles)
    assert live_objects() == before
    with pytest.raises(ClosedResourceError):
        ProtectionDomain(tree.handles[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7])
def test_a_tree_nobody_holds_is_closed(order: tuple[int, ...], action: str) -> None:
    """All of it at once, in any order and whatever becomes of the warnings."""
    before = live_objects()
    tree = Tree()
    # In a cycle, so that it takes the collector, which goes by an order of its own.
    knot: list[object] = [tree.handles[i] for i in order]
    knot.append(knot)
    del tree
    with warnings.catch_warnings():
        warnings.simplefilter(action, ResourceWarning)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            # What a finalizer raises is reported, and meant to be.
            patch.setattr("sys.unraisablehook", lambda unraisable: None)
            del knot
            gc.collect()
    assert live_objects() == before
