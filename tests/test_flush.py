"""A READ behind the last WR of a write: when it is answered, all is in place.

The software device acknowledges writes before they are in place if it is told to, as
NICs may do towards some GPUs.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvxfer import Client, Options, cuda
from kvxfer._engine import RingArrival
from kvxfer.errors import VersionMismatchError
from kvxfer.host import Host, _needs_flush
from kvxfer.options import OPTIONS
from kvxfer.requests import TicketState
from kvxfer.testing import set_faults
from kvxfer.verbs_types import Access
from kvxfer.wire import FEATURE_FLUSH
from tests.communicators import (
    HOST,
    Nodes,
    communicator,
    free_port,
    memory,
    target_faults,
)
from tests.cuda_stand_in import StandIn
from tests.endpoints import arena, check_reconnects, connected, dial, take, until
from tests.engine_rig import Rig, Shape
from tests.streaming import streamed
from tests.test_gpu_memory import device_cache

OURS, THEIRS = [3, 1, 9, 4], [5, 2, 30, 7]
LATE = "act=posted_write_delay,us=60000000"
# Announcements do not wait for these, as they do not for a GPU's memory.
LATE_GPU = "act=gpu_write_delay,us=60000000"


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


def test_one_read_for_each_announcement() -> None:
    with Rig(flush=True, depth=64) as rig:
        rig.let_go()
        ends = rig.finish(rig.submit(OURS, THEIRS, rows=(0, 1, 2)))
        # With it the record and the immediate.
        assert [end.n_wrs for end in ends] == [8 + 1 + 2] * 3


def arrivals(rig: Rig) -> list[RingArrival]:
    """Return what the target has been told by now."""
    rig.target.wait(lambda: True)
    return [found for found in rig.target.found if isinstance(found, RingArrival)]


def test_what_is_announced_is_in_place_whatever_comes_behind() -> None:
    """Two layers are announced, and of the third no WR reaches the target."""
    with Rig(flush=True, depth=64) as rig:
        rig.let_go()
        rig.target.device.set_faults(LATE_GPU)
        rig.source.device.set_faults("act=drop,nth=23")
        rig.finish(rig.submit(OURS, THEIRS, rows=(0, 1, 2)))
        rig.target.wait(lambda: len(arrivals(rig)) == 2)
        wanted = rig.expected(OURS, THEIRS, (0, 1))
        assert (rig.target.memory == wanted).all()


@pytest.mark.parametrize("lane", [0, 1])
def test_nothing_is_announced_before_the_read_is_answered(lane: int) -> None:
    """The flag is IBV_SEND_FENCE: without it the record would leave at once.

    The target executes the READ and what comes behind it; its answers are lost. On
    a NIC a READ waits for the memory while later WRs overtake it, so what is
    announced then need not be in place.
    """
    shape = Shape(n_planes=2)
    with Rig(shape, flush=True, lanes=2, stripe_bytes=256, depth=64) as rig:
        rig.let_go()
        qp = rig.pairs[lane][0]
        # Of 8 WRs each lane has 4; the READ is behind them.
        rig.source.device.set_faults(f"act=ack_lost,nth=5,qp={qp.qp_num}")
        (end,) = rig.finish(rig.submit(OURS, THEIRS))
        assert end.status != 0
        assert arrivals(rig) == []


def test_the_next_layer_does_not_wait_for_the_answer() -> None:
    """Its data leaves between the READ and the record, which waits for the READ."""
    with Rig(flush=True, depth=64) as rig:
        rig.let_go()
        # The READ behind the first layer's 8 WRs is executed, and never answered.
        rig.source.device.set_faults("act=ack_lost,nth=9")
        ends = rig.finish(rig.submit(OURS, THEIRS, rows=(0, 1)))
        assert all(end.status for end in ends)
        assert (rig.target.memory == rig.expected(OURS, THEIRS, (0, 1))).all()
        assert arrivals(rig) == []


def test_no_more_than_a_little_goes_before_the_record() -> None:
    """128 KiB: an announcement waits for the READ, and for no other layer."""
    kib = 1 << 10
    size = 32 * kib
    shape = Shape(
        n_local=16,
        n_remote=16,
        block_bytes=size,
        local_stride=size,
        remote_stride=size,
        n_planes=1,
    )
    apart = [0, 2, 4, 6, 8, 10, 12, 14]
    with Rig(shape, flush=True, depth=64) as rig:
        rig.let_go()
        rig.source.device.set_faults("act=ack_lost,nth=9")
        rig.finish(rig.submit(apart, apart, rows=(0, 1)))
        wanted = rig.expected(apart, apart, (0,))
        partly = rig.expected(apart[:4], apart[:4], (0, 1))
        done = np.where(wanted != rig.before, wanted, partly)
        assert (rig.target.memory == done).all()


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


async def test_a_flush_is_one_more_wr_a_layer() -> None:
    counts = []
    for flush in ("none", "initiator_read"):
        async with connected(arena(), arena(seed=2), flush=flush) as pair:
            result = await pair.client.write_cache(pair.peer, OURS, THEIRS)
            counts.append(result.wrs)
    assert counts[1] == counts[0] + 3


@pytest.fixture
def option(reader: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What has this one read; for nobody, the READ of the target is left out."""
    if reader == "nobody":
        monkeypatch.setattr(Host, "flushes_arrivals", lambda *_: False)
    return {"writer": "initiator_read"}.get(reader, "target_read")


@pytest.mark.parametrize("reader", ["nobody", "writer", "target"])
async def test_what_arrives_is_in_place(reader: str, option: str) -> None:
    """Each layer when it is told, whoever reads; without a READ none of it is."""
    async with connected(flush=option) as pair:
        set_faults(pair.server, LATE_GPU)
        before = pair.target.memory.copy()
        write = asyncio.ensure_future(
            pair.client.write_cache(pair.peer, OURS, THEIRS, [2, 0, 1])
        )
        seen = []
        for _ in range(3):
            (arrival,) = await take(pair.server, 1)
            ours = dict(pair.source.cache.group().rows(arrival.layer))
            for name, place in pair.target.cache.group().rows(arrival.layer):
                found = pair.target.blocks(place)[THEIRS]
                wanted = pair.source.blocks(ours[name])[OURS]
                seen.append(bool((found == wanted).all()))
        await write
        assert seen == [reader != "nobody"] * 6
        if reader == "nobody":
            assert (pair.target.memory == before).all()


async def test_arrivals_keep_their_order_and_are_told_before_a_goodbye() -> None:
    """They are held while they are read back, and the writer leaves meanwhile."""
    async with connected(flush="target_read") as pair:
        set_faults(pair.server, LATE_GPU)
        for i in range(40):
            await pair.client.write_cache(
                pair.peer, [i % 32], [i % 31], i % 3, request_id=str(i)
            )
        await pair.client.close()
        found = await take(pair.server, 40)
        assert [arrival.request_id for arrival in found] == [str(i) for i in range(40)]


async def test_a_read_back_that_fails_drops_the_writer_and_tells_nothing() -> None:
    """What cannot be told to be in place is not told; a new connection is sound."""
    async with connected(flush="target_read", ib_timeout=14) as pair:
        set_faults(pair.server, "act=status:LOC_PROT_ERR,times=1")
        await pair.client.write_cache(pair.peer, OURS, THEIRS, 1)
        await until(lambda: not pair.peer.connected and not pair.server.peers)
        assert pair.server.n_waiting == 0
        await check_reconnects(pair)
        for arrival in await take(pair.server, 3):
            assert arrival.block_ids.tolist() == [3, 4]


@pytest.mark.parametrize("reader", ["nobody", "target"])
async def test_a_digest_is_of_what_is_in_place(reader: str, option: str) -> None:
    """The ticket's digest is computed when the layer is told to have landed."""
    async with streamed(arena(seed=1), arena(seed=2), flush=option) as pair:
        set_faults(pair.server, LATE_GPU)
        ticket = pair.server.offer(pair.prefill, "r", {"main": THEIRS}, checksum=True)
        request = pair.client.open("r")
        request.ready(None, OURS)
        request.finish()
        await until(lambda: ticket._over.is_set)
        wanted = TicketState.FAILED if reader == "nobody" else TicketState.DONE
        assert ticket.state is wanted


def test_who_reads_by_itself() -> None:
    """On GPUs that need it the writer; where that does not, who is written to."""
    with arena() as made:

        def host(flush: str) -> Host:
            found = Host(made.cache, Access(0), Options(flush=flush))
            found.needs_flush = flush == "auto"
            return found

        assert [host(f).flushes for f in ("auto", "initiator_read")] == [True, True]
        assert [host(f).flushes for f in ("none", "target_read")] == [False, False]
        for features in (0, FEATURE_FLUSH):
            assert host("auto").flushes_arrivals(features) is (features == 0)
            assert host("target_read").flushes_arrivals(features) is True
            assert host("none").flushes_arrivals(features) is False
            assert host("initiator_read").flushes_arrivals(features) is False


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


@pytest.mark.parametrize("flush", ["auto", "none", "target_read"])
async def test_a_server_permits_reads_only_where_they_flush(flush: str) -> None:
    """A writer that wants to read the cache is refused, and told what to set."""
    server_options = {"flush": flush}
    async with connected(flush="none", server_options=server_options) as pair:
        with pytest.raises(VersionMismatchError, match="initiator_read there as well"):
            async with Client(pair.source.cache, flush="initiator_read") as other:
                await dial(other, pair.server)
        # And the memory itself says so, whatever a QP of theirs would permit.
        readable = bool(pair.server._host._access & Access.REMOTE_READ)
        assert readable is (flush == "target_read")
        await pair.check_write(OURS, THEIRS)


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
    assert option.describe_range() == "one of auto, none, initiator_read, target_read"


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), True), ((8, 9), True), ((9, 0), False)]
)
def test_unset_it_is_on_for_gpus_that_need_it(
    capability: tuple[int, int],
    wanted: bool,
    nic: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = StandIn(capability=capability)
    made = driver.allocate(1 << 16, gpu=1)
    monkeypatch.setattr(cuda, "load", lambda: cuda.Cuda(driver))
    cache = device_cache(made.base, n_blocks=4, block_bytes=4096)
    assert _needs_flush(cache) is wanted
    with arena() as on_host:
        assert _needs_flush(on_host.cache) is False
    del made
    driver.close()


@pytest.mark.parametrize("flush", [False, True])
def test_the_drop_in_flushes_with_scales(
    flush: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original reads behind keys and values, and never behind their scales.

    All four planes are there when the call returns; without the flush none is.
    """
    planes, port = ("k", "v", "k_scale", "v_scale"), free_port()
    ours, theirs = [1, 2, 3], [7, 5, 9]
    source, target = memory(1, planes), memory(2, planes)
    # What may be read remotely is what plays a GPU's memory, so the decode node
    # permits it in both cases.
    monkeypatch.setenv("KVCACHE_GDRCOPY_FLUSH_ENABLE", "1")
    with communicator("decode", port, target) as decode:
        monkeypatch.setenv("KVCACHE_GDRCOPY_FLUSH_ENABLE", str(int(flush)))
        with communicator("prefill", "0", source) as prefill:
            assert prefill.connect(HOST, port) == 0
            target_faults(Nodes(source, target, prefill, decode, str(port)), LATE_GPU)
            before, wanted = target.copy(), target.copy()
            for name, of in wanted.items():
                of[1][theirs] = source.planes[name][1][ours]
            assert prefill.write_cache(HOST, port, ours, theirs, 1) == 0
            assert target.differs(wanted if flush else before) == []
            assert target.differs(before if flush else wanted) == [
                f"{name} layer 1" for name in planes
            ]
