"""FastDeploy's module and GPU memory, asked of a stand-in for the CUDA driver."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvxfer import cuda
from kvxfer.host import Host
from kvxfer.verbs_types import Access
from rdma_comm import RDMACommunicator
from tests.communicators import HOST, communicator, memory, nodes
from tests.cuda_stand_in import StandIn

N_BLOCKS, BLOCK_BYTES = 8, 4096
LAYER = N_BLOCKS * BLOCK_BYTES


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A machine whose CUDA driver is the stand-in."""
    made = StandIn()
    monkeypatch.setattr(cuda, "load", lambda: cuda.Cuda(made))
    yield made
    made.close()


def gpu_arguments(driver: StandIn) -> dict[str, Any]:
    """Make a cache of keys and values in the memory of GPU 1; the arguments for it."""
    base = driver.allocate(4 * LAYER, gpu=1).base
    places = [base + i * LAYER for i in range(4)]
    return {
        "key_cache_ptrs": places[:2],
        "value_cache_ptrs": places[2:],
        "block_number": N_BLOCKS,
        "block_bytes": BLOCK_BYTES,
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_software_device_refuses_a_gpu(
    role: str, driver: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the drop-in refuses everything: RuntimeError, and what to use instead."""
    monkeypatch.setenv("KVXFER_DEVICE", "soft")
    with pytest.raises(RuntimeError, match="GPU memory") as caught:
        RDMACommunicator(role, 1, "0", **gpu_arguments(driver))
    assert "the option device is 'soft'" in str(caught.value)
    assert "KVCache.allocate" in str(caught.value)


def test_one_layer_on_a_gpu_makes_it_a_cache_on_a_gpu(
    driver: StandIn, nic: None
) -> None:
    held = memory(1, n_layers=1, n_blocks=N_BLOCKS, block_bytes=BLOCK_BYTES)
    values = [gpu_arguments(driver)["value_cache_ptrs"][0]]
    with communicator("prefill", "0", held, value_cache_ptrs=values) as prefill:
        assert not any(r.on_host for r in prefill._ends._cache.regions)
    with communicator("prefill", "0", held) as prefill:
        assert all(r.on_host for r in prefill._ends._cache.regions)


@pytest.mark.parametrize(
    ("capability", "switch", "wanted"),
    [
        ((8, 0), None, True),
        ((8, 9), None, True),
        ((9, 0), None, False),
        ((8, 0), "0", False),
        ((9, 0), "1", True),
    ],
)
def test_the_flush_is_the_gpu_generation_s(
    capability: tuple[int, int],
    switch: str | None,
    wanted: bool,
    driver: StandIn,
    nic: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What FastDeploy's manager sets for these is right without it; the variable
    has the last word."""
    driver.capability = capability
    monkeypatch.delenv("KVCACHE_GDRCOPY_FLUSH_ENABLE", raising=False)
    if switch is not None:
        monkeypatch.setenv("KVCACHE_GDRCOPY_FLUSH_ENABLE", switch)
    made = RDMACommunicator("prefill", 1, "0", **gpu_arguments(driver))
    ends = made._ends
    assert not any(region.on_host for region in ends._cache.regions)
    host = Host(ends._cache, Access(0), ends._settings.options)
    host.prepare()
    assert host.flushes is wanted
    made.close()


@pytest.mark.parametrize("uses_cuda", [False, True])
def test_a_process_with_cuda_and_without_the_package_is_warned(
    uses_cuda: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its layers would pass for host memory in silence."""
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setenv("KVXFER_HOST", HOST)  # no warning of open ports
    library = tmp_path / ("libcuda.so.1" if uses_cuda else "libcudart.so.12")
    library.write_bytes(bytes(mmap.PAGESIZE))
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ),
        nodes() as pair,
    ):
        pair.check_write([1], [2])  # it may be in host memory after all
    warned = [r.getMessage() for r in caplog.records if r.name == "kvxfer.fastdeploy"]
    if not uses_cuda:
        assert warned == []
        return
    assert len(warned) == 2  # each communicator
    for text in warned:
        assert "pip install 'kvxfer[cuda]'" in text
        assert "no dma-buf" in text and "no flush" in text
