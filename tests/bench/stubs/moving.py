"""What the stubs of other engines have in common.

They stand for foreign code, with its names and its ways, and move bytes for real: from
the process that writes into the one that is written to, by process_vm_writev. The
environment says how they behave: ``STUB_BEHAVES``, where they say what they were given:
``STUB_LOG``, and which file stands for the NIC: ``STUB_UVERBS``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from pathlib import Path
from typing import Any

_AT_ONCE = 1024
_LIBC = ctypes.CDLL(None, use_errno=True)

WELL, FAILS, WRONG, DIES, KILLS, HANGS, ASIDE = (
    *("well", "fails", "wrong", "dies", "kills", "hangs", "aside"),
)
#: Blocks of that many bytes are those with which the misbehaviour begins.
MIDDLE = 4096


class _Part(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def behaves() -> str:
    """Say how this process behaves."""
    return os.environ.get("STUB_BEHAVES", WELL)


def log(**said: Any) -> None:
    """Say what it was given."""
    ways = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("MC_", "UCX_"))
    }
    with Path(os.environ["STUB_LOG"]).open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "environ": ways, **said}) + "\n")


def open_nic() -> None:
    """Open what stands for the NIC, for good."""
    if behaves() != ASIDE:
        os.open(os.environ["STUB_UVERBS"], os.O_RDONLY)


def write(pid: int, ours: list[int], theirs: list[int], lengths: list[int]) -> bool:
    """Write into a process; return whether that went well."""
    if lengths[0] == MIDDLE:
        if behaves() == FAILS:
            return False
        if behaves() == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if behaves() == KILLS:
            os.kill(pid, signal.SIGKILL)
            # The target is a child of who writes; until it has ended it has memory.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if behaves() == HANGS:
            signal.pause()
        if behaves() == WRONG:
            ours = [ours[1], *ours[1:]]
    for at in range(0, len(ours), _AT_ONCE):
        n = len(ours[at : at + _AT_ONCE])
        sides = [
            (_Part * n)(*map(_Part, side[at : at + n], lengths[at : at + n]))
            for side in (ours, theirs)
        ]
        moved = _LIBC.process_vm_writev(pid, sides[0], n, sides[1], n, 0)
        if moved != sum(lengths[at : at + n]):
            return False
    return True
