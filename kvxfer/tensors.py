"""Where a tensor's bytes lie, whatever library made it.

Reads address, shape and strides; never copies and imports no tensor library.
Device memory is described like any other: nothing here touches the bytes.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvxfer.errors import LayoutError
from kvxfer.layout import PlaneLayer, normalize_dtype

__all__ = ["TensorMemory", "inspect_tensor", "is_tensor", "place_blocks"]


@dataclass(frozen=True, slots=True)
class TensorMemory:
    """A strided view of memory that ``owner`` keeps alive.

    Attributes:
      address: Of the first element.
      shape: Elements along each axis.
      strides: Bytes along each axis.
      itemsize: Bytes of an element.
      dtype: Tag of the element type.
      on_host: Whether the CPU can read it.
      allocation: First and last-plus-one address of the allocation it is part
        of, where known.
      owner: Holds the memory.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    on_host: bool
    allocation: tuple[int, int] | None
    owner: object

    def select(self, axis: int, index: int) -> TensorMemory:
        """Fix one axis at an index, like ``t[..., index, ...]``."""
        return replace(
            self,
            address=self.address + index * self.strides[axis],
            shape=self.shape[:axis] + self.shape[axis + 1 :],
            strides=self.strides[:axis] + self.strides[axis + 1 :],
        )


def is_tensor(thing: object) -> bool:
    """Tell a tensor from a sequence of tensors."""
    names = ("data_ptr", "__cuda_array_interface__", "__array_interface__")
    if any(hasattr(thing, name) for name in (*names, "__dlpack__")):
        return True
    try:
        memoryview(thing)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def inspect_tensor(thing: Any) -> TensorMemory:
    """Find out where the bytes of ``thing`` lie.

    Tried in this order: torch's methods, ``__cuda_array_interface__``, numpy
    and ``__array_interface__``, the buffer protocol, DLPack.

    Raises:
      LayoutError: Read-only, no dense strided memory, elements that are Python
        objects, or nothing that describes memory.
    """
    if all(hasattr(thing, name) for name in ("data_ptr", "element_size", "stride")):
        return _from_torch(thing)
    interface = getattr(thing, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_interface(thing, interface, on_host=False)
    if isinstance(thing, np.ndarray):
        return _from_numpy(thing)
    if hasattr(thing, "__array_interface__"):
        return _from_numpy(np.asarray(thing))
    try:
        view = memoryview(thing)
    except (TypeError, BufferError):
        view = None
    if view is not None:
        # The array holds the export, so a bytearray cannot be resized meanwhile.
        return _from_numpy(np.asarray(view))
    if hasattr(thing, "__dlpack__"):
        return _from_dlpack(thing)
    raise LayoutError(
        f"a {type(thing).__name__} describes no memory: pass numpy, torch, a "
        "buffer, or something with DLPack or __array_interface__"
    )


def _from_torch(tensor: Any) -> TensorMemory:
    layout = str(getattr(tensor, "layout", "torch.strided"))
    if layout != "torch.strided":
        raise LayoutError(f"the tensor's layout is {layout}, not dense")
    address = int(tensor.data_ptr())
    if not address:
        raise LayoutError("the tensor has no memory (meta or empty)")
    itemsize = int(tensor.element_size())
    device = str(getattr(getattr(tensor, "device", "cpu"), "type", "cpu"))
    allocation = None
    if hasattr(tensor, "untyped_storage"):
        storage = tensor.untyped_storage()
        start = int(storage.data_ptr())
        allocation = (start, start + int(storage.nbytes()))
    return TensorMemory(
        address=address,
        shape=tuple(int(n) for n in tensor.shape),
        strides=tuple(int(n) * itemsize for n in tensor.stride()),
        itemsize=itemsize,
        dtype=normalize_dtype(str(tensor.dtype)),
        on_host=device == "cpu",
        allocation=allocation,
        owner=tensor,
    )


def _from_interface(
    thing: Any, interface: dict[str, Any], *, on_host: bool
) -> TensorMemory:
    address, readonly = interface["data"]
    if readonly:
        raise LayoutError("the memory is read-only")
    if not address:
        raise LayoutError("the tensor has no memory")
    dtype = np.dtype(interface["typestr"])
    shape = tuple(int(n) for n in interface["shape"])
    strides = interface.get("strides")
    return TensorMemory(
        address=int(address),
        shape=shape,
        strides=tuple(strides) if strides else _c_strides(shape, dtype.itemsize),
        itemsize=dtype.itemsize,
        dtype=normalize_dtype(str(getattr(thing, "dtype", dtype.name))),
        on_host=on_host,
        allocation=None,
        owner=thing,
    )


def _from_numpy(array: np.ndarray[Any, Any]) -> TensorMemory:
    if array.dtype.hasobject:
        raise LayoutError("elements are Python objects, not bytes that can be moved")
    if not array.flags.writeable:
        raise LayoutError(
            "the memory is read-only",
            hint="Pass a writable tensor: peers write into it, and so may you.",
        )
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    start = int(root.__array_interface__["data"][0])
    steps = [(n - 1) * s for n, s in zip(root.shape, root.strides, strict=True) if n]
    low = start + sum(step for step in steps if step < 0)
    high = start + sum(step for step in steps if step > 0) + root.itemsize
    return TensorMemory(
        address=int(array.__array_interface__["data"][0]),
        shape=array.shape,
        strides=array.strides,
        itemsize=array.dtype.itemsize,
        dtype=normalize_dtype(array.dtype.name),
        on_host=True,
        allocation=(low, high),
        owner=array,
    )


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _DLDataType(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLVersioned(ctypes.Structure):
    """DLManagedTensorVersioned up to the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", _DLTensor),
    )


_DL_READ_ONLY = 1
# CPU, pinned host memory of CUDA, of ROCm.
_DL_HOST_DEVICES = frozenset({1, 3, 11})
_DL_CODES = {0: "i", 1: "u", 2: "f", 4: "bf", 5: "c", 6: "bool"}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.restype = ctypes.c_int
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(thing: Any) -> TensorMemory:
    try:
        try:
            capsule = thing.__dlpack__(max_version=(1, 0))
        except TypeError:  # a producer from before versions
            capsule = thing.__dlpack__()
    except (BufferError, RuntimeError, ValueError) as exc:
        raise LayoutError(f"DLPack export refused: {exc}") from exc
    tensor = _read_capsule(capsule)
    ndim, bits = tensor.ndim, tensor.dtype.bits * tensor.dtype.lanes
    if not tensor.data or bits % 8:
        raise LayoutError(f"no memory, or elements of {bits} bits")
    shape = tuple(tensor.shape[axis] for axis in range(ndim))
    itemsize = bits // 8
    strides = _c_strides(shape, itemsize)
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * itemsize for axis in range(ndim))
    code = _DL_CODES.get(tensor.dtype.code, f"dl{tensor.dtype.code}_")
    return TensorMemory(
        address=tensor.data + tensor.byte_offset,
        shape=shape,
        strides=strides,
        itemsize=itemsize,
        dtype=code if code == "bool" else f"{code}{bits}",
        on_host=tensor.device_type in _DL_HOST_DEVICES,
        allocation=None,
        # Not consumed, so the capsule releases the memory when it goes.
        owner=(thing, capsule),
    )


def _read_capsule(capsule: object) -> _DLTensor:
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        address = _capsule_pointer(capsule, b"dltensor_versioned")
        versioned = _DLVersioned.from_address(address)
        if versioned.major != 1:
            raise LayoutError(f"DLPack version {versioned.major} is not known")
        if versioned.flags & _DL_READ_ONLY:
            raise LayoutError("the memory is read-only")
        tensor: _DLTensor = versioned.dl_tensor
        return tensor
    if _capsule_is_valid(capsule, b"dltensor"):
        return _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    raise LayoutError("__dlpack__ returned no DLPack capsule")


def place_blocks(
    memory: TensorMemory, block_axis: int, dtype: str | None = None
) -> PlaneLayer:
    """Say where the blocks of one layer's tensor lie.

    Args:
      memory: The tensor.
      block_axis: The axis that counts blocks; negative counts from the end.
        All other axes together are one block.
      dtype: Tag to use instead of the tensor's own.

    Raises:
      LayoutError: A block is not one contiguous run of bytes, or blocks
        overlap or run backwards; the message has shape, strides and remedy.
    """
    shape, strides = memory.shape, memory.strides
    figures = f"shape {shape}, strides {strides} bytes, block axis {block_axis}"
    if not -len(shape) <= block_axis < len(shape):
        raise LayoutError(f"there is no such axis: {figures}")
    axis = block_axis % len(shape)
    if 0 in shape:
        raise LayoutError(f"the tensor is empty: {figures}")
    inner = [a for a in range(len(shape)) if a != axis and shape[a] > 1]
    expected = memory.itemsize
    for a in reversed(inner):
        if strides[a] != expected:
            raise LayoutError(
                f"a block is not contiguous bytes in the order of its axes: {figures}",
                hint=_remedy(memory, axis, inner),
            )
        expected *= shape[a]
    block_stride = strides[axis] if shape[axis] > 1 else expected
    if block_stride < expected:
        raise LayoutError(
            f"blocks of {expected} bytes every {block_stride} bytes overlap or run "
            f"backwards: {figures}",
            hint="Pass the tensor that owns the memory, not an expanded or "
            "reversed view of it.",
        )
    return PlaneLayer(
        base=memory.address,
        n_blocks=shape[axis],
        block_bytes=expected,
        block_stride=block_stride,
        dtype=dtype or memory.dtype,
    )


def _remedy(memory: TensorMemory, axis: int, inner: list[int]) -> str:
    """Guess what the caller wanted from where contiguity breaks."""
    order = sorted(inner, key=lambda a: -memory.strides[a])
    expected = memory.itemsize
    for position, a in reversed(list(enumerate(order))):
        if memory.strides[a] != expected:
            if position == 0 and len(order) == len(inner) and a < axis:
                return (
                    f"Axis {a} lies outside the blocks: make each of its "
                    f"{memory.shape[a]} parts a plane of its own, such as "
                    '{"k": [t[0], ...], "v": [t[1], ...]}.'
                )
            return "Use a contiguous tensor, or another block_axis."
        expected *= memory.shape[a]
    whole = list(range(len(memory.shape)))
    moved = iter(order)
    permutation = tuple(next(moved) if a in inner else a for a in whole)
    return f"In memory order it would do: pass t.permute{permutation}."
