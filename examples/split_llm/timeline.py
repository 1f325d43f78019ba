"""What happened when, layer by layer, and its drawing.

All times are of ``time.monotonic()``, which the processes of one host share.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Drawn beside the last arrival in the close-up, as a part of its width.
MARGIN = 0.15


@dataclass(frozen=True)
class Timeline:
    """One prompt through both processes.

    Attributes:
      computed: Layer, begin and end, one for each chunk of the prompt.
      handed_over: When the library was told that each layer is ready.
      acknowledged: When the device had taken all of each layer.
      arrived: When the decode side knew that each layer is in place.
      first_step: When the decode side began its first step; 0 if it made none.
    """

    computed: Sequence[tuple[int, float, float]]
    handed_over: Sequence[float]
    acknowledged: Sequence[float]
    arrived: Sequence[float]
    first_step: float

    @property
    def n_layers(self) -> int:
        return len(self.arrived)

    def ended(self, layer: int) -> float:
        """When the last chunk of a layer was computed."""
        return max(end for index, _, end in self.computed if index == layer)

    @property
    def last_computed(self) -> float:
        """When the last layer was computed."""
        return self.ended(self.n_layers - 1)

    @property
    def n_hidden(self) -> int:
        """Layers that were in place before the last layer was computed."""
        return sum(arrived <= self.last_computed for arrived in self.arrived)

    @property
    def exposed(self) -> float:
        """Seconds from the end of the last layer until all layers were in place."""
        return max(self.arrived) - self.last_computed

    @property
    def until_first_step(self) -> float:
        """Seconds from the end of the last layer until the decode side went on."""
        return self.first_step - self.last_computed


def draw(timelines: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Draw some prompts to a PNG, each whole and from its last layers on.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      OSError: ``path`` cannot be written.
    """
    figures: Any = importlib.import_module("matplotlib.figure")
    figure = figures.Figure(
        figsize=(5.5 * len(timelines), 6.5), dpi=80, layout="constrained"
    )
    rows = figure.subplots(
        2, len(timelines), squeeze=False, gridspec_kw={"height_ratios": [2, 1]}
    )
    origin = min(begin for _, line in timelines for _, begin, _ in line.computed)
    width = max(line.until_first_step for _, line in timelines)
    for column, (title, line) in enumerate(timelines):
        whole, close = rows[0][column], rows[1][column]
        # Alone, a prompt begins at 0; several at once share their clock.
        zero = origin if len(timelines) > 2 else min(b for _, b, _ in line.computed)
        _draw_layers(whole, line, zero)
        whole.set_title(title, fontsize="medium", wrap=True)
        whole.set_xlabel("ms")
        _draw_layers(close, line, line.last_computed)
        close.set_xlim(-1e3 * width, 1e3 * width * (1 + MARGIN))
        close.set_ylim(line.n_layers - 0.4, line.n_layers - 7.6)
        close.axvline(0, color="0.6", linewidth=0.8)
        close.set_xlabel("ms from the end of the last layer")
    rows[0][0].set_ylabel("layer")
    rows[1][0].set_ylabel("layer")
    rows[0][0].legend(loc="lower left", fontsize="small")
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_layers(axes: Any, line: Timeline, zero: float) -> None:
    """Draw one bar a layer and chunk, and behind them how its bytes travelled."""

    def ms(seconds: float) -> float:
        return 1e3 * (seconds - zero)

    layers = [layer for layer, _, _ in line.computed]
    axes.barh(
        layers,
        [1e3 * (end - begin) for _, begin, end in line.computed],
        left=[ms(begin) for _, begin, _ in line.computed],
        color="#8ab6d6",
        label="computed",
    )
    ends = [line.ended(layer) for layer in range(line.n_layers)]
    axes.barh(
        range(line.n_layers),
        [1e3 * (sent - end) for sent, end in zip(line.acknowledged, ends, strict=True)],
        left=[ms(end) for end in ends],
        height=0.5,
        color="#d9822b",
        label="ready, then sent",
    )
    axes.plot(
        [ms(arrived) for arrived in line.arrived],
        range(line.n_layers),
        linestyle="none",
        marker="|",
        markersize=7,
        color="#1b4332",
        label="in place",
    )
    if line.first_step:
        axes.axvline(
            ms(line.first_step), color="#b5179e", linewidth=1.2, label="first step"
        )
    axes.set_ylim(line.n_layers - 0.4, -0.6)
