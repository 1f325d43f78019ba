"""Bandwidth and latency by block size, drawn; and a page that needs nothing else."""

from __future__ import annotations

import base64
import html
import importlib
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvxfer.bench.contenders import Contender
from kvxfer.bench.labels import (
    COPIES,
    NOTHING,
    SOFTWARE,
    all_null,
    any_software,
    kind_of,
)
from kvxfer.bench.report import (
    Report,
    case_of,
    figure,
    names_of,
    summarize,
    title_of,
)
from kvxfer.errors import KVXferError, UsageError
from kvxfer.sizes import format_size

_KINDS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Check that ``path`` can be drawn to, before anything is measured.

    Raises:
      UsageError: It is neither PNG nor SVG.
      KVXferError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _KINDS:
        raise UsageError(f"--plot {str(path)!r}: expected a name in .png or .svg")
    need_matplotlib("--plot")


def need_matplotlib(option: str) -> None:
    """Raise KVXferError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KVXferError(f"{option} needs matplotlib: pip install 'kvxfer[bench]'")


def _figure(report: Report) -> Any:
    rows = summarize(report.outcome.windows)
    latency = f"us for a batch of {_batches(report)} blocks, p50"
    shown = {"gb_per_s": "GB/s (1e9 bytes)", "p50_us": latency}
    if all_null(rows):
        del shown["gb_per_s"]  # nothing has moved
    figures: Any = importlib.import_module("matplotlib.figure")
    drawing = figures.Figure(figsize=(5.5 * len(shown), 4.5), layout="constrained")
    load = report.workload
    by_batch = len(load.sizes) == 1 < len(load.batches)
    across = "batch" if by_batch else "block_bytes"
    places = sorted({row[across] for row in rows})
    names = [f"{x:,}" if by_batch else format_size(x) for x in places]
    all_axes = drawing.subplots(1, len(shown), squeeze=False)[0]
    for axes, (key, name) in zip(all_axes, shown.items(), strict=True):
        for label, own in _lines(report, rows, by_batch).items():
            _draw(axes, own, across, key, label, ends=key == "gb_per_s")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(places, names)
        axes.minorticks_off()
        axes.set_xlabel("blocks of a batch" if by_batch else "block")
        axes.set_ylabel(name)
        axes.grid(True, which="both", alpha=0.3)
    all_axes[0].legend()
    drawing.suptitle(caption(report))
    return drawing


def _batches(report: Report) -> str:
    return ", ".join(f"{batch:,}" for batch in report.workload.batches)


def _lines(
    report: Report, rows: Sequence[Mapping[str, Any]], by_batch: bool
) -> dict[str, list[Mapping[str, Any]]]:
    """Sort rows into lines of the drawing: a contender's, of each batch if several."""
    apart = not by_batch and len(report.workload.batches) > 1
    found: dict[str, list[Mapping[str, Any]]] = {}
    for contender in report.contenders:
        for row in rows:
            if row["contender"] == contender.name:
                label = contender.name
                label += f", {row['batch']:,} a batch" if apart else ""
                found.setdefault(label, []).append(row)
    return found


def _draw(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    across: str,
    key: str,
    name: str,
    ends: bool = False,
) -> None:
    places = [row[across] for row in rows]
    # Who has no such figure has a line all the same: else the colours of the others
    # would not be those of the legend.
    values = [math.nan if row[key] is None else row[key] for row in rows]
    (line,) = axes.plot(places, values, marker="o", label=name)
    if ends:
        low = [row["low_gb_per_s"] for row in rows]
        high = [row["high_gb_per_s"] for row in rows]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15)


def caption(report: Report) -> str:
    """Say in one line what was measured, and what it is not."""
    load = report.workload
    named = [w for w in report.outcome.windows if w.get("device") is not None]
    ways = {f"{w['device']} ({w['wire']})" for w in named}
    kinds = {kind_of(w) for w in named}
    text = f"{_batches(report)} {load.pattern} blocks a batch"
    if ways:
        text += f", {', '.join(sorted(ways))}"
    if COPIES in kinds:
        text += f": {COPIES}, not a NIC"
    if NOTHING in kinds:
        text += f": {NOTHING}"
    return text


def draw(report: Report, path: Path) -> None:
    """Draw to a PNG or an SVG.

    Raises:
      KVXferError: It cannot be written.
    """
    try:
        # No date in it: the same figures make the same file.
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        _figure(report).savefig(path, metadata=metadata)
    except OSError as error:
        raise KVXferError(f"cannot write {path}: {error.strerror}") from error


# -- the page -------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }
img { max-width: 100%; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
"""
_AMOUNTS = {
    "gb_per_s": "GB/s",
    "low_gb_per_s": "low",
    "high_gb_per_s": "high",
    "blocks_per_s": "blocks/s",
}
_TIMES = {"p50_us": "p50 us", "p99_us": "p99 us"}
_COSTS = {"cpu_initiator_s_per_gb": "CPU s/GB, from", "cpu_target_s_per_gb": "to"}
_COUNTS = {
    "wrs_per_block": "WRs/block",
    "verified_blocks": "verified blocks",
    "wrong_blocks": "wrong",
}
_RATIO = {"rate_ratio": ""}
_RATIOS_BY_TIME = {"p50_ratio": "", "p50_difference_us": "us more"}
_ENDS = ("median", "low", "high")


def _table(caption_: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "\n".join(row(line, "td") for line in lines)
    return (
        f"<table><caption>{html.escape(caption_)}</caption>\n{row(header, 'th')}\n"
        f"{body}\n</table>"
    )


def _cases(contender: Contender, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of one contender; of what moved nothing it has no bandwidth."""
    null = all_null(rows)
    columns = _TIMES | _COUNTS if null else _AMOUNTS | _TIMES | _COSTS | _COUNTS
    lines = []
    for row in rows:
        each = [figure(1e9 / row["blocks_per_s"])] if null else []
        cells = [figure(row[key]) for key in columns]
        lines.append([*names_of(case_of(row)), *each, *cells])
    header = ["block", "batch", *(["ns/block"] if null else []), *columns.values()]
    return _table(title_of(contender, rows), header, lines)


def _comparisons(report: Report, rows: Sequence[Mapping[str, Any]]) -> str:
    by_time = report.by_time
    keys = _RATIOS_BY_TIME if by_time else _RATIO
    lines = []
    for row in rows:
        found = [row[key] or dict.fromkeys(_ENDS) for key in keys]
        cells = [figure(each[end]) for each in found for end in _ENDS]
        case = names_of(case_of(row))
        lines.append([row["against"], *case, *cells, str(row["pairs"])])
    what = "p50 of a batch" if by_time else "GB/s"
    title = f"{what}: {report.ours} over the others, pairs of the same round"
    ends = [f"{what} {end}".strip() for what in keys.values() for end in _ENDS]
    return _table(title, ["against", "block", "batch", *ends, "pairs"], lines)


def _tables(report: Report, document: Mapping[str, Any]) -> list[str]:
    found = []
    for contender in report.contenders:
        rows = [r for r in document["summary"] if r["contender"] == contender.name]
        if rows:
            found.append(_cases(contender, rows))
    if document["comparisons"]:
        found.append(_comparisons(report, document["comparisons"]))
    return found


def write_page(report: Report, path: Path) -> None:
    """Write one HTML file with the drawing, the tables and the method in it.

    Raises:
      KVXferError: It cannot be written.
    """
    image = io.BytesIO()
    _figure(report).savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    document = report.document()
    facts = {**document["machine"], **document["method"], **document["workload"]}
    soft = any_software(report.outcome.windows)
    page = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>kvxfer bench</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>kvxfer bench</h1><p>{html.escape(caption(report))}</p>",
        f"<p><strong>{SOFTWARE}</strong></p>" if soft else "",
        f'<img alt="bandwidth and latency" src="data:image/png;base64,{data}">',
        *_tables(report, document),
        _table("How", ["", ""], [[key, str(value)] for key, value in facts.items()]),
        f"<p><code>{html.escape(' '.join(document['command']))}</code></p>",
        "</body></html>",
    ]
    try:
        path.write_text("\n".join(page) + "\n")
    except OSError as error:
        raise KVXferError(f"cannot write {path}: {error.strerror}") from error
