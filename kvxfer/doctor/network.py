"""What may stand between two hosts: packet filters, and who has the control port."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kvxfer.doctor.machine import Machine
from kvxfer.doctor.report import Finding, note, ok, warning
from kvxfer.options import Options

_IPC = "ipc://"
# What fits into struct sockaddr_un.
_MAX_SOCKET_PATH_BYTES = 107


def firewall(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether something may stand before the ports that peers need."""
    if options.host.startswith(_IPC):
        yield ok("firewall", "the control connection is a socket of this host")
        if machine.is_this:
            yield _socket_path(Path(options.host.removeprefix(_IPC)))
        return
    yield _filters(machine, options)
    if machine.is_this and options.port:
        yield _port(options.host, options.port)


def _filters(machine: Machine, options: Options) -> Finding:
    needed = f"nodes that connect need {_ports(machine, options)}"
    remedy = "try it from the other side: kvxfer doctor --peer HOST:PORT"
    tables = "/proc/net/ip_tables_names"
    found = machine.text(tables).split()
    if "nf_tables" in machine.modules():
        found.append("nf_tables")
    if found:
        return note(
            "firewall",
            f"packet filters are there: {', '.join(dict.fromkeys(found))}",
            f"{needed[0].upper()}{needed[1:]}.",
            f"nft list ruleset; firewall-cmd --add-port={options.port}/tcp; {remedy}",
        )
    if machine.hides(tables):
        return note(
            "firewall",
            "packet filters cannot be seen without root",
            f"{needed[0].upper()}{needed[1:]}.",
            f"the same as root; or {remedy}",
        )
    return ok("firewall", f"no packet filter is seen here; {needed}")


def _ports(machine: Machine, options: Options) -> str:
    """Say which ports packets arrive at, of each kind of device."""
    ports = f"TCP port {options.port}"
    if machine.names("/sys/class/infiniband"):
        ports += ", UDP port 4791 for RoCE"
    if options.require_rdma:
        return ports
    # The wire's listener has a port of its own, which only the peer is told.
    bounds = machine.text("/proc/sys/net/ipv4/ip_local_port_range").split()
    free = f" ({'-'.join(bounds)})" if len(bounds) == 2 else ""
    return (
        f"{ports}, and for the software device any TCP port of "
        f"net.ipv4.ip_local_port_range{free}"
    )


def _port(host: str, port: int) -> Finding:
    """Say whether a server could listen on its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = f"{host} port {port}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, port))
        except (socket.gaierror, UnicodeError):
            return warning(
                "control port",
                f"{host}: the name is not known",
                "A server cannot listen there, nor can anybody connect.",
                f"getent hosts {host}; or an address by KVXFER_HOST",
            )
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return note(
                    "control port",
                    f"{where}: no interface of this host has that address",
                    "A client may connect to it; a server cannot listen there.",
                    "ip addr; another address by KVXFER_HOST",
                )
            return note(
                "control port",
                f"{where}: {error.strerror}",
                "An endpoint that is running already has it, or another program.",
                f"ss -ltnp sport = :{port}; or another port by KVXFER_PORT",
            )
    return ok("control port", f"{where} is free")


def _socket_path(path: Path) -> Finding:
    """Say whether a server could make its Unix socket."""
    length = len(os.fsencode(path))
    where = f"{_IPC}{path}"
    if length > _MAX_SOCKET_PATH_BYTES:
        why = f"{length} bytes, and a socket's path has {_MAX_SOCKET_PATH_BYTES}"
    elif not path.parent.is_dir():
        why = f"there is no directory {path.parent}"
    elif path.exists() and not path.is_socket():
        why = "a file is there that is no socket"
    elif path.is_socket():
        return note(
            "control port",
            f"{where} is there",
            "An endpoint that is running has it, or one that is gone has left it.",
            f"ss -lxp src {path}; or another path by KVXFER_HOST",
        )
    else:
        return ok("control port", f"{where} is free")
    return warning(
        "control port",
        f"{where}: {why}",
        "A server cannot listen there.",
        f"mkdir -p {path.parent}; or another path by KVXFER_HOST",
    )
