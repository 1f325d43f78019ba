"""How memory becomes a region of a device: as it is, or by its dma-buf.

GPU memory is registered by the dma-buf that the CUDA driver gives out, or else as
its address stands, which needs the kernel module nvidia-peermem. It has been tested
against a stand-in for the driver only, and has not yet met a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from kvxfer import cuda
from kvxfer._verbs import MemoryRegion, ProtectionDomain
from kvxfer.errors import DeviceUnavailableError, VerbsError
from kvxfer.regions import Region
from kvxfer.verbs_types import Access

__all__ = ["DMABUF", "HOST", "PEERMEM", "peermem_module", "register"]

_log = logging.getLogger("kvxfer.registration")

#: The ways in which memory is registered.
HOST, DMABUF, PEERMEM = "host", "dmabuf", "peermem"

_MODULES = Path("/sys/module")

FromDmabuf = Callable[[ProtectionDomain, int, int, int, int, Access], MemoryRegion]


def peermem_module(modules: Path = _MODULES) -> str | None:
    """Return the kernel module that lets NICs register GPU addresses, if loaded."""
    for name in ("nvidia_peermem", "nv_peer_mem"):
        if (modules / name).is_dir():
            return name
    return None


def register(
    pd: ProtectionDomain,
    region: Region,
    access: Access,
    *,
    load: Callable[[], cuda.Cuda] = cuda.load,
    from_dmabuf: FromDmabuf = MemoryRegion.from_dmabuf,
) -> tuple[MemoryRegion, str]:
    """Register a region; return it and the way that was taken.

    Raises:
      VerbsError: Host memory that the device does not take.
      DeviceUnavailableError: GPU memory that it does not take in either way; the
        message has the reasons.
    """
    if region.on_host:
        mr = MemoryRegion(
            pd, region.addr, region.length, access, fd=region.fd, offset=region.offset
        )
        return mr, HOST
    reasons: list[str] = []
    try:
        driver = load()
        gpu = driver.gpu_of(region.addr)
        if gpu is None:
            reasons.append("CUDA does not know the address")
        elif not driver.exports_dmabuf(gpu):
            reasons.append(f"GPU {gpu} gives out no dma-buf")
        else:
            with driver.dmabuf(gpu, region.addr, region.length) as (fd, offset):
                mr = from_dmabuf(pd, fd, offset, region.addr, region.length, access)
            _log.info("%d bytes of GPU %d registered by dma-buf", region.length, gpu)
            return mr, DMABUF
    except (DeviceUnavailableError, VerbsError) as error:
        reasons.append(str(error))
    try:
        mr = MemoryRegion(pd, region.addr, region.length, access)
    except VerbsError as error:
        module = peermem_module()
        state = f"{module} is loaded" if module else "nvidia-peermem is not loaded"
        raise DeviceUnavailableError(
            f"GPU memory at {region.addr:#x} cannot be registered: by dma-buf: "
            f"{'; '.join(reasons)}; by its address: {error}; {state}",
            hint="Load nvidia-peermem, or a kernel (5.12), driver and rdma-core (34) "
            "with dma-buf.",
        ) from error
    _log.info(
        "%d bytes of GPU memory registered by address, not by dma-buf: %s",
        region.length,
        "; ".join(reasons),
    )
    return mr, PEERMEM
