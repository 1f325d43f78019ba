"""Measured rows: one shape for every engine, on the screen and in files."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvxfer.kvbench.errors import RunError
from kvxfer.kvbench.plan import Plan

__all__ = ["Result", "percentile", "result_for", "results_csv", "results_json"]
__all__ += ["results_table", "write_file"]

# Name on the screen, field, width and decimals: nixlbench's own, then ours.
_COLUMNS = (
    ("Block Size (B)", "block_size", 20, 0),
    ("Batch Size", "batch_size", 15, 0),
    ("B/W (GB/Sec)", "bandwidth_gb_s", 15, 6),
    ("Avg Lat. (us)", "avg_latency_us", 15, 1),
    ("Avg Prep (us)", "avg_prep_us", 15, 1),
    ("P99 Prep (us)", "p99_prep_us", 15, 1),
    ("Avg Post (us)", "avg_post_us", 15, 1),
    ("P99 Post (us)", "p99_post_us", 15, 1),
    ("Avg Tx (us)", "avg_tx_us", 15, 1),
    ("P50 Tx (us)", "p50_tx_us", 15, 1),
    ("P90 Tx (us)", "p90_tx_us", 15, 1),
    ("P99 Tx (us)", "p99_tx_us", 15, 1),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One measured pair of block and batch size; None is not measured.

    Times are microseconds, bandwidths 1e9 bytes a second. ``avg_latency_us`` is
    for a block, the ``tx`` times are for a batch, from its first post until all
    of it has arrived.
    """

    model: str
    config_file: str
    engine: str
    backend: str
    op_type: str
    num_threads: int
    block_size: int
    batch_size: int
    bandwidth_gb_s: float
    avg_latency_us: float
    aggregate_gb_s: float | None = None
    network_util_percent: float | None = None
    avg_prep_us: float | None = None
    p99_prep_us: float | None = None
    avg_post_us: float | None = None
    p99_post_us: float | None = None
    avg_tx_us: float | None = None
    p50_tx_us: float | None = None
    p90_tx_us: float | None = None
    p99_tx_us: float | None = None
    iterations: int | None = None
    seconds: float | None = None


def result_for(plan: Plan, engine: str, **measured: Any) -> Result:
    """Return a row for ``plan`` with what was measured."""
    params = plan.params
    shared: dict[str, Any] = {
        "model": plan.model.name,
        "config_file": plan.config.path,
        "engine": engine,
        "backend": params["backend"],
        "op_type": params["op_type"],
        "num_threads": params["num_threads"],
        "block_size": params["max_block_size"],
        "batch_size": params["max_batch_size"],
    }
    return Result(**{**shared, **measured})


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 1)
    return ordered[max(0, int(rank) - 1)]


def results_table(results: Sequence[Result]) -> str:
    """Return the rows under nixlbench's column names, with percentiles added."""
    columns = [
        column
        for column in _COLUMNS
        if any(getattr(row, column[1]) is not None for row in results)
    ]
    lines = ["".join(f"{name:<{width}}" for name, _, width, _ in columns).rstrip()]
    lines.append("-" * max(len(lines[0]), 40))
    for row in results:
        cells = (
            _cell(getattr(row, field), width, decimals)
            for _, field, width, decimals in columns
        )
        lines.append("".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _cell(value: float | None, width: int, decimals: int) -> str:
    text = "-" if value is None else f"{value:.{decimals}f}"
    # A value as wide as its column must not run into the next.
    return f"{text:<{width - 1}} "


def results_json(results: Sequence[Result]) -> str:
    """Return one JSON array, an object a row."""
    return json.dumps([asdict(row) for row in results], indent=2) + "\n"


def results_csv(results: Sequence[Result]) -> str:
    """Return a header and a line a row; what was not measured stays empty."""
    out = io.StringIO()
    names = [field.name for field in fields(Result)]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in results)
    return out.getvalue()


def write_file(path: str, text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all.

    Raises:
      RunError: It cannot be written; what stood there before still does.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".kvbench-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
