"""Geometry, fit, ids and extents."""

from __future__ import annotations

import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.errors import GeometryMismatchError, LayoutError
from kvxfer.layout import (
    Extent,
    Geometry,
    Group,
    Plane,
    PlaneLayer,
    PlanePair,
    as_ids,
    check_fit,
    check_ids,
    describe,
    extents,
    find_overlap,
    fit,
    format_layers,
    normalize_dtype,
)

GIB = 1 << 30


def place(
    base: int = 4096,
    n_blocks: int = 8,
    block_bytes: int = 64,
    block_stride: int | None = None,
    dtype: str = "u8",
) -> PlaneLayer:
    return PlaneLayer(base, n_blocks, block_bytes, block_stride or block_bytes, dtype)


def geometry(groups: Mapping[str, Mapping[str, Mapping[int, PlaneLayer]]]) -> Geometry:
    return describe(
        Group(name, tuple(Plane(p, layers) for p, layers in planes.items()))
        for name, planes in groups.items()
    )


def one_group(**planes: Mapping[int, PlaneLayer]) -> Geometry:
    return geometry({"main": planes})


# Names and dtypes


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("torch.bfloat16", "bf16"),
        ("bfloat16", "bf16"),
        ("bf16", "bf16"),
        ("float16", "f16"),
        ("half", "f16"),
        ("uint8", "u8"),
        ("u8", "u8"),
        ("int32", "i32"),
        ("float8_e4m3fn", "f8_e4m3fn"),
        ("torch.float8_e5m2", "f8_e5m2"),
        ("bool", "bool"),
        ("MyOwn", "myown"),
    ],
)
def test_dtype_tags(name: str, tag: str) -> None:
    assert normalize_dtype(name) == tag
    assert normalize_dtype(tag) == tag


@pytest.mark.parametrize("name", ["", "  ", "x" * 129])
def test_bad_dtype(name: str) -> None:
    with pytest.raises(LayoutError):
        normalize_dtype(name)


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], ""), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 1, 5, 7, 8], "0-1, 5, 7-8")],
)
def test_format_layers(layers: list[int], text: str) -> None:
    assert format_layers(layers) == text


# Places


def test_place_beyond_32_bits() -> None:
    big = place(base=1 << 46, n_blocks=40_000, block_bytes=128 << 10)
    assert big.length == 40_000 * (128 << 10)
    assert big.length > 4 * GIB
    assert big.address(39_999) == (1 << 46) + 39_999 * (128 << 10)
    assert big.end == big.base + big.length


@pytest.mark.parametrize(
    "bad",
    [
        {"base": 0},
        {"base": -4096},
        {"n_blocks": 0},
        {"n_blocks": -1},
        {"n_blocks": 1 << 31},
        {"block_bytes": 0},
        {"block_bytes": 1 << 41},
        {"block_bytes": 64, "block_stride": 63},
        {"base": (1 << 64) - 64, "n_blocks": 2},
        {"base": 1.5},
        {"n_blocks": True},
        {"dtype": ""},
    ],
    ids=str,
)
def test_bad_place(bad: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        place(**bad)


def test_place_may_end_with_the_address_space() -> None:
    assert place(base=(1 << 64) - 128, n_blocks=2).end == 1 << 64


# Planes and groups


def test_plane_is_sorted_and_a_copy() -> None:
    given_layers = {5: place(), 1: place()}
    plane = Plane("k", given_layers)
    given_layers[9] = place()
    assert list(plane.layers) == [1, 5]


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", 7])
def test_bad_names(name: Any) -> None:
    with pytest.raises(LayoutError, match="name"):
        Plane(name, {0: place()})
    with pytest.raises(LayoutError, match="name"):
        Group(name, (Plane("k", {0: place()}),))


@pytest.mark.parametrize("layer", [-1, 1024, "0", True])
def test_bad_layer(layer: Any) -> None:
    with pytest.raises(LayoutError, match="layer"):
        Plane("k", {layer: place()})


def test_empty_plane_and_group() -> None:
    with pytest.raises(LayoutError, match="no layer"):
        Plane("k", {})
    with pytest.raises(LayoutError, match="no plane"):
        Group("main", ())


def test_group_lookups() -> None:
    group = Group(
        "main",
        (
            Plane("k", {0: place(n_blocks=8), 1: place(n_blocks=6)}),
            Plane("s", {1: place(block_bytes=4)}),
        ),
    )
    assert group.layers == (0, 1)
    assert group.n_blocks == 6
    assert [name for name, _ in group.rows(0)] == ["k"]
    assert [name for name, _ in group.rows(1)] == ["k", "s"]
    with pytest.raises(LayoutError, match="layers 0-1"):
        group.rows(2)
    with pytest.raises(LayoutError, match="only k, s"):
        group.plane("v")
    with pytest.raises(LayoutError, match="twice"):
        Group("main", (Plane("k", {0: place()}), Plane("k", {1: place()})))


def test_describe_splits_a_plane_by_figures() -> None:
    described = one_group(k={0: place(), 1: place(block_bytes=32), 2: place()})
    runs = described.groups[0].planes
    assert [(run.layers, run.block_bytes) for run in runs] == [((0, 2), 64), ((1,), 32)]
    assert len(list(described.entries())) == 3
    assert "4096" not in str(described)


# Overlap


@given(
    first=st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9)),
    second=st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9)),
    pads=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_overlap_agrees_with_sets(
    first: tuple[int, int, int], second: tuple[int, int, int], pads: tuple[int, int]
) -> None:
    places = [
        place(base, n, size, size + pad)
        for (base, n, size), pad in zip((first, second), pads, strict=True)
    ]
    sets = [
        {
            p.address(i) + byte
            for i in range(p.n_blocks)
            for byte in range(p.block_bytes)
        }
        for p in places
    ]
    assert (find_overlap(places) is not None) == bool(sets[0] & sets[1])


def test_alternating_blocks_do_not_overlap() -> None:
    places = [place(4096 + 64 * i, 100, 64, 64 * 6) for i in range(6)]
    assert find_overlap(places) is None
    assert find_overlap([*places, place(4096 + 64 * 6 * 50, 1)]) == (0, 6)


# Fit


def test_fit() -> None:
    local = one_group(k={0: place(), 1: place()}, v={0: place(), 1: place()})
    remote = one_group(
        v={1: place(n_blocks=99), 2: place()}, k={1: place(n_blocks=99), 2: place()}
    )
    assert fit(local, remote) == []
    assert fit(remote, local) == []
    check_fit(local, remote)


def test_mismatches_show_both_figures() -> None:
    local = one_group(k={i: place(block_bytes=32) for i in range(4)})
    remote = one_group(k={i: place(dtype="bf16") for i in range(1, 6)})
    texts = [str(mismatch) for mismatch in fit(local, remote)]
    assert texts == [
        "group main, plane k, layers 1-3: block_bytes is 32 here, 64 at the peer",
        "group main, plane k, layers 1-3: dtype is u8 here, bf16 at the peer",
    ]
    with pytest.raises(GeometryMismatchError, match=r"32 here, 64.*u8 here, bf16"):
        check_fit(local, remote)


def test_missing_plane_and_group() -> None:
    local = geometry({"main": {"k": {0: place()}, "v": {0: place()}}})
    remote = geometry({"main": {"k": {0: place()}}, "swa": {"k": {0: place()}}})
    texts = [str(mismatch) for mismatch in fit(local, remote)]
    assert texts == [
        "group main, plane v, layer 0: plane is present here, missing at the peer",
        "group swa, plane k, layer 0: plane is missing here, present at the peer",
    ]


def test_planes_of_layers_that_one_side_lacks_do_not_matter() -> None:
    local = one_group(k={0: place()})
    remote = one_group(k={0: place(), 1: place()}, k_scale={1: place()})
    assert fit(local, remote) == []


def test_no_common_layer() -> None:
    (mismatch,) = fit(one_group(k={0: place(), 1: place()}), one_group(k={2: place()}))
    assert "0-1 here, 2 at the peer" in str(mismatch)


# Ids


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        [np.int32(3), 1, np.uint8(2)],
        array.array("i", [3, 1, 2]),
        array.array("Q", [3, 1, 2]),
        memoryview(array.array("q", [3, 1, 2])),
        *(np.array([3, 1, 2], dtype=t) for t in ("i2", "i4", "u4", "i8", "u8", ">i8")),
        np.array([3, 0, 1, 0, 2, 0])[::2],
    ],
    ids=lambda ids: f"{type(ids).__name__}-{getattr(ids, 'dtype', '')}",
)
def test_ids(ids: object) -> None:
    found = as_ids(ids)
    assert found.dtype == np.dtype("=i8")
    assert found.flags.c_contiguous
    assert found.tolist() == [3, 1, 2]


@pytest.mark.parametrize("ids", [range(0), range(5), range(5, 0, -2)], ids=str)
def test_ids_of_ranges(ids: range) -> None:
    assert as_ids(ids).tolist() == list(ids)


@pytest.mark.parametrize("ids", [[], (), np.array([], dtype=np.int32)], ids=repr)
def test_no_ids(ids: object) -> None:
    assert as_ids(ids).size == 0


def test_int64_is_not_copied() -> None:
    ids = np.arange(5)
    assert np.shares_memory(as_ids(ids), ids)
    assert np.shares_memory(as_ids(ids.data), ids)


@pytest.mark.parametrize(
    "ids",
    [
        [1.0],
        [1, 2.5],
        [1, True],
        [[1], [2]],
        [None],
        ["1"],
        [1 << 63],
        np.array([1.0]),
        np.array([True]),
        np.array([[1, 2]]),
        np.array([1], dtype=object),
        np.array([1 << 63], dtype=np.uint64),
        np.int64(3),
        3,
        None,
        "123",
        b"123",
        {1, 2},
        range(1 << 63, (1 << 63) + 2),
        pytest.param(iter([1, 2]), id="iterator"),
    ],
    ids=repr,
)
def test_not_ids(ids: object) -> None:
    with pytest.raises(LayoutError, match="source blocks"):
        as_ids(ids, "source blocks")


def test_ids_of_torch() -> None:
    torch = pytest.importorskip("torch")
    ids = torch.tensor([3, 1, 2])
    assert as_ids(ids).tolist() == [3, 1, 2]
    assert as_ids(ids.to(torch.int32)).tolist() == [3, 1, 2]
    assert as_ids(ids).ctypes.data == ids.data_ptr()
    for bad in (ids.to(torch.float32), ids.to(torch.bool), ids.to("meta")):
        with pytest.raises(LayoutError):
            as_ids(bad)


@pytest.mark.parametrize(
    ("local", "remote", "text"),
    [
        ([0, 1], [0], "2 local block ids but 1 remote"),
        ([0, 8], [0, 1], "local block id 8 at position 1 .* 8 blocks, 0 to 7"),
        ([0, -1], [0, 1], "local block id -1 at position 1"),
        ([0, 1], [9, 10], "remote block id 10 at position 1 .* 10 blocks, 0 to 9"),
        ([0, 1, 2], [4, 5, 4], "remote block id 4 occurs twice, at positions 0 and 2"),
        ([1 << 40], [0], "local block id 1099511627776"),
    ],
)
def test_wrong_ids(local: list[int], remote: list[int], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        check_ids(local, remote, 8, 10)


def test_a_source_may_repeat() -> None:
    ours, theirs = check_ids([3, 3], [1, 2], 8, 8)
    assert (ours.tolist(), theirs.tolist()) == ([3, 3], [1, 2])


# Extents


def pair(
    local_stride: int = 64,
    remote_stride: int = 64,
    block_bytes: int = 64,
    n_local: int = 8,
    n_remote: int = 8,
) -> PlanePair:
    return PlanePair(
        1 << 40, local_stride, 1 << 41, remote_stride, block_bytes, n_local, n_remote
    )


def test_neighbours_on_both_sides_merge() -> None:
    found = extents([pair()], [0, 1, 2, 5, 6], [3, 4, 6, 0, 1])
    assert found == [
        Extent(1 << 40, (1 << 41) + 3 * 64, 128),
        Extent((1 << 40) + 2 * 64, (1 << 41) + 6 * 64, 64),
        Extent((1 << 40) + 5 * 64, 1 << 41, 128),
    ]


def test_merging_is_capped_and_never_splits() -> None:
    ids = range(8)
    assert [e.length for e in extents([pair()], ids, ids, merge_bytes=192)] == [
        192,
        192,
        128,
    ]
    assert [e.length for e in extents([pair()], ids, ids, merge_bytes=1)] == [64] * 8


def test_strides_and_pairs_do_not_merge() -> None:
    assert len(extents([pair(remote_stride=65)], range(8), range(8))) == 8
    twice = [pair(n_local=4, n_remote=4), pair(n_local=4, n_remote=4)]
    assert [e.length for e in extents(twice, range(4), range(4))] == [256, 256]


def test_descending_ids_do_not_merge() -> None:
    assert len(extents([pair()], [1, 0], [1, 0])) == 2


def test_smallest_pair_limits() -> None:
    with pytest.raises(LayoutError, match="there are 5 blocks"):
        extents([pair(), pair(n_remote=5)], [5], [5])


def test_nothing_to_move() -> None:
    assert extents([pair()], [], []) == []
    assert extents([], [], []) == []


def test_offsets_beyond_32_bits() -> None:
    big = pair(128 << 10, 256 << 10, 128 << 10, 1 << 20, 1 << 20)
    (found,) = extents([big], [(1 << 20) - 1], [(1 << 20) - 2])
    assert found.local_addr == (1 << 40) + ((1 << 20) - 1) * (128 << 10)
    assert found.remote_addr == (1 << 41) + ((1 << 20) - 2) * (256 << 10)


@st.composite
def transfers(draw: st.DrawFn) -> tuple[Any, ...]:
    block_bytes = draw(st.integers(1, 24))
    sides = [
        (block_bytes + draw(st.sampled_from([0, 0, 1, 7])), draw(st.integers(1, 20)))
        for _ in range(2)
    ]
    n_local, n_remote = sides[0][1], sides[1][1]
    count = draw(st.integers(0, n_remote))
    if draw(st.booleans()):
        first = draw(st.integers(0, n_remote - count))
        remote_ids = list(range(first, first + count))
    else:
        remote_ids = draw(st.permutations(range(n_remote)))[:count]
    local_ids = [draw(st.integers(0, n_local - 1)) for _ in range(count)]
    if draw(st.booleans()) and count <= n_local:
        local_ids = list(range(count))
    n_pairs = draw(st.integers(1, 3))
    merge_bytes = draw(st.sampled_from([1, 30, 100, 1 << 20]))
    return block_bytes, sides, local_ids, remote_ids, n_pairs, merge_bytes


@given(transfers())
def test_copy_by_extents_is_copy_by_indexing(transfer: tuple[Any, ...]) -> None:
    block_bytes, sides, local_ids, remote_ids, n_pairs, merge_bytes = transfer
    (local_stride, n_local), (remote_stride, n_remote) = sides
    red = 11
    rng = np.random.default_rng(1)
    pairs, source, target, wanted = [], [], [], []
    local_base, remote_base = 1000, 5000
    for _ in range(n_pairs):
        local_size = n_local * local_stride + 2 * red
        remote_size = n_remote * remote_stride + 2 * red
        source.append(rng.integers(0, 255, local_size, dtype=np.uint8))
        target.append(np.full(remote_size, 255, dtype=np.uint8))
        result = target[-1].copy()
        blocks = np.lib.stride_tricks.as_strided
        blocks(result[red:], (n_remote, block_bytes), (remote_stride, 1))[
            remote_ids
        ] = blocks(source[-1][red:], (n_local, block_bytes), (local_stride, 1))[
            local_ids
        ]
        wanted.append(result)
        pairs.append(
            PlanePair(
                local_base + red,
                local_stride,
                remote_base + red,
                remote_stride,
                block_bytes,
                n_local,
                n_remote,
            )
        )
        local_base += local_size
        remote_base += remote_size
    ours, theirs = np.concatenate(source), np.concatenate(target)
    found = extents(pairs, local_ids, remote_ids, merge_bytes=merge_bytes)
    for local_addr, remote_addr, length in found:
        assert block_bytes <= length <= max(merge_bytes, block_bytes)
        a, b = local_addr - 1000, remote_addr - 5000
        theirs[b : b + length] = ours[a : a + length]
    assert (theirs == np.concatenate(wanted)).all()
    assert sum(e.length for e in found) == n_pairs * len(local_ids) * block_bytes
