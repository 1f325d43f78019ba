"""A port of an open device: what it says now, and which GID its packets leave from."""

from __future__ import annotations

from dataclasses import replace

from kvxfer import _verbs, gids
from kvxfer.devices import DeviceSpec
from kvxfer.errors import DeviceUnavailableError
from kvxfer.gids import GID
from kvxfer.inventory import ask_port
from kvxfer.options import Options
from kvxfer.sysfs import Port, Sysfs

__all__ = ["check_reachable", "choose_gid", "describe_port", "max_retries"]


def describe_port(device: _verbs.Device, spec: DeviceSpec, options: Options) -> Port:
    """Read what an open device and its sysfs say of a port, now.

    Raises:
      VerbsError: There is no such port.
    """
    found = Port(spec.port_num)
    if device.is_software:
        gid_type = "software" if spec.provider == "soft" else spec.provider
        gid = GID(0, device.query_gid(spec.port_num, 0), gid_type)
        return ask_port(device, replace(found, gids=(gid,)))
    for port in Sysfs.at(options.sysfs).ports(spec.name):
        if port.port_num == spec.port_num:
            found = port
    return ask_port(device, found)


def choose_gid(device: _verbs.Device, spec: DeviceSpec, index: int | None) -> GID:
    """Choose the GID that a connection leaves from, see :func:`kvxfer.gids.choose`.

    Raises:
      DeviceUnavailableError: The entry, or the whole table, is empty.
    """
    port = describe_port(device, spec, Options())
    return gids.choose(port.gids, port.link_layer, spec.label, index)


def check_reachable(spec: DeviceSpec, ours: GID, theirs: bytes) -> None:
    """Refuse a peer's GID that packets from our GID cannot be addressed to.

    Raises:
      DeviceUnavailableError: One is an IPv4 address and the other is not.
    """
    their_family = gids.family_of(theirs)
    if ours.gid_type == gids.ROCE_V2 and (
        (ours.family is gids.Family.IPV4) != (their_family is gids.Family.IPV4)
    ):
        # The verbs would say EINVAL, and not which of a dozen attributes is meant.
        raise DeviceUnavailableError(
            f"GID {ours.index} of {spec.name} is {ours.text} and the peer's is "
            f"{gids.gid_address(theirs)}: both must be IPv4 addresses, or neither; "
            "see gid_index"
        )


def max_retries(spec: DeviceSpec) -> int:
    """Return the highest ``retry_cnt`` that a device takes for a number of retries.

    Verbs permit up to 7, and only for ``rnr_retry`` does 7 mean "for ever". Soft-RoCE
    takes it so for both: a dead peer would never be reported.
    """
    if spec.provider == "libibverbs" and Sysfs().is_soft_roce(spec.name):
        return 6
    return 7
