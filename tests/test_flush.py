"""A READ behind the last WR of a write: when it is answered, all is in place.

The software device acknowledges writes before they are in place if it is told to, as
NICs may do towards some GPUs.
"""

from __future__ import annotations

import pytest

from kvxfer import Options, cuda
from kvxfer.host import _flushes
from kvxfer.options import OPTIONS
from kvxfer.verbs_types import Access
from kvxfer.wire import FEATURE_FLUSH
from tests.communicators import memory, nodes
from tests.cuda_stand_in import StandIn
from tests.endpoints import arena, connected, take
from tests.engine_rig import Rig, Shape
from tests.test_gpu_memory import device_cache

OURS, THEIRS = [3, 1, 9, 4], [5, 2, 30, 7]
LATE = "act=posted_write_delay,us=60000000"


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("n_planes", [1, 2, 4])
@pytest.mark.parametrize("flush", [False, True])
def test_bytes_that_are_acknowledged_are_in_place_only_with_a_flush(
    flush: bool, n_planes: int, lanes: int
) -> None:
    """All planes of all layers, keys, values and scales, whatever QP they took."""
    shape = Shape(n_planes=n_planes)
    with Rig(shape, notify=False, flush=flush, lanes=lanes, stripe_bytes=128) as rig:
        rig.let_go()
        rig.target.device.set_faults(LATE)
        ends = rig.finish(rig.submit(OURS, THEIRS, rows=(0, 1, 2)))
        assert [end.status for end in ends] == [0, 0, 0]
        wanted = rig.expected(OURS, THEIRS, (0, 1, 2))
        assert (rig.target.memory == wanted).all() == flush
        if not flush:
            assert (rig.target.memory == rig.before).all()


def test_one_read_for_a_submission() -> None:
    """Behind the last of its operations, and it counts no byte as written."""
    with Rig(notify=False, flush=True) as rig:
        rig.let_go()
        ends = rig.finish(rig.submit(OURS, THEIRS, rows=(0, 1, 2)))
        assert [end.n_wrs for end in ends] == [8, 8, 9]
        assert len({end.n_bytes for end in ends}) == 1


def test_blocks_of_fewer_bytes_than_a_flush_reads() -> None:
    shape = Shape(block_bytes=3)
    with Rig(shape, notify=False, flush=True) as rig:
        rig.let_go()
        rig.target.device.set_faults(LATE)
        rig.finish(rig.submit(OURS, THEIRS))
        assert (rig.target.memory == rig.expected(OURS, THEIRS, (0,))).all()


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_flush_waits_for_room(depth: int) -> None:
    """Where the send queue has room for a few WRs, or one, and none to spare."""
    with Rig(depth=depth, flush=True, max_sge=1) as rig:
        rig.let_go()
        ends = rig.finish(rig.submit(OURS, THEIRS, rows=(0, 1, 2)))
        assert [end.status for end in ends] == [0, 0, 0]
        wanted = rig.expected(OURS, THEIRS, (0, 1, 2))
        assert (rig.target.memory == wanted).all()


async def test_writes_and_arrivals_with_a_flush() -> None:
    async with connected(flush="initiator_read") as pair:
        for layers in (0, [1, 2], None):
            await pair.check_write(OURS, THEIRS, layers)
        assert len(await take(pair.server, 6)) == 6


async def test_a_flush_is_one_more_wr() -> None:
    counts = []
    for flush in ("none", "initiator_read"):
        async with connected(arena(), arena(seed=2), flush=flush) as pair:
            result = await pair.client.write_cache(pair.peer, OURS, THEIRS)
            counts.append(result.wrs)
    assert counts[1] == counts[0] + 1


async def test_only_who_flushes_may_read() -> None:
    """A writer says so when it connects; the QPs of the others permit no READ."""
    async with connected(flush="none") as pair:
        assert not pair.peer.hello().features & FEATURE_FLUSH
    with Rig(notify=False, flush=True) as rig:
        rig.target.qp.to_reset()
        rig.target.qp.to_init(access=Access.REMOTE_WRITE)
        rig.let_go()
        (end,) = rig.finish(rig.submit(OURS, THEIRS))
        assert end.status != 0 and end.culprit


def test_the_switch_of_other_systems() -> None:
    def load(value: str) -> str:
        return Options.load(environ={"KVCACHE_GDRCOPY_FLUSH_ENABLE": value}).flush

    assert [load(v) for v in ("1", "true", "0", "off")] == [
        "initiator_read",
        "initiator_read",
        "none",
        "none",
    ]
    assert Options().flush == "auto"
    (option,) = [o for o in OPTIONS if o.name == "flush"]
    assert option.describe_range() == "one of auto, none, initiator_read"


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), True), ((8, 9), True), ((9, 0), False)]
)
def test_unset_it_is_on_for_gpus_that_need_it(
    capability: tuple[int, int], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = StandIn(capability=capability)
    made = driver.allocate(1 << 16, gpu=1)
    monkeypatch.setattr(cuda, "load", lambda: cuda.Cuda(driver))
    cache = device_cache(made.base, n_blocks=4, block_bytes=4096)
    assert _flushes(cache, "auto") is wanted
    assert _flushes(cache, "none") is False
    assert _flushes(cache, "initiator_read") is True
    with arena() as on_host:
        assert _flushes(on_host.cache, "auto") is False
    del made
    driver.close()


def test_the_drop_in_flushes_with_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original reads behind keys and values, and never behind their scales."""
    monkeypatch.setenv("KVCACHE_GDRCOPY_FLUSH_ENABLE", "1")
    planes = ("k", "v", "k_scale", "v_scale")
    with nodes(memory(1, planes), memory(2, planes)) as pair:
        assert pair.prefill._ends.client().options.flush == "initiator_read"
        pair.check_write([1, 2, 3], [7, 5, 9], 1)
