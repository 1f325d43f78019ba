"""The original's environment variables, read when a communicator is made."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from kvxfer import devices, logs
from kvxfer.interfaces import address_of
from kvxfer.options import Options

__all__ = ["Settings"]

_GID_INDEX = "KVCACHE_RDMA_GID_INDEX"


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
        devices.usable(options)
        if environ.get("KVXFER_HOST"):
            host = options.host
        elif options.socket_ifname is not None:
            host = address_of(options.socket_ifname)
        else:
            host = _any_address()
        _configure_logging(options)
        return cls(options, host, environ.get("SET_RDMA_DEST_PORT") or None)


def _any_address() -> str:
    """Return what stands for all addresses, of both families if there are both."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"
    return "::"


_configured: tuple[bool, str | None, str | None] | None = None
_configure_lock = threading.Lock()


def _configure_logging(options: Options) -> None:
    """Log as the original's variables say; without them as the program has it.

    Raises:
      OptionError: A file cannot be written.
    """
    global _configured
    wanted = (options.debug, options.debug_file, options.error_file)
    with _configure_lock:
        # Not for each communicator: it would empty the files.
        if wanted != (False, None, None) and wanted != _configured:
            logs.configure(options)
            _configured = wanted
