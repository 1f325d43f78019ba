"""The original's environment variables, read when a communicator is made."""

from __future__ import annotations

import dataclasses
import fcntl
import ipaddress
import logging
import os
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvxfer import devices
from kvxfer.errors import OptionError
from kvxfer.options import Options

__all__ = ["Settings", "configure_logging"]

_GID_INDEX = "KVCACHE_RDMA_GID_INDEX"
_TRUE = frozenset({"1", "true", "on", "yes"})
_SIOCGIFADDR = 0x8915
_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    Attributes:
      options: For client and server.
      host: What a decode node listens on.
      port: Overrides both the port that is listened on and the one that is dialled.
    """

    options: Options
    host: str
    port: str | None

    @classmethod
    def read(cls, gpu_idx: int, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment now.

        Raises:
          OptionError: A value is not permitted; the message has the range.
          DeviceUnavailableError: A NIC that is named is not there.
        """
        environ = dict(os.environ if environ is None else environ)
        if environ.get(_GID_INDEX, "").strip().startswith("-"):
            del environ[_GID_INDEX]  # the original's word for: none in particular
        options = Options.load(
            environ=environ, gpu_index=gpu_idx if gpu_idx >= 0 else None
        )
        options = _without_useless_gid(options)
        if environ.get("KVXFER_HOST"):
            host = options.host
        elif options.socket_ifname is not None:
            host = _address_of(options.socket_ifname)
        else:
            host = _any_address()
        configure_logging(environ)
        return cls(options, host, environ.get("SET_RDMA_DEST_PORT") or None)


def _without_useless_gid(options: Options) -> Options:
    """Check that there are devices; drop the index where they are all software.

    The documentation of the original has everybody set the index, which means an
    entry of a NIC's table.
    """
    free = dataclasses.replace(options, gid_index=None)
    if all(spec.provider == "soft" for spec in devices.usable(free)):
        return free
    return options


def _any_address() -> str:
    """Return what stands for all addresses, of both families if there are both."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"
    return "::"


def _address_of(interface: str) -> str:
    """Return an address of an interface, IPv4 before IPv6.

    Raises:
      OptionError: There is no such interface, or it has no address.
    """
    known = sorted(name for _, name in socket.if_nameindex())
    if interface not in known:
        raise OptionError(
            f"KVCACHE_SOCKET_IFNAME is {interface!r}, and there are: {', '.join(known)}"
        )
    request = struct.pack("256s", interface.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            return socket.inet_ntoa(answer[20:24])
        except OSError:
            pass  # no IPv4 address; perhaps one of IPv6
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        words = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(words[0]))
        if words[5] == interface and not address.is_link_local:
            return str(address)
    raise OptionError(f"KVCACHE_SOCKET_IFNAME is {interface!r}, which has no address")


_handlers: dict[str, logging.Handler] = {}
_handlers_lock = threading.Lock()


def configure_logging(environ: Mapping[str, str]) -> None:
    """Log as the original's variables say, once for each file of the process.

    ``KVCACHE_DEBUG`` and ``KV_IS_DEBUG_ENABLED`` turn debug messages on, into
    ``KVCACHE_DEBUG_FILE`` or standard error; ``KVCACHE_ERROR_FILE`` gets warnings and
    errors. ``%h`` and ``%p`` in a name are host and process. Without any of them
    logging is the program's own.

    Raises:
      OptionError: A file cannot be written.
    """
    logger = logging.getLogger("kvxfer")
    words = (environ.get(n, "") for n in ("KVCACHE_DEBUG", "KV_IS_DEBUG_ENABLED"))
    if any(word.strip().lower() in _TRUE for word in words):
        logger.setLevel(logging.DEBUG)
        _add(logger, environ.get("KVCACHE_DEBUG_FILE", ""), logging.DEBUG)
    if environ.get("KVCACHE_ERROR_FILE"):
        _add(logger, environ["KVCACHE_ERROR_FILE"], logging.WARNING)


def _add(logger: logging.Logger, name: str, level: int) -> None:
    path = name.replace("%h", socket.gethostname()).replace("%p", str(os.getpid()))
    with _handlers_lock:
        if path in _handlers:
            return
        try:
            handler: logging.Handler = logging.StreamHandler()
            if path:
                handler = logging.FileHandler(path, "w")
        except OSError as error:
            raise OptionError(f"log file {path}: {error.strerror}") from error
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        _handlers[path] = handler
