"""Contract, first part: bytes and messages arrive, in order, and nowhere else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvxfer.verbs_types import Opcode, QPLimits, QPState, SendWR, WCOpcode
from tests.device_ends import (
    LOC_LEN,
    LOC_QP_OP,
    PATH,
    REM_INV_REQ,
    REM_OP,
    RNR_RETRY,
    SUCCESS,
    Rig,
    Spec,
    statuses,
)


class Transfers:
    """Bytes arrive where they were sent, and nowhere else."""

    def test_write_lands_where_it_was_aimed(self, rig: Rig) -> None:
        a, b = rig.pair()
        a.post(a.write(b, 100, 3000, 1000, wr_id=1 << 40))
        wc = a.reap_one()
        assert (wc.wr_id, wc.status, wc.qp_num) == (1 << 40, SUCCESS, a.qp.qp_num)
        assert wc.opcode == WCOpcode.RDMA_WRITE
        expected = np.zeros_like(b.buffer)
        expected[3000:4000] = a.buffer[100:1100]
        assert np.array_equal(b.buffer, expected)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("depth", [2, 4, 16, 64])
    def test_random_traffic_against_an_oracle(
        self, rig: Rig, depth: int, seed: int
    ) -> None:
        """Any sizes and places, signaled where the queue's depth requires it."""
        rng = np.random.default_rng(1000 * depth + seed)
        spec = Spec(limits=QPLimits(max_send_wr=depth, max_send_sge=4))
        a, b = rig.pair(spec)
        expected = np.zeros_like(b.buffer)
        depth = a.qp.max_send_wr
        open_, signaled = 0, 0
        for _ in range(300):
            if open_ == depth:
                assert all(wc.status == SUCCESS for wc in a.reap(signaled))
                open_ = signaled = 0
            lengths = rng.integers(0, 700, size=rng.integers(1, 5))
            starts = rng.integers(0, len(a.buffer) - 700, size=len(lengths))
            to = int(rng.integers(0, len(b.buffer) - 2800))
            pairs = list(zip(map(int, starts), map(int, lengths), strict=True))
            source = np.concatenate([a.buffer[s : s + n] for s, n in pairs])
            expected[to : to + len(source)] = source
            open_ += 1
            must_sign = open_ == depth or bool(rng.integers(0, 4) == 0)
            signaled += must_sign
            a.post(
                SendWR(
                    sges=tuple(a.sge(s, n) for s, n in pairs),
                    remote_addr=b.addr + to,
                    rkey=b.mr.rkey,
                    signaled=must_sign,
                )
            )
        a.post(a.write(b, 0, 0, 0)) if open_ < depth else a.reap(signaled)
        if open_ < depth:
            a.reap(signaled + 1)
        assert np.array_equal(b.buffer, expected)

    def test_long_write(self, rig: Rig) -> None:
        a, b = rig.pair(Spec(size=(6 << 20) + 10))
        a.post(a.write(b, 3, 7, 6 << 20))
        assert a.reap_one().status == SUCCESS
        assert np.array_equal(b.buffer[7 : 7 + (6 << 20)], a.buffer[3 : 3 + (6 << 20)])
        assert not b.buffer[:7].any() and not b.buffer[7 + (6 << 20) :].any()

    def test_one_chain_one_completion(self, rig: Rig) -> None:
        """Only the signaled WR reports, and it speaks for all before it."""
        a, b = rig.pair()
        a.post(
            *(
                a.write(b, i * 500, 50_000 - i * 500, 500, wr_id=i, signaled=i == 99)
                for i in range(100)
            )
        )
        assert statuses(a, 1) == [(99, SUCCESS)]
        for i in range(100):
            at = 50_000 - i * 500
            assert np.array_equal(
                b.buffer[at : at + 500], a.buffer[i * 500 : i * 500 + 500]
            )
        a.expect_silence()

    def test_completions_keep_the_order_of_posting(self, rig: Rig) -> None:
        a, b = rig.pair()
        sizes = [1, 60_000, 0, 7, 30_000, 0, 3]
        a.post(*(a.write(b, 0, 0, n, wr_id=i) for i, n in enumerate(sizes)))
        assert statuses(a, len(sizes)) == [(i, SUCCESS) for i in range(len(sizes))]

    def test_zero_length_write_needs_no_key(self, rig: Rig) -> None:
        a, b = rig.pair()
        a.post(SendWR(remote_addr=0, rkey=0xDEAD))
        assert a.reap_one().status == SUCCESS
        assert not b.buffer.any()

    def test_inline_bytes_are_taken_at_once(self, rig: Rig) -> None:
        spec = Spec(limits=QPLimits(max_send_wr=16, max_inline=32))
        a, b = rig.pair(spec)
        a.buffer[:16] = 7
        wr = a.write(b, 0, 0, 16)
        a.post(dataclasses.replace(wr, inline_=True))
        a.buffer[:16] = 9
        assert a.reap_one().status == SUCCESS
        assert (b.buffer[:16] == 7).all()

    def test_both_ways_at_once(self, rig: Rig) -> None:
        a, b = rig.pair()
        b.buffer[:1000] = 5
        for _ in range(20):
            a.post(a.write(b, 2000, 2000, 4000))
            b.post(b.write(a, 0, 0, 1000))
        assert all(wc.status == SUCCESS for wc in a.reap(20) + b.reap(20))
        assert (a.buffer[:1000] == 5).all()
        assert np.array_equal(b.buffer[2000:6000], a.buffer[2000:6000])

    def test_read_fetches(self, rig: Rig) -> None:
        """More READs than max_rd_atomic are throttled, not refused."""
        a, b = rig.pair()
        b.buffer[:] = np.arange(len(b.buffer)) % 251
        a.buffer[:] = 0
        for i in range(16):
            a.post(
                a.write(b, i * 4000, i * 4000, 4000, wr_id=i, opcode=Opcode.RDMA_READ)
            )
        found = a.reap(16)
        assert [wc.wr_id for wc in found] == list(range(16))
        assert all(wc.status == SUCCESS for wc in found)
        assert all(wc.opcode == WCOpcode.RDMA_READ for wc in found)
        assert np.array_equal(a.buffer[:64000], b.buffer[:64000])

    def test_read_comes_after_the_writes_before_it(self, rig: Rig) -> None:
        a, b = rig.pair()
        a.post(
            a.write(b, 0, 100, 5000, signaled=False),
            a.write(b, 50_000, 100, 5000, opcode=Opcode.RDMA_READ),
        )
        assert a.reap_one().status == SUCCESS
        assert np.array_equal(a.buffer[50_000:55_000], a.buffer[:5000])


class Messages:
    """SEND and immediate data: what consumes a receive."""

    def test_immediate_data_follows_its_bytes(self, rig: Rig) -> None:
        a, b = rig.pair()
        for i in range(3):
            b.post_recv(10 + i)
        for i, n in enumerate([300, 0, 20_000]):
            a.post(
                a.write(b, 0, 0, n, signaled=False),
                a.write(
                    b,
                    0,
                    n,
                    n,
                    wr_id=i,
                    opcode=Opcode.RDMA_WRITE_WITH_IMM,
                    imm_data=0x01020304 + i,
                ),
            )
            wc = b.reap_one()
            assert (wc.wr_id, wc.status, wc.byte_len) == (10 + i, SUCCESS, n)
            assert wc.opcode == WCOpcode.RECV_RDMA_WITH_IMM
            assert (wc.imm_data, wc.qp_num) == (0x01020304 + i, b.qp.qp_num)
            assert np.array_equal(b.buffer[n : 2 * n], a.buffer[:n])
            assert a.reap_one().status == SUCCESS

    def test_immediate_data_waits_for_its_receive(self, rig: Rig) -> None:
        a, b = rig.pair()
        for i in range(2):
            a.post(a.write(b, 0, 0, 8, wr_id=i, opcode=Opcode.RDMA_WRITE_WITH_IMM))
        a.expect_silence()
        b.post_recv(1)
        assert b.reap_one().wr_id == 1
        assert statuses(a, 1) == [(0, SUCCESS)]
        b.post_recv(2)
        assert b.reap_one().wr_id == 2
        assert statuses(a, 1) == [(1, SUCCESS)]

    def test_no_receive_in_time(self, rig: Rig) -> None:
        """The initiator fails; the target stays as it was."""
        a, b = rig.pair(Spec(path=dataclasses.replace(PATH, rnr_retry=1)))
        a.post(a.write(b, 0, 0, 8, opcode=Opcode.RDMA_WRITE_WITH_IMM))
        assert a.reap_one().status == RNR_RETRY
        assert a.qp.state == QPState.ERR
        assert b.qp.state == QPState.RTS

    def test_send_goes_where_the_receive_says(self, rig: Rig) -> None:
        a, b = rig.pair()
        b.post_recv(5, 1000, 2000)
        a.post(a.write(b, 40, 0, 1500, opcode=Opcode.SEND_WITH_IMM, imm_data=77))
        wc = b.reap_one()
        assert (wc.wr_id, wc.status, wc.byte_len) == (5, SUCCESS, 1500)
        assert (wc.opcode, wc.imm_data) == (WCOpcode.RECV, 77)
        assert np.array_equal(b.buffer[1000:2500], a.buffer[40:1540])
        assert not b.buffer[2500:].any() and not b.buffer[:1000].any()
        assert a.reap_one().status == SUCCESS

    def test_send_longer_than_its_receive(self, rig: Rig) -> None:
        a, b = rig.pair()
        b.post_recv(5, 1000, 99)
        a.post(a.write(b, 0, 0, 100, opcode=Opcode.SEND))
        assert a.reap_one().status in (REM_INV_REQ, REM_OP)
        # Soft-RoCE calls it a bad request here too.
        assert statuses(b, 1)[0] in ((5, LOC_LEN), (5, LOC_QP_OP))
        assert not b.buffer[1099:].any()
