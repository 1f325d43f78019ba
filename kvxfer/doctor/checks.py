"""What decides whether memory, processes and the clock of a machine are fit.

Each check reads the machine's files and yields findings; none changes anything.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator

from kvxfer import options as options_module
from kvxfer._version import __version__
from kvxfer.doctor import cma, network
from kvxfer.doctor.machine import CAP_IPC_LOCK, CAP_SYS_PTRACE, Machine
from kvxfer.doctor.report import Finding, note, ok, problem, warning
from kvxfer.options import Options

Check = Callable[[Machine, Options], Iterator[Finding]]

_STA_UNSYNC = 0x0040
_FEW_FILES = 4096
_GIB = 1 << 30
_CGROUPS = "/sys/fs/cgroup"
_NO_MEMORY_LIMIT = 1 << 62


def copied(machine: Machine, options: Options) -> Iterator[Finding]:
    """Whether a copy of another machine is one."""
    missing = [name for name in ("sys", "proc") if not machine.exists(name)]
    if missing:
        yield warning(
            "root",
            f"{machine.root} has no {' and no '.join(missing)}",
            "Nothing of what would be in there is known: what is well may not be.",
            "--root takes the directory that another machine's /sys and /proc are in",
        )


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
    yield copies(
        machine.text("/proc/sys/kernel/yama/ptrace_scope"),
        machine.has_capability(CAP_SYS_PTRACE),
        cma.attempt() if machine.is_this else None,
    )


def copies(scope: str, may_trace: bool, failed: str | None) -> Finding:
    """Say whether processes of a host can copy out of each other (CMA).

    Args:
      scope: Yama's ``ptrace_scope``; empty where there is no Yama.
      may_trace: The process has CAP_SYS_PTRACE.
      failed: Why a copy out of a child failed; empty if it did not, None if it was
        not tried.
    """
    text = f"ptrace_scope is {scope or 'not there'}"
    lifted = scope == "2" and may_trace
    if scope in ("2", "3") and not lifted:
        return _no_copies(
            text, "sysctl kernel.yama.ptrace_scope=1, or CAP_SYS_PTRACE where it is 2"
        )
    if failed:
        return _no_copies(
            f"{text}; process_vm_readv of a child: {failed}",
            "docker run --cap-add SYS_PTRACE; or a profile of seccomp that permits "
            "process_vm_readv; the same user for both processes",
        )
    if lifted:
        text += ", and CAP_SYS_PTRACE lifts that"
    if failed is None:
        return ok("same host", f"{text}: CMA is permitted; not tried")
    between = " between peers that agree" if scope == "1" else ""
    return ok("same host", f"{text}: CMA works{between}; bytes of a child were copied")


def _no_copies(found: str, remedy: str) -> Finding:
    return warning(
        "same host",
        found,
        "The software device cannot copy between processes (CMA) and takes its "
        "TCP wire, at a fraction of the speed.",
        remedy,
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
    memory, cpus, pids = (limit(machine) for limit in (_memory, _cpus, _pids))
    limits = []
    if memory is not None:
        limits.append(f"{memory / _GIB:.1f} GiB of memory")
    if cpus is not None:
        limits.append(f"{cpus:g} CPUs")
    if pids is not None:
        limits.append(f"{pids} processes")
    if not limits and not _has_control_groups(machine):
        yield note(
            "container",
            f"{kind or 'none'}; limits are not known: {_CGROUPS} has no control groups",
        )
    elif not kind and not limits:
        yield ok("container", "none, and no limits of a control group")
    elif cpus is not None and cpus < 1:
        yield warning(
            "container",
            f"{kind or 'none'}, {', '.join(limits)}",
            "With less than one CPU, threads stop in the middle of a transfer.",
            "docker run --cpus 2, or a larger limit in the pod",
        )
    else:
        yield ok("container", f"{kind or 'none'}, {', '.join(limits) or 'no limits'}")


# Each is in one place in version 2 of control groups, and elsewhere in version 1.


def _has_control_groups(machine: Machine) -> bool:
    return any(
        machine.exists(f"{_CGROUPS}/{name}")
        for name in ("cgroup.controllers", "memory", "cpu", "cpu,cpuacct", "pids")
    )


def _memory(machine: Machine) -> int | None:
    """Bytes; None where there is no limit, or it is not known."""
    text = machine.text(f"{_CGROUPS}/memory.max") or machine.text(
        f"{_CGROUPS}/memory/memory.limit_in_bytes"
    )
    # Version 1 has no word for none: it says the largest multiple of a page.
    return int(text) if text.isdecimal() and int(text) < _NO_MEMORY_LIMIT else None


def _cpus(machine: Machine) -> float | None:
    words = machine.text(f"{_CGROUPS}/cpu.max").split()
    for controller in ("cpu", "cpu,cpuacct"):
        words = words or [
            machine.text(f"{_CGROUPS}/{controller}/cpu.cfs_{name}_us")
            for name in ("quota", "period")
            if machine.exists(f"{_CGROUPS}/{controller}/cpu.cfs_{name}_us")
        ]
    # "max" or -1 is none.
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]) / int(words[1])


def _pids(machine: Machine) -> int | None:
    text = machine.text(f"{_CGROUPS}/pids.max") or machine.text(
        f"{_CGROUPS}/pids/pids.max"
    )
    return int(text) if text.isdecimal() else None


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
    copied,
    extension,
    environment,
    memlock,
    open_files,
    same_host,
    huge_pages,
    container,
    processors,
    network.firewall,
    clock,
)
