"""RDMA as the kernel and rdma-core have it: libraries, files, devices, GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kvxfer import cuda, gids
from kvxfer.doctor.checks import Check
from kvxfer.doctor.machine import Machine
from kvxfer.doctor.report import Finding, note, ok, problem, warning
from kvxfer.errors import DeviceUnavailableError
from kvxfer.options import Options
from kvxfer.sysfs import RDMADevice, Sysfs

if TYPE_CHECKING:
    from kvxfer.devices import Verdict

_JUMBO_BYTES = 4200
_DMABUF_KERNEL = (5, 12)
_PEER_MODULES = ("nvidia_peermem", "nv_peer_mem", "amdgpu")
# What rdma-core calls the other half of a driver of the kernel.
_PROVIDERS = {
    "mlx5_core": "mlx5",
    "mlx4_core": "mlx4",
    "ib_mthca": "mthca",
    "bnxt_en": "bnxt_re",
    "bnxt_re": "bnxt_re",
    "cxgb4": "cxgb4",
    "efa": "efa",
    "erdma": "erdma",
    "hfi1": "hfi1verbs",
    "hns3": "hns",
    "hns_roce_hw_v2": "hns",
    "i40e": "irdma",
    "ice": "irdma",
    "idpf": "irdma",
    "ib_qib": "ipathverbs",
    "mana": "mana",
    "be2net": "ocrdma",
    "qede": "qedr",
    "vmw_pvrdma": "vmw_pvrdma",
}


def _has_nic(machine: Machine) -> bool:
    return bool(machine.names("/sys/class/infiniband"))


def _sysfs(machine: Machine) -> Sysfs:
    return Sysfs(machine.path("/sys"), machine.path("/proc"))


def libraries(machine: Machine, options: Options) -> Iterator[Finding]:
    """libibverbs, and for each device the provider that drives it."""
    path = machine.library("libibverbs.so.1")
    if options.ibverbs_path is not None and machine.is_this:
        yield note("rdma-core", f"ibverbs_path names {options.ibverbs_path}")
    elif path is None:
        report = problem if _has_nic(machine) else note
        yield report(
            "rdma-core",
            "libibverbs.so.1 is not installed",
            "Only the software device can be used.",
            "apt install libibverbs1 ibverbs-providers; dnf install libibverbs",
        )
        return
    else:
        version = path.resolve().name.partition(".so.")[2]
        yield ok("rdma-core", f"libibverbs {version}")
    providers = {
        name.partition(".")[0]
        for name in machine.names("/etc/libibverbs.d", "*.driver")
    }
    wanted = {_provider(device) for device in _sysfs(machine).devices()}
    missing = wanted - providers - {""}
    if missing:
        yield problem(
            "providers",
            f"none for {', '.join(sorted(missing))}",
            "libibverbs does not list a device that it has no provider for.",
            "apt install ibverbs-providers; dnf install libibverbs",
        )
    elif providers:
        yield ok("providers", ", ".join(sorted(providers)))


def _provider(device: RDMADevice) -> str:
    """Say which provider a device needs; empty where that is not known.

    Its name says nothing where rdma-core has given it one by its place, such as
    ``rocep1s0f0``. The kernel's driver does.
    """
    if device.is_soft_roce:
        return "rxe"
    # mlx5_core.sf is a function of an mlx5_core.
    driver = device.driver.partition(".")[0]
    if driver in _PROVIDERS:
        return _PROVIDERS[driver]
    usual = r"(mlx4|mlx5|rxe|siw|bnxt_re|irdma|hns|efa|erdma|mana)"
    match = re.match(usual, device.name)
    return match[1] if match else ""


def device_files(machine: Machine, options: Options) -> Iterator[Finding]:
    """The files through which a process talks to a device."""
    nodes = machine.names("/sys/class/infiniband_verbs", "uverbs*")
    if not _has_nic(machine):
        yield note("device files", "no RDMA device: none are needed")
        return
    if "ib_uverbs" not in machine.modules() and not nodes:
        yield problem(
            "device files",
            "the kernel module ib_uverbs is not loaded",
            "No program can use the devices.",
            "modprobe ib_uverbs",
        )
        return
    files = [f"/dev/infiniband/{node}" for node in nodes]
    absent = [file for file in files if not machine.exists(file)]
    if absent or not files:
        yield problem(
            "device files",
            f"{', '.join(absent) or '/dev/infiniband'}: not there",
            "The kernel has the devices, and this process may not reach them.",
            "docker run --device=/dev/infiniband --ulimit memlock=-1 ...; in "
            "Kubernetes a device plugin: resources: rdma/hca: 1",
        )
    elif not machine.may_use(files):
        yield problem(
            "device files",
            f"{', '.join(files)}: no permission",
            "They must be readable and writable.",
            'usermod -aG rdma USER; or a rule for udev: KERNEL=="uverbs*", MODE="0666"',
        )
    else:
        yield ok("device files", f"{', '.join(files)}")


def ports(machine: Machine, options: Options) -> Iterator[Finding]:
    """Each port of each device: what is chosen, and what is wrong with the others."""
    from kvxfer import devices

    verdicts = judged(machine, options)
    for verdict in verdicts:
        check = f"device {verdict.spec.label}"
        if verdict.chosen and not verdict.is_software:
            yield ok(check, f"chosen: {verdict.reason}; {_link(verdict)}")
        elif verdict.usable:
            yield ok(check, f"{verdict.reason}; {_link(verdict)}")
        elif verdict.is_software:
            yield note(check, verdict.reason)
        else:
            yield from _unusable(check, verdict)
    try:
        devices.check(options, verdicts)
    except DeviceUnavailableError as error:
        yield problem(
            "choice",
            str(error),
            "Nothing can be transferred with these options.",
            "kvxfer devices --gids; kvxfer config",
        )


def judged(machine: Machine, options: Options) -> list[Verdict]:
    """Judge the ports of the machine.

    Raises:
      ImportError: The compiled part of kvxfer is missing.
    """
    from kvxfer import devices

    return devices.look(options, open_devices=machine.is_this)


def _link(verdict: Verdict) -> str:
    port = verdict.port
    if verdict.is_software:
        return "needs no NIC"
    words = [f"{port.link_layer}"]
    if port.rate_gbps:
        words.append(f"{port.rate_gbps:g} Gb/s")
    if verdict.gid is not None:
        words.append(f"GID {verdict.gid}")
    return ", ".join(words)


def _unusable(check: str, verdict: Verdict) -> Iterator[Finding]:
    port = verdict.port
    remedy = "kvxfer devices --gids"
    if "management" in verdict.reason or "the option" in verdict.reason:
        yield note(check, verdict.reason)
        return
    if port.state in ("DOWN", "UNKNOWN"):
        remedy = (
            f"ip link set {port.netdev} up; then the cable and the switch"
            if port.netdev
            else "the cable and the switch: ibstat, rdma link"
        )
    elif port.state in ("INIT", "ARMED"):
        remedy = "start a subnet manager: opensm, or the switch's"
    elif not port.gids:
        remedy = f"give {port.netdev or 'its netdev'} an address: ip addr add ..."
    elif all(gids.problem(entry, port.link_layer) for entry in port.gids):
        remedy = (
            "move its netdev into this network namespace: a CNI for RDMA (macvlan, "
            "SR-IOV), or docker run --network=host"
        )
    yield warning(check, verdict.reason, "It is not used.", remedy)


def mtu(machine: Machine, options: Options) -> Iterator[Finding]:
    """The packets that fit: RoCE takes the largest power of two beneath the MTU."""
    for verdict in judged(machine, options):
        port = verdict.port
        if not verdict.usable or verdict.is_software or port.link_layer != "ethernet":
            continue
        check = f"MTU {verdict.spec.label}"
        size = port.netdev_mtu_bytes
        if size and size < _JUMBO_BYTES:
            yield warning(
                check,
                f"{port.netdev} has {size} bytes"
                + (f", verbs use {port.mtu_bytes}" if port.mtu_bytes else ""),
                "Packets of 4096 bytes need less of the NIC and of the network.",
                f"ip link set {port.netdev} mtu 9000, on both sides and on all "
                "switches between: a smaller MTU on the way swallows large packets",
            )
        elif size:
            yield ok(check, f"{port.netdev} has {size} bytes")


def registered_by(
    driver: cuda.Cuda | str, gpus: Iterable[int], kernel: tuple[int, int], peer: str
) -> tuple[str, str]:
    """Say by what way a cache in GPU memory is registered, and why not by dmabuf.

    Args:
      driver: CUDA's, or why it cannot be asked; empty: it is another machine's.
      peer: The kernel module that lets NICs register GPU addresses; empty: none.

    Returns:
      ``dmabuf``, ``nvidia-peermem`` or ``none``, and the reason.
    """
    if kernel < _DMABUF_KERNEL:
        why = f"kernel {kernel[0]}.{kernel[1]} has no dmabuf for NICs"
    elif isinstance(driver, str):
        if not driver:
            return "dmabuf", "if CUDA's driver gives it out"
        why = f"no dmabuf without CUDA's driver: {driver}"
    else:
        without = [str(gpu) for gpu in gpus if not driver.exports_dmabuf(gpu)]
        if not without:
            return "dmabuf", "CUDA's driver gives it out"
        why = f"CUDA's driver gives out no dmabuf of GPU {', '.join(without)}"
    return ("nvidia-peermem", why) if peer else ("none", why)


def gpu(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether the GPU that the options name is here."""
    from kvxfer import devices

    why = devices.absent_gpu(_sysfs(machine).gpus(), options)
    if not why:
        return
    # An index also says whose turn it is among NICs; an address is for nothing else.
    report = note if options.gpu_pci is None else warning
    yield report(
        "GPU",
        why,
        "No NIC can be chosen for being near to it.",
        "kvxfer config prints gpu_index and gpu_pci; echo $CUDA_VISIBLE_DEVICES",
    )


def gpu_memory(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether a NIC can reach the memory of the GPUs, and by what way it would."""
    found = _sysfs(machine).gpus()
    if not found:
        yield ok("GPU memory", "no GPU")
        return
    vendors = ", ".join(sorted({gpu.vendor for gpu in found}))
    text = f"{len(found)} of {vendors}"
    modules = machine.modules()
    peer = next((n for n in _PEER_MODULES if n in modules), "")
    driver: cuda.Cuda | str = ""
    if machine.is_this:
        try:
            driver = cuda.load()
        except DeviceUnavailableError as error:
            driver = str(error)
    way, why = registered_by(driver, range(len(found)), machine.kernel(), peer)
    loaded = f"; {peer} is loaded" if peer else "; no module for peer memory"
    if not _has_nic(machine):
        yield note("GPU memory", f"{text}; no NIC that could reach it")
    elif way == "none":
        yield problem(
            "GPU memory",
            f"{text}; way: none, {why}{loaded}",
            "A cache in GPU memory cannot be registered: ibv_reg_mr says EFAULT.",
            "modprobe nvidia-peermem; or a kernel from 5.12 on with the open GPU "
            "driver, and kvxfer with the extra cuda",
        )
    elif not peer:
        yield note(
            "GPU memory",
            f"{text}; way: {way}, {why}{loaded}",
            "If dmabuf fails there is no other way.",
            "modprobe nvidia-peermem",
        )
    else:
        yield ok("GPU memory", f"{text}; way: {way}, {why}{loaded}")
    if "iommu=on" in machine.text("/proc/cmdline") and "iommu=pt" not in machine.text(
        "/proc/cmdline"
    ):
        yield warning(
            "IOMMU",
            "on, and not in pass-through",
            "Transfers between NIC and GPU go by the root complex, if at all.",
            "boot with iommu=pt; and look for ACS: lspci -vvv | grep ACSCtl",
        )


def relaxed_ordering(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether a NIC may write in any order on the bus."""
    if not _has_nic(machine):
        yield ok("relaxed ordering", "no NIC that could use it")
    elif options.relaxed_ordering:
        yield ok("relaxed ordering", "on")
    else:
        yield note(
            "relaxed ordering",
            "off",
            "It is faster on AMD processors, and where several GPUs share a NIC. "
            "Arrivals are safe with it.",
            "export KVXFER_RELAXED_ORDERING=1",
        )


CHECKS: tuple[Check, ...] = (
    libraries,
    device_files,
    ports,
    mtu,
    gpu,
    gpu_memory,
    relaxed_ordering,
)
