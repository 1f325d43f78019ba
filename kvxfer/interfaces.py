"""The address of a network interface, for those who name one instead of it."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from kvxfer.errors import OptionError

_SIOCGIFADDR = 0x8915
_LINK_LOCAL = "20"


def address_of(name: str) -> str:
    """Return the address that a server on an interface listens on: IPv4, or IPv6.

    Raises:
      OptionError: There is no such interface, or it has no address.
    """
    known = [interface for _, interface in socket.if_nameindex()]
    if name not in known:
        raise OptionError(
            f"option socket_ifname = {name!r}: no such interface; there are "
            + ", ".join(known)
        )
    request = struct.pack("256s", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return _ipv6_of(name)
    # struct ifreq: the name, then a sockaddr_in.
    return str(ipaddress.IPv4Address(answer[20:24]))


def _ipv6_of(name: str) -> str:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, interface = line.split()
        if interface == name and scope != _LINK_LOCAL:
            return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    raise OptionError(
        f"option socket_ifname = {name!r}: the interface has no address to listen on"
    )
