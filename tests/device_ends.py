"""Two ends of a connection over any device, for the contract suite.

An :class:`End` is one device with one QP over one buffer; :class:`Rig` makes
pairs of them and closes all that it made. Waiting is always by the completion
channel and with a deadline, so that a lost event fails a test and hangs none.
"""

from __future__ import annotations

import dataclasses
import secrets
import select
import time
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvxfer._verbs import (
    CompletionQueue,
    Device,
    MemoryRegion,
    ProtectionDomain,
    QueuePair,
)
from kvxfer.cache import KVCache
from kvxfer.verbs_types import (
    SGE,
    WC,
    Access,
    Opcode,
    QPLimits,
    QPPath,
    RecvWR,
    SendWR,
)
from tests.patience import patient

ALL = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
PATIENCE = patient(15.0)
"""Seconds until something that must come counts as missing."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device under test, and where it is known to be more lenient than a NIC."""

    name: str
    provider: Literal["soft", "null", "libibverbs"]
    wire: str | None = None
    shared: bool = False
    """The buffers are memory that a peer on this host can map."""
    gid_index: int = 0
    library: str | None = None
    """Of libibverbs; None: the system's."""
    strict: bool = True
    """Slots come back by polling only; an overrun CQ takes its QPs along."""


LIMITS = QPLimits(max_send_wr=128, max_recv_wr=64, max_send_sge=8)
PATH = QPPath(
    qp_num=0,
    psn=0,
    gid=bytes(16),
    timeout=14,
    retry_cnt=6,
    rnr_retry=7,
    max_rd_atomic=4,
    max_dest_rd_atomic=4,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to make a pair."""

    size: int = 1 << 16
    limits: QPLimits = LIMITS
    cq_depth: int = 1024
    mr_access: Access = ALL
    qp_access: Access = Access.REMOTE_WRITE | Access.REMOTE_READ
    path: QPPath = PATH


# The numbers of ibv_wc_status that the checks name.
SUCCESS, LOC_LEN, LOC_QP_OP, LOC_PROT, FLUSH = 0, 1, 2, 4, 5
REM_INV_REQ, REM_ACCESS, REM_OP, RETRY_EXC, RNR_RETRY = 9, 10, 11, 12, 13


def statuses(end: End, n: int) -> list[tuple[int, int]]:
    """Wait for ``n`` completions; give the wr_id and status of each."""
    return [(wc.wr_id, wc.status) for wc in end.reap(n)]


class End:
    """One end: a buffer, registered, and a QP that may touch it."""

    def __init__(self, target: Target, spec: Spec) -> None:
        self.target = target
        self.spec = spec
        self.cache: KVCache | None = None
        self.buffer: NDArray[np.uint8]
        fd = -1
        if target.shared:
            self.cache = KVCache.allocate(
                n_layers=1, n_blocks=1, block_bytes=spec.size, planes=("all",)
            )
            self.buffer = self.cache.view(0, "all")[0]
            fd = self.cache.regions[0].fd
        else:
            self.buffer = np.zeros(spec.size, np.uint8)
        self.addr: int = self.buffer.ctypes.data
        self.device = Device(
            target.name,
            provider=target.provider,
            wire=target.wire,
            path=target.library,
        )
        self.pd = ProtectionDomain(self.device)
        self.cq = CompletionQueue(self.device, spec.cq_depth)
        self.mr = MemoryRegion(self.pd, self.addr, spec.size, spec.mr_access, fd=fd)
        self.qp = QueuePair(self.pd, self.cq, spec.limits)
        self.psn = secrets.randbits(24)

    def close(self) -> None:
        self.device.close()
        if self.cache is not None:
            self.buffer = np.zeros(0, np.uint8)  # the memory goes with its last view
            self.cache.close()

    @property
    def gid(self) -> bytes:
        return self.device.query_gid(1, self.target.gid_index)

    def path_to(self, peer: End) -> QPPath:
        port = self.device.query_port()
        return dataclasses.replace(
            self.spec.path,
            qp_num=peer.qp.qp_num,
            psn=peer.psn,
            gid=peer.gid,
            lid=peer.device.query_port().lid,
            mtu=port.active_mtu,
            own_psn=self.psn,
            gid_index=self.target.gid_index,
        )

    def connect(self, peer: End) -> None:
        path = self.path_to(peer)
        self.qp.to_init(access=self.spec.qp_access)
        self.qp.to_rtr(path)
        self.qp.to_rts(path)

    def sge(self, offset: int, length: int) -> SGE:
        return SGE(self.addr + offset, length, self.mr.lkey)

    def write(
        self,
        peer: End,
        from_: int,
        to: int,
        length: int,
        *,
        wr_id: int = 0,
        signaled: bool = True,
        opcode: Opcode = Opcode.RDMA_WRITE,
        imm_data: int = 0,
        solicited: bool = False,
    ) -> SendWR:
        """A WR from our buffer to the peer's; offsets and length in bytes."""
        return SendWR(
            opcode=opcode,
            sges=(self.sge(from_, length),) if length else (),
            remote_addr=peer.addr + to,
            rkey=peer.mr.rkey,
            wr_id=wr_id,
            signaled=signaled,
            imm_data=imm_data,
            solicited=solicited,
        )

    def post(self, *wrs: SendWR) -> None:
        assert self.qp.post_send(wrs) == len(wrs)

    def post_recv(self, wr_id: int, offset: int = 0, length: int = 0) -> None:
        sges = (self.sge(offset, length),) if length else ()
        self.qp.post_recv([RecvWR(wr_id=wr_id, sges=sges)])

    def wait_event(self, seconds: float) -> bool:
        """Wait for a completion event; take it. False: none came."""
        ready, _, _ = select.select([self.cq.fd], [], [], seconds)
        return bool(ready) and self.cq.drain_events() > 0

    def reap(self, n: int) -> list[WC]:
        """Wait for exactly ``n`` completions."""
        deadline = time.monotonic() + PATIENCE
        found: list[WC] = []
        while len(found) < n:
            found += self.cq.poll(min(32, n - len(found)))
            if len(found) == n:
                break
            self.cq.arm()
            some = self.cq.poll(min(32, n - len(found)))
            found += some
            if not some:
                left = deadline - time.monotonic()
                assert left > 0, f"{len(found)} of {n} completions came: {found}"
                self.wait_event(left)
        return found

    def reap_one(self) -> WC:
        return self.reap(1)[0]

    def expect_silence(self, seconds: float = 0.02) -> None:
        """No completion is there, and none comes soon."""
        self.cq.arm()
        assert self.cq.poll() == []
        self.wait_event(seconds)
        assert self.cq.poll() == []

    def wait_async_event(self) -> int:
        ready, _, _ = select.select([self.device.async_fd], [], [], PATIENCE)
        assert ready, "no asynchronous event came"
        event = self.device.take_async_event()
        assert event is not None
        return event.event_type


class Rig:
    """Makes ends and pairs, and closes them all."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._ends: list[End] = []

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for end in self._ends:
            end.close()

    def end(self, spec: Spec | None = None) -> End:
        end = End(self.target, spec or Spec())
        self._ends.append(end)
        return end

    def pair(
        self, spec: Spec | None = None, peer_spec: Spec | None = None
    ) -> tuple[End, End]:
        """Two connected ends; the first has random bytes, the second zeros."""
        a, b = self.end(spec), self.end(peer_spec or spec)
        a.connect(b)
        b.connect(a)
        a.buffer[:] = np.frombuffer(secrets.token_bytes(len(a.buffer)), np.uint8)
        return a, b
