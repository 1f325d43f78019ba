"""What a process holds: descriptors, threads, children, tasks, native objects.

A census is taken before and after a test; what is only in the second one has
leaked. Everything comes from /proc, so it also sees what C code holds.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.patience import patient

TASK_DIR = Path("/proc/self/task")
FD_DIR = "/proc/self/fd"


@dataclass(frozen=True)
class Census:
    """What one process holds at one moment, each thing with a name for people."""

    fds: dict[tuple[int, str], str]
    threads: dict[int, str]
    children: dict[int, str]
    native: dict[str, int]


def take_census() -> Census:
    """Count what this process holds now."""
    return Census(_fds(), _threads(), _children(), _native())


def leaked_since(before: Census, *, patience: float = patient(3.0)) -> list[str]:
    """Say what this process holds and did not hold at ``before``.

    Threads that were joined and sockets that were closed may need a moment in
    the kernel, and objects in reference cycles need the collector, so a
    difference counts only once it has lasted for ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    leaks = _difference(before, take_census())
    pause = 0.005
    while leaks and time.monotonic() < deadline:
        gc.collect()
        time.sleep(pause)
        pause = min(2 * pause, 0.1)  # what takes longer is not worth so many looks
        leaks = _difference(before, take_census())
    return leaks


def pending_tasks(loop: asyncio.AbstractEventLoop) -> list[str]:
    """Name the tasks of ``loop`` that are not done, the calling one left out."""
    current = asyncio.current_task(loop)
    return [
        f"task {task.get_name()}: {task.get_coro()!r}"
        for task in asyncio.all_tasks(loop)
        if task is not current and not task.done()
    ]


def _difference(before: Census, after: Census) -> list[str]:
    leaks = []
    leaks += [f"fd {name}" for k, name in after.fds.items() if k not in before.fds]
    leaks += [
        f"thread {name}" for k, name in after.threads.items() if k not in before.threads
    ]
    leaks += [
        f"child process {name}"
        for k, name in after.children.items()
        if k not in before.children
    ]
    leaks += [
        f"{count - before.native.get(kind, 0)} native {kind}"
        for kind, count in after.native.items()
        if count > before.native.get(kind, 0)
    ]
    return leaks


def _fds() -> dict[tuple[int, str], str]:
    tracker = _resource_tracker("_fd")
    fds = {}
    for entry in os.listdir(FD_DIR):
        fd = int(entry)
        if fd == tracker:
            continue
        target = _or_gone(lambda fd=fd: os.readlink(f"{FD_DIR}/{fd}"))  # type: ignore[misc]
        # The directory that is being listed has a descriptor as well.
        if target is not None and not target.startswith("/proc/"):
            fds[fd, target] = f"{fd} -> {target}"
    return fds


def _threads() -> dict[int, str]:
    python = {t.native_id: t.name for t in threading.enumerate()}
    threads = {}
    for entry in os.listdir(TASK_DIR):
        tid = int(entry)
        comm = _or_gone((TASK_DIR / entry / "comm").read_text)
        if comm is not None:
            threads[tid] = f"{python.get(tid, 'not of Python')} ({comm.strip()}, {tid})"
    return threads


def _children() -> dict[int, str]:
    tracker = _resource_tracker("_pid")
    children = {}
    for entry in os.listdir(TASK_DIR):
        pids = _or_gone((TASK_DIR / entry / "children").read_text)
        for pid in map(int, (pids or "").split()):
            command = _or_gone(Path(f"/proc/{pid}/cmdline").read_text)
            if pid != tracker and command is not None:
                what = command.replace("\0", " ").strip() or "a zombie"
                children[pid] = f"{pid}: {what}"
    return children


def _native() -> dict[str, int]:
    # Not imported for this: a test of pure Python must not need the extension.
    verbs = sys.modules.get("kvxfer._verbs")
    return dict(verbs.live_objects()) if verbs is not None else {}


def _resource_tracker(field: str) -> int | None:
    """multiprocessing keeps one helper process for the life of this one."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    tracker = getattr(module, "_resource_tracker", None)
    value = getattr(tracker, field, None)
    return value if isinstance(value, int) else None


def _or_gone(read: Callable[[], str]) -> str | None:
    """What ``read`` returns, or None when the thing went away meanwhile."""
    try:
        return read()
    except (FileNotFoundError, ProcessLookupError):
        return None
