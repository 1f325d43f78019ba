"""The constructor's arguments, in all the orders and names that they have had.

Three generations of callers exist. The first passed seven by position; the second
nine, the last two being the tensor-parallel size and index; the third twelve, where
the same places hold the pointers of the scales. An integer in the eighth place tells
the second from the third. The documentation of the original has names of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Arguments", "bind"]

_NAMES = (
    "splitwise_role",
    "gpu_idx",
    "port",
    "key_cache_ptrs",
    "value_cache_ptrs",
    "block_number",
    "block_bytes",
    "key_scale_ptrs",
    "value_scale_ptrs",
    "scale_block_bytes",
    "prefill_tp_size",
    "prefill_tp_idx",
)
_N_REQUIRED = 7
_SECOND_GENERATION = (*_NAMES[:_N_REQUIRED], "prefill_tp_size", "prefill_tp_idx")
_DOCUMENTED = {
    "role": "splitwise_role",
    "local_key_cache": "key_cache_ptrs",
    "local_value_cache": "value_cache_ptrs",
}
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Arguments:
    """What a communicator is made of, checked.

    Raises:
      RuntimeError: What the original refuses, and a scale of values without a size.
    """

    role: str
    gpu_idx: int
    port: str
    planes: Mapping[str, list[int]]
    """Plane name to the address of block 0 in each layer."""
    block_number: int
    block_bytes: int
    scale_block_bytes: int
    prefill_tp_size: int
    prefill_tp_idx: int

    def __post_init__(self) -> None:
        n_layers = len(self.planes["k"])
        if not n_layers:
            raise RuntimeError("key_cache_ptrs is empty: there are no layers")
        for plane, pointers in self.planes.items():
            if len(pointers) != n_layers:
                raise RuntimeError(
                    f"{_ARGUMENT_OF[plane]} has {len(pointers)} layers, "
                    f"key_cache_ptrs has {n_layers}"
                )
            if not all(pointers):
                raise RuntimeError(
                    f"{_ARGUMENT_OF[plane]}[{pointers.index(0)}] is a null pointer"
                )
        for name in ("block_number", "block_bytes"):
            if getattr(self, name) <= 0:
                raise RuntimeError(f"{name} is {getattr(self, name)}, not positive")
        if self.scale_planes and self.scale_block_bytes <= 0:
            raise RuntimeError(
                f"there are scales, and scale_block_bytes is {self.scale_block_bytes}"
            )

    @property
    def scale_planes(self) -> list[str]:
        """The planes that hold scales."""
        return [plane for plane in self.planes if plane.endswith("_scale")]

    @property
    def is_key_only(self) -> bool:
        """Whether there are no values, as with a latent that all ranks hold."""
        return "v" not in self.planes

    @property
    def sizes(self) -> dict[str, int]:
        """Plane name to the bytes of its blocks."""
        return {
            plane: self.scale_block_bytes
            if plane in self.scale_planes
            else self.block_bytes
            for plane in self.planes
        }


_ARGUMENT_OF = {
    "k": "key_cache_ptrs",
    "v": "value_cache_ptrs",
    "k_scale": "key_scale_ptrs",
    "v_scale": "value_scale_ptrs",
}


def bind(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Take the arguments of any generation.

    Raises:
      TypeError: A wrong number, an unknown name, or a value of another type.
      RuntimeError: See :class:`Arguments`.
    """
    given = _by_name(args, kwargs)
    planes = {
        plane: _pointers(name, given.get(name, ()))
        for plane, name in _ARGUMENT_OF.items()
    }
    role = given["splitwise_role"]
    if not isinstance(role, str):
        raise TypeError(f"splitwise_role is {role!r}, not a str")
    return Arguments(
        role=role,
        gpu_idx=_integer("gpu_idx", given["gpu_idx"]),
        port=str(given["port"]),
        # Keys always; the others where they are.
        planes={plane: ptrs for plane, ptrs in planes.items() if ptrs or plane == "k"},
        block_number=_integer("block_number", given["block_number"]),
        block_bytes=_integer("block_bytes", given["block_bytes"]),
        scale_block_bytes=_integer(
            "scale_block_bytes", given.get("scale_block_bytes", 0)
        ),
        prefill_tp_size=_integer("prefill_tp_size", given.get("prefill_tp_size", 1)),
        prefill_tp_idx=_integer("prefill_tp_idx", given.get("prefill_tp_idx", 0)),
    )


def _by_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names: tuple[str, ...] = _NAMES
    if len(args) > _N_REQUIRED and hasattr(args[_N_REQUIRED], "__index__"):
        names = _SECOND_GENERATION
    if len(args) > len(names):
        raise TypeError(f"{len(args)} arguments are more than {len(names)}")
    given = dict(zip(names, args, strict=False))
    for spelled, value in kwargs.items():
        name = _DOCUMENTED.get(spelled, spelled)
        if name not in _NAMES:
            raise TypeError(f"unexpected argument {spelled!r}")
        if name in given:
            raise TypeError(f"argument {spelled!r} is given twice")
        given[name] = value
    missing = [name for name in _NAMES[:_N_REQUIRED] if name not in given]
    if missing:
        raise TypeError(f"missing arguments: {', '.join(missing)}")
    return given


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, not an integer") from None


def _pointers(name: str, values: Iterable[Any] | None) -> list[int]:
    """Take a list or array of addresses, signed 64-bit ones among them."""
    if values is None:
        return []
    try:
        return [operator.index(value) & _WORD for value in values]
    except TypeError:
        raise TypeError(f"{name} must be a list of integers") from None
