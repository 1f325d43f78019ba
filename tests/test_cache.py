"""KVCache: tensors in, places and regions out."""

from __future__ import annotations

import gc
import itertools
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer.cache import Entry, KVCache, Region
from kvxfer.errors import ClosedResourceError, LayoutError, UsageError
from kvxfer.layout import Group, Plane, PlaneLayer, fit

GIB = 1 << 30


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


class DLPackOnly:
    """What remains of a numpy array if DLPack is its only protocol."""

    def __init__(self, array: np.ndarray[Any, Any], *, versioned: bool) -> None:
        self._array = array
        self._versioned = versioned

    def __dlpack__(self, **arguments: Any) -> object:
        if arguments and not self._versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class InterfaceOnly:
    """What remains of it if ``__array_interface__`` is the only protocol."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__


class OnDevice:
    """A tensor in device memory; nothing may follow its pointer."""

    def __init__(self, address: int, *shape: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f2",
            "data": (address, False),
            "version": 3,
        }


@pytest.fixture
def pool() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Distinct values in a tensor [2, blocks, tokens, dim]."""
    return np.arange(2 * 6 * 4 * 8, dtype=np.uint16).reshape(2, 6, 4, 8)


# Tensors in


WRAPPERS = {
    "numpy": lambda array: array,
    "buffer": lambda array: array.data,
    "interface": InterfaceOnly,
    "dlpack": lambda array: DLPackOnly(array, versioned=False),
    "dlpack-versioned": lambda array: DLPackOnly(array, versioned=True),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_every_protocol_gives_the_same(wrap: Any) -> None:
    array = np.arange(5 * 3 * 4, dtype=np.float16).reshape(5, 3, 4)
    with KVCache.from_tensors({"k": [wrap(array)]}) as cache:
        (entry,) = cache.entries()
        assert entry.place == PlaneLayer(address(array), 5, 24, 24, "f16")
        view = cache.view(0, "k")
        assert view.shape == (5, 24)
        assert (view.view(np.float16).reshape(5, 3, 4) == array).all()
        view[2, 0] ^= 0xFF
        assert view.tobytes() == array.tobytes()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_memory_is_kept_alive_until_close(wrap: Any) -> None:
    array = np.zeros((4, 8), dtype=np.uint8)
    gone = weakref.ref(array)
    cache = KVCache.from_tensors({"k": [wrap(array)]})
    del array
    gc.collect()
    assert gone() is not None
    view = cache.view(0, "k")
    cache.close()
    gc.collect()
    assert gone() is not None
    view[:] = 1
    del view
    gc.collect()
    assert gone() is None


def test_bytearray_cannot_be_resized_meanwhile() -> None:
    memory = bytearray(64)
    cache = KVCache.from_tensors({"k": [memoryview(memory).cast("B", (4, 16))]})
    with pytest.raises(BufferError):
        memory.extend(b"x")
    cache.close()
    memory.extend(b"x")


def test_k_and_v_in_one_tensor_by_halves(pool: Any) -> None:
    cache = KVCache.from_tensors({"k": [pool[0]], "v": [pool[1]]})
    k, v = (entry.place for entry in cache.entries())
    assert k == PlaneLayer(address(pool), 6, 64, 64, "u16")
    assert v == PlaneLayer(address(pool) + 6 * 64, 6, 64, 64, "u16")
    assert cache.regions == [Region(address(pool), pool.nbytes)]
    assert (cache.view(0, "v").view(np.uint16) == pool[1].reshape(6, -1)).all()


def test_k_and_v_in_one_tensor_by_block() -> None:
    pool = np.arange(6 * 2 * 4 * 8, dtype=np.uint16).reshape(6, 2, 4, 8)
    cache = KVCache.from_tensors({"k": [pool[:, 0]], "v": [pool[:, 1]]})
    k, v = (entry.place for entry in cache.entries())
    assert (k.block_bytes, k.block_stride, v.base - k.base) == (64, 128, 64)
    assert cache.regions == [Region(address(pool), pool.nbytes)]
    assert (cache.view(0, "v").view(np.uint16) == pool[:, 1].reshape(6, -1)).all()


@pytest.mark.parametrize("layer_axis", [0, 1, -3], ids=["first", "second", "negative"])
def test_one_tensor_across_layers(layer_axis: int) -> None:
    shape = (3, 5, 4, 8) if layer_axis == 0 else (5, 3, 4, 8)
    pool = np.arange(5 * 3 * 4 * 8, dtype=np.uint8).reshape(shape)
    cache = KVCache.from_tensors({"kv": pool}, layer_axis=layer_axis)
    assert cache.layers == (0, 1, 2)
    assert cache.regions == [Region(address(pool), pool.nbytes)]
    for layer in range(3):
        wanted = np.take(pool, layer, axis=layer_axis).reshape(5, -1)
        assert (cache.view(layer, "kv") == wanted).all()


def test_block_axis_by_plane(pool: Any) -> None:
    scale = np.zeros((1, 6, 4), dtype=np.float32)
    cache = KVCache.from_tensors(
        {"k": [pool[0]], "s": [scale]}, block_axis={"k": -3, "s": 1}
    )
    s = cache.entries()[1].place
    assert (s.n_blocks, s.block_bytes, s.dtype) == (6, 16, "f32")
    with pytest.raises(LayoutError, match="block_axis names planes k, x"):
        KVCache.from_tensors({"k": [pool[0]]}, block_axis={"k": 0, "x": 0})


def test_pipeline_stage_holds_some_layers(pool: Any) -> None:
    cache = KVCache.from_tensors({"k": {7: pool[0], 4: pool[1]}})
    assert cache.layers == (4, 7)
    assert [entry.layer for entry in cache.entries()] == [4, 7]
    assert [entry.layer for entry in cache.entries([7])] == [7]
    with pytest.raises(LayoutError, match="layers 4, 7"):
        cache.entries([0])


def test_dtype_can_be_named(pool: Any) -> None:
    cache = KVCache.from_tensors({"k": [pool[0]]}, dtype="torch.bfloat16")
    assert cache.entries()[0].place.dtype == "bf16"
    other = KVCache.allocate(n_layers=1, n_blocks=2, block_bytes=64, planes=("k",))
    (mismatch,) = fit(cache.describe(), other.describe())
    assert (mismatch.what, mismatch.local, mismatch.remote) == ("dtype", "bf16", "u8")


def test_one_block_may_have_any_stride() -> None:
    array = np.zeros((4, 8), dtype=np.uint8)[::4]
    assert KVCache.from_tensors({"k": [array]}).entries()[0].place.block_stride == 8


def test_device_memory_is_described_and_never_read(nic: None) -> None:
    a, b = 0x7F00_0000_0000, 0x7F00_0000_0000 + 4 * 16
    cache = KVCache.from_tensors({"k": [OnDevice(a, 4, 8), OnDevice(b, 4, 8)]})
    assert cache.entries()[0].place == PlaneLayer(a, 4, 16, 16, "f16")
    # They touch, but may be two allocations.
    assert cache.regions == [Region(a, 64, False), Region(b, 64, False)]
    with pytest.raises(LayoutError, match="host memory"):
        cache.view(0, "k")


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    pool = torch.zeros((2, 6, 4, 8), dtype=torch.bfloat16)
    cache = KVCache.from_tensors({"k": [pool[0]], "v": [pool[1]]})
    k = cache.entries()[0].place
    assert k == PlaneLayer(pool.data_ptr(), 6, 64, 64, "bf16")
    assert cache.regions == [Region(pool.data_ptr(), 2 * 6 * 64)]
    cache.view(0, "v")[3] = 0x3F
    assert bool((pool[1, 3] != 0).all())
    assert not bool((pool[1, 2] != 0).any())
    bad = {
        "axes": pool[0].transpose(1, 2),
        "overlap": pool[0, :1].expand(6, 4, 8),
        "no memory": torch.empty((6, 4), device="meta"),
        "layout": torch.eye(3).to_sparse(),
    }
    for text, tensor in bad.items():
        with pytest.raises(LayoutError, match=text):
            KVCache.from_tensors({"k": [tensor]})


# What cannot be expressed


def read_only() -> np.ndarray[Any, Any]:
    array = np.zeros((4, 8), dtype=np.uint8)
    array.flags.writeable = False
    return array


GRID = np.zeros((2, 6, 4, 8), dtype=np.uint8)

REFUSED = {
    "inner gap": (GRID[0][:, :, ::2], "not contiguous"),
    "reversed inside": (GRID[0][:, ::-1], "not contiguous"),
    "transposed inside": (GRID[0].transpose(0, 2, 1), r"permute\(0, 2, 1\)"),
    "blocks backwards": (GRID[0][::-1], "overlap or run backwards"),
    "broadcast": (np.lib.stride_tricks.as_strided(GRID, (6, 8), (0, 1)), "overlap"),
    "sliding": (np.lib.stride_tricks.as_strided(GRID, (6, 8), (4, 1)), "overlap"),
    "no blocks": (GRID[0][:0], "empty"),
    "nothing in a block": (GRID[0][:, :0], "empty"),
    "scalar": (np.zeros((), dtype=np.uint8), "no such axis"),
    "objects": (np.array([[None]]), "Python objects"),
    "read-only": (read_only(), "read-only"),
    "read-only buffer": (b"abcd", "read-only"),
    "read-only dlpack": (DLPackOnly(read_only(), versioned=True), "read-?only"),
    "unversioned": (DLPackOnly(read_only(), versioned=False), "refused"),
    "text": ("abcd", "describes no memory"),
    "number": (7, "describes no memory"),
    "none": (None, "describes no memory"),
    "null": (OnDevice(0, 4, 8), "no memory"),
}


@pytest.mark.parametrize(("tensor", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_with_plane_and_layer(tensor: Any, text: str) -> None:
    good = np.zeros((4, 8), dtype=np.uint8)
    with pytest.raises(LayoutError, match=f"plane 'v' layer 3: .*{text}"):
        KVCache.from_tensors({"v": {0: good, 3: tensor}})


def test_refusal_shows_shape_strides_and_remedy() -> None:
    with pytest.raises(LayoutError) as caught:
        KVCache.from_tensors({"k": [GRID]}, block_axis=1)
    for fact in ("(2, 6, 4, 8)", "(192, 32, 8, 1)", "block axis 1", "t[0]", "t[1]"):
        assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "expected a dict"),
        ([GRID], "expected a dict"),
        ({"k": GRID}, "one tensor, expected one a layer"),
        ({"k": []}, "no layer"),
        ({"k": 7}, "expected one item a layer"),
        ({"k": {"0": GRID}}, "layer '0' is not an integer"),
        ({"k": {-1: GRID}}, "layer -1"),
        ({"": [GRID]}, "plane name"),
    ],
    ids=str,
)
def test_wrong_planes(tensors: Any, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        KVCache.from_tensors(tensors)


def test_wrong_layer_axis(pool: Any) -> None:
    with pytest.raises(LayoutError, match="no axis 4"):
        KVCache.from_tensors({"k": pool}, layer_axis=4)


def test_overlap_inside_a_group_is_refused(pool: Any) -> None:
    with pytest.raises(LayoutError, match=r"'k' layer 0 .* 'v' layer 0 overlap"):
        KVCache.from_tensors({"k": [pool[0]], "v": [pool[0]]})


# Pointers


def test_pointers() -> None:
    cache = KVCache.from_pointers(
        {"k": np.array([0x10000, 0x20000]), "s": {1: 0x30000}},
        n_blocks=4,
        block_bytes={"k": 64, "s": 4},
        block_stride={"k": 128, "s": 4},
        dtype={"k": "bf16", "s": "float32"},
    )
    assert [tuple(entry) for entry in cache.entries()] == [
        ("main", "k", 0, PlaneLayer(0x10000, 4, 64, 128, "bf16")),
        ("main", "k", 1, PlaneLayer(0x20000, 4, 64, 128, "bf16")),
        ("main", "s", 1, PlaneLayer(0x30000, 4, 4, 4, "f32")),
    ]
    assert cache.regions[0] == Region(0x10000, 3 * 128 + 64)


def test_view_of_pointers(nic: None) -> None:
    memory = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8)
    pointers = {"k": [address(memory)]}
    cache = KVCache.from_pointers(pointers, n_blocks=4, block_bytes=8)
    assert (cache.view(0, "k") == memory).all()
    cache = KVCache.from_pointers(
        pointers, n_blocks=4, block_bytes=8, host_memory=False
    )
    with pytest.raises(LayoutError, match="host memory"):
        cache.view(0, "k")


@pytest.mark.parametrize(
    "bad",
    [
        {"pointers": {"k": [0]}},
        {"pointers": {"k": [4096, None]}},
        {"pointers": {"k": [4096.0]}},
        {"n_blocks": 0},
        {"n_blocks": True},
        {"block_bytes": 0},
        {"block_bytes": {"v": 8}},
        {"block_stride": 4},
    ],
    ids=str,
)
def test_wrong_pointers(bad: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"n_blocks": 4, "block_bytes": 8, **bad}
    pointers = arguments.pop("pointers", {"k": [4096]})
    with pytest.raises(LayoutError):
        KVCache.from_pointers(pointers, **arguments)


def test_pointers_beyond_2_gib() -> None:
    cache = KVCache.from_pointers(
        {"k": [1 << 44]}, n_blocks=1 << 20, block_bytes=128 << 10
    )
    assert cache.regions == [Region(1 << 44, 128 * GIB)]
    assert cache.nbytes == 128 * GIB


# Memory of our own


def test_allocate() -> None:
    cache = KVCache.allocate(
        n_layers=3,
        n_blocks=5,
        block_bytes={"k": 1000, "s": 4},
        planes=("k", "s"),
        dtype="bf16",
    )
    entries = cache.entries()
    assert [(e.layer, e.plane) for e in entries] == [
        (layer, plane) for layer in range(3) for plane in ("k", "s")
    ]
    assert all(entry.place.base % 4096 == 0 for entry in entries)
    assert len(cache.regions) == 1
    assert cache.nbytes == 3 * 5 * 1004
    for number, entry in enumerate(entries):
        view = cache.view(entry.layer, entry.plane)
        assert not view.any()
        view[:] = number + 1
    for number, entry in enumerate(entries):
        assert (cache.view(entry.layer, entry.plane) == number + 1).all()


def test_allocate_some_layers() -> None:
    cache = KVCache.allocate(layers=[4, 5], n_blocks=2, block_bytes=8)
    assert cache.layers == (4, 5)


@pytest.mark.parametrize(
    "bad",
    [
        {"n_layers": 0},
        {"n_layers": None},
        {"n_layers": 1, "layers": [1]},
        {"n_layers": None, "layers": [1, 1]},
        {"n_layers": 1.5},
        {"n_blocks": 0},
        {"n_blocks": 1 << 31},
        {"block_bytes": -8},
        {"block_bytes": 1 << 62},
        {"planes": ()},
        {"planes": ("k", "k")},
    ],
    ids=str,
)
def test_wrong_allocation(bad: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        KVCache.allocate(**{"n_layers": 1, "n_blocks": 4, "block_bytes": 8, **bad})


def test_layer_beyond_2_gib() -> None:
    block_bytes = 128 << 10
    n_blocks = (3 * GIB) // block_bytes
    with KVCache.allocate(
        n_layers=2, n_blocks=n_blocks, block_bytes=block_bytes, planes=("k",)
    ) as cache:
        (region,) = cache.regions
        assert region.length == 6 * GIB
        last = cache.view(0, "k")[n_blocks - 1]
        last[-1] = 7
        view = cache.view(1, "k")
        view[0, 0] = 8
        assert cache.view(0, "k")[n_blocks - 1, -1] == 7
        assert address(view) - address(last) == block_bytes
        del last, view


def mapped(at: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(n, 16) for n in line.split()[0].split("-"))
            if low <= at < high:
                return True
    return False


def test_close_unmaps_with_the_last_view() -> None:
    cache = KVCache.allocate(n_layers=1, n_blocks=64, block_bytes=1 << 20)
    base = cache.regions[0].addr
    view = cache.view(0, "k")
    cache.close()
    assert mapped(base)
    view[0, 0] = 1
    del view
    assert not mapped(base)


# Regions


def places(cache: KVCache) -> Iterator[PlaneLayer]:
    return (entry.place for entry in cache.entries())


def test_allocations_stay_apart() -> None:
    with mmap.mmap(-1, 1 << 20) as memory:
        whole = np.frombuffer(memory, dtype=np.uint8)
        far = [whole[i : i + 4096].reshape(4, -1) for i in (0, 500_000)]
        one = KVCache.from_tensors({"k": far})
        assert one.regions == [Region(address(whole), 504_096)]
        apart = [np.frombuffer(memory, np.uint8, 4096, i) for i in (0, 500_000)]
        two = KVCache.from_tensors({"k": [a.reshape(4, -1) for a in apart]})
        assert two.regions == [
            Region(address(whole), 4096),
            Region(address(whole) + 500_000, 4096),
        ]
        assert [two.region_index(place) for place in places(two)] == [0, 1]
        del whole, far, apart
        one.close()
        two.close()


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1))
def test_regions_cover_exactly(ranges: list[tuple[int, int]]) -> None:
    groups = [
        Group(f"g{i}", (Plane("k", {0: PlaneLayer(base, 1, size, size, "u8")}),))
        for i, (base, size) in enumerate(ranges[:64])
    ]
    cache = KVCache(groups)
    covered = {base + i for base, size in ranges[:64] for i in range(size)}
    regions = cache.regions
    assert {r.addr + i for r in regions for i in range(r.length)} == covered
    for before, after in itertools.pairwise(regions):
        assert before.addr + before.length < after.addr
    for group in groups:
        place = group.planes[0].layers[0]
        region = regions[cache.region_index(place)]
        assert region.addr <= place.base
        assert place.end <= region.addr + region.length


def test_no_region_for_foreign_memory() -> None:
    cache = KVCache.from_pointers({"k": [8192]}, n_blocks=1, block_bytes=64)
    for base in (4096, 8192 + 64, 8191):
        with pytest.raises(LayoutError, match="no region"):
            cache.region_index(PlaneLayer(base, 1, 64, 64, "u8"))


# Groups


def test_groups_share_memory_as_hybrid_models_do() -> None:
    main = KVCache.allocate(n_layers=2, n_blocks=8, block_bytes=64)
    window = KVCache.from_pointers(
        {"k": [address(main.view(0, "k"))]}, n_blocks=4, block_bytes=128
    )
    cache = KVCache.grouped({"main": main, "swa": window})
    assert [group.name for group in cache.groups] == ["main", "swa"]
    assert cache.regions == main.regions
    assert cache.entries(group="swa") == [
        Entry("swa", "k", 0, window.entries()[0].place)
    ]
    main.close()
    cache.view(0, "v", "main")[:] = 3
    with pytest.raises(LayoutError, match="name the group"):
        cache.view(0, "k")
    with pytest.raises(LayoutError, match="no group 'x', only main, swa"):
        cache.entries(group="x")
    with pytest.raises(LayoutError, match="several groups"):
        KVCache.grouped({"a": cache})
    with pytest.raises(ClosedResourceError):
        KVCache.grouped({"a": main})


def test_bad_groups() -> None:
    group = Group("main", (Plane("k", {0: PlaneLayer(4096, 1, 8, 8, "u8")}),))
    with pytest.raises(LayoutError, match="at least one"):
        KVCache([])
    with pytest.raises(LayoutError, match="twice"):
        KVCache([group, group])


def test_more_entries_than_can_be_announced() -> None:
    pointers = {f"p{i}": range(4096, 4096 + 900 * 8, 8) for i in range(5)}
    with pytest.raises(LayoutError, match="4500 planes times layers"):
        KVCache.from_pointers(pointers, n_blocks=1, block_bytes=8)


# Life


def test_wrong_views() -> None:
    cache = KVCache.allocate(n_layers=2, n_blocks=2, block_bytes=8)
    for layer in (2, -1):
        with pytest.raises(LayoutError, match=f"no layer {layer}: .*layers 0-1"):
            cache.view(layer, "k")
    with pytest.raises(LayoutError, match="no plane 'x', only k, v"):
        cache.view(0, "x")


def test_close() -> None:
    cache = KVCache.allocate(n_layers=1, n_blocks=2, block_bytes=8)
    described = cache.describe()
    cache.close()
    cache.close()
    assert cache.closed
    assert cache.describe() == described
    assert "closed" in repr(cache)
    with pytest.raises(ClosedResourceError):
        cache.view(0, "k")
    with pytest.raises(ClosedResourceError):
        _ = cache.regions
    with pytest.raises(ClosedResourceError):
        cache._pin()
    with pytest.raises(ClosedResourceError), cache:
        pass


def test_close_while_in_use_is_refused() -> None:
    cache = KVCache.allocate(n_layers=1, n_blocks=2, block_bytes=8)
    cache._pin()
    cache._pin()
    assert cache.in_use == 2
    cache._unpin()
    with pytest.raises(UsageError, match="used by 1"):
        cache.close()
    assert not cache.closed
    cache.view(0, "k")
    cache._unpin()
    cache.close()
