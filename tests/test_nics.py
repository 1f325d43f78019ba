"""Several NICs in one host, end to end: the software device under their names.

The shim of the strangers' tests stands in for libibverbs, so the devices are listed,
opened and driven as NICs are. sysfs is empty: nothing is known of them but what the
verbs say, so they are equals. What sysfs decides is in test_devices.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import asyncio, json, logging, sys
import kvxfer
import kvxfer.link

paths = []
made = kvxfer.link.QPPath

def look_at(**fields):
    paths.append({name: fields[name] for name in ("lid", "is_global")})
    return made(**fields)

kvxfer.link.QPPath = look_at

def cache():
    return kvxfer.KVCache.allocate(n_layers=2, n_blocks=8, block_bytes=4096)

async def main():
    say = {}
    options = json.loads(sys.argv[1])
    with cache() as source, cache() as target:
        source.view(1, "k")[3] = 77
        async with (
            kvxfer.Server(target, port=0, **options["server"]) as server,
            kvxfer.Client(source, **options["client"]) as client,
        ):
            say["before"] = [s.name for s in client.device_states()]
            peer = await client.connect("127.0.0.1", server.port)
            result = await client.write_cache(peer, [3], [5])
            say["device"] = result.device
            say["wire"] = result.wire
            say["after"] = [s.name for s in client.device_states()]
            say["there"] = server.devices
            say["paths"] = paths
            say["layers"] = {s.name: s.link_layer for s in client.device_states()}
        say["bytes"] = int(target.view(1, "k")[5][0])
    print(json.dumps(say))

try:
    asyncio.run(main())
except kvxfer.KVXferError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The software device as a libibverbs."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    out = tmp_path_factory.mktemp("shim")
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "shim"), f"OUT={out}", "CFLAGS=-O1"],
        check=True,
        timeout=300,
    )
    (out / "sys").mkdir()
    return out / "libkvxsoft.so"


def run(
    shim: Path, devices: str, client: dict[str, Any], server: dict[str, Any]
) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM),
            json.dumps({"client": client, "server": server}),
        ],
        stdout=subprocess.PIPE,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "KVXFER_IBVERBS_PATH": str(shim),
            "KVXFER_SHIM_DEVICES": devices,
            "KVXFER_SYSFS": str(shim.with_name("sys")),
        },
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_first_nic_moves_the_bytes(shim: Path) -> None:
    found = run(shim, "mlx5_0 mlx5_1", {}, {})
    assert found["device"] == "mlx5_0"
    assert found["bytes"] == 77
    # The others wait until they are needed; the software device is always open.
    assert found["before"] == found["after"] == ["mlx5_0", "soft0"]


def test_nics_of_the_seed_by_gpu(shim: Path) -> None:
    nics = "mlx5_0,mlx5_1"
    for gpu in (0, 1, 2, 3):
        found = run(shim, "mlx5_0 mlx5_1", {"nics": nics, "gpu_index": gpu}, {})
        assert found["device"] == f"mlx5_{gpu % 2}"
        assert found["before"] == [f"mlx5_{gpu % 2}"]


def test_another_nic_is_opened_for_a_peer_that_the_first_does_not_reach(
    shim: Path,
) -> None:
    found = run(shim, "mlx5_0:infiniband mlx5_1 mlx5_2", {}, {"device": "mlx5_2"})
    assert found["before"] == ["mlx5_0", "soft0"]
    assert found["device"] == "mlx5_1"
    assert found["after"] == ["mlx5_0", "soft0", "mlx5_1"]
    assert found["there"] == ["mlx5_2"]
    assert found["bytes"] == 77


def test_no_nic_in_common_shows_both_tables(shim: Path) -> None:
    found = run(
        shim,
        "mlx5_0:infiniband mlx5_1",
        {"device": "mlx5_0"},
        {"device": "mlx5_1"},
    )
    assert found["error"] == "DeviceUnavailableError"
    assert "mlx5_1 with mlx5_0: ethernet here, infiniband there" in found["text"]
    assert "here:" in found["text"] and "at the peer:" in found["text"]


def test_software_where_no_nic_is_common(shim: Path) -> None:
    found = run(shim, "mlx5_0:infiniband mlx5_1", {}, {"device": "soft"})
    assert (found["device"], found["bytes"]) == ("soft0", 77)


def test_a_write_over_infiniband(shim: Path) -> None:
    """By the LID that the peer's port has; its GID too, which is of another subnet."""
    found = run(shim, "mlx5_0:infiniband mlx5_1:infiniband", {}, {"device": "mlx5_1"})
    assert (found["device"], found["there"]) == ("mlx5_0", ["mlx5_1"])
    assert found["layers"]["mlx5_0"] == "infiniband"
    assert (found["bytes"], found["wire"]) == (77, "rdma")
    assert found["paths"] == [{"lid": 17, "is_global": True}] * 2


def test_ethernet_has_no_lids(shim: Path) -> None:
    found = run(shim, "mlx5_0", {}, {})
    assert found["layers"]["mlx5_0"] == "ethernet"
    assert found["paths"] == [{"lid": 0, "is_global": True}] * 2


@pytest.mark.parametrize("gpu", [5, 9])
def test_eight_nics_in_turn_by_gpu(shim: Path, gpu: int) -> None:
    names = [f"mlx5_{i}" for i in range(8)]
    found = run(shim, " ".join(names), {"gpu_index": gpu}, {"gpu_index": 3})
    assert found["device"] == names[gpu % 8]
    # Each side by its own GPU.
    assert found["there"] == ["mlx5_3", "soft0"]
    assert found["bytes"] == 77
