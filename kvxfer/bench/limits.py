"""The machine's own limits as contenders: what no library could beat by much.

The tables are those of everybody else, the loops are C (``_limits.pyx``), and a batch
has ended when the side that wrote it has said so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvxfer.bench import _limits
from kvxfer.bench.side import Control, Initiator, Job, Target
from kvxfer.bench.transfer import Pool
from kvxfer.bench.workload import Case, Ids, Tables, unseen_blocks, wrong_blocks
from kvxfer.errors import UsageError

_BUFFER_BYTES = 4 << 20
_CONGESTION = b"cubic"
_OVER = -1
_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # since Linux 6.1


def flat(pool: Pool, table: Ids, size: int) -> NDArray[np.int64]:
    """Return a table over all planes at once, as ids from the first plane's start.

    Raises:
      UsageError: Blocks of this size do not fill a plane.
    """
    apart = [base - pool.bases[0] for base in pool.bases]
    if any(distance % size for distance in apart):
        raise UsageError(f"blocks of {size} bytes do not fill a plane: choose --pool")
    return np.concatenate([table + distance // size for distance in apart], axis=1)


def collapse(pool: Pool) -> None:
    """Put a pool on huge pages, as the software device does when it registers one.

    A kernel that cannot leaves it as it is.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for (words, _), base in zip(pool.planes, pool.bases, strict=True):
        start = -(-base // _HUGE_PAGE) * _HUGE_PAGE
        end = (base + words.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        madvise(start, max(0, end - start), _MADV_COLLAPSE)


class Copy(Initiator):
    """One process copies from its one pool into its other, with memcpy."""

    has_target = False

    def open(self) -> None:
        """Map both pools."""
        shared = self.job["memory"] == "shared"
        self.source = Pool(self.job, shared=shared)
        self.source.fill()
        self.target = Pool(self.job, shared=shared)
        self.target.touch()
        if shared:
            collapse(self.source)
            collapse(self.target)

    def prepare(self, tables: Tables) -> None:
        """Forget what was copied before."""
        self.target.touch()
        size = tables.block_bytes
        self._from = flat(self.source, tables.source, size)
        self._to = flat(self.target, tables.target, size)

    def batch(self, source_set: int, target_set: int) -> None:
        """Copy one batch."""
        _limits.copy_blocks(
            self.target.bases[0],
            self._to[target_set],
            self.source.bases[0],
            self._from[source_set],
            self.tables.block_bytes,
        )

    def peek(self, sets: list[tuple[int, int]]) -> int | None:
        """Count blocks that cannot be seen."""
        return sum(self._check(unseen_blocks, *pair) for pair in sets)

    def verify(self, sets: list[tuple[int, int]]) -> int | None:
        """Count blocks that hold other bytes."""
        return sum(self._check(wrong_blocks, *pair) for pair in sets)

    def _check(self, check: Any, source_set: int, target_set: int) -> int:
        tables = self.tables
        return sum(
            check(
                words,
                tables.block_bytes,
                tables.source[source_set],
                tables.target[target_set],
                first,
            )
            for words, first in self.target.planes
        )

    def facts(self) -> dict[str, Any]:
        """Say what it is."""
        pools = self.source, self.target
        return {
            "wire": "memcpy",
            "page_bytes": min(pool.cache.page_bytes for pool in pools),
        }


class Asked(Initiator):
    """Two processes and a socket between them, on which batches are asked for."""

    def open(self) -> None:
        """Map the source, start the target and connect."""
        self.pool = Pool(self.job, shared=self.job["memory"] == "shared")
        self.pool.fill()
        self._begun = False
        super().open()

    def connect(self, hello: dict[str, Any]) -> None:
        """Connect to where the target listens, and say where our memory is."""
        tcp = self.job["kind"] == "tcp"
        self._page_bytes = min(self.pool.cache.page_bytes, hello["page_bytes"])
        self.socket = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        if tcp:
            tune(self.socket)
            self.socket.connect(("127.0.0.1", hello["port"]))
        else:
            self.socket.connect(hello["name"])
        assert self.control is not None
        self.control.ask("source", base=self.pool.bases[0], pid=os.getpid())

    def begin(self, tables: Tables) -> None:
        """End the case before, then begin."""
        if self._begun:
            _limits.ask(self.socket.fileno(), _OVER, 0)
        self._begun = True
        super().begin(tables)

    def prepare(self, tables: Tables) -> None:
        """Make the table over all planes."""
        self._size = tables.block_bytes
        self._from = flat(self.pool, tables.source, self._size)

    def facts(self) -> dict[str, Any]:
        """Say what it is."""
        return {"wire": self.job["kind"], "page_bytes": self._page_bytes}


class ReadMemory(Asked):
    """The target takes the blocks out of our memory, by process_vm_readv."""

    def batch(self, source_set: int, target_set: int) -> None:
        """Ask for one batch."""
        _limits.ask(self.socket.fileno(), source_set, target_set)


class Stream(Asked):
    """The blocks go through a TCP connection, from their place into their place."""

    def batch(self, source_set: int, target_set: int) -> None:
        """Send one batch."""
        _limits.send_batch(
            self.socket.fileno(),
            self.pool.bases[0],
            self._size,
            self._from,
            source_set,
            target_set,
        )


def tune(connection: socket.socket) -> None:
    """Give a socket what made it fastest: large buffers, cubic, no delay."""
    for name in ("SO_SNDBUFFORCE", "SO_RCVBUFFORCE", "SO_SNDBUF", "SO_RCVBUF"):
        # The forced ones need a privilege; the others are cut to what is permitted.
        number = {"SO_SNDBUFFORCE": 32, "SO_RCVBUFFORCE": 33}.get(name)
        with contextlib.suppress(PermissionError):
            connection.setsockopt(
                socket.SOL_SOCKET, number or getattr(socket, name), _BUFFER_BYTES
            )
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # a kernel that does not have it
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _CONGESTION)


class AskedTarget(Target):
    """Serves one case at a time in a thread; the main one answers the initiator."""

    def __init__(self, job: Job, pool: Pool, connection: socket.socket) -> None:
        super().__init__(job, pool.planes)
        self._pool = pool
        self._connection = connection
        self._source_base = 0
        self._pid = 0
        self._thread: threading.Thread | None = None

    def begin(self, case: Case) -> None:
        """Serve the next case once the one before has ended."""
        if self._thread is not None:
            self._thread.join()
        super().begin(case)
        self._thread = threading.Thread(
            target=self._move, args=[case.block_bytes], daemon=True
        )
        self._thread.start()

    def _move(self, size: int) -> None:
        fd, base = self._connection.fileno(), self._pool.bases[0]
        to = flat(self._pool, self.tables.target, size)
        if self.job["kind"] == "tcp":
            _limits.serve_stream(fd, base, size, to)
        else:
            from_ = flat(self._pool, self.tables.source, size)
            _limits.serve_reads(fd, self._pid, base, self._source_base, size, to, from_)

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Take the initiator's addresses, or answer as any target."""
        if message["command"] == "source":
            self._source_base, self._pid = message["base"], message["pid"]
            return {}
        return super().answer(message)


def serve(job: Job, control: Control) -> None:
    """Be the target of :class:`ReadMemory` or :class:`Stream`."""
    pool = Pool(job, shared=job["memory"] == "shared")
    pool.touch()
    tcp = job["kind"] == "tcp"
    with socket.socket(socket.AF_INET if tcp else socket.AF_UNIX) as listener:
        if tcp:
            tune(listener)
            listener.bind(("127.0.0.1", 0))
        else:
            listener.bind(f"\0kvxfer-bench-{os.getpid()}")
        listener.listen(1)
        where = (
            {"port": listener.getsockname()[1]}
            if tcp
            else {"name": f"\0kvxfer-bench-{os.getpid()}"}
        )
        control.send(**where, page_bytes=pool.cache.page_bytes)
        connection, _ = listener.accept()
    if tcp:
        tune(connection)
    AskedTarget(job, pool, connection).serve(control)
