"""Idle costs nothing: connected, quiet, and next to no processor time."""

from __future__ import annotations

import asyncio
import sys
import textwrap

import pytest

from tests.endpoints import SOON

# What is measured is processor time, not time: a busy machine changes nothing.
PROGRAM = """
    import asyncio, os
    from tests.endpoints import connected, take

    SECONDS = 2.0

    def used():
        times = os.times()
        return times.user + times.system

    async def main():
        async with connected(ping_interval=1.0, ping_timeout=5.0) as pair:
            arrivals = asyncio.ensure_future(take(pair.server, 7))
            await pair.check_write(range(32), range(32))
            await pair.check_write(range(32), range(31, -1, -1))
            before = used()
            await asyncio.sleep(SECONDS)
            print((used() - before) / SECONDS, pair.peer.wire)
            assert pair.peer.connected
            await pair.check_write([1], [2], 0)
            await arrivals

    asyncio.run(main())
"""


@pytest.mark.parametrize("wire", ["tcp", "cma", "shm"])
async def test_an_idle_connection_takes_no_processor_time(
    wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client, server and their devices together, after some work."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", wire)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(PROGRAM),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), SOON)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    share, travelled = output.decode().split()
    assert travelled == wire
    assert float(share) < 0.02
