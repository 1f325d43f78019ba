"""GIDs: what an entry of a port's table is, and which of them goes before which.

Pure. An index says nothing by itself: it depends on the order in which addresses
were given to the netdev, and it changes at a reboot. So entries are ranked by what
they are.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvxfer.errors import DeviceUnavailableError

ROCE_V2 = "RoCE v2"
ROCE_V1 = "IB/RoCE v1"

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_IPV4_LINK_LOCAL = ipaddress.ip_network("169.254.0.0/16")
# Addresses that exist on every host that runs containers, and reach none of them.
_VIRTUAL = ("docker", "br-", "cni", "flannel", "veth", "virbr", "lo")


class Family(enum.IntEnum):
    """What a GID's address is, best first."""

    IPV4 = 0
    IPV6 = 1
    LINK_LOCAL = 2

    def __str__(self) -> str:
        return ("IPv4", "IPv6", "IPv6 link-local")[self]


@dataclass(frozen=True)
class Network:
    """A network that this host is directly in, and by which interface."""

    netdev: str
    network: IPNetwork


@dataclass(frozen=True)
class GID:
    """An entry of a port's GID table.

    Attributes:
      index: Its place in the table.
      gid: 16 bytes.
      gid_type: ``RoCE v2``, ``IB/RoCE v1`` (also of InfiniBand), ``software``, or
        empty where the kernel does not say.
      netdev: The interface whose address it is; empty if there is none here.
      netdev_up: Whether that is up; None where it is not known.
      prefix_len: Length of the address's network prefix; 0 where it is not known.
      foreign: Its interface is in another network namespace.
    """

    index: int
    gid: bytes
    gid_type: str = ""
    netdev: str = ""
    netdev_up: bool | None = None
    prefix_len: int = 0
    foreign: bool = False

    @property
    def address(self) -> IPAddress:
        """The GID as an address: IPv4 if it maps one."""
        return gid_address(self.gid)

    @property
    def family(self) -> Family:
        """What the address is."""
        return family_of(self.gid)

    @property
    def text(self) -> str:
        """The GID as people write it, such as ``10.0.0.1`` or ``fe80::1``."""
        return str(self.address)

    def __str__(self) -> str:
        kind = f" {self.gid_type}" if self.gid_type else ""
        where = f" on {self.netdev}" if self.netdev else ""
        return f"{self.index}: {self.text}{kind}{where}"


def gid_address(gid: bytes) -> IPAddress:
    """Return the address that a GID is."""
    address = ipaddress.IPv6Address(gid)
    return address.ipv4_mapped or address


def family_of(gid: bytes) -> Family:
    """Return what the address of a GID is."""
    address = gid_address(gid)
    if isinstance(address, ipaddress.IPv4Address):
        return Family.IPV4
    return Family.LINK_LOCAL if address.is_link_local else Family.IPV6


def subnet(gid: bytes, prefix_len: int) -> IPNetwork | None:
    """Return the network of a GID; None where that is unknown or says nothing."""
    if not prefix_len or family_of(gid) is Family.LINK_LOCAL:
        return None
    return ipaddress.ip_network((gid_address(gid), prefix_len), strict=False)


def share_subnet(a: bytes, a_prefix: int, b: bytes, b_prefix: int) -> bool:
    """Say whether two GIDs are known to be in one network, as either side sees it."""
    ours, theirs = subnet(a, a_prefix), subnet(b, b_prefix)
    return (ours is not None and gid_address(b) in ours) or (
        theirs is not None and gid_address(a) in theirs
    )


def problem(entry: GID, link_layer: str) -> str:
    """Say why an entry cannot be used at all; empty if it can."""
    if link_layer != "ethernet":
        return ""
    if entry.foreign:
        return "its netdev is in another network namespace"
    if entry.netdev_up is False:
        return f"{entry.netdev} is down"
    return ""


def weakness(entry: GID, near: Sequence[IPAddress | str] = ()) -> tuple[int, ...]:
    """Return the rank of an entry, lowest first.

    Args:
      near: Addresses of the peer, or the name of an interface, that the GID should
        be in one network with.
    """
    virtual = entry.netdev.startswith(_VIRTUAL)
    address = entry.address
    unrouted = entry.family is Family.IPV4 and address in _IPV4_LINK_LOCAL
    return (
        entry.foreign,
        entry.netdev_up is False,
        entry.gid_type == ROCE_V1,
        virtual or unrouted,
        entry.family,
        bool(near) and not _is_near(entry, near),
        "." in entry.netdev,  # a VLAN of the same port
        entry.index,
    )


def _is_near(entry: GID, near: Sequence[IPAddress | str]) -> bool:
    network = subnet(entry.gid, entry.prefix_len)
    return any(
        entry.netdev == place
        if isinstance(place, str)
        else network is not None and place in network
        for place in near
    )


_WEAKNESSES = (
    "its netdev is in another network namespace",
    "its netdev is down",
    "RoCE v1",
    "an address that other hosts do not reach",
    "",
    "in another network than asked for",
    "a VLAN",
)


def explain(loser: GID, winner: GID, near: Sequence[IPAddress | str] = ()) -> str:
    """Say in a few words why an entry comes behind another one."""
    if loser.index == winner.index:
        return "chosen"
    pairs = zip(weakness(loser, near), weakness(winner, near), strict=True)
    for place, (a, b) in enumerate(pairs):
        if a == b:
            continue
        if place < len(_WEAKNESSES):
            return _WEAKNESSES[place] or f"{loser.family}, not {winner.family}"
        break
    return f"as good as index {winner.index}, which comes first"


def rank(
    table: Iterable[GID], link_layer: str, near: Sequence[IPAddress | str] = ()
) -> list[GID]:
    """Sort the entries that can be used, best first."""
    usable = [entry for entry in table if not problem(entry, link_layer)]
    if link_layer == "infiniband":
        return sorted(usable, key=lambda entry: entry.index)
    return sorted(usable, key=lambda entry: weakness(entry, near))


def choose(
    table: Sequence[GID],
    link_layer: str,
    where: str,
    index: int | None = None,
    near: Sequence[IPAddress | str] = (),
) -> GID:
    """Choose the GID that connections leave from.

    Args:
      table: The entries that are not empty.
      where: Device and port, for messages.
      index: The entry that has been asked for.
      near: As :func:`weakness` has it.

    Raises:
      DeviceUnavailableError: The entry asked for is empty or cannot be used, or none
        can be; the message has the table.
    """
    if index is not None:
        asked = next((entry for entry in table if entry.index == index), None)
        if asked is None:
            raise DeviceUnavailableError(
                f"{where} has no GID at index {index}; see gid_index. It has: "
                + listing(table, link_layer)
            )
        if why := problem(asked, link_layer):
            # Packets from it would not leave, and no call of the verbs says so.
            raise DeviceUnavailableError(
                f"GID {index} of {where} cannot be used: {why}; see gid_index. It has: "
                + listing(table, link_layer)
            )
        return asked
    ranked = rank(table, link_layer, near)
    if not ranked:
        raise DeviceUnavailableError(
            f"{where} has no GID to use: {listing(table, link_layer)}"
        )
    return ranked[0]


def listing(table: Sequence[GID], link_layer: str = "ethernet") -> str:
    """Put a table into a message."""
    return (
        "; ".join(
            f"{entry}" + (f" ({why})" if (why := problem(entry, link_layer)) else "")
            for entry in table
        )
        or "none"
    )
