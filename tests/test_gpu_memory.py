"""GPU memory: asked of a stand-in for the driver, since no machine here has a GPU."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, KVCache, Server, cuda
from kvxfer._verbs import Device, MemoryRegion, ProtectionDomain
from kvxfer.errors import DeviceUnavailableError, LayoutError, VerbsError
from kvxfer.layout import PlaneLayer
from kvxfer.regions import MAX_DEVICE_REGION, Region, Span, find_slices, merge_regions
from kvxfer.registration import DMABUF, HOST, PEERMEM, peermem_module, register
from kvxfer.verbs_types import Access
from tests.cuda_stand_in import StandIn
from tests.machines import make

PAGE = mmap.PAGESIZE
GIB = 1 << 30
WRITABLE = Access.LOCAL_WRITE | Access.REMOTE_WRITE


@pytest.fixture
def driver() -> Iterator[StandIn]:
    made = StandIn()
    yield made
    made.close()


@pytest.fixture
def pd() -> Iterator[ProtectionDomain]:
    with Device("soft0") as device, ProtectionDomain(device) as pd:
        yield pd


class Registrar:
    """In place of the verb: looks at what it is given, while it is given."""

    def __init__(self, driver: StandIn, error: int = 0) -> None:
        self.driver = driver
        self.error = error
        self.calls: list[tuple[int, int, int, Access]] = []

    def __call__(
        self,
        pd: ProtectionDomain,
        fd: int,
        offset: int,
        iova: int,
        length: int,
        access: Access,
    ) -> MemoryRegion:
        allocation = next(
            a
            for a in self.driver.allocations
            if os.path.samestat(os.fstat(a.fd), os.fstat(fd))
        )
        start, size = self.driver.exported[-1]
        assert allocation.base <= start and start + offset == iova
        assert offset + length <= size
        self.calls.append((offset, iova, length, access))
        if self.error:
            raise VerbsError(self.error, "refused", call="ibv_reg_dmabuf_mr")
        return MemoryRegion(pd, iova, length, access)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("skip", "length"),
    [(0, PAGE), (1, 1), (100, 3 * PAGE), (PAGE - 1, 2), (5 * PAGE + 7, 2 * PAGE)],
)
def test_a_range_is_registered_by_its_dmabuf(
    driver: StandIn, pd: ProtectionDomain, skip: int, length: int
) -> None:
    """Whole pages are asked for, and the region begins where it should in them."""
    made = driver.allocate(16 * PAGE, gpu=1)
    region = Region(made.base + skip, length, on_host=False)
    registrar, fds = Registrar(driver), open_fds()
    mr, way = register(
        pd, region, WRITABLE, load=lambda: cuda.Cuda(driver), from_dmabuf=registrar
    )
    with mr:
        assert way == DMABUF
        assert registrar.calls == [(skip % PAGE, region.addr, length, WRITABLE)]
        assert (mr.addr, mr.length) == (region.addr, length)
        # What the driver gave is given back; the region lives on.
        assert open_fds() == fds
        assert driver.retained == []


def test_host_memory_asks_no_driver(pd: ProtectionDomain) -> None:
    def load() -> cuda.Cuda:
        raise AssertionError("CUDA was asked")

    memory = np.zeros(PAGE, np.uint8)
    region = Region(memory.ctypes.data, PAGE)
    mr, way = register(pd, region, WRITABLE, load=load)
    mr.close()
    assert way == HOST


@pytest.mark.parametrize("case", ["no dmabuf", "verb refuses", "no driver", "unknown"])
def test_otherwise_the_address_is_registered(
    driver: StandIn,
    pd: ProtectionDomain,
    case: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As nvidia-peermem has it; the log says why it is not the dma-buf."""
    caplog.set_level("INFO", "kvxfer.registration")
    made = driver.allocate(PAGE)
    address, fds = made.base, open_fds()
    host = np.zeros(PAGE, np.uint8)
    registrar = Registrar(driver, errno.EOPNOTSUPP if case == "verb refuses" else 0)
    reasons = {
        "no dmabuf": "GPU 0 gives out no dma-buf",
        "verb refuses": "refused",
        "no driver": "no CUDA here",
        "unknown": "CUDA does not know the address",
    }
    driver.dmabuf = case != "no dmabuf"
    if case == "unknown":
        address = host.ctypes.data

    def load() -> cuda.Cuda:
        if case == "no driver":
            raise DeviceUnavailableError("no CUDA here")
        return cuda.Cuda(driver)

    mr, way = register(
        pd,
        Region(address, PAGE, on_host=False),
        WRITABLE,
        load=load,
        from_dmabuf=registrar,
    )
    mr.close()
    assert way == PEERMEM
    assert reasons[case] in caplog.text
    assert open_fds() == fds


def test_memory_that_cannot_be_registered_at_all(
    driver: StandIn, pd: ProtectionDomain
) -> None:
    driver.dmabuf = False
    gone = mmap.mmap(-1, PAGE)
    address = np.frombuffer(gone, np.uint8).ctypes.data
    gone.close()
    with pytest.raises(DeviceUnavailableError) as caught:
        register(
            pd,
            Region(address, PAGE, on_host=False),
            WRITABLE,
            load=lambda: cuda.Cuda(driver),
        )
    text = str(caught.value)
    assert "by dma-buf: CUDA does not know the address" in text
    assert "by its address: " in text and "ibv_reg_mr failed" in text
    assert "nvidia-peermem" in text


def test_the_software_device_takes_no_dmabuf(
    driver: StandIn, pd: ProtectionDomain
) -> None:
    made = driver.allocate(PAGE)
    with pytest.raises(VerbsError) as caught:
        MemoryRegion.from_dmabuf(pd, made.fd, 0, made.base, PAGE, WRITABLE)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.call == "ibv_reg_dmabuf_mr"


def test_the_kernel_module(tmp_path: Any) -> None:
    assert peermem_module(tmp_path) is None
    (tmp_path / "nvidia_peermem").mkdir()
    assert peermem_module(tmp_path) == "nvidia_peermem"


# -- the driver ---------------------------------------------------------------------


def test_what_the_driver_says(driver: StandIn) -> None:
    api = cuda.Cuda(driver)
    made = driver.allocate(PAGE, gpu=1)
    assert api.gpu_of(made.base + PAGE - 1) == 1
    assert api.gpu_of(made.base + PAGE) is None
    assert api.compute_capability(1) == (9, 0)
    assert api.describe() == [
        "CUDA driver 12.8",
        "GPU 0: compute capability 9.0, dma-buf",
        "GPU 1: compute capability 9.0, dma-buf",
    ]
    with pytest.raises(cuda.CudaError, match="cuDeviceGet failed with CUDA_ERROR_INV"):
        api.exports_dmabuf(7)


def test_a_range_outside_an_allocation(driver: StandIn) -> None:
    made, fds = driver.allocate(PAGE), open_fds()
    with (
        pytest.raises(cuda.CudaError, match="cuMemGetHandleForAddressRange failed"),
        cuda.Cuda(driver).dmabuf(0, made.base, PAGE + 1),
    ):
        pass
    assert open_fds() == fds and driver.retained == []


def test_without_the_package_or_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(DeviceUnavailableError, match="cuda-bindings is not there"):
        cuda.load()
    assert "cuda-bindings is not there" in cuda.describe()[0]


def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed, so there is nothing to compare")
    real: Any = importlib.import_module("cuda.bindings.driver")
    for name in (name for name in dir(StandIn) if name.startswith("cu")):
        ours = list(inspect.signature(getattr(StandIn, name)).parameters)[1:]
        first = getattr(real, name).__doc__.splitlines()[0]
        words = re.search(r"\((.*)\)", first)
        assert words is not None
        theirs = [p.split(":")[0].split()[-1] for p in words[1].split(",") if p]
        assert [n.lower() for n in ours] == [n.lower() for n in theirs], name
    for enum in ("CUmemorytype", "CUpointer_attribute", "CUdevice_attribute"):
        for member in getattr(StandIn, enum):
            assert int(getattr(getattr(real, enum), member.name)) == int(member)


# -- caches ----------------------------------------------------------------------------


def device_cache(*layers: int, n_blocks: int, block_bytes: int) -> KVCache:
    return KVCache.from_pointers(
        {"k": list(layers)},
        n_blocks=n_blocks,
        block_bytes=block_bytes,
        host_memory=False,
    )


def test_long_allocations_are_registered_in_slices() -> None:
    """Of 3.5 GiB at most, and no layer in two of them."""
    layer = GIB
    places = [
        PlaneLayer(0x7F00_0000_0000 + i * layer, 1024, 1 << 20, 1 << 20, "u8")
        for i in range(8)
    ]
    whole = (places[0].base, places[-1].end)
    regions = merge_regions((p, Span(whole, on_host=False)) for p in places)
    assert [r.length for r in regions] == [3 * GIB, 3 * GIB, 2 * GIB]
    assert all(not r.on_host and r.length <= MAX_DEVICE_REGION for r in regions)
    for place in places:
        holding = [
            r
            for r in regions
            if r.addr <= place.base and place.end <= r.addr + r.length
        ]
        assert len(holding) == 1
    (host,) = merge_regions((p, Span(whole)) for p in places)
    assert host == Region(whole[0], 8 * GIB)


def test_a_layer_longer_than_a_slice_is_cut_between_its_blocks(
    nic: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Both layers at the same blocks, and each block in one region."""
    block_bytes, base = 3 << 20, GPU_ADDRESS
    far = base + (1 << 40)
    a_slice = MAX_DEVICE_REGION // block_bytes
    n_blocks = 2 * a_slice + 1
    long = device_cache(base, far, n_blocks=n_blocks, block_bytes=block_bytes)
    whole = a_slice * block_bytes
    assert [r.length for r in long.regions] == [whole, whole, block_bytes] * 2
    assert [r.addr for r in long.regions[3:]] == [far, far + whole, far + 2 * whole]
    assert not any(r.on_host for r in long.regions) and caplog.records == []
    for i, entry in enumerate(long.entries()):
        assert find_slices(long.regions, entry.place) == (3 * i, 3, a_slice)
        with pytest.raises(LayoutError, match="is in 3 regions"):
            long.region_index(entry.place)


def test_a_block_longer_than_a_slice_is_one_region_and_a_warning(
    nic: None, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver may refuse it, and then the log has said why."""
    block_bytes = MAX_DEVICE_REGION + 1
    long = device_cache(GPU_ADDRESS, n_blocks=2, block_bytes=block_bytes)
    assert [r.length for r in long.regions] == [2 * block_bytes]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("kvxfer.regions", "WARNING")
    assert f"1 regions are longer than {MAX_DEVICE_REGION} bytes" in caplog.text
    assert f"{2 * block_bytes} the longest at {GPU_ADDRESS:#x}" in caplog.text


def test_slices_of_a_layer_have_a_dmabuf_each(
    driver: StandIn, pd: ProtectionDomain
) -> None:
    """Of whole pages, though blocks are none: neighbours share the page between."""
    n_blocks, block_bytes = 9, GIB - 100
    made = driver.allocate(9 * GIB)
    place = PlaneLayer(made.base + 24, n_blocks, block_bytes, block_bytes, "u8")
    regions = merge_regions([(place, Span(on_host=False))])
    assert [r.length // block_bytes for r in regions] == [3, 3, 3]
    registrar, fds = Registrar(driver), open_fds()
    for region in regions:
        mr, way = register(
            pd,
            region,
            WRITABLE,
            load=lambda: cuda.Cuda(driver),
            from_dmabuf=registrar,
        )
        mr.close()
        assert way == DMABUF
    assert open_fds() == fds
    for (start, size), (offset, iova, length, _), region in zip(
        driver.exported, registrar.calls, regions, strict=True
    ):
        assert start % PAGE == size % PAGE == 0 and offset < PAGE
        assert (iova, length) == (region.addr, region.length)
        assert size <= MAX_DEVICE_REGION + PAGE


def test_slices_of_a_cache_are_found_by_place(nic: None) -> None:
    base = GPU_ADDRESS
    cache = KVCache.from_tensors({"k": [Tensor(base + i * GIB) for i in range(8)]})
    # Without knowledge of the allocation each layer is one of its own.
    assert [r.length for r in cache.regions] == [GIB] * 8
    for i, entry in enumerate(cache.entries()):
        assert cache.region_index(entry.place) == i


class Tensor:
    """What CuPy and others show of device memory: a gibibyte of it."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (1024, 1 << 20),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


GPU_ADDRESS = 0x7F00_0000_0000


@pytest.mark.parametrize("how", ["tensors", "pointers"])
@pytest.mark.parametrize("device", ["auto", "soft"])
def test_gpu_memory_is_refused_when_the_cache_is_made(
    how: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing but the software device could move it: why, and what instead."""
    made = make("bare" if device == "auto" else "bonded", tmp_path / "machine")
    monkeypatch.setenv("KVXFER_SYSFS", str(made.sys))
    monkeypatch.setenv("KVXFER_DEVICE", device)
    with pytest.raises(DeviceUnavailableError, match="GPU memory") as caught:
        if how == "tensors":
            KVCache.from_tensors({"k": [Tensor(GPU_ADDRESS)]})
        else:
            device_cache(GPU_ADDRESS, n_blocks=4, block_bytes=4096)
    reason = "no RDMA device" if device == "auto" else "the option device is 'soft'"
    assert reason in str(caught.value)
    assert "KVCache.allocate" in (caught.value.hint or "")


async def test_gpu_memory_is_refused_when_no_nic_can_be_used(nic: None) -> None:
    """There is a NIC, so the cache could be made; it cannot be opened."""
    cache = KVCache.from_tensors({"k": [Tensor(GPU_ADDRESS)]})
    for end in (Client(cache), Server(cache, port=0)):
        with pytest.raises(DeviceUnavailableError, match="GPU memory") as caught:
            await end.open()
        assert "KVCache.allocate" in (caught.value.hint or "")
        await end.close()
    assert cache.in_use == 0
    with pytest.raises(LayoutError, match="not in host memory"):
        cache.view(0, "k")
