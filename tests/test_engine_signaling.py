"""Which WRs ask for a completion: the last of a chain, and which one that is.

The CQEs are taken out of the engine's own CQ by hand, so each is seen with its wr_id;
the engine is not asked for progress meanwhile.
"""

from __future__ import annotations

import time

import pytest

from tests.device_ends import SUCCESS
from tests.endpoints import SOON
from tests.engine_rig import Rig, Shape

KIB = 1 << 10
# What a wr_id says of the WR's place in its send queue, and whose that is.
SEQUENCE, QP = (1 << 37) - 1, 50


def signaled_by_qp(rig: Rig, n_wrs: int) -> list[list[int]]:
    """Take the CQEs of the source until so many WRs have completed.

    Returns where in the send queue of each QP the signaled WRs stand, from 0 on.
    """
    rig.let_go()
    cq = rig.source.engine.cq
    found: list[list[int]] = [[] for _ in rig.pairs]
    deadline = time.monotonic() + SOON
    while sum(places[-1] + 1 for places in found if places) < n_wrs:
        assert time.monotonic() < deadline, f"only {found} came"
        for wc in cq.poll():
            assert wc.status == SUCCESS
            found[wc.wr_id >> QP & 3].append(wc.wr_id & SEQUENCE)
    assert cq.poll() == []
    # The engine has seen none of them: end its operations without it.
    rig.source.engine.abort(rig.slot)
    for ours, _ in rig.pairs:
        ours.close()
    rig.source.engine.forget(rig.slot)
    return found


def signaled(rig: Rig, n_wrs: int) -> list[int]:
    """The same where there is one QP."""
    (places,) = signaled_by_qp(rig, n_wrs)
    return places


def apart(n: int) -> tuple[list[int], list[int]]:
    """Ids of ``n`` blocks no two of which are neighbours on the remote side."""
    return list(range(n)), [i // 2 + (i % 2) * (n // 2) for i in range(n)]


def one_plane(n_blocks: int, block_bytes: int) -> Shape:
    return Shape(
        n_local=n_blocks,
        n_remote=n_blocks,
        block_bytes=block_bytes,
        local_stride=block_bytes,
        remote_stride=block_bytes,
        n_rows=1,
        n_planes=1,
    )


@pytest.mark.parametrize(
    ("block_bytes", "n_blocks", "wrs_a_chain"),
    [
        (KIB, 1000, 64),  # a chain is full
        (16 * KIB, 500, 64),  # full, and a MiB, both
        (64 * KIB, 250, 16),  # a MiB
        (256 * KIB, 62, 4),
        (1024 * KIB, 10, 1),
        (2048 * KIB, 6, 1),  # more than a MiB, but it is one WR
    ],
)
def test_one_signaled_wr_in_64_or_in_a_mib_and_the_last(
    block_bytes: int, n_blocks: int, wrs_a_chain: int
) -> None:
    shape = one_plane(n_blocks, block_bytes)
    with Rig(
        shape,
        depth=1024,
        notify=False,
        window_bytes=1 << 30,
        device_window_bytes=1 << 30,
    ) as rig:
        rig.submit(*apart(n_blocks))
        # The first is short, so that the device starts early.
        first = min(16, wrs_a_chain)
        wanted = [*range(first - 1, n_blocks, wrs_a_chain)]
        if wanted[-1] != n_blocks - 1:
            wanted.append(n_blocks - 1)
        assert signaled(rig, n_blocks) == wanted


def test_a_chain_ends_where_the_qp_changes() -> None:
    """Every 256 KiB: four blocks of 64 KiB on the one QP, four on the other."""
    with Rig(one_plane(32, 64 * KIB), depth=64, notify=False, lanes=2) as rig:
        rig.submit(*apart(32))
        assert signaled_by_qp(rig, 32) == [[3, 7, 11, 15]] * 2


def test_the_planes_and_the_announcement_share_chains() -> None:
    """Two planes of 24, a record and an immediate are 50 WRs: one CQE for the rest."""
    with Rig(Shape(n_planes=2), depth=64) as rig:
        rig.submit(*apart(24))
        assert signaled(rig, 50) == [15, 49]


def test_announcements_behind_reads_are_no_further_behind_than_a_chain() -> None:
    """Three layers of 8 WRs and a READ, one after the other and each announced."""
    with Rig(Shape(n_planes=1), depth=64, flush=True) as rig:
        rig.submit(*apart(8), rows=(0, 1, 2))
        first, second, third = range(9), range(9, 18), range(22, 31)
        announced = [(18, 19), (20, 21), (31, 32)]  # each a record and an immediate
        assert signaled(rig, 33) == [
            first[-1],
            second[-1],
            *(immediate for _, immediate in announced[:2]),
            announced[2][-1],
        ]
        assert third[-1] + 1 == announced[2][0]  # nothing is left to go in between


def test_each_of_many_small_submissions_has_its_last() -> None:
    """Whoever waits for one of them waits for no other."""
    with Rig(Shape(n_planes=1), depth=64, notify=False) as rig:
        for i in range(8):
            rig.submit([2 * i], [2 * i])
        assert signaled(rig, 8) == list(range(8))
