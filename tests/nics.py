"""The software device as NICs of machines that are made up, and their network.

The shim of the strangers' tests stands in for libibverbs, and takes ports and GIDs
from the files of :mod:`tests.machines` that kvxfer reads as well. Packets go where the
GID, its type and the LID lead, so a path that no network would carry fails here too.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.machines import V1, V2, GIDs, Machine

ROOT = Path(__file__).parent.parent

_PATH = re.compile(r"(\S+) port (\d+) gid (\d+): (\S+) to (\S+)")


def build() -> Path:
    """Compile the shim, unless there is one of these sources; return its path."""
    directory = ROOT / ".cache" / "shim-of-tests"
    library, made_of = directory / "libkvxsoft.so", directory / "made-of"
    directory.mkdir(parents=True, exist_ok=True)
    command = ["make", "-s", "-C", str(ROOT / "shim"), f"OUT={directory}", "CFLAGS=-O1"]
    # Several processes of pytest may want it at once.
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = _sources(command)
        if not made_of.exists() or made_of.read_text() != sources:
            made_of.unlink(missing_ok=True)
            library.unlink(missing_ok=True)  # some process may have it mapped
            subprocess.run(command, check=True, timeout=300)
            made_of.write_text(sources)
    return library


def _sources(command: list[str]) -> str:
    """Return a hash of all that the shim is compiled of, and how."""
    found = hashlib.sha256(json.dumps([command, os.environ.get("CC")]).encode())
    for folder in ("shim", "kvxfer/softdev", "kvxfer/native"):
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in (".c", ".h") or path.name == "Makefile":
                found.update(f"{path.name}\0".encode() + path.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Route:
    """The path that a QP was given, as the device was told it.

    Attributes:
      device: Name of the NIC.
      port_num: Its port.
      gid_index: Where its packets leave from.
      source: Type and address, such as ``v2 10.0.0.1``, or ``ib 17``.
      destination: The same of the peer.
    """

    device: str
    port_num: int
    gid_index: int
    source: str
    destination: str


def _address(text: str) -> str:
    kind, _, digits = text.partition("-")
    if kind == "ib":
        return f"ib {int(digits, 16)}"
    address = ipaddress.IPv6Address(bytes.fromhex(digits))
    return f"{kind} {address.ipv4_mapped or address}"


class Network:
    """What machines whose NICs are the software device are connected by."""

    def __init__(self, shim: Path, directory: Path) -> None:
        directory.mkdir()
        self._shim = shim
        self.directory = directory

    def environ(self, machine: Path) -> dict[str, str]:
        """Return what a process of one machine needs in its environment."""
        return {
            "KVXFER_IBVERBS_PATH": str(self._shim),
            "KVXFER_SHIM_SYSFS": str(machine / "sys"),
            "KVXFER_SHIM_NETWORK": str(self.directory),
            "KVXFER_SYSFS": str(machine / "sys"),
        }

    def routes(self) -> list[Route]:
        """List the paths that QPs were given, in that order."""
        log = self.directory / "paths"
        lines = log.read_text().splitlines() if log.exists() else []
        found = [_PATH.fullmatch(line) for line in lines]
        return [
            Route(m[1], int(m[2]), int(m[3]), _address(m[4]), _address(m[5]))
            for m in found
            if m is not None
        ]

    def stations(self) -> list[str]:
        """List the addresses of QPs by which they are reached now."""
        return [path.name for path in self.directory.iterdir() if path.is_symlink()]


# -- machines -----------------------------------------------------------------------


def one_port_each(
    machine: Machine, names: Sequence[str], infiniband: Sequence[str] = ()
) -> None:
    """NICs that are alike, but for those on InfiniBand: their LIDs count from 16."""
    for i, name in enumerate(names):
        device = machine.device(name, None)
        if name in infiniband:
            machine.port(
                device,
                layer="InfiniBand",
                lid=16 + i,
                gids=[(0, f"fe80::1:{i:x}", V1, None)],
            )
            continue
        netdev, address, link_local = f"eth{i}", f"10.{i}.0.1", f"fe80::1:{i:x}"
        machine.netdev(netdev, f"{address}/24")
        machine.port(
            device, gids=[(0, link_local, V2, netdev), (1, address, V2, netdev)]
        )


def two_ports(machine: Machine, host: int = 7) -> None:
    """A NIC with both ports up, in two networks; the second has no IPv4 address."""
    device = machine.device("mlx5_0", None)
    first, second = f"10.11.0.{host}", f"2001:db8:12::{host}"
    machine.netdev("ens1f0", f"{first}/24")
    machine.netdev("ens1f1", f"{second}/64")
    tables: list[GIDs] = [
        [(1, first, V1, "ens1f0"), (3, first, V2, "ens1f0")],
        [(0, f"fe80::{host}", V2, "ens1f1"), (2, second, V2, "ens1f1")],
    ]
    for number, table in enumerate(tables, start=1):
        machine.port(device, number, gids=table)


def mixed(machine: Machine, host: int = 7) -> None:
    """A table that begins with holes: both types, link-local beside IPv4."""
    address, link_local = f"10.13.0.{host}", f"fe80::{host}"
    machine.netdev("ens3", f"{address}/24")
    machine.port(
        machine.device("mlx5_0", None),
        gids=[
            (2, address, V1, "ens3"),
            (3, address, V2, "ens3"),
            (5, link_local, V2, "ens3"),
            (6, link_local, V1, "ens3"),
        ],
    )
