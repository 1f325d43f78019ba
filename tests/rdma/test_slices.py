"""Memory registered in slices, on a device of libibverbs: the same tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.test_slices import WAYS
from tests.test_slices import test_writes_across_slices as writes_across_slices

pytestmark = pytest.mark.rdma


@WAYS
async def test_slices_on_both_sides(options: dict[str, Any]) -> None:
    """The numbers of regions are those of the software device; so are the bytes."""
    await writes_across_slices(700, 3000, options)
