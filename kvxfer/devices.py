"""Which devices this process can use, in order of preference, and with which GID.

A NIC is preferred; the software device is always there and comes last, unless
``require_rdma`` excludes it. What was passed over and why is logged.
"""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass
from pathlib import Path

from kvxfer import _verbs
from kvxfer.errors import DeviceUnavailableError, OptionError, VerbsError
from kvxfer.options import Options
from kvxfer.verbs_types import PortState

_log = logging.getLogger("kvxfer.devices")

SOFTWARE_DEVICE = "soft0"
NULL_DEVICE = "null0"
_SYSFS = Path("/sys/class/infiniband")
_IPV4_MAPPED = bytes(10) + b"\xff\xff"


@dataclass(frozen=True)
class DeviceSpec:
    """A device and port to open."""

    name: str
    provider: _verbs.Provider
    port_num: int = 1


@dataclass(frozen=True)
class GIDChoice:
    """An entry of a port's GID table and what it is."""

    index: int
    gid: bytes
    gid_type: str


def usable(options: Options) -> list[DeviceSpec]:
    """List what ``options`` permit this process to use, best first.

    Raises:
      DeviceUnavailableError: Nothing is left, or the device named by the option
        is not there.
    """
    if options.device in ("soft", SOFTWARE_DEVICE):
        if options.require_rdma:
            raise OptionError(
                "device names the software device, but require_rdma refuses it"
            )
        return [DeviceSpec(SOFTWARE_DEVICE, "soft")]
    if options.device in ("null", NULL_DEVICE):
        # Only ever by name: it throws away what is written.
        if options.require_rdma:
            raise OptionError("device names the null device, which is no RDMA device")
        return [DeviceSpec(NULL_DEVICE, "null")]
    if options.device != "auto":
        name, _, port = options.device.partition(":")
        return [DeviceSpec(name, "libibverbs", int(port or 1))]
    found: list[DeviceSpec] = []
    try:
        for info in _verbs.list_devices("libibverbs", path=options.ibverbs_path):
            found.extend(_active_ports(info.name, options))
    except DeviceUnavailableError as error:
        if options.require_rdma:
            raise
        _log.debug("no NIC: %s", error)
    if not options.require_rdma:
        found.append(DeviceSpec(SOFTWARE_DEVICE, "soft"))
    if not found:
        raise DeviceUnavailableError(
            "require_rdma is set and no RDMA device has an active port"
        )
    return found


def _active_ports(name: str, options: Options) -> list[DeviceSpec]:
    """List the active ports of a NIC, or log why there are none."""
    try:
        with _verbs.Device(
            name, provider="libibverbs", path=options.ibverbs_path
        ) as device:
            ports = range(1, device.query().phys_port_cnt + 1)
            states = {port: device.query_port(port).state for port in ports}
    except (DeviceUnavailableError, VerbsError) as error:
        _log.warning("%s is passed over: %s", name, error)
        return []
    for port, state in states.items():
        if state is not PortState.ACTIVE:
            _log.warning("%s port %d is passed over: it is %s", name, port, state.name)
    return [
        DeviceSpec(name, "libibverbs", port)
        for port, state in states.items()
        if state is PortState.ACTIVE
    ]


def choose_gid(device: _verbs.Device, spec: DeviceSpec, index: int | None) -> GIDChoice:
    """Choose the GID that a connection leaves from.

    With an ``index`` that entry, which must not be empty. Else on Ethernet RoCE v2
    before v1 and an IPv4 address before IPv6; on InfiniBand the first.

    Raises:
      DeviceUnavailableError: The entry, or the whole table, is empty.
    """
    port = device.query_port(spec.port_num)
    if device.is_software:
        gid_type = "software" if spec.provider == "soft" else spec.provider
        return GIDChoice(0, device.query_gid(spec.port_num, 0), gid_type)
    indices = range(port.gid_tbl_len) if index is None else [index]
    table: list[GIDChoice] = []
    for i in indices:
        try:
            gid = device.query_gid(spec.port_num, i)
        except VerbsError as error:
            _log.debug("GID %d of %s: %s", i, spec.name, error)
            continue
        if any(gid):
            table.append(GIDChoice(i, gid, _gid_type(spec, i)))
    if not table:
        raise DeviceUnavailableError(
            f"{spec.name} port {spec.port_num} has no GID"
            + ("" if index is None else f" at index {index}; see gid_index")
        )
    return min(table, key=_gid_rank)


def check_reachable(spec: DeviceSpec, ours: GIDChoice, theirs: bytes) -> None:
    """Refuse a peer's GID that packets from our GID cannot be addressed to.

    Raises:
      DeviceUnavailableError: One is an IPv4 address and the other is not.
    """
    if ours.gid_type == "RoCE v2" and (
        ours.gid.startswith(_IPV4_MAPPED) != theirs.startswith(_IPV4_MAPPED)
    ):
        # The verbs would say EINVAL, and not which of a dozen attributes is meant.
        raise DeviceUnavailableError(
            f"GID {ours.index} of {spec.name} is {_text(ours.gid)} and the peer's is "
            f"{_text(theirs)}: both must be IPv4 addresses, or neither; see gid_index"
        )


def _text(gid: bytes) -> str:
    address = ipaddress.IPv6Address(gid)
    return str(address.ipv4_mapped or address)


def max_retries(spec: DeviceSpec) -> int:
    """Return the highest ``retry_cnt`` that a device takes for a number of retries.

    Verbs permit up to 7, and only for ``rnr_retry`` does 7 mean "for ever". Soft-RoCE
    takes it so for both: a dead peer would never be reported.
    """
    if spec.provider == "libibverbs" and (_SYSFS / spec.name / "parent").exists():
        # The netdev beneath; only Soft-RoCE's driver has this file.
        return 6
    return 7


def _gid_rank(choice: GIDChoice) -> tuple[bool, bool, bool, int]:
    return (
        choice.gid_type == "IB/RoCE v1",
        not choice.gid.startswith(_IPV4_MAPPED),
        choice.gid.startswith(b"\xfe\x80"),
        choice.index,
    )


def _gid_type(spec: DeviceSpec, index: int) -> str:
    path = _SYSFS / spec.name / "ports" / str(spec.port_num) / "gid_attrs/types"
    try:
        return (path / str(index)).read_text().strip()
    except OSError:
        # A slot of another network namespace, or a sysfs without this table.
        return ""
