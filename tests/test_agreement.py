"""Which pair of devices two peers agree on, and what they say if there is none."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from kvxfer import agreement, devices
from kvxfer.agreement import agree, is_global
from kvxfer.errors import DeviceUnavailableError
from kvxfer.inventory import Inventory
from kvxfer.options import Options
from kvxfer.sysfs import Sysfs
from kvxfer.wire import DeviceCandidate, GIDCandidate, Hello, decode, encode
from tests.control_messages import hello
from tests.machines import make


def gid(text: str, gid_type: str = "RoCE v2", prefix_len: int = 0) -> GIDCandidate:
    text = text if ":" in text else f"::ffff:{text}"
    return GIDCandidate(
        gid=ipaddress.IPv6Address(text).packed,
        gid_type=gid_type,
        prefix_len=prefix_len,
    )


def nic(name: str, *table: GIDCandidate, **fields: Any) -> DeviceCandidate:
    fields = {"kind": "rdma", "link_layer": "ethernet", "mtu": 5, **fields}
    first = table[0]
    return DeviceCandidate(
        name=name, gid=first.gid, gid_type=first.gid_type, gids=list(table), **fields
    )


def software(name: str = "soft0", last: str = "fd6b::1") -> DeviceCandidate:
    return nic(name, gid(last, "software"), kind="soft")


def infiniband(
    name: str, guid: int, lid: int, prefix: str = "fe80::"
) -> DeviceCandidate:
    table = gid(f"{prefix}{guid:x}", "IB/RoCE v1")
    return nic(name, table, link_layer="infiniband", lid=lid)


def candidates(name: str, tmp_path: Path, **options: Any) -> list[DeviceCandidate]:
    """What a made-up machine tells its peers."""
    root = tmp_path / name
    if not root.exists():
        make(name, root)
    sysfs = Sysfs(root / "sys", root / "proc")
    found = Inventory(tuple(sysfs.devices()), tuple(sysfs.gpus()))
    return [
        agreement.candidate(v.spec.label, "rdma", v.port, v.gid)
        for v in devices.judge(found, Options(**options), visible="")
        if v.usable and v.gid is not None
    ]


def names(
    ours: list[DeviceCandidate], theirs: list[DeviceCandidate]
) -> tuple[str, str]:
    found = agree(ours, theirs)
    return found.ours.name, found.theirs.name


def test_rails_meet_on_their_own_network(tmp_path: Path) -> None:
    """GPU 2 writes to GPU 5: by the first pair of NICs that share a network."""
    ours = candidates("dgx", tmp_path, gpu_index=2)
    theirs = candidates("dgx", tmp_path, gpu_index=5)
    found = agree(ours, theirs)
    assert found.ours.name == found.theirs.name
    assert {found.ours.name, found.theirs.name} <= {"mlx5_2", "mlx5_5"}
    assert agree(ours, ours).ours.name == "mlx5_2"


def test_a_route_does_where_no_network_is_shared() -> None:
    ours = [nic("a", gid("10.0.0.1", prefix_len=24))]
    theirs = [nic("b", gid("10.0.1.1", prefix_len=24))]
    assert names(ours, theirs) == ("a", "b")


def test_one_side_that_sees_the_network_is_enough() -> None:
    near = nic("near", gid("10.0.0.9"))
    first = nic("first", gid("10.9.0.9"))
    assert names([nic("a", gid("10.0.0.1", prefix_len=24))], [first, near]) == (
        "a",
        "near",
    )


def test_the_gids_go_together_and_not_only_the_devices() -> None:
    ours = nic("a", gid("10.0.0.1", prefix_len=24), gid("2001:db8::1", prefix_len=64))
    theirs = nic("b", gid("2001:db8::2", prefix_len=64), gid("fe80::2"))
    found = agree([ours], [theirs])
    assert found.our_gid == ours.gids[1]
    assert found.their_gid == theirs.gids[0]


def test_a_nic_goes_before_software() -> None:
    ours = [software(), nic("a", gid("10.0.0.1"))]
    theirs = [software("soft0", "fd6b::2"), nic("b", gid("10.7.0.1"))]
    assert names(ours, theirs) == ("a", "b")
    assert names(ours, theirs[:1]) == ("soft0", "soft0")


def test_infiniband_goes_by_lid_and_subnet() -> None:
    ours = [infiniband("a", 1, 7)]
    assert names(ours, [infiniband("b", 2, 8)]) == ("a", "b")
    far = infiniband("far", 3, 8, "fec0::")
    assert names(ours, [far, infiniband("b", 2, 9)]) == ("a", "b")
    near, other = gid("fe80::1").gid, gid("fec0::3").gid
    assert not is_global("infiniband", near, gid("fe80::2").gid)
    assert is_global("infiniband", near, other)
    assert is_global("ethernet", near, gid("fe80::2").gid)


def test_a_peer_of_an_older_release_names_one_gid() -> None:
    old = DeviceCandidate(
        name="b",
        kind="rdma",
        link_layer="ethernet",
        gid=gid("10.0.0.2").gid,
        gid_type="RoCE v2",
        mtu=3,
    )
    found = agree([nic("a", gid("fe80::1"), gid("10.0.0.1"))], [old])
    assert found.our_gid == gid("10.0.0.1")
    assert found.their_gid.gid == old.gid


def test_a_device_of_a_newer_release_is_passed_over() -> None:
    newer = nic("x", gid("10.0.0.2"), kind="cxl")
    assert names([nic("a", gid("10.0.0.1"))], [newer, nic("b", gid("10.0.0.3"))]) == (
        "a",
        "b",
    )


def test_no_pair_has_both_tables_and_every_reason() -> None:
    ours = [
        nic("mlx5_0", gid("10.0.0.1"), gid("10.0.0.1", "IB/RoCE v1")),
        infiniband("mlx5_1", 1, 17),
    ]
    theirs = [nic("rxe0", gid("fe80::2")), software()]
    with pytest.raises(DeviceUnavailableError) as caught:
        agree(ours, theirs)
    assert str(caught.value).splitlines() == [
        "no pair of devices can talk to each other",
        "here:",
        "  mlx5_0 (rdma, ethernet): 10.0.0.1 RoCE v2, 10.0.0.1 IB/RoCE v1",
        "  mlx5_1 (rdma, infiniband): LID 17",
        "at the peer:",
        "  rxe0 (rdma, ethernet): fe80::2 RoCE v2",
        "  soft0 (soft, ethernet): fd6b::1 software",
        "mlx5_0 with rxe0: IPv4 here, IPv6 link-local there; "
        "IB/RoCE v1 here, RoCE v2 there",
        "mlx5_0 with soft0: rdma here, soft there",
        "mlx5_1 with rxe0: infiniband here, ethernet there",
        "mlx5_1 with soft0: rdma here, soft there",
    ]
    with pytest.raises(DeviceUnavailableError, match=r"here:\n  none"):
        agree([], theirs)


@pytest.mark.parametrize("name", ["dgx", "bonded", "dual_port", "holes", "infiniband"])
def test_what_is_offered_passes_the_decoder(name: str, tmp_path: Path) -> None:
    offered = candidates(name, tmp_path)
    message = hello(devices=offered)
    found = decode(encode(message))
    assert isinstance(found, Hello)
    assert found.devices == offered
    assert len({device.name for device in offered}) == len(offered)
