"""The transfers that are tried on the software device, over libibverbs.

The tests are the same; here the device that ``--rdma-device`` names moves the
bytes.
"""

from __future__ import annotations

import pytest

from tests.test_flow import *  # noqa: F403
from tests.test_transfer import *  # noqa: F403

pytestmark = pytest.mark.rdma


@pytest.fixture(autouse=True)  # type: ignore[no-redef]  # instead of theirs
def wire(device: str) -> str:
    """How bytes travel."""
    return "rdma"
