"""Two engines with a queue between them, on the software device of this process.

The initiator's queue writes into the target's memory. Until :meth:`Rig.let_go` the
target's QP is not ready to receive: what is posted stays in flight, so a test can
look at a full queue for as long as it likes.
"""

from __future__ import annotations

import dataclasses
import select
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvxfer._engine import Engine, Finished
from kvxfer._verbs import Device, MemoryRegion, ProtectionDomain, QueuePair
from kvxfer.verbs_types import Access, QPLimits, QPPath
from tests.endpoints import SOON, Bytes, mappable, noise

if TYPE_CHECKING:
    from kvxfer._engine import Pair, Row

WRITABLE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ


class End:
    """One side: device, engine, QP, and memory that it may touch."""

    def __init__(
        self,
        length: int,
        seed: int,
        ring_bytes: int,
        limits: QPLimits,
        *,
        wire: str | None,
        **engine: Any,
    ) -> None:
        fd, ring_fd = -1, -1
        if wire == "shm":
            self.memory, span = mappable(length, seed)
            self.ring, ring_span = mappable(ring_bytes, seed)
            fd, ring_fd = span.fd, ring_span.fd
        else:
            self.memory, self.ring = noise(length, seed), noise(ring_bytes, seed)
        self.ring[:] = 0
        self.device = Device("soft0", wire=wire)
        self.pd = ProtectionDomain(self.device)
        self.engine = Engine(self.device, **{"cq_depth": 1024, **engine})
        self.mr = self.register(self.memory, fd=fd)
        self.ring_mr = self.register(
            self.ring, Access.LOCAL_WRITE | Access.REMOTE_WRITE, fd=ring_fd
        )
        self.qp = self.new_qp(limits)
        self.found: list[Any] = []
        self.failed: list[int] = []

    def register(
        self, memory: Bytes, access: Access = WRITABLE, *, fd: int = -1
    ) -> MemoryRegion:
        """Register memory, for reading and writing if nothing else is said."""
        return MemoryRegion(self.pd, memory.ctypes.data, memory.nbytes, access, fd=fd)

    def new_qp(self, limits: QPLimits) -> QueuePair:
        """Make a QP in INIT."""
        qp = QueuePair(self.pd, self.engine.cq, limits)
        qp.to_init(access=Access.REMOTE_WRITE | Access.REMOTE_READ)
        return qp

    def connect(self, qp: QueuePair, other: End, others_qp: QueuePair) -> None:
        """Bring a QP to RTS, towards another end's."""
        path = QPPath(
            qp_num=others_qp.qp_num,
            psn=0,
            gid=other.device.query_gid(),
            timeout=14,
            rnr_retry=7,
        )
        qp.to_rtr(path)
        qp.to_rts(path)

    def wait(self, condition: Any) -> None:
        """Make progress, on events alone, until ``condition()`` is true."""
        poll = select.poll()
        poll.register(self.engine.fd, select.POLLIN)
        deadline = time.monotonic() + SOON
        while True:
            progress = self.engine.progress()
            self.found += progress.finished + progress.arrivals
            self.failed += progress.failed
            if condition():
                return
            if progress.more:
                continue
            left = deadline - time.monotonic()
            assert left > 0 and poll.poll(left * 1000), "nothing comes any more"

    def close(self) -> None:
        """Close the device and all that is on it."""
        self.device.close()
        # Memory that is a file goes with its last view.
        self.memory = self.ring = np.zeros(0, np.uint8)


@dataclasses.dataclass
class Shape:
    """The planes of a rig: blocks of ``block_bytes``, at ``stride`` on both sides."""

    n_local: int = 64
    n_remote: int = 64
    block_bytes: int = 64
    local_stride: int = 80
    remote_stride: int = 96
    n_rows: int = 3
    n_planes: int = 2


class Rig:
    """An initiator and a target; a context manager."""

    def __init__(
        self,
        shape: Shape | None = None,
        *,
        depth: int = 16,
        ring_bytes: int = 4096,
        receives: int = 8,
        notify: bool = True,
        lanes: int = 1,
        row_lanes: Sequence[int] | None = None,
        flush: bool = False,
        progress: str = "event",
        wire: str | None = None,
        **engine: Any,
    ) -> None:
        self.shape = shape or Shape()
        s = self.shape
        n_pairs = s.n_rows * s.n_planes
        self.local_length = s.n_local * s.local_stride
        self.remote_length = s.n_remote * s.remote_stride
        max_sge = engine.get("max_sge", 8)
        limits = QPLimits(
            max_send_wr=depth, max_recv_wr=max(1, receives), max_send_sge=max_sge
        )
        self.source = End(
            n_pairs * self.local_length,
            1,
            ring_bytes,
            limits,
            wire=wire,
            progress=progress,
            **engine,
        )
        self.target = End(
            n_pairs * self.remote_length,
            2,
            ring_bytes,
            limits,
            wire=wire,
            progress=progress,
        )
        self.before = self.target.memory.copy()
        ring = (
            self.source.ring.ctypes.data,
            self.source.ring_mr.lkey,
            self.target.ring.ctypes.data,
            self.target.ring_mr.rkey,
            ring_bytes,
            receives,
        )
        self.pairs = [(self.source.qp, self.target.qp)]
        for _ in range(lanes - 1):
            self.pairs.append((self.source.new_qp(limits), self.target.new_qp(limits)))
        self.receiver = self.target.engine.add_target(
            [theirs for _, theirs in self.pairs],
            self.target.ring.ctypes.data,
            ring_bytes,
            receives,
        )
        for ours, theirs in self.pairs:
            self.source.connect(ours, self.target, theirs)
        self.slot = self.source.engine.add_initiator(
            [ours for ours, _ in self.pairs],
            self.rows(),
            ring if notify else None,
            self.flush_target() if flush else None,
            row_lanes,
        )

    def pair(self, index: int, **changes: int) -> Pair:
        """Return plane ``index`` of all, row by row, as the engine takes it."""
        s = self.shape
        found = {
            "local_base": self.source.memory.ctypes.data + index * self.local_length,
            "local_stride": s.local_stride,
            "remote_base": self.target.memory.ctypes.data + index * self.remote_length,
            "remote_stride": s.remote_stride,
            "block_bytes": s.block_bytes,
            "lkey": self.source.mr.lkey,
            "rkey": self.target.mr.rkey,
        }
        return tuple({**found, **changes}.values())  # type: ignore[return-value]

    def flush_target(self) -> tuple[int, int]:
        """Eight bytes for what a flush reads: the last of our copy of the ring."""
        ring = self.source.ring
        return ring.ctypes.data + ring.nbytes - 8, self.source.ring_mr.lkey

    def rows(self) -> list[Row]:
        """Return the table that the initiator writes by."""
        s = self.shape
        return [
            (
                10 + row,
                0,
                s.n_local,
                s.n_remote,
                [self.pair(row * s.n_planes + i) for i in range(s.n_planes)],
            )
            for row in range(s.n_rows)
        ]

    def let_go(self) -> None:
        """Let the target's QPs receive, the last of them first."""
        for ours, theirs in reversed(self.pairs):
            self.target.connect(theirs, self.source, ours)

    def submit(
        self,
        local_ids: Sequence[int],
        remote_ids: Sequence[int],
        rows: Sequence[int] = (0,),
        key: int = 0,
        request_id: bytes = b"",
    ) -> list[int]:
        """Submit an operation a row; return their ids."""
        return self.source.engine.submit(
            self.slot, rows, as_array(local_ids), as_array(remote_ids), request_id, key
        )

    def finish(self, op_ids: Sequence[int]) -> list[Finished]:
        """Wait until operations have ended; return all that ended, in order."""
        ends: list[Finished] = []

        def ended() -> bool:
            ends[:] = [f for f in self.source.found if isinstance(f, Finished)]
            return set(op_ids) <= {f.op_id for f in ends}

        self.source.wait(ended)
        return ends

    def expected(
        self, local_ids: Sequence[int], remote_ids: Sequence[int], rows: Sequence[int]
    ) -> Bytes:
        """Return the target's memory as the operations leave it, from the start."""
        s = self.shape
        found: Bytes = self.before.copy()
        for row in rows:
            for i in range(row * s.n_planes, (row + 1) * s.n_planes):
                for ours, theirs in zip(local_ids, remote_ids, strict=True):
                    from_ = i * self.local_length + ours * s.local_stride
                    to = i * self.remote_length + theirs * s.remote_stride
                    block = self.source.memory[from_ : from_ + s.block_bytes]
                    found[to : to + s.block_bytes] = block
        return found

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.source.close()
        self.target.close()


def as_array(ids: Sequence[int]) -> NDArray[np.int64]:
    """Return ids as the engine takes them."""
    return np.array(ids, np.int64)
