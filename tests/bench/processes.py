"""What the kernel says of the processes that a bench has started."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int) -> set[int]:
    """List the processes below one."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child, *descendants(child)}
    return found


def state(pid: int) -> str:
    """Return the letter of a process' state; Z where it is gone as well."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def gone(pids: set[int]) -> bool:
    """Whether none of these processes runs any more."""
    return all(state(pid) == "Z" for pid in pids)
