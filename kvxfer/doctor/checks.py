"""What decides whether memory, processes and the clock of a machine are fit.

Each check reads the machine's files and yields findings; none changes anything.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Callable, Iterator

from kvxfer import options as options_module
from kvxfer._version import __version__
from kvxfer.doctor.machine import CAP_IPC_LOCK, CAP_SYS_PTRACE, Machine
from kvxfer.doctor.report import Finding, note, ok, problem, warning
from kvxfer.options import Options

Check = Callable[[Machine, Options], Iterator[Finding]]

_STA_UNSYNC = 0x0040
_FEW_FILES = 4096
_GIB = 1 << 30


def extension(machine: Machine, options: Options) -> Iterator[Finding]:
    """The compiled part of kvxfer."""
    if not machine.is_this:
        return
    try:
        from kvxfer import _engine  # noqa: F401
    except ImportError as error:
        yield problem(
            "kvxfer",
            f"version {__version__}, without its compiled part: {error}",
            "Nothing can be transferred; what follows was read only.",
            "pip install --force-reinstall kvxfer, for this Python; in a source tree "
            "python setup.py build_ext --inplace",
        )
    else:
        yield ok("kvxfer", f"version {__version__}")


def environment(machine: Machine, options: Options) -> Iterator[Finding]:
    """Variables that are set and do nothing."""
    if not machine.is_this:
        return
    for remark in options_module.remarks():
        yield warning(
            "environment",
            remark,
            "Whoever set it expects something that does not happen.",
            "unset it; kvxfer config prints what is in force",
        )


def memlock(machine: Machine, options: Options) -> Iterator[Finding]:
    """How much memory may be registered."""
    try:
        limit = machine.limit("Max locked memory")
    except LookupError:
        return
    if limit is None:
        yield ok("memlock", "unlimited")
    elif machine.has_capability(CAP_IPC_LOCK):
        yield ok("memlock", f"{limit} bytes, and CAP_IPC_LOCK lifts that")
    else:
        report = problem if machine.names("/sys/class/infiniband") else note
        yield report(
            "memlock",
            f"{limit} bytes",
            "A NIC pins all of the cache: ibv_reg_mr fails with ENOMEM beyond that. "
            "The software device pins nothing.",
            "ulimit -l unlimited; docker run --ulimit memlock=-1; systemd: "
            "LimitMEMLOCK=infinity; or CAP_IPC_LOCK",
        )


def open_files(machine: Machine, options: Options) -> Iterator[Finding]:
    """How many connections there may be."""
    try:
        limit = machine.limit("Max open files")
    except LookupError:
        return
    if limit is not None and limit < _FEW_FILES:
        yield warning(
            "open files",
            f"{limit}",
            "A connection takes up to four descriptors.",
            "ulimit -n 65536",
        )
    else:
        yield ok("open files", "unlimited" if limit is None else f"{limit}")


def same_host(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether one process may copy out of another: the wire within a host."""
    scope = machine.text("/proc/sys/kernel/yama/ptrace_scope")
    if scope in ("", "0"):
        yield ok("same host", f"ptrace_scope is {scope or 'not there'}: CMA works")
    elif scope == "1":
        yield ok("same host", "ptrace_scope is 1: CMA works between peers that agree")
    elif machine.has_capability(CAP_SYS_PTRACE) and scope == "2":
        yield ok("same host", "ptrace_scope is 2, and CAP_SYS_PTRACE lifts that")
    else:
        yield warning(
            "same host",
            f"ptrace_scope is {scope}",
            "The software device cannot copy between processes (CMA) and takes its "
            "TCP wire, at a fraction of the speed.",
            "sysctl kernel.yama.ptrace_scope=1, or CAP_SYS_PTRACE",
        )


def huge_pages(machine: Machine, options: Options) -> Iterator[Finding]:
    """The size of memory pages, which registration and copies take one by one."""
    modes = machine.text("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", modes)
    mode = chosen[1] if chosen else ""
    reserved = re.search(r"HugePages_Total:\s*(\d+)", machine.text("/proc/meminfo"))
    count = int(reserved[1]) if reserved else 0
    found = f"transparent: {mode or 'none'}, reserved: {count}"
    if mode == "never" and not count:
        yield warning(
            "huge pages",
            found,
            "Memory is registered 4 KiB at a time: a large cache takes seconds, and "
            "the NIC's tables of addresses do not fit into its cache.",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    else:
        yield ok("huge pages", found)


def container(machine: Machine, options: Options) -> Iterator[Finding]:
    """What a container may use of its host."""
    kind = machine.in_container()
    limits = []
    memory = machine.text("/sys/fs/cgroup/memory.max")
    if memory.isdecimal():
        limits.append(f"{int(memory) / _GIB:.1f} GiB of memory")
    quota = machine.text("/sys/fs/cgroup/cpu.max").split()
    if quota and quota[0].isdecimal():
        limits.append(f"{int(quota[0]) / int(quota[1]):g} CPUs")
    pids = machine.text("/sys/fs/cgroup/pids.max")
    if pids.isdecimal():
        limits.append(f"{pids} processes")
    if not kind and not limits:
        yield ok("container", "none, and no limits of a control group")
        return
    text = f"{kind or 'none'}, {', '.join(limits) or 'no limits'}"
    if quota and quota[0].isdecimal() and int(quota[0]) < int(quota[1]):
        yield warning(
            "container",
            text,
            "With less than one CPU, threads stop in the middle of a transfer.",
            "docker run --cpus 2, or a larger limit in the pod",
        )
    else:
        yield ok("container", text)


def firewall(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether something may stand before the control port."""
    port = options.port
    modules = machine.modules()
    filters = machine.text("/proc/net/ip_tables_names").split()
    if "nf_tables" in modules:
        filters.append("nf_tables")
    ports = f"TCP port {port}"
    if machine.names("/sys/class/infiniband"):
        ports += ", and UDP port 4791 for RoCE"
    if filters:
        yield note(
            "firewall",
            f"packet filters are there: {', '.join(dict.fromkeys(filters))}",
            f"Nodes that connect need {ports}.",
            f"nft list ruleset; firewall-cmd --add-port={port}/tcp; try it from the "
            "other side: kvxfer doctor --peer HOST:PORT",
        )
    else:
        yield ok("firewall", f"no packet filter here; nodes that connect need {ports}")
    if machine.is_this and port:
        yield from _port_is_free(options)


def _port_is_free(options: Options) -> Iterator[Finding]:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            yield note(
                "control port",
                f"{options.host} port {options.port}: {error.strerror}",
                "An endpoint that is running already has it, or another program.",
                f"ss -ltnp sport = :{options.port}; or another port by KVXFER_PORT",
            )
        else:
            yield ok("control port", f"{options.host} port {options.port} is free")


def clock(machine: Machine, options: Options) -> Iterator[Finding]:
    """The clock, which logs of two hosts are put side by side by."""
    source = machine.text(
        "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    )
    if source in ("hpet", "acpi_pm", "jiffies"):
        yield warning(
            "clock",
            f"the source is {source}",
            "To read it takes microseconds, and each write reads it.",
            "boot with clocksource=tsc, or ask why the kernel mistrusts the TSC: "
            "dmesg | grep -i tsc",
        )
        return
    synchronised = _is_synchronised() if machine.is_this else None
    if synchronised is False:
        yield note(
            "clock",
            f"the source is {source or 'unknown'}; it is not synchronised",
            "Deadlines do not depend on it, but logs of two hosts do not line up.",
            "timedatectl set-ntp true, or chronyd",
        )
    else:
        yield ok("clock", f"the source is {source or 'unknown'}")


def _is_synchronised() -> bool | None:
    """Ask the kernel whether something disciplines its clock."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, with modes 0: a query
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex") or libc.adjtimex(buffer) < 0:
        return None
    # modes, padding, offset, freq, maxerror, esterror, then status.
    status = int.from_bytes(buffer.raw[40:44], "little")
    return not status & _STA_UNSYNC


def processors(machine: Machine, options: Options) -> Iterator[Finding]:
    """How many CPUs there are, and whether they are slowed down."""
    governor = machine.text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    count = f"{len(os.sched_getaffinity(0))} CPUs" if machine.is_this else "CPUs"
    if governor == "powersave":
        yield warning(
            "processors",
            f"{count}, governor {governor}",
            "A CPU that wakes up slowly adds to the latency of each write.",
            "cpupower frequency-set -g performance",
        )
    elif count != "CPUs" or governor:
        yield ok("processors", f"{count}{f', governor {governor}' if governor else ''}")


CHECKS: tuple[Check, ...] = (
    extension,
    environment,
    memlock,
    open_files,
    same_host,
    huge_pages,
    container,
    processors,
    firewall,
    clock,
)
