"""Which device and GID is chosen, on machines that are made up, and what is said."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvxfer import devices, devices_cli, inventory
from kvxfer.devices import Verdict
from kvxfer.errors import DeviceUnavailableError, OptionError
from kvxfer.gids import GID, ROCE_V1, ROCE_V2, Family, choose, explain
from kvxfer.inventory import Inventory
from kvxfer.options import Options
from kvxfer.sysfs import Sysfs
from kvxfer.topology import Distance, Place, distance
from tests.machines import Machine, make

Judge = Callable[..., list[Verdict]]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the directory of a machine, made once."""
    made: dict[str, Path] = {}

    def root(name: str) -> Path:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name) / "machine").root
        return made[name]

    return root


@pytest.fixture
def judge(machines: Callable[[str], Path]) -> Judge:
    """Judge the devices of a machine under some options."""

    def run(
        name: str, *, node: int | None = None, visible: str = "", **options: Any
    ) -> list[Verdict]:
        root = machines(name)
        found = Options(sysfs=str(root / "sys"), **options)
        return devices.judge(look(root), found, Place(numa_node=node), visible)

    return run


def look(root: Path) -> Inventory:
    sysfs = Sysfs(root / "sys", root / "proc")
    return Inventory(tuple(sysfs.devices()), tuple(sysfs.gpus()))


def winner(verdicts: list[Verdict]) -> Verdict:
    (found,) = [verdict for verdict in verdicts if verdict.chosen]
    return found


def reasons(verdicts: list[Verdict]) -> dict[str, str]:
    return {verdict.spec.label: verdict.reason for verdict in verdicts}


# -- what is chosen ---------------------------------------------------------------


@pytest.mark.parametrize("gpu", range(8))
def test_each_gpu_gets_the_nic_on_its_switch(judge: Judge, gpu: int) -> None:
    found = winner(judge("dgx", gpu_index=gpu))
    assert (found.spec.label, found.distance) == (f"mlx5_{gpu}", Distance.PIX)
    assert found.gid is not None
    assert str(found.gid) == f"3: 172.16.{gpu}.10 RoCE v2 on rdma{gpu}"


def test_the_losers_know_why(judge: Judge) -> None:
    verdicts = judge("dgx", gpu_index=0)
    assert [v.spec.label for v in verdicts if v.usable] == [
        *("mlx5_0", "mlx5_8"),
        *(f"mlx5_{i}" for i in range(1, 8)),
        "soft0",
    ]
    why = reasons(verdicts)
    assert why["mlx5_8"] == "PHB from the GPU, mlx5_0 is PIX"
    assert why["mlx5_3"] == "NODE from the GPU, mlx5_0 is PIX"
    assert why["mlx5_4"] == "SYS from the GPU, mlx5_0 is PIX"
    assert "25 Gb/s, mlx5_0 has 400" in why["mlx5_9"]


def test_a_port_for_management_is_used_if_named(judge: Judge) -> None:
    assert winner(judge("dgx", device="mlx5_9")).spec.label == "mlx5_9"


def test_the_gpu_by_its_pci_address_as_cuda_writes_it(judge: Judge) -> None:
    for text in ("0000:B8:06.0", "00000000:b8:06.0", "b8:06.0"):
        assert winner(judge("dgx", gpu_pci=text)).spec.label == "mlx5_5"


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [("6,2", "mlx5_2"), ("GPU-8932f937", "mlx5_1"), ("5", "mlx5_1")],
)
def test_gpus_that_cuda_hides(judge: Judge, visible: str, chosen: str) -> None:
    """Where it cannot be told which GPU is meant, NICs are taken in turn."""
    assert winner(judge("dgx", gpu_index=1, visible=visible)).spec.label == chosen


def test_a_gpu_that_is_not_here_is_said(judge: Judge) -> None:
    for options, visible, words in (
        ({"gpu_index": 77}, "", "GPU 77 is not here: there are 8"),
        ({"gpu_index": 1}, "5", "GPU 1 is not here: CUDA_VISIBLE_DEVICES=5 is 1"),
        ({"gpu_index": 0}, "9", "GPU 9, by CUDA_VISIBLE_DEVICES, is not here: there"),
        ({"gpu_pci": "1b:00.0"}, "", "GPU 1b:00.0 is not here: there are 0000:18:06.0"),
    ):
        verdict = winner(judge("dgx", visible=visible, **options))
        assert verdict.spec.provider == "libibverbs"
        assert words in verdict.reason
    # What cannot be told is not said.
    for name, options, visible in (
        ("dgx", {"gpu_index": 7}, ""),
        ("dgx", {"gpu_index": 77}, "GPU-8932f937"),
        ("container", {"gpu_index": 77}, ""),
        ("container", {"gpu_pci": "1b:00.0"}, ""),
    ):
        verdict = winner(judge(name, visible=visible, **options))
        assert "not here" not in verdict.reason


def test_without_a_gpu_the_processor_decides(judge: Judge) -> None:
    assert winner(judge("dgx", node=1)).spec.label == "mlx5_4"
    assert reasons(judge("dgx", node=1))["mlx5_0"] == "on NUMA node 0, unlike mlx5_4"
    assert winner(judge("dgx")).spec.label == "mlx5_0"


def test_nics_of_the_seed_go_by_modulo(judge: Judge) -> None:
    nics = "mlx5_6, mlx5_2 ,mlx5_6"
    for gpu, chosen in ((None, 6), (0, 6), (1, 2), (2, 6), (3, 6), (4, 2)):
        verdicts = judge("dgx", nics=nics, gpu_index=gpu)
        assert [v.spec.label for v in verdicts if v.usable] == [f"mlx5_{chosen}"]
        assert winner(verdicts).reason == "named by the option nics"
    assert winner(judge("dgx", nics=nics, device="mlx5_1")).spec.label == "mlx5_1"


def test_where_pci_says_nothing_nics_are_taken_in_turn(judge: Judge) -> None:
    labels = [winner(judge("virtual", gpu_index=i)).spec.label for i in range(4)]
    assert labels == ["mlx5_0", "mlx5_1", "mlx5_0", "mlx5_1"]
    assert (
        "2 that are as good, by gpu_index"
        in winner(judge("virtual", gpu_index=1)).reason
    )


def test_the_active_port_of_two(judge: Judge) -> None:
    for device in ("auto", "mlx4_0", "mlx4_0:2"):
        found = winner(judge("dual_port", device=device))
        assert found.spec.label == "mlx4_0:2"
        assert found.gid is not None and found.gid.text == "10.4.0.7"
    verdicts = judge("dual_port", device="mlx4_0:1")
    assert not any(v.usable for v in verdicts)
    with pytest.raises(DeviceUnavailableError, match=r"mlx4_0:1.*DOWN.*Polling"):
        devices.check(Options(device="mlx4_0:1"), verdicts)


def test_a_bond_by_its_own_address(judge: Judge) -> None:
    found = winner(judge("bonded"))
    assert found.spec.label == "mlx5_bond_0"
    assert found.port.netdev == "bond0"
    assert found.gid is not None and str(found.gid) == "5: 10.5.0.7 RoCE v2 on bond0"
    by_vlan = winner(judge("bonded", socket_ifname="bond0.100"))
    assert by_vlan.gid is not None and by_vlan.gid.netdev == "bond0.100"


def test_infiniband_by_its_lid(judge: Judge) -> None:
    verdicts = judge("infiniband")
    found = winner(verdicts)
    assert (found.spec.label, found.port.lid) == ("mlx5_0", 0x11)
    assert reasons(verdicts)["mlx5_1"] == "the port is INIT (LinkUp)"
    assert reasons(verdicts)["mlx5_2"] == "the port is DOWN (Disabled)"


def test_a_container_uses_its_own_addresses_only(judge: Judge) -> None:
    verdicts = judge("container")
    found = winner(verdicts)
    assert found.gid is not None and str(found.gid) == "5: 10.6.0.77 RoCE v2 on net1"
    assert "another network namespace" in reasons(verdicts)["mlx5_5"]


def test_holes_in_the_table(judge: Judge) -> None:
    found = winner(judge("holes"))
    assert found.gid is not None and found.gid.index == 130
    (other,) = [v for v in judge("holes") if v.spec.name == "mlx5_1"]
    assert other.gid is not None and other.gid.text == "2001:db8:8::7"
    with pytest.raises(DeviceUnavailableError, match=r"at index 5.*130: 10\.8\.0\.7"):
        options = Options(device="mlx5_0", gid_index=5)
        devices.check(options, judge("holes", device="mlx5_0", gid_index=5))


def test_a_gid_index_is_taken_at_its_word(judge: Judge) -> None:
    found = winner(judge("bonded", gid_index=1))
    assert found.gid is not None and (found.gid.index, found.gid.text) == (1, "fe80::5")


def test_a_gid_index_that_cannot_be_used_is_refused(judge: Judge) -> None:
    """Named or not: from a netdev that is elsewhere, or down, no packet leaves."""
    asked = Options(device="mlx5_4", gid_index=0)
    with pytest.raises(DeviceUnavailableError, match="gid_index") as caught:
        devices.check(asked, judge("container", device="mlx5_4", gid_index=0))
    said = str(caught.value)
    assert "GID 0 of mlx5_4 cannot be used: its netdev is in another network" in said
    assert "5: 10.6.0.77 RoCE v2 on net1" in said
    down = entry(1, "10.0.0.1", netdev_up=False)
    with pytest.raises(DeviceUnavailableError, match=r"GID 1 of mlx5_0 .*eth0 is down"):
        choose([down, entry(2, "fe80::1")], "ethernet", "mlx5_0", 1)
    # On InfiniBand the netdev is IPoIB's, which says nothing of the port.
    assert choose([down], "infiniband", "mlx5_0", 1) is down


def test_no_nic_is_chosen_for_a_gid_index_that_it_cannot_use(judge: Judge) -> None:
    """Nor is the software device in their place, where one could use another."""
    verdicts = judge("container", gid_index=1)
    assert not any(v.usable for v in verdicts)
    for label in ("mlx5_4", "mlx5_5"):
        assert "another network namespace" in reasons(verdicts)[label]
    why = "gid_index is 1, an entry that no NIC here can use"
    assert reasons(verdicts)["soft0"] == why
    with pytest.raises(DeviceUnavailableError, match="gid_index is 1 and no RDMA") as e:
        devices.check(Options(gid_index=1), verdicts)
    assert "mlx5_4: GID 1 of mlx5_4 cannot be used" in str(e.value)
    assert "device = soft" in str(e.value)


@pytest.mark.parametrize(
    ("machine", "usable"),
    [("bare", ["soft0"]), ("holes", ["mlx5_1", "soft0"])],
)
def test_a_gid_index_is_for_nics(judge: Judge, machine: str, usable: list[str]) -> None:
    """The software device has no table, and is there for peers all the same."""
    verdicts = judge(machine, gid_index=7)
    assert [v.spec.label for v in verdicts if v.usable] == usable
    assert winner(verdicts).spec.label == usable[0]


def test_a_gid_index_is_not_to_blame_for_a_port_that_is_down(tmp_path: Path) -> None:
    made = Machine(tmp_path / "m")
    made.port(made.device("mlx5_0", None), state="1: DOWN", gids=[])
    verdicts = devices.judge(look(made.root), Options(gid_index=7), visible="")
    assert winner(verdicts).is_software


def test_no_nic_means_software_unless_it_is_refused(judge: Judge) -> None:
    assert winner(judge("bare")).is_software
    verdicts = judge("bare", require_rdma=True)
    assert not any(v.usable for v in verdicts)
    with pytest.raises(DeviceUnavailableError, match=r"require_rdma is set.*none"):
        devices.check(Options(require_rdma=True), verdicts)


def test_a_nic_that_is_not_there_is_no_reason_for_software(judge: Judge) -> None:
    verdicts = judge("dgx", nics="mlx5_0,mlx5_77", gpu_index=1)
    with pytest.raises(DeviceUnavailableError, match=r"'mlx5_77'.*nics.*mlx5_9"):
        devices.check(Options(nics="mlx5_0,mlx5_77", gpu_index=1), verdicts)


def test_what_libibverbs_cannot_open_is_passed_over(tmp_path: Path) -> None:
    make("dgx", tmp_path / "m")
    found = look(tmp_path / "m")
    broken = Inventory(found.devices, found.gpus, "cannot load libibverbs: not there")
    verdicts = devices.judge(broken, Options(), visible="")
    assert winner(verdicts).is_software
    assert reasons(verdicts)["mlx5_0"] == "cannot load libibverbs: not there"


# -- distances and GIDs -----------------------------------------------------------


def test_distances_are_those_of_nccl() -> None:
    switch = ("pci0000:18", "0000:18:01.0", "0000:19:00.0")
    gpu = Place((*switch, "0000:1a:00.0", "0000:1b:00.0"), 0)
    for path, node, expected in (
        ((*switch, "0000:1a:01.0", "0000:1c:00.0"), 0, Distance.PIX),
        ((*switch, "0000:1a:01.0", "0000:20:00.0", "0000:21:00.0"), 0, Distance.PXB),
        (("pci0000:18", "0000:18:02.0", "0000:30:00.0"), 0, Distance.PHB),
        (("pci0000:40", "0000:40:01.0", "0000:41:00.0"), 0, Distance.NODE),
        (("pci0000:80", "0000:80:01.0", "0000:81:00.0"), 1, Distance.SYS),
        ((), None, Distance.SYS),
        ((), 0, Distance.NODE),
    ):
        assert distance(gpu, Place(path, node)) is expected
        assert distance(Place(path, node), gpu) is expected


def entry(index: int, address: str, gid_type: str = ROCE_V2, **fields: Any) -> GID:
    text = address if ":" in address else f"::ffff:{address}"
    fields = {"netdev": "eth0", "netdev_up": True, **fields}
    return GID(index, ipaddress.IPv6Address(text).packed, gid_type, **fields)


BEST_FIRST = [
    entry(9, "10.0.0.1"),
    entry(8, "10.1.0.1", netdev="eth0.7"),
    entry(7, "2001:db8::1"),
    entry(6, "fe80::1"),
    entry(5, "172.17.0.1", netdev="docker0"),
    entry(4, "169.254.3.4"),
    entry(3, "10.0.0.1", ROCE_V1),
    entry(2, "fe80::1", ROCE_V1),
]


def test_gids_are_ranked_by_what_they_are() -> None:
    for i in range(len(BEST_FIRST)):
        table = sorted(BEST_FIRST[i:], key=lambda gid: gid.index)
        # Two that others do not reach are as bad.
        expected = {4, 5} if BEST_FIRST[i].index == 5 else {BEST_FIRST[i].index}
        assert choose(table, "ethernet", "mlx5_0").index in expected


def test_losers_of_the_table_know_why() -> None:
    why = [explain(gid, BEST_FIRST[0]) for gid in BEST_FIRST]
    assert why == [
        "chosen",
        "a VLAN",
        "IPv6, not IPv4",
        "IPv6 link-local, not IPv4",
        "an address that other hosts do not reach",
        "an address that other hosts do not reach",
        "RoCE v1",
        "RoCE v1",
    ]
    twin = entry(12, "10.0.0.2")
    assert explain(twin, BEST_FIRST[0]) == "as good as index 9, which comes first"


def test_a_netdev_that_is_down_is_no_way_out() -> None:
    down = entry(1, "10.0.0.1", netdev_up=False)
    up = entry(2, "fe80::1")
    assert choose([down, up], "ethernet", "mlx5_0") is up
    with pytest.raises(DeviceUnavailableError, match="eth0 is down"):
        choose([down], "ethernet", "mlx5_0")


def test_the_network_of_the_peer_decides_between_equals() -> None:
    a = entry(1, "10.0.0.1", prefix_len=24)
    b = entry(2, "10.1.0.1", prefix_len=24)
    near = [entry(0, "10.1.0.9").address]
    assert choose([a, b], "ethernet", "mlx5_0") is a
    assert choose([a, b], "ethernet", "mlx5_0", near=near) is b
    assert a.family is Family.IPV4


def test_sysfs_is_read_as_it_is_written(tmp_path: Path) -> None:
    root = tmp_path / "m"
    make("bonded", root)
    (device,) = look(root).devices
    assert device.place.path == ("pci0000:80", "0000:80:01.0", "0000:81:00.0")
    assert device.place.numa_node == 1
    (port,) = device.ports
    assert (port.state, port.phys_state, port.link_layer) == (
        *("ACTIVE", "LinkUp"),
        "ethernet",
    )
    assert (port.rate_gbps, port.netdev, port.netdev_mtu_bytes) == (100, "bond0", 4200)
    assert [gid.index for gid in port.gids] == [0, 1, 2, 4, 5]
    assert [gid.prefix_len for gid in port.gids] == [64, 64, 24, 16, 16]
    sysfs = Sysfs(root / "sys")
    assert sysfs.cpu_nodes({3}) == {0}
    assert sysfs.cpu_nodes({15, 16}) == {0, 1}


def test_an_empty_machine_is_no_error(tmp_path: Path) -> None:
    sysfs = Sysfs(tmp_path / "none", tmp_path / "none")
    assert (sysfs.devices(), sysfs.gpus(), sysfs.networks()) == ([], [], [])


def test_this_machine_can_be_looked_at() -> None:
    found = inventory.take(Options())
    assert all(device.ports or device.problem for device in found.devices)
    assert devices.usable(Options(device="soft")) == [
        devices.DeviceSpec("soft0", "soft")
    ]
    with pytest.raises(OptionError, match="require_rdma"):
        devices.usable(Options(device="soft", require_rdma=True))


# -- the command ------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(devices_cli.main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_table_has_winner_and_losers(tmp_path: Path) -> None:
    sysfs = str(make("dgx", tmp_path / "m").sys)
    code, out, _ = run("--sysfs", sysfs, "--gpu-index", "3")
    lines = out.splitlines()
    assert code == 0
    assert len(lines) == 12
    assert lines[1].startswith("*  mlx5_3") and "PIX from the GPU" in lines[1]
    assert lines[-1].startswith("-  mlx5_9") and "management" in lines[-1]


def test_the_table_for_machines(tmp_path: Path) -> None:
    sysfs = str(make("container", tmp_path / "m").sys)
    code, out, _ = run("--sysfs", sysfs, "--json")
    assert code == 0
    by_name = {row["device"]: row for row in map(json.loads, out.splitlines())}
    assert by_name["mlx5_4"]["chosen"] and by_name["mlx5_4"]["gid_index"] == 5
    assert not by_name["mlx5_5"]["usable"]
    (foreign,) = by_name["mlx5_5"]["gids"]
    assert foreign["why"] == "its netdev is in another network namespace"
    assert by_name["mlx5_4"]["pci_path"][-1] == "0000:05:00.0"


def test_a_device_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    sysfs = str(make("infiniband", tmp_path / "m").sys)
    code, out, err = run("--sysfs", sysfs, "--device", "mlx5_9")
    assert code == 1
    assert "mlx5_0" in out
    assert "no device 'mlx5_9'" in err
    code, _, err = run("--sysfs", sysfs, "--gid-index", "-1")
    assert (code, "gid_index" in err) == (2, True)


@pytest.mark.parametrize("device", ["soft", "null"])
def test_options_that_contradict_each_other_are_wrong_use(device: str) -> None:
    code, out, err = run("--device", device, "--require-rdma")
    assert (code, out) == (2, "")
    assert "device names the" in err and "Traceback" not in err


def test_a_gid_that_cannot_be_used_is_said_so(tmp_path: Path) -> None:
    sysfs = str(make("container", tmp_path / "m").sys)
    for named in ((), ("--device", "mlx5_4")):
        code, out, err = run("--sysfs", sysfs, *named, "--gid-index", "0")
        assert code == 1
        assert "-  mlx5_4" in out and "*" not in out
        assert "its netdev is in another network namespace" in err
