"""What happens to a real device reaches those who use it.

Addresses are added and links taken down, so only Soft-RoCE on a netdev that the guest
has made for this is used.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvxfer.sysfs import Sysfs
from tests.endpoints import connected, until

pytestmark = [pytest.mark.rdma, pytest.mark.alone]

ADDRESS = "10.78.0.1"


def beneath(name: str) -> str:
    """Return the interface that a Soft-RoCE device is on."""
    return Path(f"/sys/class/infiniband/{name}/parent").read_text().strip()


@pytest.fixture
async def netdev(device: str) -> AsyncIterator[str]:
    """The interface beneath a Soft-RoCE device of the guest; left as it was."""
    name = device.partition(":")[0]

    def table() -> set[bytes]:
        return {entry.gid for port in Sysfs().ports(name) for entry in port.gids}

    before = table()
    if not Sysfs().is_soft_roce(name):
        pytest.skip("not Soft-RoCE: the addresses of a NIC are its owner's")
    found = beneath(name)
    if not found.startswith("veth"):
        pytest.skip(f"{found} is no interface that was made for the tests")
    yield found
    await asyncio.to_thread(ip, "link", "set", found, "up")
    # An address of IPv6 comes back a moment after the link.
    await until(lambda: table() == before)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=60)


async def test_an_address_that_is_added_is_seen(netdev: str) -> None:
    async with connected() as pair:
        adapter = pair.client._host.adapters[0]
        before = {gid.text for gid in adapter.described.gids}
        assert ADDRESS not in before
        await asyncio.to_thread(ip, "addr", "add", f"{ADDRESS}/24", "dev", netdev)
        try:
            await until(lambda: ADDRESS in {gid.text for gid in adapter.described.gids})
            await pair.check_write([1, 2], [3, 4])
        finally:
            await asyncio.to_thread(ip, "addr", "del", f"{ADDRESS}/24", "dev", netdev)
        await until(lambda: ADDRESS not in {gid.text for gid in adapter.described.gids})
        assert not adapter.trouble


async def test_a_link_that_goes_down_and_comes_up(netdev: str) -> None:
    async with connected() as pair:
        adapter = pair.client._host.adapters[0]
        await asyncio.to_thread(ip, "link", "set", netdev, "down")
        await until(lambda: "port is down" in adapter.trouble)
        await asyncio.to_thread(ip, "link", "set", netdev, "up")
        await until(lambda: not adapter.trouble)
