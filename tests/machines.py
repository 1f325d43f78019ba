"""Machines that are not there: the files by which servers with NICs tell what they are.

    python -m tests.machines dgx DIRECTORY

makes one, to look at with ``kvxfer doctor --root DIRECTORY``.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

V1, V2 = "IB/RoCE v1", "RoCE v2"
NVIDIA_GPU = ("0x10de", "0x030200")
MELLANOX_NIC = ("0x15b3", "0x020700")
# Reading it answers EINVAL, as a slot does whose netdev is somewhere else.
UNREADABLE = "/proc/self/clear_refs"

# index, address, type, netdev; a netdev of None cannot be read
GIDs = Sequence[tuple[int, str, str, str | None]]


class Machine:
    """A directory with ``sys``, ``proc``, ``dev``, ``etc`` and ``usr`` in it."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()  # links lead there
        self.sys = self.root / "sys"
        self.proc = self.root / "proc"
        self._routes: list[str] = [
            "Iface Destination Gateway Flags RefCnt Use Metric Mask"
        ]
        self._if_inet6: list[str] = []
        for place in ("class/infiniband", "class/net", "bus/pci/devices"):
            (self.sys / place).mkdir(parents=True)
        (self.proc / "net").mkdir(parents=True)
        self._write_networks()

    def pci(
        self, *path: str, numa: int = -1, what: tuple[str, str] | None = None
    ) -> Path:
        """Add a PCI device beneath its bridges and give its directory."""
        place = self.sys / "devices"
        for name in path:
            place /= name
            place.mkdir(parents=True, exist_ok=True)
            _put(place / "numa_node", str(numa))
            link = self.sys / "bus/pci/devices" / name
            if not name.startswith("pci") and not link.is_symlink():
                link.symlink_to(place)
        vendor, kind = what or ("0x0000", "0x060400")
        _put(place / "vendor", vendor)
        _put(place / "class", kind)
        return place

    def cpus(self, *nodes: str) -> None:
        """Say which CPUs the NUMA nodes have, such as ``0-31``."""
        for i, cpus in enumerate(nodes):
            _put(self.sys / f"devices/system/node/node{i}/cpulist", cpus)

    def netdev(
        self, name: str, *addresses: str, mtu: int = 1500, state: str = "up"
    ) -> None:
        """Add a network interface with addresses such as ``10.0.0.1/24``."""
        _put(self.sys / "class/net" / name / "mtu", str(mtu))
        _put(self.sys / "class/net" / name / "operstate", state)
        for text in addresses:
            address = ipaddress.ip_interface(text)
            length = address.network.prefixlen
            if isinstance(address, ipaddress.IPv4Interface):
                words = (address.network.network_address, address.network.netmask)
                base, mask = (int.from_bytes(w.packed, "little") for w in words)
                self._routes.append(f"{name} {base:08X} 00000000 0001 0 0 0 {mask:08X}")
            else:
                self._if_inet6.append(
                    f"{address.ip.packed.hex()} 02 {length:02x} 00 80 {name}"
                )
        self._write_networks()

    def host(
        self,
        *,
        kernel: str = "6.1.0-18-amd64",
        memlock: str = "unlimited",
        ptrace_scope: str = "0",
        modules: Sequence[str] = ("ib_uverbs", "mlx5_ib", "nvidia_peermem"),
        providers: Sequence[str] = ("mlx4", "mlx5", "rxe"),
        device_files: bool = True,
        control_groups: str = "cgroup.controllers",
        **files: str,
    ) -> None:
        """Say what else the machine is; what is not said is well.

        Args:
          providers: Of rdma-core; none at all means that it is not installed.
          device_files: Whether /dev/infiniband is there.
          control_groups: What of version 2 is at the root of the control groups, or
            of version 1; empty: none are mounted.
          files: Contents by path, with ``__`` for the slashes.
        """
        limits = "Limit                     Soft Limit           Hard Limit   Units\n"
        for name, value, unit in (
            ("Max open files", "1048576", "files"),
            ("Max locked memory", memlock, "bytes"),
        ):
            limits += f"{name:<26}{value:<21}{value:<13}{unit}\n"
        texts = {
            "proc/self/limits": limits,
            "proc/self/status": "Name:\tkvxfer\nCapEff:\t0000000000000000",
            "proc/sys/kernel/osrelease": kernel,
            "proc/sys/kernel/yama/ptrace_scope": ptrace_scope,
            "proc/meminfo": "HugePages_Total:       0",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
            "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc",
            **{name.replace("__", "/"): text for name, text in files.items()},
        }
        if control_groups:
            texts.setdefault(f"sys/fs/cgroup/{control_groups}", "cpu memory pids")
        for name, text in texts.items():
            _put(self.root / name, text)
        for module in modules:
            (self.sys / "module" / module).mkdir(parents=True, exist_ok=True)
        for provider in providers:
            _put(
                self.root / f"etc/libibverbs.d/{provider}.driver", f"driver {provider}"
            )
        if providers:
            library = self.root / "usr/lib/x86_64-linux-gnu/libibverbs.so.1"
            _put(library.with_name("libibverbs.so.1.14.44.0"), "")
            library.symlink_to("libibverbs.so.1.14.44.0")
        for i in range(len(list((self.sys / "class/infiniband").iterdir()))):
            (self.sys / f"class/infiniband_verbs/uverbs{i}").mkdir(parents=True)
            if device_files:
                _put(self.root / f"dev/infiniband/uverbs{i}", "")

    def _write_networks(self) -> None:
        _put(self.proc / "net/route", "\n".join(self._routes))
        _put(self.proc / "net/if_inet6", "\n".join(self._if_inet6))

    def device(
        self,
        name: str,
        pci: Path | None,
        *,
        soft_roce_on: str | None = None,
        driver: str = "",
    ) -> Path:
        """Add an RDMA device, and what drives the PCI device beneath."""
        place = (pci or self.sys / "devices/virtual") / "infiniband" / name
        place.mkdir(parents=True)
        if pci is not None:
            (place / "device").symlink_to(pci)
            if driver:
                (pci / "driver").symlink_to(f"/sys/bus/pci/drivers/{driver}")
        if soft_roce_on is not None:
            _put(place / "parent", soft_roce_on)
        (self.sys / "class/infiniband" / name).symlink_to(place)
        return place

    def port(
        self,
        device: Path,
        number: int = 1,
        *,
        state: str = "4: ACTIVE",
        phys_state: str = "5: LinkUp",
        layer: str = "Ethernet",
        rate: str = "400 Gb/sec (4X NDR)",
        lid: int = 0,
        gids: GIDs = (),
        length: int = 8,
    ) -> None:
        """Add a port with a GID table of ``length`` entries, most of them empty."""
        place = device / "ports" / str(number)
        for name, text in (
            ("state", state),
            ("phys_state", phys_state),
            ("link_layer", layer),
            ("rate", rate),
            ("lid", f"{lid:#x}"),
        ):
            _put(place / name, text)
        table = {entry[0]: entry for entry in gids}
        for index in range(length):
            _, text, kind, netdev = table.get(index, (index, "::", "", None))
            # As the kernel writes them: all the digits.
            address = ipaddress.IPv6Address(_mapped(text)).exploded
            _put(place / "gids" / str(index), address)
            for attribute, value in (("types", kind), ("ndevs", netdev)):
                file = place / "gid_attrs" / attribute / str(index)
                if value:
                    _put(file, value)
                else:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.symlink_to(UNREADABLE)


def _mapped(text: str) -> str:
    return text if ":" in text else f"::ffff:{text}"


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def roce_table(netdev: str, ipv4: str, link_local: str) -> GIDs:
    """The table of a RoCE port with one IPv4 address, as ConnectX NICs have it."""
    return [
        (0, link_local, V1, netdev),
        (1, link_local, V2, netdev),
        (2, ipv4, V1, netdev),
        (3, ipv4, V2, netdev),
    ]


def dgx(machine: Machine) -> None:
    """Eight GPUs and eight NICs, each pair on a switch of its own; two for storage."""
    machine.cpus("0-55", "56-111")
    for i in range(8):
        node = i // 4
        bus = f"{0x18 + 0x20 * i:02x}"
        switch = (f"pci0000:{bus}", f"0000:{bus}:01.0", f"0000:{bus}:02.0")
        machine.pci(*switch, f"0000:{bus}:03.0", f"0000:{bus}:04.0", numa=node)
        machine.pci(
            *switch, f"0000:{bus}:05.0", f"0000:{bus}:06.0", numa=node, what=NVIDIA_GPU
        )
        nic = machine.pci(
            *switch,
            f"0000:{bus}:07.0",
            f"0000:{bus}:08.0",
            numa=node,
            what=MELLANOX_NIC,
        )
        machine.netdev(f"rdma{i}", f"172.16.{i}.10/24", mtu=9000)
        machine.port(
            machine.device(f"mlx5_{i}", nic),
            gids=roce_table(f"rdma{i}", f"172.16.{i}.10", f"fe80::10:{i}"),
        )
    # On a root port of its own, and slower: the network for storage.
    storage = machine.pci(
        "pci0000:18", "0000:18:1f.0", "0000:19:00.0", numa=0, what=MELLANOX_NIC
    )
    machine.netdev("storage0", "10.9.0.10/16", mtu=9000)
    machine.port(
        machine.device("mlx5_8", storage),
        rate="200 Gb/sec (2X NDR)",
        gids=roce_table("storage0", "10.9.0.10", "fe80::9"),
    )
    management = machine.pci(
        "pci0000:18", "0000:18:1e.0", "0000:1a:00.0", numa=0, what=MELLANOX_NIC
    )
    machine.netdev("eno1", "192.168.1.10/24")
    machine.port(
        machine.device("mlx5_9", management),
        rate="25 Gb/sec (1X EDR)",
        gids=roce_table("eno1", "192.168.1.10", "fe80::a"),
    )
    machine.host()


def dual_port(machine: Machine, host: int = 7) -> None:
    """One device with two ports: InfiniBand without a cable, and Ethernet."""
    nic = machine.pci("pci0000:00", "0000:00:02.0", "0000:03:00.0", what=MELLANOX_NIC)
    device = machine.device("mlx4_0", nic)
    machine.port(
        device,
        1,
        state="1: DOWN",
        phys_state="2: Polling",
        layer="InfiniBand",
        rate="10 Gb/sec (4X SDR)",
        gids=[(0, "fe80::2:c903:1", V1, None)],
    )
    machine.netdev("ens2", f"10.4.0.{host}/24", f"2001:db8:4::{host}/64")
    machine.port(
        device,
        2,
        rate="40 Gb/sec (4X QDR)",
        gids=[
            (0, f"fe80::{host}", V1, "ens2"),
            (1, f"fe80::{host}", V2, "ens2"),
            (2, f"2001:db8:4::{host}", V2, "ens2"),
            (3, f"10.4.0.{host}", V2, "ens2"),
        ],
    )
    machine.host(modules=("ib_uverbs", "mlx4_ib"), memlock="8388608")


def bonded(machine: Machine, host: int = 7) -> None:
    """Two ports in one bond, with a VLAN on it and a bridge of containers."""
    nic = machine.pci(
        "pci0000:80", "0000:80:01.0", "0000:81:00.0", numa=1, what=MELLANOX_NIC
    )
    machine.cpus("0-15", "16-31")
    for slave in ("ens6f0", "ens6f1"):
        machine.netdev(slave, mtu=4200)
        (machine.sys / "class/net" / slave / "master").symlink_to("../bond0")
    machine.netdev("bond0", f"10.5.0.{host}/16", "fe80::5/64", mtu=4200)
    _put(machine.sys / "class/net/bond0/bonding/slaves", "ens6f0 ens6f1")
    machine.netdev("bond0.100", f"10.100.0.{host}/24", mtu=4200)
    machine.netdev("docker0", "172.17.0.1/16", state="down")
    machine.port(
        machine.device("mlx5_bond_0", nic),
        rate="100 Gb/sec (4X EDR)",
        gids=[
            (0, "fe80::5", V1, "bond0"),
            (1, "fe80::5", V2, "bond0"),
            (2, f"10.100.0.{host}", V2, "bond0.100"),
            (4, f"10.5.0.{host}", V1, "bond0"),
            (5, f"10.5.0.{host}", V2, "bond0"),
        ],
    )
    machine.host(sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="powersave")


def infiniband(machine: Machine) -> None:
    """InfiniBand: one port in use, one that no subnet manager has seen, one down."""
    machine.cpus("0-15", "16-31")
    for i, (state, lid) in enumerate(
        (("4: ACTIVE", 0x11), ("2: INIT", 0), ("1: DOWN", 0))
    ):
        nic = machine.pci(
            f"pci0000:{0x40 * i + 0x10:02x}",
            f"0000:{0x40 * i + 0x10:02x}:01.0",
            f"0000:{0x40 * i + 0x11:02x}:00.0",
            numa=i % 2,
            what=MELLANOX_NIC,
        )
        machine.port(
            machine.device(f"mlx5_{i}", nic),
            state=state,
            phys_state="3: Disabled" if state.startswith("1") else "5: LinkUp",
            layer="InfiniBand",
            rate="200 Gb/sec (4X HDR)",
            lid=lid,
            gids=[(0, f"fe80::ec0d:9a03:{i:x}", V1, None)],
        )
    machine.host(providers=("rxe",), ptrace_scope="3")


def container(machine: Machine, host: int = 77) -> None:
    """A container: the table shows the host's addresses, one of them is its own."""
    nic = machine.pci("pci0000:00", "0000:00:04.0", "0000:05:00.0", what=MELLANOX_NIC)
    machine.netdev("net1", f"10.6.0.{host}/24", mtu=9000)
    machine.port(
        machine.device("mlx5_4", nic),
        gids=[
            (0, "fe80::6", V2, None),
            (1, "10.6.0.6", V2, None),
            (2, f"10.6.0.{host}", V1, "net1"),
            (5, f"10.6.0.{host}", V2, "net1"),
        ],
    )
    other = machine.pci("pci0000:00", "0000:00:05.0", "0000:06:00.0", what=MELLANOX_NIC)
    machine.port(machine.device("mlx5_5", other), gids=[(1, "10.7.0.6", V2, None)])
    machine.host(
        memlock="65536",
        device_files=False,
        **{
            ".dockerenv": "",
            "sys/fs/cgroup/memory.max": str(64 << 30),
            "sys/fs/cgroup/cpu.max": "50000 100000",
        },
    )


def holes(machine: Machine, host: int = 7) -> None:
    """A table with holes, whose only good entry is high up; and an IPv6-only port."""
    nic = machine.pci("pci0000:00", "0000:00:02.0", "0000:03:00.0", what=MELLANOX_NIC)
    machine.netdev("ens3", f"10.8.0.{host}/24")
    machine.port(
        machine.device("mlx5_0", nic),
        gids=[
            (4, f"10.8.0.{host}", V1, "ens3"),
            (130, f"10.8.0.{host}", V2, "ens3"),
        ],
        length=256,
    )
    other = machine.pci("pci0000:00", "0000:00:03.0", "0000:04:00.0", what=MELLANOX_NIC)
    machine.netdev("ens4", "2001:db8:8::7/64", "fe80::8/64")
    machine.port(
        machine.device("mlx5_1", other),
        rate="200 Gb/sec (4X HDR)",
        gids=[(0, "fe80::8", V2, "ens4"), (7, "2001:db8:8::7", V2, "ens4")],
    )
    machine.host(
        sys__kernel__mm__transparent_hugepage__enabled="always madvise [never]"
    )


def virtual(machine: Machine) -> None:
    """A guest with four GPUs and two functions of a NIC: PCI says nothing there."""
    for i in range(4):
        machine.pci("pci0000:00", f"0000:00:{0x10 + i:02x}.0", what=NVIDIA_GPU)
    for i in range(2):
        nic = machine.pci("pci0000:00", f"0000:00:{0x20 + i:02x}.0", what=MELLANOX_NIC)
        machine.netdev(f"eth{i + 1}", f"10.20.{i}.5/24", mtu=4200)
        machine.port(
            machine.device(f"mlx5_{i}", nic),
            rate="100 Gb/sec (4X EDR)",
            gids=roce_table(f"eth{i + 1}", f"10.20.{i}.5", f"fe80::20:{i}"),
        )
    machine.host(
        kernel="5.4.0-150-generic",
        modules=("ib_uverbs", "mlx5_ib"),
        proc__cmdline="BOOT_IMAGE=/vmlinuz intel_iommu=on quiet",
        sys__devices__system__clocksource__clocksource0__current_clocksource="hpet",
    )


def bare(machine: Machine) -> None:
    """A server without any NIC for RDMA."""
    machine.cpus("0-7")
    machine.netdev("eth0", "192.168.1.5/24")
    machine.host(modules=("nf_tables",), providers=())


def legacy(machine: Machine) -> None:
    """A container on an older host: control groups 1, a NIC named by its place."""
    machine.cpus("0-7")
    nic = machine.pci("pci0000:00", "0000:00:02.0", "0000:03:00.0", what=MELLANOX_NIC)
    machine.netdev("net1", "10.3.0.7/24", mtu=9000)
    machine.port(
        machine.device("rocep3s0f0", nic, driver="mlx5_core"),
        rate="100 Gb/sec (4X EDR)",
        gids=roce_table("net1", "10.3.0.7", "fe80::3"),
    )
    machine.host(
        kernel="4.18.0-553.el8.x86_64",
        providers=("mlx4", "rxe"),
        device_files=True,
        control_groups="",
        **{
            ".dockerenv": "",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(32 << 30),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/pids/pids.max": "4096",
        },
    )


MACHINES: dict[str, Callable[[Machine], None]] = {
    "bare": bare,
    "bonded": bonded,
    "container": container,
    "dgx": dgx,
    "dual_port": dual_port,
    "holes": holes,
    "infiniband": infiniband,
    "legacy": legacy,
    "virtual": virtual,
}


def make(name: str, root: Path) -> Machine:
    """Make one of :data:`MACHINES` in an empty directory."""
    machine = Machine(root)
    MACHINES[name](machine)
    return machine


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MACHINES:
        sys.exit(f"usage: python -m tests.machines {'|'.join(MACHINES)} DIRECTORY")
    os.makedirs(sys.argv[2])
    make(sys.argv[1], Path(sys.argv[2]))
