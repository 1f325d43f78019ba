"""The doctor and the table of devices on a real device of libibverbs."""

from __future__ import annotations

import sys
from asyncio.subprocess import PIPE, create_subprocess_exec

import pytest

from kvxfer import _verbs, devices
from kvxfer.doctor import cli, fabric, transfer
from kvxfer.doctor.machine import Machine
from kvxfer.doctor.report import Level
from kvxfer.options import Options
from kvxfer.sysfs import Sysfs
from tests.pages import ENDS, SAYS
from tests.test_doctor import listening

pytestmark = pytest.mark.rdma


def test_sysfs_and_verbs_agree(device: str) -> None:
    """What is read from files is what the device says of itself."""
    name, _, port = device.partition(":")
    options = Options()
    (verdict,) = [
        v
        for v in devices.look(options)
        if (v.spec.name, v.spec.port_num) == (name, int(port or 1))
    ]
    assert verdict.usable, verdict.reason
    (described,) = [
        p for p in Sysfs().ports(name) if p.port_num == verdict.spec.port_num
    ]
    assert (described.state, described.link_layer) == (
        *(verdict.port.state, verdict.port.link_layer),
    )
    assert described.lid == verdict.port.lid
    assert verdict.port.mtu_bytes in (256, 512, 1024, 2048, 4096)
    assert verdict.gid in described.gids
    with _verbs.Device(name, provider="libibverbs") as handle:
        for entry in described.gids:
            assert handle.query_gid(verdict.spec.port_num, entry.index) == entry.gid


async def test_blocks_are_written_and_compared(device: str) -> None:
    options = Options.load(device=device)
    found = await cli.transfers(Machine(), options)
    assert [f.level for f in found] == [Level.OK], found
    assert "by rdma" in found[0].found


async def test_the_whole_path_to_another_process(device: str) -> None:
    """What ``--peer`` does, by the device on both sides."""
    async with listening(device) as port:
        found = await transfer.probe("127.0.0.1", port, Options.load(device=device))
    assert [f.check for f in found] == [
        *("control", "negotiation", "packets", "data path", "verified")
    ], found
    assert not [f for f in found if f.level is Level.PROBLEM], found
    assert "blocks compared at the other side" in found[-1].found


def test_nothing_that_is_read_is_a_problem(device: str) -> None:
    options = Options.load(device=device)
    found = [
        *fabric.device_files(Machine(), options),
        *fabric.ports(Machine(), options),
    ]
    assert not [f for f in found if f.level is Level.PROBLEM], found


async def test_the_command(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words are shown, so that the documentation can have them."""
    process = await create_subprocess_exec(
        sys.executable, "-m", "kvxfer", "doctor", stdout=PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    name = device.partition(":")[0]
    text = out.decode()
    assert f"device {name}" in text and f"write {name}" in text
    with capsys.disabled():
        sys.stdout.write(f"\n{SAYS}\n{text}{ENDS}\n")
