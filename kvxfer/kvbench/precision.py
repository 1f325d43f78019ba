"""KV precisions: how many bytes a vector of elements takes, scales and all."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from kvxfer.kvbench.errors import PlanError, suggestion
from kvxfer.kvbench.yamlio import load_data

__all__ = ["NATIVE", "Precision", "precision", "precision_names"]

# What the reference takes, in its spelling.
NATIVE = ("fp8", "int8", "fp16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Precision:
    """How elements are stored.

    ``group`` elements share ``scale_bits``; 0 means one head's vector shares
    them, None that the scales are too few to count.
    """

    name: str
    bits: int
    scale_bits: int = 0
    group: int | None = None
    rope: str | None = None  # precision of MLA's rotary part, if another

    @property
    def element_bytes(self) -> int | float:
        """Bytes of one element without its scales, whole where it is whole."""
        return self.bits // 8 if self.bits % 8 == 0 else self.bits / 8

    def vector_bytes(self, dim: int) -> int:
        """Bytes of ``dim`` consecutive elements with their scales, rounded up."""
        bits = dim * self.bits
        if self.scale_bits and dim:
            groups = 1 if not self.group else -(-dim // self.group)
            bits += groups * self.scale_bits
        return -(-bits // 8)


@functools.cache
def _table() -> dict[str, Precision]:
    table: dict[str, Precision] = {}
    data: dict[str, dict[str, Any]] = load_data("precisions")
    for name, entry in data.items():
        group = entry.get("group")
        one = Precision(
            name,
            entry["bits"],
            entry.get("scale_bits", 0),
            0 if group == "head" else group,
            entry.get("rope"),
        )
        for spelling in (name, *entry.get("aliases", ())):
            table[spelling] = one
    return table


def precision_names() -> list[str]:
    """Every spelling that :func:`precision` knows."""
    return sorted(_table())


def precision(name: object) -> Precision:
    """Return the precision of that name, whatever its case.

    Raises:
      PlanError: There is none; the message lists those there are.
    """
    found = _table().get(str(name).strip().lower())
    if found is None:
        names = precision_names()
        raise PlanError(
            f"unsupported precision {name!r}{suggestion(str(name), names)} "
            f"(one of {', '.join(names)})"
        )
    return found
