"""What libibverbs says of itself, and what is left in the kernel afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvxfer._verbs import Device, MemoryRegion, ProtectionDomain, list_devices
from kvxfer.errors import VerbsError
from kvxfer.verbs_types import Access, PortState
from tests.endpoints import connected, scattered, until

pytestmark = pytest.mark.rdma

Resources = Callable[[], dict[str, int]]


@pytest.fixture
def resources(device: str) -> Resources:
    """Return what counts the objects that the kernel has for the device."""
    if shutil.which("rdma") is None:
        pytest.skip("counting needs the command rdma, from iproute2")
    name = device.partition(":")[0]

    def count() -> dict[str, int]:
        out = subprocess.run(
            ["rdma", "-j", "resource", "show"], stdout=subprocess.PIPE, check=True
        )
        (found,) = (d for d in json.loads(out.stdout) if d["ifname"] == name)
        return {kind: found[kind] for kind in ("pd", "cq", "qp", "mr")}

    return count


def test_the_library_and_its_device(device: str) -> None:
    assert device.partition(":")[0] in {
        found.name for found in list_devices("libibverbs")
    }
    assert "libibverbs.so.1" in Path("/proc/self/maps").read_text()


def test_limits_and_port(device: str) -> None:
    """The port is asked by the way that knows of the struct's newer members."""
    name, _, port_num = device.partition(":")
    with Device(name, provider="libibverbs") as handle:
        limits = handle.query()
        assert limits.max_qp_wr >= 1024 and limits.max_cqe >= 1024
        assert limits.max_sge >= 1 and limits.max_qp_rd_atom >= 1
        port = handle.query_port(int(port_num or 1))
        assert port.state is PortState.ACTIVE
        assert port.link_layer in ("ethernet", "infiniband")
        assert 1 <= port.active_mtu <= 5
        assert port.max_msg_bytes >= 1 << 20 and port.gid_tbl_len >= 1
        with pytest.raises(VerbsError):
            handle.query_port(99)


def test_regions(device: str) -> None:
    memory = np.zeros(64 << 20, np.uint8)
    addr: int = memory.ctypes.data
    access = Access.LOCAL_WRITE | Access.REMOTE_WRITE
    with (
        Device(device.partition(":")[0], provider="libibverbs") as handle,
        ProtectionDomain(handle) as pd,
        MemoryRegion(pd, addr, memory.nbytes, access) as strict,
        # By another function of the library, or left out where it has none.
        MemoryRegion(pd, addr, memory.nbytes, access | Access.RELAXED_ORDERING) as lax,
    ):
        assert strict.rkey != lax.rkey


@pytest.mark.alone
async def test_nothing_is_left_in_the_kernel(resources: Resources) -> None:
    before = resources()
    for life in range(3):
        async with connected() as pair:
            await pair.check_write(scattered(32, 20, life), scattered(32, 20, 9))
            during = resources()
            assert during["qp"] >= before["qp"] + 2
            assert during["mr"] >= before["mr"] + 4
        await until(lambda: resources() == before)
