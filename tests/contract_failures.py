"""Contract, second part: failures are typed, loud, timely and contained."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from kvxfer._verbs import MemoryRegion, ProtectionDomain
from kvxfer.verbs_types import SGE, Access, Opcode, QPState, SendWR
from tests.device_ends import (
    ALL,
    FLUSH,
    LOC_PROT,
    LOC_QP_OP,
    REM_ACCESS,
    REM_INV_REQ,
    RETRY_EXC,
    SUCCESS,
    End,
    Rig,
    Spec,
    statuses,
)
from tests.patience import patient

QP_ERROR_EVENTS = {1, 2, 3}  # QP_FATAL, QP_REQ_ERR, QP_ACCESS_ERR


class Errors:
    """A failed WR says so, takes the rest along, and harms nothing else."""

    def fail_in_the_middle(self, a: End, b: End, bad: SendWR) -> int:
        """Post good, good, bad, good, good, unsignaled; return bad's status."""
        b.post_recv(70)
        wrs = [a.write(b, 0, 1000 * i, 1000, wr_id=i, signaled=False) for i in range(5)]
        wrs[2] = dataclasses.replace(bad, wr_id=2, signaled=False)
        a.post(*wrs)
        found = statuses(a, 3)
        # Failed and flushed WRs report in order, signaled or not.
        assert found[1:] == [(3, FLUSH), (4, FLUSH)]
        assert found[0][0] == 2
        assert a.qp.state == QPState.ERR
        assert np.array_equal(b.buffer[:1000], a.buffer[:1000])
        assert np.array_equal(b.buffer[1000:2000], a.buffer[:1000])
        assert not b.buffer[2000:].any()
        # And so does all that comes later.
        a.post(a.write(b, 0, 9000, 8, wr_id=9))
        assert statuses(a, 1) == [(9, FLUSH)]
        return found[0][1]

    def target_is_down(self, b: End) -> None:
        """An access error takes the target's QP along, and it is told."""
        assert statuses(b, 1) == [(70, FLUSH)]
        assert b.qp.state == QPState.ERR
        if b.target.strict:  # Soft-RoCE tells by the flushed receive alone
            assert b.wait_async_event() in QP_ERROR_EVENTS

    def test_unknown_rkey(self, rig: Rig) -> None:
        a, b = rig.pair()
        bad = dataclasses.replace(a.write(b, 0, 0, 8), rkey=b.mr.rkey ^ 0x55)
        assert self.fail_in_the_middle(a, b, bad) == REM_ACCESS
        self.target_is_down(b)

    @pytest.mark.parametrize("by", [1, 1000, 1 << 40])
    def test_beyond_the_region(self, rig: Rig, by: int) -> None:
        a, b = rig.pair()
        bad = a.write(b, 0, len(b.buffer) - 1000 + by, 1000)
        assert self.fail_in_the_middle(a, b, bad) == REM_ACCESS
        self.target_is_down(b)

    def test_before_the_region(self, rig: Rig) -> None:
        a, b = rig.pair()
        assert self.fail_in_the_middle(a, b, a.write(b, 0, -1, 10)) == REM_ACCESS

    def test_region_that_is_gone(self, rig: Rig) -> None:
        a, b = rig.pair()
        gone = MemoryRegion(b.pd, b.addr, 1000, ALL)
        bad = dataclasses.replace(a.write(b, 0, 0, 8), rkey=gone.rkey)
        gone.close()
        assert self.fail_in_the_middle(a, b, bad) == REM_ACCESS

    def test_region_of_another_domain(self, rig: Rig) -> None:
        a, b = rig.pair()
        with (
            ProtectionDomain(b.device) as pd,
            MemoryRegion(pd, b.addr, 1000, ALL) as mr,
        ):
            bad = dataclasses.replace(a.write(b, 0, 0, 8), rkey=mr.rkey)
            assert self.fail_in_the_middle(a, b, bad) == REM_ACCESS

    def test_region_that_may_not_be_written(self, rig: Rig) -> None:
        a, b = rig.pair(Spec(mr_access=Access.LOCAL_WRITE | Access.REMOTE_READ))
        a.post(a.write(b, 0, 0, 8))
        assert a.reap_one().status == REM_ACCESS
        assert not b.buffer.any()

    def test_region_that_may_not_be_read(self, rig: Rig) -> None:
        a, b = rig.pair(Spec(mr_access=Access.LOCAL_WRITE | Access.REMOTE_WRITE))
        before = a.buffer.copy()
        a.post(a.write(b, 0, 0, 8, opcode=Opcode.RDMA_READ))
        assert a.reap_one().status == REM_ACCESS
        assert np.array_equal(a.buffer, before)

    def test_qp_that_may_not_be_written(self, rig: Rig) -> None:
        a, b = rig.pair(Spec(qp_access=Access.REMOTE_READ))
        a.post(a.write(b, 0, 0, 8))
        # Soft-RoCE says 9; NICs may say either.
        assert a.reap_one().status in (REM_INV_REQ, REM_ACCESS)
        assert not b.buffer.any()

    @pytest.mark.parametrize("what", ["key", "end", "start"])
    def test_local_memory_that_is_not_registered(self, rig: Rig, what: str) -> None:
        """The target is not to blame and stays as it was."""
        a, b = rig.pair()
        sge = {
            "key": SGE(a.addr, 8, a.mr.lkey ^ 0x55),
            "end": a.sge(len(a.buffer) - 7, 8),
            "start": a.sge(-1, 8),
        }[what]
        bad = dataclasses.replace(a.write(b, 0, 0, 8), sges=(sge,))
        # Soft-RoCE calls it a bad request.
        assert self.fail_in_the_middle(a, b, bad) in (LOC_PROT, LOC_QP_OP)
        assert b.qp.state == QPState.RTS
        b.expect_silence()

    def test_read_into_memory_that_may_not_be_written(self, rig: Rig) -> None:
        a, b = rig.pair(Spec(mr_access=Access(0)), Spec())
        before = a.buffer.copy()
        a.post(a.write(b, 0, 0, 8, opcode=Opcode.RDMA_READ))
        assert a.reap_one().status in (LOC_PROT, LOC_QP_OP)
        assert np.array_equal(a.buffer, before)

    def test_error_state_flushes_everything(self, rig: Rig) -> None:
        a, b = rig.pair()
        for i in range(5):
            b.post_recv(i)
        b.qp.to_error()
        assert statuses(b, 5) == [(i, FLUSH) for i in range(5)]
        b.post(b.write(a, 0, 0, 8, wr_id=6, signaled=False))
        assert statuses(b, 1) == [(6, FLUSH)]
        b.post_recv(7)
        if not b.target.strict:
            # Soft-RoCE's kernel is not told of a posted receive, and sees this
            # one when it has something else to do with the QP.
            b.qp.to_error()
        assert statuses(b, 1) == [(7, FLUSH)]

    def test_nothing_lands_after_the_target_says_stop(self, rig: Rig) -> None:
        """dereg, ERR, RESET and destroy: when they return, the bytes are still."""
        spec = Spec(size=8 << 20)
        for stop in ("dereg", "error", "reset", "destroy"):
            a, b = rig.pair(spec)
            a.post(*(a.write(b, 0, 0, 8 << 20, wr_id=i) for i in range(8)))
            match stop:
                case "dereg":
                    b.mr.close()
                case "error":
                    b.qp.to_error()
                case "reset":
                    b.qp.to_reset()
                case "destroy":
                    b.qp.close()
            still = b.buffer.copy()
            found = a.reap(8)
            bad = [wc.status for wc in found if wc.status != SUCCESS]
            assert np.array_equal(b.buffer, still), stop
            if bad:
                assert bad[0] in (REM_ACCESS, RETRY_EXC), stop
                assert set(bad[1:]) <= {FLUSH}, stop
            a.close()
            b.close()


class DeadPeers:
    """Silence becomes RETRY_EXC, in time."""

    def fails_in_time(self, a: End, b: End) -> None:
        start = time.monotonic()
        a.post(a.write(b, 0, 0, 8, wr_id=3), a.write(b, 0, 0, 8, wr_id=4))
        assert statuses(a, 2) == [(3, RETRY_EXC), (4, FLUSH)]
        # 7 tries of 67 ms each; NICs may take up to four times as long.
        assert time.monotonic() - start < patient(10)
        assert a.qp.state == QPState.ERR

    def test_peer_that_is_not_ready(self, rig: Rig) -> None:
        a, b = rig.end(), rig.end()
        a.connect(b)
        b.qp.to_init(access=ALL)
        self.fails_in_time(a, b)

    def test_peer_in_error(self, rig: Rig) -> None:
        a, b = rig.pair()
        a.post(a.write(b, 0, 0, 8))
        assert a.reap_one().status == SUCCESS
        b.qp.to_error()
        self.fails_in_time(a, b)

    def test_peer_that_was_destroyed(self, rig: Rig) -> None:
        a, b = rig.pair()
        b.qp.close()
        self.fails_in_time(a, b)

    def test_peer_of_another_life(self, rig: Rig) -> None:
        """Back from RESET with other PSNs it does not take our old requests."""
        a, b = rig.pair()
        b.qp.to_reset()
        b.psn ^= 0x800000
        old = a.psn
        # Our request is ahead of what it expects: one that is behind would be a
        # duplicate to it, which transports acknowledge without executing it.
        a.psn = (old - 0x400000) % 2**24
        b.connect(a)
        a.psn = old
        self.fails_in_time(a, b)
        assert not b.buffer.any()
