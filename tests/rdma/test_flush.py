"""The READ behind a write, by either side, on a device of libibverbs."""

from __future__ import annotations

import pytest

from tests.endpoints import connected, scattered, take

pytestmark = pytest.mark.rdma

OURS, THEIRS = scattered(32, 24, 1), scattered(32, 24, 2)


@pytest.mark.parametrize("flush", ["initiator_read", "target_read"])
async def test_writes_that_flush(flush: str) -> None:
    async with connected(flush=flush) as pair:
        for layers in (0, [1, 2], None):
            await pair.check_write(OURS, THEIRS, layers)
        assert len(await take(pair.server, 6)) == 6
