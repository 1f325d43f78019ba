"""The READ behind a write, on a device of libibverbs."""

from __future__ import annotations

import pytest

from tests.endpoints import connected, scattered, take

pytestmark = pytest.mark.rdma

OURS, THEIRS = scattered(32, 24, 1), scattered(32, 24, 2)


async def test_writes_that_flush() -> None:
    async with connected(flush="initiator_read") as pair:
        for layers in (0, [1, 2], None):
            await pair.check_write(OURS, THEIRS, layers)
        assert len(await take(pair.server, 6)) == 6
