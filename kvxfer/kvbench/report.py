"""What a cache weighs: the figures of ``kvcache``, in each of its formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.exact import ExactSizes
from kvxfer.kvbench.models import Model
from kvxfer.kvbench.sizing import Sizes, human_bytes, kv_bytes

__all__ = ["CacheRow", "exact_rows", "lines", "reference_row", "rows_csv", "rows_json"]
__all__ += ["rows_table"]


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One row: one config, and in exact sizing one kind of layer. Sizes in bytes.

    In reference sizing ``per_gpu_bytes`` is the total over tp x pp, as if the
    ranks shared it evenly; in exact sizing it is the largest rank's.
    """

    model: str
    config_file: str
    sizing: str
    layer_kind: str
    isl: int | float
    num_requests: int | float
    batch_size: int
    io_bytes: int
    tp: int | float
    pp: int | float
    page_size: int | float
    access_pattern: str
    per_token_bytes: int | float
    per_page_bytes: int | float
    per_request_bytes: int | float
    per_gpu_bytes: int | float
    total_bytes: int | float


def reference_row(model: Model, config: ModelConfig, sizes: Sizes) -> CacheRow:
    """Return the row of the reference sizing."""
    per_token = kv_bytes(model, config, 1)
    per_request = kv_bytes(model, config, int(config.isl))
    total = per_request * config.num_requests
    return CacheRow(
        **_shared(model, config),
        sizing="reference",
        layer_kind="",
        batch_size=sizes.batch,
        io_bytes=sizes.io_bytes,
        per_token_bytes=per_token,
        per_page_bytes=per_token * config.page_size,
        per_request_bytes=per_request,
        per_gpu_bytes=_whole(total / (config.tp_size * config.pp_size)),
        total_bytes=_whole(total),
    )


def exact_rows(model: Model, config: ModelConfig, exact: ExactSizes) -> list[CacheRow]:
    """Return a row for each part of the exact sizing."""
    return [
        CacheRow(
            **_shared(model, config),
            sizing="exact",
            layer_kind=part.name,
            batch_size=part.sizes.batch,
            io_bytes=part.sizes.io_bytes,
            per_token_bytes=exact.per_token,
            per_page_bytes=exact.per_page,
            per_request_bytes=exact.per_request,
            per_gpu_bytes=exact.per_gpu,
            total_bytes=exact.total,
        )
        for part in exact.parts
    ]


def lines(rows: Sequence[CacheRow]) -> str:
    """Return the four lines of the first release, a blank line between two rows."""
    plain = all(row.sizing == "reference" for row in rows)
    several_files = len({row.config_file for row in rows}) > 1
    texts = []
    for row in rows:
        pairs: list[tuple[str, object]] = []
        if several_files:
            pairs.append(("Model Config", row.config_file))
        pairs += [
            ("Model", row.model),
            ("Input Sequence Length", row.isl),
            ("Batch Size", row.batch_size),
            ("IO Size", human_bytes(row.io_bytes)),
        ]
        if not plain:
            pairs.append(("Sizing", " ".join((row.sizing, row.layer_kind)).strip()))
        texts.append("".join(f"{name:<23s}: {value}\n" for name, value in pairs))
    return "\n".join(texts)


def rows_table(rows: Sequence[CacheRow]) -> str:
    """Return a table; its first nine columns are the reference's."""
    table: list[dict[str, object]] = []
    for row in rows:
        cells: dict[str, object] = {
            "Model": row.model,
            "ISL": row.isl,
            "Num Requests": row.num_requests,
            "Batch Size": row.batch_size,
            "IO Size": human_bytes(row.io_bytes),
            "TP": row.tp,
            "PP": row.pp,
            "Page Size": row.page_size,
            "Access": row.access_pattern,
            "Per Token": human_bytes(row.per_token_bytes),
            "Per Page": human_bytes(row.per_page_bytes),
            "Per Request": human_bytes(row.per_request_bytes),
            "Per GPU": human_bytes(row.per_gpu_bytes),
            "Total": human_bytes(row.total_bytes),
            "Sizing": row.sizing,
        }
        if any(row.layer_kind for row in rows):
            cells["Layers"] = row.layer_kind
        table.append(cells)
    return simple_table(table)


def simple_table(rows: Sequence[dict[str, object]]) -> str:
    """Lay out rows of the same keys: text to the left, numbers to the right."""
    names = list(rows[0])
    columns = []
    for name in names:
        cells = [str(row[name]) for row in rows]
        width = max(len(name), *map(len, cells))
        numbers = all(isinstance(row[name], (int, float)) for row in rows)
        align = str.rjust if numbers else str.ljust
        columns.append(
            [align(name, width), "-" * width, *(align(cell, width) for cell in cells)]
        )
    return "".join(
        "  ".join(cells).rstrip() + "\n" for cells in zip(*columns, strict=True)
    )


def rows_json(rows: Sequence[CacheRow]) -> str:
    """Return one JSON array, an object a row, sizes in bytes."""
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def rows_csv(rows: Sequence[CacheRow]) -> str:
    """Return a header and a line a row, sizes in bytes."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def _shared(model: Model, config: ModelConfig) -> dict[str, Any]:
    return {
        "model": model.name,
        "config_file": config.path,
        "isl": config.isl,
        "num_requests": config.num_requests,
        "tp": config.tp_size,
        "pp": config.pp_size,
        "page_size": config.page_size,
        "access_pattern": config.access_pattern or "",
    }


def _whole(value: int | float) -> int | float:
    return int(value) if value == int(value) else value
