"""Blocks of one cache into blocks of another: every layout, every kind of ids.

Each test compares the target's whole memory with what numpy says it should be, on
both wires of the software device.
"""

from __future__ import annotations

import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvxfer import KVCache
from tests.endpoints import Arena, arena, connected, expected, noise, scattered, take
from tests.patience import fewer

WIRES = ["tcp", "cma", "shm"]


@pytest.fixture(params=WIRES, autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


@st.composite
def transfers(draw: st.DrawFn) -> dict[str, Any]:
    """Two caches and a write between them."""
    n_local, n_remote = draw(st.tuples(*[st.integers(1, 70)] * 2))
    n = draw(st.integers(0, min(n_remote, 60)))
    sizes = st.integers(1, 3000)
    return {
        "n_local": n_local,
        "n_remote": n_remote,
        "planes": draw(
            st.dictionaries(st.sampled_from("abc"), sizes, min_size=1, max_size=3)
        ),
        "local_ids": draw(
            st.lists(st.integers(0, n_local - 1), min_size=n, max_size=n)
        ),
        "remote_ids": draw(
            st.lists(st.integers(0, n_remote - 1), min_size=n, max_size=n, unique=True)
        ),
        "layers": draw(st.none() | st.lists(st.integers(0, 2), unique=True)),
        "options": {
            "max_sge": draw(st.sampled_from([1, 2, 8])),
            "chain": draw(st.integers(1, 64)),
            "merge_bytes": draw(st.sampled_from([1, 4096, 1 << 20])),
            "sq_depth": draw(st.sampled_from([16, 33, 2048])),
        },
    }


@given(transfer=transfers(), seed=st.integers(0, 1000))
@settings(
    max_examples=fewer(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_any_write_moves_the_named_blocks_and_nothing_else(
    transfer: dict[str, Any], seed: int
) -> None:
    source = arena(
        n_blocks=transfer["n_local"], planes=transfer["planes"], seed=2 * seed
    )
    target = arena(
        n_blocks=transfer["n_remote"], planes=transfer["planes"], seed=2 * seed + 1
    )
    async with connected(source, target, **transfer["options"]) as pair:
        await pair.check_write(
            transfer["local_ids"], transfer["remote_ids"], transfer["layers"]
        )


@pytest.mark.parametrize("layers", [2, [0, 3], [3, 1], [], None])
async def test_layers(layers: int | list[int] | None) -> None:
    async with connected(arena(layers=4, seed=1), arena(layers=4, seed=2)) as pair:
        await pair.check_write(scattered(32, 20, 1), scattered(32, 20, 2), layers)


@pytest.mark.parametrize(
    ("local_ids", "remote_ids"),
    [
        ([3, 1, 3], (9, 0, 4)),
        (range(5), range(9, -1, -2)),
        (np.array([7, 8], np.int32), np.array([0, 1], np.int64)),
        (np.array([5, 6, 7], ">u2"), np.arange(12, dtype=np.uint64)[::4]),
        (array.array("q", [4, 2]), [np.int64(1), 0]),
        ([], []),
    ],
)
async def test_kinds_of_ids(local_ids: Any, remote_ids: Any) -> None:
    async with connected() as pair:
        await pair.check_write(local_ids, remote_ids)


async def test_result(wire: str) -> None:
    async with connected() as pair:
        result = await pair.client.write_cache(
            pair.peer, scattered(32, 7, 1), scattered(32, 7, 2), [2, 0]
        )
        # Red zones keep blocks apart: a WR each, and two a layer to announce it.
        assert result.wrs == 2 * (2 * 7 + 2)
        assert result.bytes == 2 * 2 * 7 * 256
        assert result.layers == (2, 0)
        # On shm it is fetched from where it lies.
        for side in (pair.source, pair.target):
            assert {r.fd >= 0 for r in side.cache.regions} == {wire == "shm"}
        (device,) = pair.server.devices
        assert (result.device, result.wire) == (device, wire)
        assert (pair.peer.device, pair.peer.wire) == (device, wire)
        assert 0 < result.seconds < 20


async def test_an_empty_list_moves_and_announces_nothing() -> None:
    async with connected() as pair:
        result = await pair.client.write_cache(pair.peer, [], [])
        assert (result.bytes, result.wrs) == (0, 0)
        await pair.check_write([1], [2], 0)
        assert [a.layer for a in await take(pair.server, 1)] == [0]


# -- layouts ------------------------------------------------------------------------


async def test_planes_of_different_sizes() -> None:
    planes = {"k": (4096, 4096), "v": (512, 640), "k_scale": (8, 24), "odd": (13, 13)}
    source, target = (
        arena(planes=planes, seed=1, n_blocks=50),
        arena(planes=dict(reversed(planes.items())), seed=2, n_blocks=40),
    )
    async with connected(source, target) as pair:
        await pair.check_write(scattered(50, 30, 1), scattered(40, 30, 2))


async def test_the_layouts_of_inference_engines() -> None:
    """FlashInfer's ``[blocks, 2, ...]`` into vLLM's ``[2, blocks, ...]``."""
    ours = noise(3 * 20 * 2 * 512, 1)
    theirs = noise(3 * 2 * 30 * 512, 2)
    a = list(ours.reshape(3, 20, 2, 512))
    b = list(theirs.reshape(3, 2, 30, 512))
    source = Arena(
        ours,
        KVCache.from_tensors({"k": [t[:, 0] for t in a], "v": [t[:, 1] for t in a]}),
    )
    target = Arena(
        theirs, KVCache.from_tensors({"k": [t[0] for t in b], "v": [t[1] for t in b]})
    )
    assert source.cache.groups[0].planes[0].layers[0].block_stride == 1024
    async with connected(source, target) as pair:
        await pair.check_write(scattered(20, 20, 1), scattered(30, 20, 2))


async def test_one_tensor_across_layers() -> None:
    ours, theirs = noise(16 * 5 * 384, 1), noise(24 * 5 * 384, 2)
    source = Arena(
        ours,
        KVCache.from_tensors({"kv": ours.reshape(16, 5, 384)}, layer_axis=1),
    )
    target = Arena(
        theirs, KVCache.from_tensors({"kv": theirs.reshape(5, 24, 384)}, layer_axis=0)
    )
    async with connected(source, target) as pair:
        await pair.check_write(scattered(16, 12, 1), scattered(24, 12, 2), [4, 1])
        await pair.check_write(scattered(16, 16, 3), scattered(24, 16, 4))


async def test_a_single_plane_of_mla() -> None:
    planes = {"kv": (1152, 1152)}
    async with connected(
        arena(planes=planes, seed=1), arena(planes=planes, seed=2)
    ) as pair:
        await pair.check_write(range(32), range(32))
        await pair.check_write(scattered(32, 32, 1), scattered(32, 32, 2))


async def test_pipeline_stages_share_some_layers() -> None:
    source, target = arena(layers=[2, 3, 4], seed=1), arena(layers=[4, 9, 3], seed=2)
    async with connected(source, target) as pair:
        await pair.check_write([1, 2], [3, 4])
        assert [a.layer for a in await take(pair.server, 2)] == [3, 4]
        await pair.check_write([5, 6], [0, 1], [4])


def _grouped(
    n_blocks: dict[str, int], layers: dict[str, list[int]], seed: int
) -> Arena:
    """Make a cache of two groups in one piece of memory."""
    memory = noise(1 << 17, seed)
    at = 0
    parts = {}
    for group, count in n_blocks.items():
        shape = (len(layers[group]), count, 128 if group == "full" else 64)
        length = int(np.prod(shape))
        tensor = memory[at : at + length].reshape(shape)
        at += length + 512
        parts[group] = KVCache.from_tensors(
            {"k": dict(zip(layers[group], tensor, strict=True))}
        )
    return Arena(memory, KVCache.grouped(parts))


async def test_groups_have_block_ids_of_their_own() -> None:
    layers = {"full": [0, 2], "window": [1, 3]}
    source = _grouped({"full": 40, "window": 8}, layers, 1)
    target = _grouped({"window": 9, "full": 30}, layers, 2)
    async with connected(source, target) as pair:
        await pair.check_write(scattered(40, 25, 1), scattered(30, 25, 2), group="full")
        await pair.check_write([7, 0], [8, 3], 3, group="window")
        groups = [(a.group, a.layer) for a in await take(pair.server, 3)]
        assert groups == [("full", 0), ("full", 2), ("window", 3)]


async def test_a_group_may_be_elsewhere_in_another_stage() -> None:
    layers = {"full": [0, 1], "window": [2, 3]}
    source = _grouped({"full": 12, "window": 12}, layers, 1)
    target = _grouped({"full": 12, "window": 12}, {"full": [1], "window": [2]}, 2)
    async with connected(source, target) as pair:
        await pair.check_write([1, 2], [3, 4], group="full")
        await pair.check_write([1, 2], [5, 6], group="window")


# -- where the other side is --------------------------------------------------------


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0", "::", "ipc"])
async def test_addresses(host: str, tmp_path: Path) -> None:
    if host == "ipc":
        host = f"ipc://{tmp_path}/control"
    async with connected(host=host) as pair:
        await pair.check_write([4, 5], [6, 7])
        assert len(await take(pair.server, 3)) == 3


# -- one WR and many ----------------------------------------------------------------


async def test_runs_merge_and_still_land_right() -> None:
    planes = {"k": (256, 256)}
    source, target = arena(planes=planes, seed=1), arena(planes=planes, seed=2)
    async with connected(source, target, merge_bytes=8 * 256) as pair:
        before = target.memory.copy()
        result = await pair.client.write_cache(pair.peer, range(32), range(32), 0)
        assert result.wrs == 4 + 2
        wanted = expected(source, target, before, range(32), range(32), [0])
        assert (target.memory == wanted).all()
        # Neighbours at the target alone: gathered, up to max_sge to a WR.
        result = await pair.client.write_cache(
            pair.peer, range(31, -1, -1), range(32), 0
        )
        assert result.wrs == 4 + 2
        wanted = expected(source, target, before, range(31, -1, -1), range(32), [0])
        assert (target.memory == wanted).all()


async def test_blocks_of_a_megabyte(wire: str) -> None:
    planes = {"k": (1 << 20, (1 << 20) + 64)}
    source = arena(planes=planes, seed=1, n_blocks=6, layers=2)
    target = arena(planes=planes, seed=2, n_blocks=7, layers=2)
    async with connected(source, target) as pair:
        await pair.check_write([5, 0, 3, 1], [0, 6, 2, 4])


async def test_both_sides_use_the_smaller_path_mtu() -> None:
    async with connected(server_options={"path_mtu": 1024}) as pair:
        (incoming,) = pair.server._connections.incoming.values()
        assert incoming.link.infos[0].mtu == 3  # enum ibv_mtu has 1 for 256 bytes
        await pair.check_write(range(32), range(31, -1, -1))
    async with connected(path_mtu=256) as pair:
        assert pair.peer.link.infos[0].mtu == 1
        await pair.check_write(range(32), range(31, -1, -1))
