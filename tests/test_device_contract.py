"""Run the contract suite on the software device over each wire, and on a NIC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvxfer import devices, ports
from kvxfer._verbs import Device
from kvxfer.options import Options
from tests.contract import DeviceContract
from tests.device_ends import Rig, Target

SOFT = [
    pytest.param(Target("soft0", "soft", wire="tcp"), id="soft-tcp"),
    pytest.param(Target("soft0", "soft", wire="cma"), id="soft-cma"),
    pytest.param(Target("soft0", "soft", wire="shm", shared=True), id="soft-shm"),
    # Memory that cannot be mapped: its bytes go through the ring.
    pytest.param(Target("soft0", "soft", wire="shm"), id="soft-shm-plain"),
]


class TestSoftware(DeviceContract):
    """The software device, both ends in this process."""

    @pytest.fixture(params=SOFT)
    def rig(self, request: pytest.FixtureRequest) -> Iterator[Rig]:
        with Rig(request.param) as rig:
            yield rig

    def test_wire(self, rig: Rig) -> None:
        """The wire is what was asked for, and known from the first contact."""
        a, b = rig.pair()
        assert a.qp.wire == "none"
        a.post(a.write(b, 0, 0, 8))
        a.reap_one()
        assert a.qp.wire == b.qp.wire == rig.target.wire


@pytest.mark.rdma
class TestHardware(DeviceContract):
    """The device of libibverbs that --rdma-device names, talking to itself."""

    @pytest.fixture
    def rig(self, rdma_device: str, gid_index: int | None) -> Iterator[Rig]:
        library = Options.load().ibverbs_path
        with Device(rdma_device, provider="libibverbs", path=library) as device:
            spec = devices.DeviceSpec(rdma_device, "libibverbs")
            gid = ports.choose_gid(device, spec, gid_index)
        target = Target(
            rdma_device,
            "libibverbs",
            gid_index=gid.index,
            library=library,
            strict=not rdma_device.startswith("rxe"),
        )
        with Rig(target) as rig:
            yield rig
