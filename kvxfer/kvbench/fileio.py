"""Blocks to and from files by Linux AIO, io_uring or POSIX AIO.

Each queue prepares its requests once and may then run them many times, so that
what is measured is the kernel and the disk. All talk to the kernel or to glibc
through ctypes, which lets go of the interpreter's lock while it waits.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvxfer.kvbench.errors import RunError

__all__ = ["Job", "Queue", "open_queue"]

_LIBC = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"
# io_setup, io_destroy, io_submit and io_getevents differ, the rest is the same.
_AIO_CALLS = (206, 207, 209, 208) if _X86 else (0, 1, 2, 4)
_URING_SETUP, _URING_ENTER = 425, 426
_MEMBARRIER = 324 if _X86 else 283


@dataclass(frozen=True, slots=True)
class Job:
    """One block: a place in a file and a place in memory, of the same length."""

    fd: int
    offset: int
    address: int
    length: int


class Queue(Protocol):
    """Requests that are prepared once and run as often as wanted."""

    def prepare(self, jobs: Sequence[Job], write: bool) -> None:
        """Lay out the requests; what was prepared before is forgotten."""

    def run(self) -> float:
        """Run all requests, and return the seconds that posting them took.

        Returns when every one has completed. Memory and files of the jobs have to
        stay until then.

        Raises:
          RunError: One failed or came out short. None is in flight any more.
        """

    def close(self) -> None:
        """Give back what the queue holds. Twice is fine."""


def open_queue(api: str, depth: int) -> Queue:
    """Return a queue of ``AIO``, ``URING`` or ``POSIXAIO`` for ``depth`` at once.

    Raises:
      RunError: The kernel or the C library does not have it; says why.
    """
    kinds: dict[str, type[_LinuxAIO] | type[_Uring] | type[_PosixAIO]] = {
        "AIO": _LinuxAIO,
        "URING": _Uring,
        "POSIXAIO": _PosixAIO,
    }
    return kinds[api](depth)


def _syscall(number: int, *arguments: int) -> int:
    """Make a system call; all arguments are numbers or addresses.

    Raises:
      OSError: As the kernel says. A call that a signal broke is made again.
    """
    while True:
        longs = (ctypes.c_long(argument) for argument in arguments)
        result = int(_LIBC.syscall(ctypes.c_long(number), *longs))
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _check(results: Sequence[int], wanted: int) -> str:
    """Return what is wrong with one of the results, or an empty string."""
    for result in results:
        if result < 0:
            return f"a request failed: {os.strerror(-result)}"
        if result != wanted:
            return f"a request moved {result} of {wanted} bytes"
    return ""


class _LinuxAIO:
    """io_submit(2) and io_getevents(2)."""

    _IOCB = struct.Struct("=QIiHhIQQqQII")  # struct iocb of linux/aio_abi.h
    _READ, _WRITE = 0, 1

    def __init__(self, depth: int) -> None:
        context = ctypes.c_ulong(0)
        try:
            _syscall(_AIO_CALLS[0], depth, ctypes.addressof(context))
        except OSError as error:
            raise RunError(f"no Linux AIO here: {error.strerror}") from error
        self._context = context.value
        self._open = True
        self._depth = depth
        self._events = ctypes.create_string_buffer(32 * depth)
        self._count = self._length = 0

    def prepare(self, jobs: Sequence[Job], write: bool) -> None:
        size = self._IOCB.size
        opcode = self._WRITE if write else self._READ
        self._iocbs = ctypes.create_string_buffer(size * len(jobs))
        for i, job in enumerate(jobs):
            place = (job.address, job.length, job.offset)
            fields = (i, 0, 0, opcode, 0, job.fd, *place, 0, 0, 0)
            self._IOCB.pack_into(self._iocbs, i * size, *fields)
        base = ctypes.addressof(self._iocbs)
        addresses = range(base, base + size * len(jobs), size)
        self._pointers = (ctypes.c_void_p * len(jobs))(*addresses)
        self._count, self._length = len(jobs), jobs[0].length

    def run(self) -> float:
        posted = done = 0
        seconds = 0.0
        problem = ""
        pointers = ctypes.addressof(self._pointers)
        while done < posted or (posted < self._count and not problem):
            room = min(self._depth - (posted - done), self._count - posted)
            if room and not problem:
                start = time.perf_counter()
                try:
                    posted += _syscall(
                        _AIO_CALLS[2], self._context, room, pointers + 8 * posted
                    )
                except OSError as error:
                    if error.errno != errno.EAGAIN or done == posted:
                        problem = f"io_submit: {error.strerror}"
                seconds += time.perf_counter() - start
            if done < posted:
                found, wrong = self._reap()
                done += found
                problem = problem or wrong
        if problem:
            raise RunError(problem)
        return seconds

    def _reap(self) -> tuple[int, str]:
        address = ctypes.addressof(self._events)
        found = _syscall(_AIO_CALLS[3], self._context, 1, self._depth, address, 0)
        # Four longs an event, the third of them its result.
        results = memoryview(self._events).cast("B").cast("q")[2 : 4 * found : 4]
        return found, _check(results.tolist(), self._length)

    def close(self) -> None:
        if self._open:
            self._open = False
            _syscall(_AIO_CALLS[1], self._context)


class _Uring:
    """io_uring(7), its rings mapped and read without any library."""

    _SQE = struct.Struct("=BBHiQQIIQQQQ")
    _READ, _WRITE = 22, 23  # IORING_OP_READ, IORING_OP_WRITE
    _GETEVENTS = 1
    _SINGLE_MMAP = 1

    def __init__(self, depth: int) -> None:
        params = ctypes.create_string_buffer(120)  # struct io_uring_params
        try:
            self._fd = _syscall(_URING_SETUP, depth, ctypes.addressof(params))
        except OSError as error:
            raise RunError(f"no io_uring here: {error.strerror}") from error
        try:
            self._map(params.raw)
        except BaseException:
            os.close(self._fd)
            raise
        if not _X86:
            _syscall(_MEMBARRIER, 1 << 4, 0)  # register for the private barrier
        self._open = True
        self._count = self._length = 0

    def _map(self, params: bytes) -> None:
        sq_entries, cq_entries = struct.unpack_from("=II", params, 0)
        features = struct.unpack_from("=I", params, 20)[0]
        sq = struct.unpack_from("=6I", params, 40)  # head tail mask n flags dropped
        sq_array = struct.unpack_from("=I", params, 64)[0]
        cq = struct.unpack_from("=6I", params, 80)  # head tail mask n overflow cqes
        if not features & self._SINGLE_MMAP:
            raise RunError("no io_uring here: the kernel is older than 5.4")
        size = max(sq_array + 4 * sq_entries, cq[5] + 16 * cq_entries)
        self._ring = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED, offset=0)
        self._sqes = mmap.mmap(
            self._fd, 64 * sq_entries, flags=mmap.MAP_SHARED, offset=0x10000000
        )
        self._depth = sq_entries
        self._sq_tail, self._cq_head, self._cq_tail = sq[1], cq[0], cq[1]
        self._sq_mask, self._cq_mask = sq_entries - 1, cq_entries - 1
        self._cqes = cq[5]
        # Entry i always stands in slot i.
        struct.pack_into(f"={sq_entries}I", self._ring, sq_array, *range(sq_entries))

    def prepare(self, jobs: Sequence[Job], write: bool) -> None:
        size = self._SQE.size
        opcode = self._WRITE if write else self._READ
        self._requests = bytearray(size * len(jobs))
        for i, job in enumerate(jobs):
            place = (job.offset, job.address, job.length)
            fields = (opcode, 0, 0, job.fd, *place, 0, i, 0, 0, 0)
            self._SQE.pack_into(self._requests, i * size, *fields)
        self._count, self._length = len(jobs), jobs[0].length

    def run(self) -> float:
        posted = done = 0
        seconds = 0.0
        problem = ""
        while done < posted or (posted < self._count and not problem):
            room = min(self._depth - (posted - done), self._count - posted)
            start = time.perf_counter()
            if room and not problem:
                self._fill(posted, room)
                posted += room
            else:
                room = 0
            try:
                while room:
                    room -= _syscall(_URING_ENTER, self._fd, room, 0, 0, 0, 0)
                seconds += time.perf_counter() - start
                _syscall(_URING_ENTER, self._fd, 0, 1, self._GETEVENTS, 0, 0)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EBUSY):
                    raise RunError(f"io_uring_enter: {error.strerror}") from error
            found, wrong = self._reap()
            done += found
            problem = problem or wrong
        if problem:
            raise RunError(problem)
        return seconds

    def _fill(self, first: int, count: int) -> None:
        """Put requests into the ring; its slots are free once they are entered."""
        tail = struct.unpack_from("=I", self._ring, self._sq_tail)[0]
        slot = tail & self._sq_mask
        before_end = min(count, self._depth - slot)
        for to, start, n in (
            (slot, first, before_end),
            (0, first + before_end, count - before_end),
        ):
            self._sqes[64 * to : 64 * (to + n)] = self._requests[
                64 * start : 64 * (start + n)
            ]
        # The kernel looks at the tail in the call that follows, no earlier.
        new_tail = (tail + count) & 0xFFFFFFFF
        struct.pack_into("=I", self._ring, self._sq_tail, new_tail)

    def _reap(self) -> tuple[int, str]:
        head = struct.unpack_from("=I", self._ring, self._cq_head)[0]
        tail = struct.unpack_from("=I", self._ring, self._cq_tail)[0]
        if not _X86:
            _syscall(_MEMBARRIER, 1 << 3, 0)  # the entries are read after the tail
        found = (tail - head) & 0xFFFFFFFF
        results = [
            struct.unpack_from(
                "=i", self._ring, self._cqes + 16 * ((head + i) & self._cq_mask) + 8
            )[0]
            for i in range(found)
        ]
        struct.pack_into("=I", self._ring, self._cq_head, tail)
        return found, _check(results, self._length)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._sqes.close()
            self._ring.close()
            os.close(self._fd)


class _PosixAIO:
    """lio_listio(3) of glibc, which has threads of its own for the work."""

    # struct aiocb of glibc on 64 bits; the last 32 bytes and the middle are its.
    _AIOCB = struct.Struct("=iiiiQQQii10Qq4Q")
    _READ, _WRITE, _NOWAIT, _SIGEV_NONE = 0, 1, 1, 1

    def __init__(self, depth: int) -> None:
        if not hasattr(_LIBC, "gnu_get_libc_version"):
            raise RunError("no POSIX AIO here: it needs glibc")
        self._depth = depth
        self._count = self._length = 0
        _LIBC.aio_return64.restype = ctypes.c_ssize_t

    def prepare(self, jobs: Sequence[Job], write: bool) -> None:
        size = self._AIOCB.size
        opcode = self._WRITE if write else self._READ
        self._blocks = ctypes.create_string_buffer(size * len(jobs))
        for i, job in enumerate(jobs):
            fields = [job.fd, opcode, 0, 0, job.address, job.length]
            fields += [0, 0, self._SIGEV_NONE, *[0] * 10, job.offset, *[0] * 4]
            self._AIOCB.pack_into(self._blocks, i * size, *fields)
        base = ctypes.addressof(self._blocks)
        addresses = range(base, base + size * len(jobs), size)
        self._pointers = (ctypes.c_void_p * len(jobs))(*addresses)
        self._count, self._length = len(jobs), jobs[0].length

    def run(self) -> float:
        seconds = 0.0
        for first in range(0, self._count, self._depth):
            count = min(self._depth, self._count - first)
            chunk = ctypes.c_void_p(ctypes.addressof(self._pointers) + 8 * first)
            start = time.perf_counter()
            code = _LIBC.lio_listio64(self._NOWAIT, chunk, count, None)
            refused = ctypes.get_errno() if code != 0 else 0
            seconds += time.perf_counter() - start
            problem = _check(self._wait(first, count), self._length)
            if refused and not problem:
                problem = f"lio_listio: {os.strerror(refused)}"
            if problem:
                raise RunError(problem)
        return seconds

    def _wait(self, first: int, count: int) -> list[int]:
        """Return the result of each request, a negative errno where it failed."""
        results = []
        for i in range(first, first + count):
            block = ctypes.c_void_p(self._pointers[i])
            one = (ctypes.c_void_p * 1)(self._pointers[i])
            while (code := _LIBC.aio_error64(block)) == errno.EINPROGRESS:
                # Broken off by signals at most; then it is asked again.
                _LIBC.aio_suspend64(one, 1, None)
            moved = _LIBC.aio_return64(block)
            results.append(-code if code else moved)
        return results

    def close(self) -> None:
        self._count = 0
