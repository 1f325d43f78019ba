"""What this machine has: the kernel's description, and what the verbs say of it.

sysfs knows places, netdevs and types of GIDs; only the verbs know the MTU in force,
and whether a device can be opened at all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from kvxfer import _verbs
from kvxfer.errors import DeviceUnavailableError, VerbsError
from kvxfer.gids import GID
from kvxfer.options import Options
from kvxfer.sysfs import GPU, Port, RDMADevice, Sysfs

_log = logging.getLogger("kvxfer.devices")


@dataclass(frozen=True)
class Inventory:
    """The RDMA devices and GPUs of a machine.

    Attributes:
      devices: In the order of their names.
      gpus: In the order of their PCI addresses.
      problem: Why no device of libibverbs can be used; empty if they can.
    """

    devices: tuple[RDMADevice, ...] = ()
    gpus: tuple[GPU, ...] = ()
    problem: str = ""


def take(options: Options, *, open_devices: bool = True) -> Inventory:
    """Look at this machine.

    Each device is opened for a moment. A device or library that fails is part of
    the answer.

    Args:
      open_devices: False leaves the verbs out, as for another machine's sysfs.
    """
    sysfs = Sysfs.at(options.sysfs)
    described = {device.name: device for device in sysfs.devices()}
    gpus = tuple(sysfs.gpus())
    if not open_devices:
        return Inventory(tuple(described.values()), gpus)
    try:
        listed = _verbs.list_devices("libibverbs", path=options.ibverbs_path)
    except DeviceUnavailableError as error:
        return Inventory(tuple(described.values()), gpus, str(error))
    names = [info.name for info in listed]
    found = []
    for name, device in described.items():
        if name in names:
            found.append(_ask(device, options))
        else:
            why = "libibverbs does not list it: its provider library is missing"
            found.append(replace(device, problem=why))
    found += [_ask(RDMADevice(n), options) for n in names if n not in described]
    return Inventory(tuple(found), gpus)


def _ask(device: RDMADevice, options: Options) -> RDMADevice:
    """Complete a device's description by what its verbs say."""
    described = {port.port_num: port for port in device.ports}
    try:
        with _verbs.Device(
            device.name, provider="libibverbs", path=options.ibverbs_path
        ) as handle:
            ports = tuple(
                ask_port(handle, described.get(number, Port(number)))
                for number in range(1, handle.query().phys_port_cnt + 1)
            )
    except (DeviceUnavailableError, VerbsError) as error:
        return replace(device, problem=f"cannot be opened: {error}")
    return replace(device, ports=ports)


def ask_port(device: _verbs.Device, port: Port) -> Port:
    """Complete a port's description by what an open device says.

    Raises:
      VerbsError: There is no such port.
    """
    attr = device.query_port(port.port_num)
    gids = port.gids or tuple(_gids(device, port.port_num, attr.gid_tbl_len))
    return replace(
        port,
        state=attr.state.name,
        link_layer=attr.link_layer,
        lid=attr.lid,
        mtu_bytes=128 << attr.active_mtu,
        gids=gids,
    )


def _gids(device: _verbs.Device, port_num: int, length: int) -> list[GID]:
    """Read a table by verbs alone, which do not say the types."""
    found = []
    for index in range(length):
        try:
            gid = device.query_gid(port_num, index)
        except VerbsError as error:
            _log.debug("GID %d of %s: %s", index, device.name, error)
            continue
        if any(gid):
            found.append(GID(index, gid))
    return found
