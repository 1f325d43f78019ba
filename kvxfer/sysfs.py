"""What the kernel tells of RDMA devices, GPUs and networks, without opening any.

The directories may be others than ``/sys`` and ``/proc``: those of another machine,
copied, or what a container has mounted elsewhere. What cannot be read is unknown and
not an error: a slot of a GID table whose netdev is in another network namespace
answers EINVAL, and older kernels lack files.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvxfer.gids import GID, Network, gid_address
from kvxfer.topology import PCIPath, Place

_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ROOT = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
_NUMBER = re.compile(r"(\d+)")

# PCI classes (display, 3D, processing accelerator) and vendors of GPUs.
_GPU_CLASSES = ("0x0300", "0x0302", "0x1200")
_GPU_VENDORS = {
    "0x10de": "NVIDIA",
    "0x1002": "AMD",
    "0x8086": "Intel",
    "0x1d22": "Kunlun",
    "0x19e5": "Huawei",
}


@dataclass(frozen=True)
class Port:
    """A port of an RDMA device.

    Attributes:
      port_num: From 1.
      state: As verbs name it, such as ``ACTIVE`` or ``DOWN``.
      phys_state: As the kernel names it, such as ``LinkUp``.
      link_layer: ``ethernet`` or ``infiniband``.
      rate_gbps: Gigabits a second; 0 where it is not known.
      lid: The LID; 0 on Ethernet.
      mtu_bytes: The active MTU of verbs; 0 where it is not known.
      netdev_mtu_bytes: That of the netdev; 0 where it is not known.
      netdev: The port's network interface; empty if there is none here.
      gids: The entries of the GID table that are not empty.
    """

    port_num: int
    state: str = "UNKNOWN"
    phys_state: str = ""
    link_layer: str = "ethernet"
    rate_gbps: float = 0.0
    lid: int = 0
    mtu_bytes: int = 0
    netdev_mtu_bytes: int = 0
    netdev: str = ""
    gids: tuple[GID, ...] = ()


@dataclass(frozen=True)
class RDMADevice:
    """An RDMA device as the kernel lists it.

    Attributes:
      name: Such as ``mlx5_0``.
      place: Where it is in the PCI tree.
      driver: The kernel's driver; empty where it is not known.
      is_soft_roce: It is ``rdma_rxe``: no hardware.
      ports: By number.
      problem: Why it cannot be opened; empty if it can or was not tried.
    """

    name: str
    place: Place = field(default_factory=Place)
    driver: str = ""
    is_soft_roce: bool = False
    ports: tuple[Port, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class GPU:
    """A GPU or another accelerator, by its place in the order of PCI addresses."""

    index: int
    vendor: str
    place: Place


@dataclass(frozen=True)
class Sysfs:
    """Reads the two trees.

    Args:
      sys: What is ``/sys`` on the machine itself.
      proc: What is ``/proc`` there.
    """

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")

    @classmethod
    def at(cls, sys: str) -> Sysfs:
        """Read ``sys`` and the ``proc`` beside it, as in a copy; /proc if none is."""
        proc = Path(sys).parent / "proc"
        return cls(Path(sys), proc if proc.is_dir() else Path("/proc"))

    def devices(self) -> list[RDMADevice]:
        """List the RDMA devices, in the order of their names."""
        networks = self.networks()
        return [
            self._device(path, networks)
            for path in _by_number(self.sys / "class/infiniband")
        ]

    def ports(self, name: str) -> list[Port]:
        """List the ports of one device; none if it is not described here."""
        path = self.sys / "class/infiniband" / name
        if not path.exists():
            return []
        return list(self._device(path, self.networks()).ports)

    def is_soft_roce(self, name: str) -> bool:
        """Say whether a device is Soft-RoCE."""
        # The netdev beneath; only that driver has this file.
        return (self.sys / "class/infiniband" / name / "parent").exists()

    def gpus(self) -> list[GPU]:
        """List the accelerators, in the order of their PCI addresses."""
        found = []
        for path in sorted(_entries(self.sys / "bus/pci/devices")):
            vendor = _GPU_VENDORS.get(_text(path / "vendor"))
            if vendor and _text(path / "class")[:6] in _GPU_CLASSES:
                found.append((vendor, self._place(path)))
        return [GPU(i, vendor, place) for i, (vendor, place) in enumerate(found)]

    def networks(self) -> list[Network]:
        """List the networks that this host is directly in, from the routes."""
        return [*self._networks_v4(), *self._networks_v6()]

    def cpu_nodes(self, cpus: set[int]) -> set[int]:
        """Return the NUMA nodes that some CPUs belong to."""
        return {
            int(path.name[len("node") :])
            for path in _by_number(self.sys / "devices/system/node")
            if path.name.startswith("node")
            and cpus & _cpu_list(_text(path / "cpulist"))
        }

    # -- devices -----------------------------------------------------------------

    def _device(self, path: Path, networks: list[Network]) -> RDMADevice:
        # What it leads to may be missing from a copy; its name is enough.
        driver = path / "device" / "driver"
        return RDMADevice(
            name=path.name,
            place=self._place(path / "device"),
            driver=driver.readlink().name if driver.is_symlink() else "",
            is_soft_roce=self.is_soft_roce(path.name),
            ports=tuple(
                self._port(port, networks) for port in _by_number(path / "ports")
            ),
        )

    def _port(self, path: Path, networks: list[Network]) -> Port:
        layer = _text(path / "link_layer").lower() or "infiniband"
        table = tuple(self._gids(path, layer, networks))
        rate = re.match(r"[\d.]+", _text(path / "rate"))
        # What the most entries belong to is the port's own, not a VLAN of it.
        netdevs = [entry.netdev for entry in table if entry.netdev]
        netdev = min(
            netdevs, key=lambda name: (-netdevs.count(name), len(name)), default=""
        )
        return Port(
            port_num=int(path.name),
            state=_text(path / "state").partition(":")[2].strip() or "UNKNOWN",
            phys_state=_text(path / "phys_state").partition(":")[2].strip(),
            link_layer=layer,
            rate_gbps=float(rate[0]) if rate else 0.0,
            lid=_integer(path / "lid") or 0,
            netdev_mtu_bytes=_integer(self.sys / "class/net" / netdev / "mtu") or 0
            if netdev
            else 0,
            netdev=netdev,
            gids=table,
        )

    def _gids(self, port: Path, layer: str, networks: list[Network]) -> Iterator[GID]:
        for index, text in _table(port / "gids"):
            if not text.strip("0:"):
                continue  # as nearly all of the hundreds are
            try:
                gid = ipaddress.IPv6Address(text).packed
            except ValueError:
                continue
            entry = self._gid(port, index, gid, networks)
            yield entry if layer == "ethernet" else replace(entry, foreign=False)

    def _gid(self, port: Path, index: int, gid: bytes, networks: list[Network]) -> GID:
        attrs = port / "gid_attrs"
        netdev = _text(attrs / "ndevs" / str(index))
        address = gid_address(gid)
        state = _text(self.sys / "class/net" / netdev / "operstate") if netdev else ""
        return GID(
            index=index,
            gid=gid,
            gid_type=_text(attrs / "types" / str(index)),
            netdev=netdev,
            # Interfaces without a carrier of their own say "unknown" and are up.
            netdev_up=state in ("up", "unknown") if state else None,
            prefix_len=next(
                (n.network.prefixlen for n in networks if _holds(n, netdev, address)), 0
            ),
            foreign=(attrs / "ndevs").is_dir() and not self._has_netdev(netdev),
        )

    def _has_netdev(self, netdev: str) -> bool:
        return bool(netdev) and (self.sys / "class/net" / netdev).exists()

    def _place(self, path: Path) -> Place:
        if not path.exists():
            return Place()
        parts = path.resolve().parts
        start = next((i for i, name in enumerate(parts) if _ROOT.fullmatch(name)), None)
        node = _integer(path / "numa_node")
        pci: PCIPath = ()
        if start is not None:
            bridges = [name for name in parts[start + 1 :] if _BDF.fullmatch(name)]
            pci = (parts[start], *bridges)
        return Place(pci, node if node is not None and node >= 0 else None)

    # -- networks ----------------------------------------------------------------

    def _networks_v4(self) -> Iterator[Network]:
        for line in _text(self.proc / "net/route").splitlines()[1:]:
            words = line.split()
            if len(words) < 8 or int(words[2], 16) or not int(words[7], 16):
                continue  # by a gateway, or the default
            base, mask = (int(words[i], 16).to_bytes(4, "little") for i in (1, 7))
            network = ipaddress.IPv4Network(
                (base, int.from_bytes(mask, "big").bit_count()), strict=False
            )
            yield Network(words[0], network)

    def _networks_v6(self) -> Iterator[Network]:
        for line in _text(self.proc / "net/if_inet6").splitlines():
            words = line.split()
            address = ipaddress.IPv6Address(bytes.fromhex(words[0]))
            length = int(words[2], 16)
            network = ipaddress.IPv6Network((address, length), strict=False)
            yield Network(words[5], network)


def _holds(
    network: Network,
    netdev: str,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> bool:
    return network.netdev == netdev and address in network.network


def _text(path: Path) -> str:
    """Read a small file; empty where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


def _table(path: Path) -> list[tuple[int, str]]:
    """Read a directory with a file for each entry, by number.

    Soft-RoCE has 1024 of them, and each endpoint reads them twice: without a path to
    be walked and an object to be made for each that takes a fraction of the time.
    """
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return []
    try:
        found = []
        for index in sorted(int(n) for n in os.listdir(directory) if n.isdecimal()):
            try:
                file = os.open(str(index), os.O_RDONLY, dir_fd=directory)
            except OSError:
                continue
            try:
                found.append((index, os.read(file, 64).decode("ascii", "replace")))
            except OSError:
                continue
            finally:
                os.close(file)
        return [(index, text.strip()) for index, text in found]
    finally:
        os.close(directory)


def _integer(path: Path) -> int | None:
    try:
        return int(_text(path), 0)
    except ValueError:
        return None


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError:
        return []


def _by_number(path: Path) -> list[Path]:
    """List a directory, 2 before 10."""

    def key(entry: Path) -> list[tuple[int, str]]:
        return [
            (int(word), "") if word.isdecimal() else (-1, word)
            for word in _NUMBER.split(entry.name)
        ]

    return sorted(_entries(path), key=key)


def _cpu_list(text: str) -> set[int]:
    """Read ``0-3,8``."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
