"""GPU memory as the CUDA driver knows it: whose it is, and its dma-buf.

The driver API is loaded at run time with the package ``cuda-bindings`` (the extra
``cuda``), and only when a cache in GPU memory is opened. Nothing here allocates,
copies or launches anything.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvxfer.errors import DeviceUnavailableError

__all__ = ["Cuda", "CudaError", "describe", "driver_is_mapped", "load"]

_API = "cuda.bindings.driver"


class CudaError(DeviceUnavailableError):
    """A call of the driver failed; the message has its name and CUDA's code."""


class Cuda:
    """The driver API of this process.

    Args:
      api: The module ``cuda.bindings.driver``, or one that has its functions.

    Raises:
      CudaError: The driver does not initialise.
    """

    def __init__(self, api: Any) -> None:
        self._api = api
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function; what it returns beside its code."""
        code, *values = getattr(self._api, name)(*arguments)
        if int(code) != 0:
            raise CudaError(f"{name} failed with {getattr(code, 'name', int(code))}")
        return values[0] if len(values) == 1 else values

    def gpu_of(self, address: int) -> int | None:
        """Return the number of the GPU whose memory is at an address.

        ``None`` is host memory, pinned or not, and what CUDA has never heard of.
        """
        attribute = self._api.CUpointer_attribute
        try:
            kind = self._call(
                "cuPointerGetAttribute",
                attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                address,
            )
        except CudaError:
            return None
        if int(kind) != int(self._api.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            return None
        return int(
            self._call(
                "cuPointerGetAttribute",
                attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                address,
            )
        )

    def exports_dmabuf(self, gpu: int) -> bool:
        """Say whether GPU, driver and kernel give out dma-bufs."""
        name = "CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED"
        return bool(self._attribute(gpu, name))

    def compute_capability(self, gpu: int) -> tuple[int, int]:
        """Return major and minor, such as (8, 0) for an A100."""
        name = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_"
        major = self._attribute(gpu, name + "MAJOR")
        return major, self._attribute(gpu, name + "MINOR")

    def _attribute(self, gpu: int, name: str) -> int:
        attribute = getattr(self._api.CUdevice_attribute, name)
        device = self._call("cuDeviceGet", gpu)
        return int(self._call("cuDeviceGetAttribute", attribute, device))

    @contextlib.contextmanager
    def dmabuf(self, gpu: int, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Give a descriptor of the dma-buf behind a range, and the range's offset.

        The driver wants whole pages, so it begins up to a page before ``address``.
        The descriptor is closed with the context; a registration made of it lasts.

        Raises:
          CudaError: The driver gives none out for this range.
        """
        page = mmap.PAGESIZE
        start = address // page * page
        end = -(-(address + length) // page) * page
        kind = self._api.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        with self._current(gpu):
            fd = int(
                self._call("cuMemGetHandleForAddressRange", start, end - start, kind, 0)
            )
        try:
            yield fd, address - start
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _current(self, gpu: int) -> Iterator[None]:
        """Make the GPU's primary context this thread's; afterwards what was before."""
        device = self._call("cuDeviceGet", gpu)
        context = self._call("cuDevicePrimaryCtxRetain", device)
        try:
            self._call("cuCtxPushCurrent", context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent")
        finally:
            self._call("cuDevicePrimaryCtxRelease", device)

    def describe(self) -> list[str]:
        """Say in lines what there is: driver, and GPU by GPU how NICs reach it."""
        version = int(self._call("cuDriverGetVersion"))
        lines = [f"CUDA driver {version // 1000}.{version % 1000 // 10}"]
        for gpu in range(int(self._call("cuDeviceGetCount"))):
            major, minor = self.compute_capability(gpu)
            way = "dma-buf" if self.exports_dmabuf(gpu) else "no dma-buf"
            lines.append(f"GPU {gpu}: compute capability {major}.{minor}, {way}")
        return lines


def load() -> Cuda:
    """Load the driver API.

    Raises:
      DeviceUnavailableError: The package or the driver is missing; says which.
    """
    try:
        api = importlib.import_module(_API)
    except ImportError as error:
        raise DeviceUnavailableError(
            f"the package cuda-bindings is not there ({error})",
            hint="Install kvxfer with the extra cuda.",
        ) from error
    try:
        return Cuda(api)
    except CudaError:
        raise
    except Exception as error:
        why = f"the CUDA driver is not there: {error}"
        raise DeviceUnavailableError(why) from error


def driver_is_mapped() -> bool:
    """Say whether something in this process has loaded the CUDA driver already."""
    try:
        return "/libcuda.so" in Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return False


def describe() -> list[str]:
    """Say in lines what CUDA has here, or why it has nothing."""
    try:
        return load().describe()
    except DeviceUnavailableError as error:
        return [str(error)]
