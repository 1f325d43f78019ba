"""Memory registered in slices: where it is cut, and that each byte finds its key.

On the software device each slice is a region of its own, with bounds that are checked:
a work request that goes beyond one, or has another's key, is an error.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvxfer import Client, KVCache, Server
from kvxfer._verbs import MemoryRegion
from kvxfer.errors import LayoutError, ProtocolError, VersionMismatchError
from kvxfer.host import Host
from kvxfer.layout import PlaneLayer
from kvxfer.regions import Region, Span, find_slices, merge_regions
from kvxfer.wire import FEATURE_SLICES, FEATURES, Window
from tests.communicators import (  # noqa: F401
    BLOCK_BYTES,
    HOST,
    communicator,
    free_port,
    memory,
    nodes,
    quick,
)
from tests.endpoints import QUICK, Arena, arena, connected, dial, expected, take
from tests.engine_rig import End, Rig, Shape

if TYPE_CHECKING:
    from kvxfer._engine import Row

# -- where it is cut ------------------------------------------------------------------


def check_cut(places: list[PlaneLayer], regions: list[Region], limit: int) -> None:
    """Fail unless each block is in the region that it should be, none too long."""
    ends = [0]
    for region in regions:
        assert region.addr >= ends[-1] and region.length <= limit
        ends.append(region.addr + region.length)
    for place in places:
        slices = find_slices(regions, place)
        for i in range(place.n_blocks):
            region = regions[slices.first + i // slices.blocks]
            start = place.address(i)
            assert region.addr <= start
            assert start + place.block_bytes <= region.addr + region.length
        assert slices.n == len({i // slices.blocks for i in range(place.n_blocks)})
        some = np.array([0, place.n_blocks - 1])
        wanted = {slices.first + i // slices.blocks for i in some.tolist()}
        assert slices.holding(some) == wanted


def apart(rng: random.Random) -> list[PlaneLayer]:
    """Layers one after the other, of different sizes."""
    places, at = [], 1 << 20
    for _ in range(rng.randrange(1, 9)):
        size = rng.randrange(1, 65)
        stride = size + rng.randrange(9)
        places.append(PlaneLayer(at, rng.randrange(1, 65), size, stride, "u8"))
        at = places[-1].end + rng.randrange(99)
    return places


def alternating(rng: random.Random) -> list[PlaneLayer]:
    """Rows of one block of each layer; not all layers have as many."""
    sizes = [rng.randrange(1, 33) for _ in range(rng.randrange(2, 9))]
    places, at, row = [], 1 << 20, sum(sizes) + rng.randrange(9)
    for size in sizes:
        places.append(PlaneLayer(at, rng.randrange(1, 65), size, row, "u8"))
        at += size
    return places


@pytest.mark.parametrize("layout", [apart, alternating])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_each_block_lies_in_one_slice(layout: Any, known: bool, seed: int) -> None:
    rng = random.Random(seed)
    places = layout(rng)
    whole = (places[0].base, max(place.end for place in places)) if known else None
    row = max(place.block_stride for place in places)
    for limit in (row, row + 1, 3 * row - 1, 10 * row, 1 << 30):
        found = [(place, Span(whole)) for place in places]
        rng.shuffle(found)
        check_cut(places, merge_regions(found, limit), limit)


def test_slices_of_a_file_are_at_their_place_in_it() -> None:
    with KVCache.allocate(n_layers=2, n_blocks=32, block_bytes=256) as cache:
        (whole,) = cache.regions
        regions = cache.regions_within(1024)
        places = [entry.place for entry in cache.entries()]
        check_cut(places, regions, 1024)
        assert len(regions) == 4 * 8 and cache.regions_within(0) == [whole]
        for region in regions:
            assert (region.fd, region.on_host) == (whole.fd, True)
            assert region.offset - whole.offset == region.addr - whole.addr
            with pytest.raises(LayoutError, match="no region"):
                find_slices([region], places[0])


def test_what_cannot_be_cut_is_one_region_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = [PlaneLayer(4096, 8, 16, 64, "u8"), PlaneLayer(4112, 8, 16, 128, "u8")]
    (region,) = merge_regions([(place, Span()) for place in odd], 100)
    assert region == Region(4096, 4112 + 7 * 128 + 16 - 4096)
    assert f"1 regions are longer than 100 bytes, {region.length} the" in caplog.text
    caplog.clear()
    long = PlaneLayer(4096, 2, 128, 128, "u8")
    assert merge_regions([(long, Span())], 100) == [Region(4096, 256)]
    assert "cannot be cut between blocks" in caplog.text


async def test_a_limit_that_makes_too_many_regions_is_refused() -> None:
    """When it is opened, with both figures, and not by the first who connects."""
    with KVCache.allocate(n_layers=1, n_blocks=4097, block_bytes=64) as cache:
        planes = len(cache.entries())
        assert len(cache.regions_within(256)) <= 4096
        text = rf"region_bytes = 64 makes {4097 * planes} regions .* at most 4096"
        for end in (Client(cache, region_bytes=64), Server(cache, region_bytes=64)):
            with pytest.raises(LayoutError, match=text):
                await end.open()
            await end.close()
        assert cache.in_use == 0


# -- that each byte finds its key -----------------------------------------------------

# Slices of one block, of some, and nothing but whole layers. In an arena a block of a
# layer takes 280 bytes at most, a layer more than 8000.
LIMITS = [(280, 0), (0, 280), (700, 3000), (2999, 1200), (560, 560)]


WAYS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"qps_per_connection": 2, "max_sge": 1, "chain": 3},
        {"flush": "initiator_read"},
        {"flush": "target_read"},
    ],
    ids=["plain", "lanes", "flush", "target"],
)


@pytest.mark.parametrize(("ours", "theirs"), LIMITS)
@WAYS
async def test_writes_across_slices(
    ours: int, theirs: int, options: dict[str, Any]
) -> None:
    """Scattered, in runs, backwards: all of it against numpy."""
    rng = random.Random(ours)
    here = {"region_bytes": theirs, **options}
    async with connected(server_options=here, region_bytes=ours, **options) as pair:
        counts = [
            len(end._host.adapters[0].regions) for end in (pair.client, pair.server)
        ]
        # Six layers of planes, and what is cut is in more pieces than that.
        assert [n > 6 for n in counts] == [ours > 0, theirs > 0]
        for n in (1, 2, 7, 32):
            await pair.check_write(rng.sample(range(32), n), rng.sample(range(32), n))
        run = list(range(32))
        await pair.check_write(run, run, 1)
        await pair.check_write(run[3:20], run[12:29], [0, 2])
        await pair.check_write(run, run[::-1])
        assert len(await take(pair.server, 7)) == 7


@pytest.mark.parametrize("wire", ["tcp", "cma", "shm"])
async def test_slices_of_memory_that_peers_map(wire: str) -> None:
    """Each slice is a part of one file, which the other side maps."""
    sizes: dict[str, Any] = {"n_layers": 2, "n_blocks": 64, "block_bytes": 256}
    options = {"soft_wire": wire, "region_bytes": 5000, **QUICK}
    rng = np.random.default_rng(1)
    with KVCache.allocate(**sizes) as ours, KVCache.allocate(**sizes) as theirs:
        async with (
            Server(theirs, host="127.0.0.1", port=0, **options) as server,
            Client(ours, **options) as client,
        ):
            peer = await dial(client, server)
            for layer in range(2):
                from_, to = rng.permutation(64)[:40], rng.permutation(64)[:40]
                pairs = [
                    (cache.view(layer, "k"), cache.view(layer, "v"))
                    for cache in (ours, theirs)
                ]
                wanted = [to_.copy() for to_ in pairs[1]]
                for source, after in zip(pairs[0], wanted, strict=True):
                    source[:] = rng.integers(0, 256, source.shape, np.uint8)
                    after[to] = source[from_]
                result = await client.write_cache(peer, from_, to, layer)
                assert result.wire == wire
                for found, after in zip(pairs[1], wanted, strict=True):
                    assert (found == after).all()


def packed(seed: int, n_blocks: int = 32) -> Arena:
    """Blocks without gaps, so that neighbours merge."""
    return arena(seed=seed, n_blocks=n_blocks, layers=1, planes={"k": (256, 256)})


@pytest.mark.parametrize(
    ("ours", "theirs", "max_sge", "wrs"),
    [
        # One WR a remote slice of 8 blocks: gathered over local slices of 3.
        (0, 2048, 8, 4),
        (768, 2048, 8, 4),
        # All 32 at once, but no more SGEs than there may be; and then few.
        (768, 0, 16, 1),
        (768, 0, 2, 6),
        (0, 0, 1, 1),
    ],
)
async def test_runs_merge_within_slices(
    ours: int, theirs: int, max_sge: int, wrs: int
) -> None:
    run = list(range(32))
    async with connected(
        packed(1),
        packed(2),
        server_options={"region_bytes": theirs},
        region_bytes=ours,
        max_sge=max_sge,
    ) as pair:
        counters = pair.client._host.counters
        before = counters.work_requests
        await pair.check_write(run, run)
        # With each write a record and the immediate that tell the decode side.
        assert counters.work_requests - before == wrs + 2


class SlicedRig(Rig):
    """Each plane in regions of 5 blocks here and of 7 there; nothing registered whole
    is used."""

    def rows(self) -> list[Row]:
        s = self.shape
        mrs: list[MemoryRegion] = []

        def keys(end: End, at: int, stride: int, blocks: int, which: str) -> Any:
            found = []
            for i in range(0, 64, blocks):
                to = at + min(i + blocks, 64) * stride
                mrs.append(end.register(end.memory[at + i * stride : to]))
                found.append(getattr(mrs[-1], which))
            return blocks, found

        self.mrs = mrs  # alive as long as the rig
        rows = super().rows()
        for row, (_, _, _, _, pairs) in enumerate(rows):
            assert isinstance(pairs, list)
            for i in range(len(pairs)):
                n = row * s.n_planes + i
                from_, to = n * self.local_length, n * self.remote_length
                pairs[i] = (
                    *pairs[i][:5],
                    keys(self.source, from_, s.local_stride, 5, "lkey"),
                    keys(self.target, to, s.remote_stride, 7, "rkey"),
                )
        return rows


@pytest.mark.parametrize("max_wr_bytes", [1 << 30, 64, 63, 10])
@pytest.mark.parametrize("flush", [False, True])
def test_blocks_longer_than_a_wr_in_slices(max_wr_bytes: int, flush: bool) -> None:
    """As where a port carries shorter messages than a block is long."""
    shape = Shape(local_stride=64, remote_stride=64)
    with SlicedRig(shape, max_wr_bytes=max_wr_bytes, flush=flush, notify=False) as rig:
        rig.let_go()
        for ours in (range(64), range(63, -1, -1)):
            (end, _) = rig.finish(rig.submit(ours, range(64), [0, 2]))[-2:]
            assert end.status == 0
            assert (rig.target.memory == rig.expected(ours, range(64), [0, 2])).all()


@pytest.mark.parametrize("planes", [("k", "v"), ("k", "v", "k_scale", "v_scale")])
def test_the_drop_in_in_slices(
    planes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(len(planes))
    monkeypatch.setenv("KVXFER_REGION_BYTES", "1000")
    with nodes(memory(1, planes), memory(2, planes)) as pair:
        for layer in range(3):
            ids = rng.sample(range(32), 20), rng.sample(range(32), 20)
            pair.check_write(*ids, layer)
        assert pair.write([1, 32], [2, 3]) == -1
        pair.check_write(list(range(32)), list(range(32)))


def test_a_rank_writes_its_part_of_sliced_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = memory(1), memory(2, block_bytes=2 * BLOCK_BYTES)
    wanted, port = target.copy(), free_port()
    ours, theirs = [3, 1, 8, 9], [0, 31, 7, 8]
    for name, of in wanted.items():
        of[1][theirs, BLOCK_BYTES:] = source.planes[name][1][ours]
    monkeypatch.setenv("KVXFER_REGION_BYTES", "1600")
    with (
        communicator("decode", port, target),
        communicator(
            "prefill", "0", source, prefill_tp_size=2, prefill_tp_idx=1
        ) as prefill,
    ):
        assert prefill.connect(HOST, port, 1) == 0
        assert prefill.write_cache(HOST, port, ours, theirs, 1) == 0
    assert target.differs(wanted) == []


# -- releases that know no slices -----------------------------------------------------


async def test_a_writer_of_an_older_release_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would take the first key for all; where there is but one, it may write."""
    with monkeypatch.context() as older:
        older.setattr(Host, "features", FEATURES & ~FEATURE_SLICES)
        async with connected(region_bytes=600, server_options={"region_bytes": 0}):
            pass
    async with connected(server_options={"region_bytes": 600}) as pair:
        before = expected(pair.source, pair.target, pair.target.memory, [], [])
        with monkeypatch.context() as older:
            older.setattr(Host, "features", FEATURES & ~FEATURE_SLICES)
            async with Client(pair.source.cache) as client:
                with pytest.raises(VersionMismatchError, match="slices of 2 blocks"):
                    await dial(client, pair.server)
        assert (pair.target.memory == before).all()
        await pair.check_write([1, 2], [3, 4])


@pytest.mark.parametrize(
    ("n_more", "blocks", "good"),
    [
        *((0, 0, True), (3, 8, True), (3, 10, True), (0, 32, True)),
        *((1, 0, False), (2, 8, False), (4, 8, False), (3, 32, False), (0, 8, False)),
    ],
)
def test_a_window_has_a_key_for_each_slice(
    n_more: int, blocks: int, good: bool
) -> None:
    window = Window(
        group="main",
        plane="k",
        layer=0,
        base=4096,
        block_stride=64,
        block_bytes=64,
        n_blocks=32,
        rkey=1,
        more_rkeys=[7] * n_more,
        slice_blocks=blocks,
    )
    if good:
        window.check()
    else:
        with pytest.raises(ProtocolError, match="not a key for each slice"):
            window.check()


@pytest.mark.parametrize("keys", [(0, [1]), (8, [1] * 7), (63, [1]), (64, [])])
def test_the_engine_wants_a_key_for_each_block(keys: tuple[int, list[int]]) -> None:
    with Rig() as rig:
        for side in range(2):
            pair: Any = [4096, 64, 4096, 64, 64, 1, 1]
            pair[5 + side] = keys
            with pytest.raises(LayoutError, match="are not for 64"):
                rig.source.engine.add_initiator(
                    rig.source.qp, [(0, 0, 64, 64, [tuple(pair)])]
                )
