"""Draw a sweep: the time of transfer, and of the prefill that may hide it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from kvxfer.kvbench.errors import RunError, WrongUseError
from kvxfer.kvbench.sweep import Point, rate_name, series

__all__ = ["check_target", "draw"]

_AXIS_NAMES = {
    "isl": "prompt, tokens",
    "tp": "tensor parallelism",
    "pp": "pipeline parallelism",
    "page_size": "page, tokens",
    "bandwidth": "bandwidth of a GPU's NIC, Gbit/s",
}


def check_target(path: str) -> None:
    """Check that ``path`` can be drawn to, before anything is measured.

    Raises:
      WrongUseError: It is neither PNG nor SVG.
      RunError: matplotlib is not installed.
    """
    if os.path.splitext(path)[1].lower() not in (".png", ".svg"):
        raise WrongUseError(f"--plot {path!r}: expected a name in .png or .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("--plot needs matplotlib: pip install 'kvxfer[bench]'")


def draw(found: Sequence[Point], title: str, path: str) -> None:
    """Draw the points to ``path``, a line for each bandwidth and for prefill.

    Raises:
      RunError: The file cannot be written.
    """
    figure_module: Any = importlib.import_module("matplotlib.figure")
    figure = figure_module.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    several = len({point.config_file for point in found}) > 1
    axis = found[0].axis

    def label(point: Point) -> str:
        where = f", {os.path.basename(point.config_file)}" if several else ""
        rate = "transfer" if axis == "bandwidth" else rate_name(point.bandwidth)
        return f"{rate}{where}"

    def places(line: Sequence[Point]) -> list[float]:
        scale = 8 / 1e9 if axis == "bandwidth" else 1
        return [point.value * scale for point in line]

    for name, line in series(found, label).items():
        times = [1e3 * point.transfer_seconds for point in line]
        axes.plot(places(line), times, marker="o", label=name)
    for name, line in series(found, lambda point: point.config_file).items():
        known = {point.value: point for point in line if point.prefill_seconds}
        if known:
            where = f", {os.path.basename(name)}" if several else ""
            chosen = list(known.values())
            times = [1e3 * (point.prefill_seconds or 0) for point in chosen]
            axes.plot(places(chosen), times, "k--", label=f"prefill{where}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(set(places(found)))
    axes.set_xticks(ticks, [f"{place:g}" for place in ticks])
    axes.set_xlabel(_AXIS_NAMES[axis])
    axes.set_ylabel("time of one prompt, ms")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
