"""A plan: the parameters of one nixlbench run, and what led to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.errors import WrongUseError
from kvxfer.kvbench.models import Model
from kvxfer.kvbench.options import COMPUTED, OPTIONS
from kvxfer.kvbench.sizing import Sizes

__all__ = ["DEFAULTS", "NETWORK", "STORAGE", "Plan", "default_source", "make_plan"]

DEFAULTS: dict[str, Any] = {option.name: option.default for option in OPTIONS}
NETWORK = ("UCX", "UCX_MO", "GPUNETIO", "Mooncake")
STORAGE = ("GDS", "GDS_MT", "POSIX", "HF3FS", "OBJ")
_MEMORY = {"memory": "DRAM", "gpu": "VRAM"}


@dataclass(slots=True)
class Plan:
    """One nixlbench command.

    ``params`` has every option, defaults included, in the order of printing.
    ``given`` names those that go into the command although they are defaults.
    """

    model: Model
    config: ModelConfig
    sizing: str
    part: str  # which kind of layer, where a plan has several; else ""
    params: dict[str, Any]
    given: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    @property
    def command(self) -> dict[str, Any]:
        """The options that the printed command needs: all but the defaults."""
        return {
            name: value
            for name, value in self.params.items()
            if value != DEFAULTS[name] or name in self.given
        }

    def changed(self, **params: Any) -> Plan:
        """Return the plan with some parameters replaced, and those printed."""
        return replace(
            self,
            params={**self.params, **params},
            given=self.given | params.keys(),
        )


def default_source(backend: str) -> str:
    """Where the data comes from if nobody says: memory for networks, else a file."""
    return "memory" if backend in NETWORK else "file"


def make_plan(
    model: Model,
    config: ModelConfig,
    sizes: Sizes,
    options: Mapping[str, Any],
    *,
    sizing: str = "reference",
    part: str = "",
) -> Plan:
    """Put the sizes and the command line's options together.

    ``options`` holds what was given, by name, with ``source`` and
    ``destination`` among it; what is missing or None takes its default.

    Raises:
      WrongUseError: Source or destination do not go with the backend.
    """
    params = dict(DEFAULTS)
    notes = []
    for name in DEFAULTS:
        value = options.get(name)
        if value is None:
            continue
        if name in COMPUTED:
            notes.append(f"--{name} {value} is not used: the plan computes it")
            continue
        params[name] = value
    backend = params["backend"]
    source = options.get("source")
    if source is None:
        source = default_source(backend)
    destination = options.get("destination") or "memory"
    sides = _sides(backend, source, destination)
    for name, value in sides.items():
        asked = options.get(name)
        if asked is not None and asked != value:
            notes.append(f"--{name} {asked} is not used: {_because(name, backend)}")
        params[name] = value
    params["start_block_size"] = params["max_block_size"] = sizes.io_bytes
    params["start_batch_size"] = params["max_batch_size"] = sizes.batch
    given = {"total_buffer_size"} if options.get("total_buffer_size") else set()
    return Plan(model, config, sizing, part, params, frozenset(given), notes)


def _because(name: str, backend: str) -> str:
    side = "source" if name != "target_seg_type" else "source and destination"
    return f"with {backend}, {side} decide{'s' if side == 'source' else ''} it"


def _sides(backend: str, source: str, destination: str) -> dict[str, str]:
    """Return what source and destination mean for operation and segments."""
    if backend in NETWORK:
        _check("source", source, backend, _MEMORY)
        _check("destination", destination, backend, _MEMORY)
        return {
            "initiator_seg_type": _MEMORY[source],
            "target_seg_type": _MEMORY[destination],
        }
    if backend in ("GDS", "GDS_MT"):
        _check("source", source, backend, ("file", "gpu"))
        op_type = "READ" if source == "file" else "WRITE"
        return {"op_type": op_type, "target_seg_type": "VRAM"}
    if backend in ("POSIX", "HF3FS"):
        _check("source", source, backend, ("file", "memory"))
        if source == "file":
            return {"op_type": "READ", "target_seg_type": "DRAM"}
        return {"op_type": "WRITE", "initiator_seg_type": "DRAM"}
    if (source in _MEMORY) == (destination in _MEMORY):
        raise WrongUseError(
            f"backend OBJ: exactly one of --source ({source}) and --destination "
            f"({destination}) has to be memory or gpu, the other is the object store"
        )
    if source in _MEMORY:
        return {"op_type": "WRITE", "initiator_seg_type": _MEMORY[source]}
    return {"op_type": "READ", "initiator_seg_type": _MEMORY[destination]}


def _check(side: str, value: str, backend: str, allowed: Any) -> None:
    if value not in allowed:
        raise WrongUseError(
            f"--{side} {value!r} does not go with backend {backend} "
            f"(one of {', '.join(allowed)})"
        )
