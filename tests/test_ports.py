"""Ports and GIDs end to end, on machines that are made up, in two processes.

See tests/nics.py. Each process reads the files of its machine, whose NICs are the
software device, and bytes go by the port and the GID index that were chosen.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import machines, nics
from tests.children import Nursery
from tests.endpoints import arena, expected
from tests.machines import V1, V2, Machine
from tests.nics import Network, Route
from tests.patience import patient

SHAPE: dict[str, Any] = {"n_blocks": 8, "layers": 2, "planes": {"k": (4096, 4160)}}
Make = Callable[[Machine, int], None]


class Rig:
    """Two machines in one network, and a write from the first to the second."""

    def __init__(self, network: Network, nursery: Nursery, directory: Path) -> None:
        self._network = network
        self._nursery = nursery
        self._directory = directory

    def _environ(self, name: str, make: Make, host: int) -> dict[str, str]:
        root = self._directory / name
        make(Machine(root), host)
        return self._network.environ(root)

    @contextlib.asynccontextmanager
    async def _child(
        self, role: str, environ: dict[str, str], seed: int, **arguments: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Run a role of tests/children.py; give the first that it says."""
        shape = {**SHAPE, "seed": seed}
        async with self._nursery.start(
            role, environ=environ, shape=shape, **arguments
        ) as child:
            yield await child.event(patient(60))

    async def refused(
        self,
        writer: Make,
        reader: Make,
        client: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
    ) -> str:
        """Try to write; return what the writer is told, and see that nothing came."""
        found = await self._write(writer, reader, client, server)
        assert found["error"] == "DeviceUnavailableError"
        assert self.routes() == []
        return str(found["text"])

    async def write(
        self,
        writer: Make,
        reader: Make,
        client: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
    ) -> str:
        """Write from one machine to the other; return the writer's device."""
        found = await self._write(writer, reader, client, server)
        assert "error" not in found, found["text"]
        assert found["wire"] == "rdma"
        return str(found["device"])

    async def _write(
        self,
        writer: Make,
        reader: Make,
        client: dict[str, Any] | None,
        server: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Try it, and compare every byte; what the writer says of result or error."""
        memory = self._directory / "memory"
        with (
            arena(**SHAPE, seed=1) as source,
            arena(**SHAPE, seed=2, path=memory) as target,
        ):
            wanted = target.memory.copy()
            there = self._environ("reader", reader, 8)
            here = self._environ("writer", writer, 7)
            local_ids, remote_ids = [3, 0, 6], [5, 6, 1]
            blocks = {"local_ids": local_ids, "remote_ids": remote_ids}
            async with self._child(
                "serve", there, 2, path=str(memory), **(server or {})
            ) as serving:
                port = serving["port"]
                async with self._child(
                    "write_once", here, 1, port=port, **blocks, **(client or {})
                ) as found:
                    if "error" not in found:
                        wanted = expected(source, target, wanted, local_ids, remote_ids)
            assert (target.memory == wanted).all()
        return found

    def routes(self) -> list[Route]:
        """List the paths of the QPs, the writer's machine first."""
        return sorted(self._network.routes(), key=lambda r: r.source)


@pytest.fixture
def rig(network: Network, nursery: Nursery, tmp_path: Path) -> Rig:
    """Two machines to come."""
    return Rig(network, nursery, tmp_path)


def there_and_back(
    device: str, port_num: int, gid_index: int, source: str, destination: str
) -> list[Route]:
    """The routes of two NICs that are alike."""
    return [
        Route(device, port_num, gid_index, source, destination),
        Route(device, port_num, gid_index, destination, source),
    ]


async def test_the_port_that_is_up_of_two(rig: Rig) -> None:
    device = await rig.write(machines.dual_port, machines.dual_port)
    assert device == "mlx4_0:2"
    wanted = there_and_back("mlx4_0", 2, 3, "v2 10.4.0.7", "v2 10.4.0.8")
    assert rig.routes() == wanted


@pytest.mark.parametrize(
    ("client", "server", "port_num", "gid_index", "source", "destination"),
    [
        ({}, {}, 1, 3, "v2 10.11.0.7", "v2 10.11.0.8"),
        (
            *({"device": "mlx5_0:2"}, {}, 2, 2),
            *("v2 2001:db8:12::7", "v2 2001:db8:12::8"),
        ),
        (
            *({}, {"device": "mlx5_0:2"}, 2, 2),
            *("v2 2001:db8:12::7", "v2 2001:db8:12::8"),
        ),
        (
            *({"device": "mlx5_0:2", "gid_index": 0}, {}, 2, 0),
            *("v2 fe80::7", "v2 fe80::8"),
        ),
        (
            *({"device": "mlx5_0:1", "gid_index": 1}, {}, 1, 1),
            *("v1 10.11.0.7", "v1 10.11.0.8"),
        ),
        (
            *({}, {"device": "mlx5_0:1", "gid_index": 1}, 1, 1),
            *("v1 10.11.0.7", "v1 10.11.0.8"),
        ),
    ],
)
async def test_two_ports_that_are_up(
    rig: Rig,
    client: dict[str, Any],
    server: dict[str, Any],
    port_num: int,
    gid_index: int,
    source: str,
    destination: str,
) -> None:
    """By the first; by the other one if it is named, at either side."""
    device = await rig.write(nics.two_ports, nics.two_ports, client, server)
    assert device == ("mlx5_0" if port_num == 1 else "mlx5_0:2")
    wanted = there_and_back("mlx5_0", port_num, gid_index, source, destination)
    assert rig.routes() == wanted


async def test_a_bond_by_its_own_address(rig: Rig) -> None:
    device = await rig.write(machines.bonded, machines.bonded)
    assert device == "mlx5_bond_0"
    wanted = there_and_back("mlx5_bond_0", 1, 5, "v2 10.5.0.7", "v2 10.5.0.8")
    assert rig.routes() == wanted


async def test_a_bond_by_its_vlan(rig: Rig) -> None:
    """An index here; there the address that is in the same network."""
    await rig.write(machines.bonded, machines.bonded, {"gid_index": 2})
    wanted = there_and_back("mlx5_bond_0", 1, 2, "v2 10.100.0.7", "v2 10.100.0.8")
    assert rig.routes() == wanted


async def test_a_table_that_begins_with_holes(rig: Rig) -> None:
    await rig.write(nics.mixed, nics.mixed)
    assert rig.routes() == there_and_back(
        "mlx5_0", 1, 3, "v2 10.13.0.7", "v2 10.13.0.8"
    )


async def test_an_entry_beyond_many_holes(rig: Rig) -> None:
    await rig.write(machines.holes, machines.holes)
    assert rig.routes() == there_and_back(
        "mlx5_0", 1, 130, "v2 10.8.0.7", "v2 10.8.0.8"
    )


async def test_a_gid_of_v1_is_met_by_one_of_v1(rig: Rig) -> None:
    """An index here decides the type there."""
    await rig.write(nics.mixed, nics.mixed, {"gid_index": 6})
    assert rig.routes() == there_and_back("mlx5_0", 1, 6, "v1 fe80::7", "v1 fe80::8")


async def test_a_gid_index_that_no_nic_can_use_is_not_replaced(rig: Rig) -> None:
    """Not by another entry, and not by the software device."""
    said = await rig.refused(nics.mixed, nics.mixed, {"gid_index": 4})
    assert "gid_index is 4 and no RDMA device can use that entry" in said
    assert "3: 10.13.0.7 RoCE v2 on ens3" in said


async def test_a_container_and_its_own_address(rig: Rig) -> None:
    """The host's addresses are in the table, and no packet of theirs would leave."""
    device = await rig.write(machines.container, machines.container)
    assert device == "mlx5_4"
    assert rig.routes() == there_and_back("mlx5_4", 1, 5, "v2 10.6.0.7", "v2 10.6.0.8")


async def test_a_container_whose_netdevs_are_all_elsewhere(rig: Rig) -> None:
    """No packet of theirs would leave, and the verbs would not say so."""

    def foreign(machine: Machine, host: int) -> None:
        machine.port(
            machine.device("mlx5_5", None), gids=[(1, f"10.7.0.{host}", V2, None)]
        )

    said = await rig.refused(
        foreign, machines.container, {"require_rdma": True}, {"device": "mlx5_4"}
    )
    assert "10.7.0.7 RoCE v2 (its netdev is in another network" in said


def test_the_doctor_writes_by_the_gid_that_is_chosen(
    network: Network, tmp_path: Path
) -> None:
    """By the options in force, of which sysfs tells which entries are foreign."""
    machines.container(Machine(tmp_path / "machine"), 7)
    done = subprocess.run(
        [sys.executable, "-m", "kvxfer", "doctor", "--json"],
        stdout=subprocess.PIPE,
        env={**os.environ, **network.environ(tmp_path / "machine")},
        timeout=patient(120),
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    written = {row["check"]: row for row in rows if row["check"].startswith("write ")}
    assert set(written) == {"write mlx5_4", "write soft0"}
    for row in written.values():
        assert row["level"] == "ok", row
    itself = Route("mlx5_4", 1, 5, "v2 10.6.0.7", "v2 10.6.0.7")
    assert network.routes() == [itself, itself]


async def test_no_gid_in_common_shows_both_tables(rig: Rig) -> None:
    """IPv4 by RoCE v1 alone here, link-local by v2 there."""

    def old(machine: Machine, host: int) -> None:
        address = f"10.14.0.{host}"
        machine.netdev("ens3", f"{address}/24")
        machine.port(machine.device("mlx5_0", None), gids=[(2, address, V1, "ens3")])

    text = await rig.refused(
        old, nics.mixed, {"device": "mlx5_0"}, {"device": "mlx5_0", "gid_index": 5}
    )
    said = text.splitlines()
    tables = {
        "mlx5_0 (rdma, ethernet): 10.14.0.7 IB/RoCE v1",
        "mlx5_0 (rdma, ethernet): fe80::8 RoCE v2",
    }
    assert tables <= {line.strip() for line in said}
    assert said[-1] == "mlx5_0 with mlx5_0: RoCE v2 here, IB/RoCE v1 there"
