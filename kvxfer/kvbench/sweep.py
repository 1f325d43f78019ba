"""How long a prompt's cache takes on a NIC, and whether prefill hides it.

Sizes are the exact ones, of one GPU: each has its own NIC. A layer's cache can go
out while later layers are computed, so what remains to wait for is the last
layer's part at least, and what prefill was too short for.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.errors import WrongUseError, suggestion
from kvxfer.kvbench.exact import exact_sizes
from kvxfer.kvbench.models import LayerKind, Model
from kvxfer.kvbench.precision import precision
from kvxfer.kvbench.report import simple_table
from kvxfer.kvbench.sizing import human_bytes
from kvxfer.kvbench.yamlio import load_data

__all__ = [
    "AXES",
    "Axis",
    "Point",
    "bandwidth",
    "parse_axis",
    "points",
    "prefill_seconds",
    "render",
]

_FIELD = {"isl": "isl", "tp": "tp_size", "pp": "pp_size", "page_size": "page_size"}
AXES = (*_FIELD, "bandwidth")
_DEFAULT_BANDWIDTHS = ("100G", "200G", "400G")
_DEFAULT_ISL = (1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
_RATE = re.compile(r"([0-9.]+)\s*([KMGT]?)(i?)([Bb]?)(?:/s|ps|it/s)?", re.IGNORECASE)
_POWER = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Axis:
    """What a sweep varies, and over which values."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One value of the axis at one bandwidth. Seconds, and bytes a second.

    ``wait_seconds`` is what transfer takes longer than prefill; it and
    ``prefill_seconds`` are None where prefill cannot be told.
    """

    config_file: str
    axis: str
    value: float
    bandwidth: float
    bytes: int
    transfer_seconds: float
    prefill_seconds: float | None
    wait_seconds: float | None

    @property
    def hidden(self) -> bool | None:
        """Does all but the last layer's transfer happen behind prefill?"""
        if self.prefill_seconds is None:
            return None
        return self.transfer_seconds <= self.prefill_seconds


def bandwidth(text: str) -> float:
    """Read ``400G`` (bits a second), ``50GB/s`` or ``46GiB/s`` as bytes a second.

    Raises:
      WrongUseError: It is no rate above 0.
    """
    match = _RATE.fullmatch(text.strip())
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise WrongUseError(f"--bandwidth {text!r}: expected 400G, 50GB/s or 46GiB/s")
    base = 1024 if match.group(3) else 1000
    rate: float = number * base ** _POWER[match.group(2).upper()]
    return rate if match.group(4) == "B" else rate / 8


def parse_axis(text: str | None) -> Axis:
    """Read ``isl=1000,10000``; without a text, prompts of 1000 to 128000 tokens.

    Raises:
      WrongUseError: It names no axis, or has no whole positive values.
    """
    if text is None:
        return Axis("isl", _DEFAULT_ISL)
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in AXES:
        raise WrongUseError(
            f"--sweep {name!r}{suggestion(name, AXES)} (one of {', '.join(AXES)})"
        )
    words = [word.strip() for word in values.split(",") if word.strip()]
    if name == "bandwidth":
        read: list[float] = [bandwidth(word) for word in words]
    else:
        read = [int(word) if word.isdigit() else 0 for word in words]
    if not read or min(read) <= 0:
        raise WrongUseError(f"--sweep {text!r}: expected {name}=VALUE,VALUE")
    return Axis(name, tuple(read))


def points(
    model: Model,
    config: ModelConfig,
    axis: Axis,
    bandwidths: Iterable[float],
    *,
    active_params: float | None = None,
    mfu: float = 0.4,
) -> list[Point]:
    """Compute the sweep: every value of the axis at every bandwidth.

    Args:
      model: The model.
      config: Its config; the axis takes the place of one of its values.
      axis: What to vary.
      bandwidths: In bytes a second; none for the usual NICs, not used if the
        axis is bandwidth.
      active_params: Parameters that a token meets, if the model does not say.
      mfu: Share of the GPUs' peak that prefill reaches.

    Raises:
      PlanError: The exact sizing refuses a value.
    """
    rates = list(bandwidths) or [bandwidth(rate) for rate in _DEFAULT_BANDWIDTHS]
    found = []
    for value in axis.values:
        # One request: the question is how long one prompt has to wait.
        at = replace(config, num_requests=1, warnings=[])
        if axis.name in _FIELD:
            setattr(at, _FIELD[axis.name], int(value))
        size = exact_sizes(model, at).per_gpu
        prefill = prefill_seconds(model, at, active_params, mfu)
        layers = max(1, len(model.layers) // int(at.pp_size))
        for rate in [value] if axis.name == "bandwidth" else rates:
            transfer = size / rate
            wait = None
            if prefill is not None:
                during = prefill * (layers - 1) / layers
                wait = max(transfer / layers, transfer - during)
            found.append(
                Point(
                    config_file=config.path,
                    axis=axis.name,
                    value=value,
                    bandwidth=rate,
                    bytes=size,
                    transfer_seconds=transfer,
                    prefill_seconds=prefill,
                    wait_seconds=wait,
                )
            )
    return found


def prefill_seconds(
    model: Model, config: ModelConfig, active_params: float | None, mfu: float
) -> float | None:
    """Estimate the time that each GPU of the config computes for one prompt.

    Two operations a parameter and token, and the attention scores and sums over
    all tokens before. None if the parameters or the GPU are not known.
    """
    params = active_params or model.params
    peak = _peak(config)
    if params is None or peak is None:
        return None
    isl = int(config.isl)
    work = 2.0 * params * isl
    for kind in model.kinds:
        seen = _tokens_seen(kind, isl)
        each = 2.0 * model.query_heads * kind.score_elements * seen
        work += model.layers.count(kind) * each
    gpus = int(config.tp_size) * int(config.pp_size)
    return work / (gpus * peak * 1e12 * mfu)


def _tokens_seen(kind: LayerKind, isl: int) -> float:
    """Sum, over all tokens, of the tokens that each one attends to."""
    if kind.window is None or kind.window >= isl:
        return isl * isl / 2
    return isl * kind.window - kind.window**2 / 2


def _peak(config: ModelConfig) -> float | None:
    table: dict[str, dict[str, float]] = load_data("hardware")
    peaks = table.get(str(config.hardware or "").upper())
    if peaks is None:
        return None
    weights = "fp8" if precision(config.model_quant_mode).bits <= 8 else "bf16"
    return peaks.get(weights, peaks["bf16"])


def render(found: Sequence[Point], form: str) -> str:
    """Return the sweep as ``table`` (or ``lines``), ``json`` or ``csv``."""
    if form == "json":
        rows = [{**asdict(point), "hidden": point.hidden} for point in found]
        return json.dumps(rows, indent=2) + "\n"
    if form == "csv":
        out = io.StringIO()
        names = [*asdict(found[0]), "hidden"]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(one), "hidden": one.hidden} for one in found)
        return out.getvalue()
    several = len({point.config_file for point in found}) > 1
    table = []
    for point in found:
        row: dict[str, object] = {"Config": point.config_file} if several else {}
        if point.axis != "bandwidth":
            row[point.axis] = int(point.value)
        row["Bandwidth"] = rate_name(point.bandwidth)
        row["Per GPU"] = human_bytes(point.bytes)
        row["Transfer"] = _time(point.transfer_seconds)
        row["Prefill"] = _time(point.prefill_seconds)
        row["Wait"] = _time(point.wait_seconds)
        row["Hidden"] = {True: "yes", False: "no", None: "?"}[point.hidden]
        table.append(row)
    return simple_table(table)


def rate_name(rate: float) -> str:
    """Return a rate in bytes a second as ``400 Gbit/s``."""
    return f"{rate * 8 / 1e9:.4g} Gbit/s"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def series(
    found: Sequence[Point], label: Callable[[Point], str]
) -> dict[str, list[Point]]:
    """Group points that belong to one line, in their order."""
    lines: dict[str, list[Point]] = {}
    for point in found:
        lines.setdefault(label(point), []).append(point)
    return lines
