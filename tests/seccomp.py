"""System calls that this process is denied, as in a container with a profile."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

#: By machine: its AUDIT_ARCH, and the numbers of the calls that tests deny.
_MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {"madvise": 28, "process_vm_readv": 310}),
    "aarch64": (0xC00000B7, {"madvise": 233, "process_vm_readv": 270}),
}
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # in struct seccomp_data
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def can_deny() -> bool:
    """Say whether the numbers of this machine's calls are known here."""
    return platform.machine() in _MACHINES


def deny(call: str, errno: int) -> None:
    """Have a system call fail with ``errno``, in this thread and those it starts.

    It cannot be taken back: for processes that are about to end.
    """
    architecture, numbers = _MACHINES[platform.machine()]
    instructions = [
        (_LOAD_WORD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 0, 3, architecture),
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_EQUAL, 0, 1, numbers[call]),
        (_RETURN, 0, 0, _ERRNO | errno),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("=HBBI", *each) for each in instructions)
    program = _Program(len(instructions), code)
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(*arguments):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), "prctl")
