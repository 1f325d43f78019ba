"""Several NICs in one host, end to end: the software device under their names.

See tests/nics.py. Both sides are in one process, and sysfs is empty for it: nothing is
known of the NICs but what the verbs say, so they are equals. What sysfs decides is in
test_devices.py, and what it decides end to end in test_ports.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import nics
from tests.commands import start
from tests.machines import Machine
from tests.nics import Network
from tests.patience import patient

pytestmark = pytest.mark.usefixtures("commands")

ROOT = Path(__file__).parent.parent


async def output_of(environ: Mapping[str, str], *arguments: str) -> tuple[bytes, bytes]:
    """Run a module to its end, with this environ and no other."""
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environ}
    async with start(*arguments, environ=environ) as process:
        found = await asyncio.wait_for(process.communicate(), patient(60))
        assert process.returncode == 0, found
        return found


async def run(
    network: Network,
    names: list[str],
    client: dict[str, Any],
    server: dict[str, Any],
    infiniband: tuple[str, ...] = (),
) -> dict[str, Any]:
    root = network.directory / "machine"
    nics.one_port_each(Machine(root), names, infiniband)
    (root / "empty").mkdir()
    out, _ = await output_of(
        {**network.environ(root), "KVXFER_SYSFS": str(root / "empty")},
        "tests.nic_program",
        json.dumps({"client": client, "server": server}),
    )
    found: dict[str, Any] = json.loads(out)
    assert network.stations() == []
    return found


async def test_the_first_nic_moves_the_bytes(network: Network) -> None:
    found = await run(network, ["mlx5_0", "mlx5_1"], {}, {})
    assert found["device"] == "mlx5_0"
    assert found["bytes"] == 77
    # The others wait until they are needed; the software device is always open.
    assert found["before"] == found["after"] == ["mlx5_0", "soft0"]


@pytest.mark.parametrize("gpu", range(4))
async def test_nics_of_the_seed_by_gpu(network: Network, gpu: int) -> None:
    names = ["mlx5_0", "mlx5_1"]
    found = await run(network, names, {"nics": ",".join(names), "gpu_index": gpu}, {})
    assert found["device"] == names[gpu % 2]
    assert found["before"] == [names[gpu % 2]]


async def test_another_nic_is_opened_for_a_peer_that_the_first_does_not_reach(
    network: Network,
) -> None:
    names = ["mlx5_0", "mlx5_1", "mlx5_2"]
    found = await run(network, names, {}, {"device": "mlx5_2"}, infiniband=("mlx5_0",))
    assert found["before"] == ["mlx5_0", "soft0"]
    assert found["device"] == "mlx5_1"
    assert found["after"] == ["mlx5_0", "soft0", "mlx5_1"]
    assert found["there"] == ["mlx5_2"]
    assert found["bytes"] == 77


async def test_no_nic_in_common_shows_both_tables(network: Network) -> None:
    found = await run(
        network,
        ["mlx5_0", "mlx5_1"],
        {"device": "mlx5_0"},
        {"device": "mlx5_1"},
        infiniband=("mlx5_0",),
    )
    assert found["error"] == "DeviceUnavailableError"
    assert "mlx5_1 with mlx5_0: ethernet here, infiniband there" in found["text"]
    assert "here:" in found["text"] and "at the peer:" in found["text"]


async def test_software_where_no_nic_is_common(network: Network) -> None:
    names = ["mlx5_0", "mlx5_1"]
    found = await run(network, names, {}, {"device": "soft"}, infiniband=("mlx5_0",))
    assert (found["device"], found["bytes"]) == ("soft0", 77)


async def test_a_write_over_infiniband(network: Network) -> None:
    """By the LID that the port of each has; both are in one subnet."""
    names = ["mlx5_0", "mlx5_1"]
    found = await run(network, names, {}, {"device": "mlx5_1"}, infiniband=tuple(names))
    assert (found["device"], found["there"]) == ("mlx5_0", ["mlx5_1"])
    assert found["layers"]["mlx5_0"] == "infiniband"
    assert (found["bytes"], found["wire"]) == (77, "rdma")
    assert sorted(path["lid"] for path in found["paths"]) == [16, 17]
    assert not any(path["is_global"] for path in found["paths"])
    assert {(r.device, r.source, r.destination) for r in network.routes()} == {
        ("mlx5_0", "ib 16", "ib 17"),
        ("mlx5_1", "ib 17", "ib 16"),
    }


async def test_ethernet_has_no_lids(network: Network) -> None:
    found = await run(network, ["mlx5_0"], {}, {})
    assert found["layers"]["mlx5_0"] == "ethernet"
    assert found["paths"] == [{"lid": 0, "is_global": True}] * 2


@pytest.mark.parametrize("gpu", [5, 9])
async def test_eight_nics_in_turn_by_gpu(network: Network, gpu: int) -> None:
    names = [f"mlx5_{i}" for i in range(8)]
    found = await run(network, names, {"gpu_index": gpu}, {"gpu_index": 3})
    assert found["device"] == names[gpu % 8]
    # Each side by its own GPU.
    assert found["there"] == ["mlx5_3", "soft0"]
    assert found["bytes"] == 77


# -- a machine that is described wrongly --------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("state", "UP", "'UP' is not a state such as '4: ACTIVE'"),
        ("phys_state", "99: LinkUp", "'99: LinkUp' is not a state such as '5: LinkUp'"),
        ("lid", "0x10000", "'0x10000' is not a LID"),
        ("link_layer", "Token Ring", "'Token Ring' is not Ethernet or InfiniBand"),
        ("gids/3", "10.0.0.1", "'10.0.0.1' is not a GID"),
        ("gid_attrs/types/3", "RoCE v3", "'RoCE v3' is not IB/RoCE v1 or RoCE v2"),
    ],
)
async def test_files_that_make_no_sense_are_named(
    network: Network, tmp_path: Path, file: str, text: str, said: str
) -> None:
    root = tmp_path / "machine"
    nics.mixed(Machine(root))
    path = root / "sys/class/infiniband/mlx5_0/ports/1" / file
    path.write_text(f"{text}\n")
    shown = await listed(network.environ(root))
    place = str(path.relative_to(root / "sys/class"))
    assert f"libkvxsoft: KVXFER_SHIM_SYSFS: {root}/sys/class/infiniband" in shown
    assert f"{place}: {said}" in shown


async def test_nics_without_a_network_are_refused(
    network: Network, tmp_path: Path
) -> None:
    root = tmp_path / "machine"
    nics.mixed(Machine(root))
    environ = network.environ(root)
    for value in ("", str(tmp_path / "none")):
        shown = await listed({**environ, "KVXFER_SHIM_NETWORK": value})
        assert f"KVXFER_SHIM_NETWORK is '{value}', not a directory" in shown


async def listed(environ: dict[str, str]) -> str:
    """Return what is said on standard error; no NIC may be there to be used."""
    out, err = await output_of(environ, "kvxfer", "devices")
    assert "no RDMA devices can be listed: " in out.decode()
    assert "*  soft0" in out.decode()
    return err.decode()
