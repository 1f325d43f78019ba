"""A stand-in for ``cuda.bindings.driver``: strict, and without a GPU.

Its device memory is a file in memory that is mapped here, so that what was registered
can be written for real. It fails a call that the driver would fail, and counts what a
caller has to give back: contexts and descriptors.
"""

from __future__ import annotations

import enum
import mmap
import os
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_SUPPORTED = 801


class CUmemorytype(enum.IntEnum):
    CU_MEMORYTYPE_HOST = 1
    CU_MEMORYTYPE_DEVICE = 2


class CUpointer_attribute(enum.IntEnum):
    CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9


class CUdevice_attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED = 124


class CUmemRangeHandleType(enum.IntEnum):
    CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD = 1


Code = CUresult


@dataclass(eq=False)
class Allocation:
    """Device memory of one GPU."""

    gpu: int
    fd: int
    memory: mmap.mmap
    bytes: NDArray[np.uint8]
    base: int
    length: int


@dataclass(eq=False)
class StandIn:
    """The module, with its enumerations as attributes."""

    n_gpus: int = 2
    dmabuf: bool = True
    capability: tuple[int, int] = (9, 0)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    retained: list[int] = field(default_factory=list)
    exported: list[tuple[int, int]] = field(default_factory=list)

    CUresult = CUresult
    CUmemorytype = CUmemorytype
    CUpointer_attribute = CUpointer_attribute
    CUdevice_attribute = CUdevice_attribute
    CUmemRangeHandleType = CUmemRangeHandleType

    def __post_init__(self) -> None:
        self._initialised = False
        self._stack = threading.local()

    # -- for the test ----------------------------------------------------------------

    def allocate(self, length: int, gpu: int = 0) -> Allocation:
        """Make device memory of whole pages."""
        fd = os.memfd_create("gpu")
        os.ftruncate(fd, length)
        memory = mmap.mmap(fd, length)
        array = np.frombuffer(memory, np.uint8)
        made = Allocation(gpu, fd, memory, array, array.ctypes.data, length)
        self.allocations.append(made)
        return made

    def close(self) -> None:
        """Free the memory; fail if anything is owed."""
        for allocation in self.allocations:
            os.close(allocation.fd)
        self.allocations.clear()  # the mappings go with the last reference
        assert self.retained == []
        assert self._contexts == []

    @property
    def _contexts(self) -> list[int]:
        """The stack of the calling thread."""
        if not hasattr(self._stack, "contexts"):
            self._stack.contexts = []
        found: list[int] = self._stack.contexts
        return found

    def _find(self, address: int) -> Allocation | None:
        for allocation in self.allocations:
            if 0 <= address - allocation.base < allocation.length:
                return allocation
        return None

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))
        assert self._initialised or name == "cuInit", f"{name} before cuInit"

    # -- the driver ------------------------------------------------------------------

    def cuInit(self, flags: int) -> tuple[Code]:
        self._note("cuInit", flags)
        self._initialised = True
        return (CUresult.CUDA_SUCCESS,)

    def cuDriverGetVersion(self) -> tuple[Code, int]:
        return CUresult.CUDA_SUCCESS, 12080

    def cuDeviceGetCount(self) -> tuple[Code, int]:
        return CUresult.CUDA_SUCCESS, self.n_gpus

    def cuPointerGetAttribute(self, attribute: int, ptr: int) -> tuple[Code, Any]:
        self._note("cuPointerGetAttribute", attribute, ptr)
        allocation = self._find(ptr)
        if allocation is None:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        if attribute == CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            return CUresult.CUDA_SUCCESS, CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert attribute == CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        return CUresult.CUDA_SUCCESS, allocation.gpu

    def cuDeviceGet(self, ordinal: int) -> tuple[Code, int | None]:
        self._note("cuDeviceGet", ordinal)
        if not 0 <= ordinal < self.n_gpus:
            return CUresult.CUDA_ERROR_INVALID_DEVICE, None
        return CUresult.CUDA_SUCCESS, 100 + ordinal

    def cuDeviceGetAttribute(self, attrib: int, dev: int) -> tuple[Code, int]:
        self._note("cuDeviceGetAttribute", attrib, dev)
        assert dev >= 100, "a device is not an ordinal"
        values = {75: self.capability[0], 76: self.capability[1], 124: int(self.dmabuf)}
        return CUresult.CUDA_SUCCESS, values[int(attrib)]

    def cuDevicePrimaryCtxRetain(self, dev: int) -> tuple[Code, int]:
        self._note("cuDevicePrimaryCtxRetain", dev)
        self.retained.append(dev)
        return CUresult.CUDA_SUCCESS, 1000 + dev

    def cuDevicePrimaryCtxRelease(self, dev: int) -> tuple[Code]:
        self._note("cuDevicePrimaryCtxRelease", dev)
        self.retained.remove(dev)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPushCurrent(self, ctx: int) -> tuple[Code]:
        self._note("cuCtxPushCurrent", ctx)
        assert ctx - 1000 in self.retained, "a context that nobody has retained"
        self._contexts.append(ctx)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Code, int]:
        self._note("cuCtxPopCurrent")
        return CUresult.CUDA_SUCCESS, self._contexts.pop()

    def cuMemGetHandleForAddressRange(
        self, dptr: int, size: int, handleType: int, flags: int
    ) -> tuple[Code, int | None]:
        self._note("cuMemGetHandleForAddressRange", dptr, size, handleType, flags)
        assert handleType == CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        allocation = self._find(dptr)
        if not self._contexts:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        if not self.dmabuf:
            return CUresult.CUDA_ERROR_NOT_SUPPORTED, None
        if (
            allocation is None
            or self._contexts[-1] != 1100 + allocation.gpu
            or dptr % mmap.PAGESIZE
            or size % mmap.PAGESIZE
            or size == 0
            or dptr + size > allocation.base + allocation.length
        ):
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        fd = os.dup(allocation.fd)
        self.exported.append((dptr, size))
        return CUresult.CUDA_SUCCESS, fd
