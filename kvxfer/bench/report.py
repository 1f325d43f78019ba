"""What came out: medians over rounds, ratios within a round, tables, JSON and CSV.

GB is 1e9 bytes. A ratio is taken between two figures of the same round and is given
as the median of all rounds with an interval.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvxfer._version import __version__
from kvxfer.bench.contenders import Contender
from kvxfer.bench.labels import SOFTWARE, all_null, any_software, labelled, way_of
from kvxfer.bench.runner import Event, Outcome, Settings
from kvxfer.bench.workload import Case, Workload
from kvxfer.errors import KVXferError
from kvxfer.sizes import format_size

SCHEMA = 2
"""Version of the JSON."""

_CONFIDENCE = 0.95
_MEDIANS = (
    *("gb_per_s", "blocks_per_s", "p50_us", "p99_us"),
    *("cpu_initiator_s_per_gb", "cpu_target_s_per_gb", "wrs_per_block"),
)


@dataclass(frozen=True)
class Interval:
    """A median over pairs, and how far off it may be.

    Attributes:
      median: Of the values.
      low: Lower end; with at least 6 values the median of many more runs would lie
        between the ends in 95 of 100 cases, with fewer the ends are the extremes.
      high: Upper end.
    """

    median: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the median with its interval, from the order of the values alone."""
    ordered = sorted(values)
    n = len(ordered)
    cut = 0
    # The median lies outside the values from the (cut+1)th to the (cut+1)th last
    # when at most `cut` of n coins show heads, or at most `cut` tails.
    while cut + 1 < n / 2:
        outside = 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n
        if outside > 1 - _CONFIDENCE:
            break
        cut += 1
    cut = max(0, cut - 1) if cut else 0
    return Interval(statistics.median(ordered), ordered[cut], ordered[n - 1 - cut])


def case_of(row: Mapping[str, Any]) -> Case:
    """Return what a window, or a row made of windows, is of."""
    return Case(row["block_bytes"], row["batch"])


def _median(windows: Iterable[Event], key: str) -> float | None:
    values = [w[key] for w in windows if w.get(key) is not None]
    return statistics.median(values) if values else None


def summarize(windows: Sequence[Event]) -> list[dict[str, Any]]:
    """Return one row a contender and case: medians over the rounds."""
    groups: dict[tuple[str, Case], list[Event]] = {}
    for window in windows:
        groups.setdefault((window["contender"], case_of(window)), []).append(window)
    rows = []
    for (name, case), group in groups.items():
        row: dict[str, Any] = {"contender": name, **dataclasses.asdict(case)}
        row |= {key: _median(group, key) for key in _MEDIANS}
        row["rounds"] = len(group)
        row["low_gb_per_s"] = min(w["gb_per_s"] for w in group)
        row["high_gb_per_s"] = max(w["gb_per_s"] for w in group)
        for what in ("verified_blocks", "wrong_blocks", "unseen_blocks"):
            counts = [w[what] for w in group if w.get(what) is not None]
            row[what] = sum(counts) if counts else None
        row["disturbed"] = sum(bool(w.get("disturbed")) for w in group)
        row["device"] = group[-1].get("device")
        row["wire"] = group[-1].get("wire")
        row["page_bytes"] = group[-1].get("page_bytes")
        rows.append(row)
    return sorted(rows, key=case_of)


def compare(windows: Sequence[Event], ours: str) -> list[dict[str, Any]]:
    """Compare ``ours`` with each other contender, by pairs of the same round.

    Returns:
      For each of them and each case three intervals: ``rate_ratio`` of throughput,
      ``p50_ratio`` and ``p50_difference_us`` of the time of a batch; the last two are
      None where one of the two has no such time.
    """
    places = {(w["contender"], case_of(w), w["round"]): w for w in windows}
    found: dict[tuple[str, Case], list[tuple[Event, Event]]] = {}
    for (name, case, number), other in places.items():
        mine = places.get((ours, case, number))
        if name != ours and mine is not None and other["gb_per_s"] > 0:
            found.setdefault((name, case), []).append((mine, other))
    rows: list[dict[str, Any]] = []
    for (name, case), pairs in found.items():
        row = {"contender": ours, "against": name, **dataclasses.asdict(case)}
        row["pairs"] = len(pairs)
        times = [
            (a["p50_us"], b["p50_us"])
            for a, b in pairs
            if a["p50_us"] is not None and b["p50_us"] is not None
        ]
        values = {
            "rate_ratio": [a["gb_per_s"] / b["gb_per_s"] for a, b in pairs],
            "p50_ratio": [a / b for a, b in times],
            "p50_difference_us": [a - b for a, b in times],
        }
        rows.append(
            row
            | {
                key: dataclasses.asdict(interval(each)) if each else None
                for key, each in values.items()
            }
        )
    return sorted(rows, key=lambda row: (row["against"], case_of(row)))


def machine() -> dict[str, Any]:
    """Describe this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processors": os.cpu_count(),
        "model": model,
        "memory_bytes": memory,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Report:
    """All that is known after a run."""

    contenders: Sequence[Contender]
    workload: Workload
    settings: Settings
    outcome: Outcome
    absent: Mapping[str, str]
    """Contenders that could not be run -> why and what to do."""

    @property
    def ours(self) -> str:
        """The contender that the others are compared with: the first."""
        return self.contenders[0].name

    @property
    def by_time(self) -> bool:
        """Whether the time of a batch is what matters, not how much it moves."""
        return bool(self.settings.extra.get("by_time"))

    @property
    def wrong(self) -> int:
        """Blocks that did not hold what they should."""
        return sum(w.get("wrong_blocks") or 0 for w in self.outcome.windows)

    def document(self) -> dict[str, Any]:
        """Return what ``--json`` writes."""
        windows = labelled(self.outcome.windows)
        workload = self.workload
        return {
            "schema": SCHEMA,
            "kvxfer": __version__,
            "command": ["kvxfer", *sys.argv[1:]],
            "machine": machine(),
            "method": {
                "clock": "monotonic",
                "rounds": self.settings.rounds,
                "window_seconds": self.settings.window,
                "depth": self.settings.depth,
                "threads": self.settings.threads,
                "memory": self.settings.memory,
                "together": self.settings.together,
                "options": self.settings.options,
                "complete": self.outcome.complete,
            },
            "workload": {
                "block_bytes": list(workload.sizes),
                "batch": list(workload.batches),
                "planes": workload.planes,
                "pool_bytes": workload.pool_bytes,
                "pattern": workload.pattern,
                "seed": workload.seed,
            },
            "contenders": [
                {
                    "name": c.name,
                    "what": c.what,
                    "peer": c.is_peer,
                    "unheeded": self.settings.unheeded(c),
                }
                for c in self.contenders
            ],
            "windows": windows,
            "summary": labelled(summarize(windows)),
            "comparisons": compare(windows, self.ours),
            "failures": self.outcome.failures,
            "absent": dict(self.absent),
        }

    def write_json(self, path: Path) -> None:
        """Write everything, one JSON document."""
        write_text(path, json.dumps(self.document(), indent=1) + "\n")

    def write_csv(self, path: Path) -> None:
        """Write one line a window."""
        windows = labelled(self.outcome.windows)
        columns = list(dict.fromkeys(key for w in windows for key in w))
        try:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(windows)
        except OSError as error:
            raise KVXferError(f"cannot write {path}: {error.strerror}") from error

    def print(self, console: Console) -> None:
        """Print the tables, what they are and what they are not."""
        rows = summarize(self.outcome.windows)
        for contender in self.contenders:
            own = [row for row in rows if row["contender"] == contender.name]
            if own:
                console.print(_table(contender, own))
        found = compare(self.outcome.windows, self.ours)
        if found:
            console.print(_comparison(self.ours, found, self.by_time))
        for contender in self.contenders:
            unheeded = self.settings.unheeded(contender)
            if unheeded:
                console.print(f"{contender.name} does without {', '.join(unheeded)}.")
        if any_software(rows):
            console.print(SOFTWARE)
        words = [w["word_ns"] for w in self.outcome.windows if w.get("word_ns")]
        if words:
            console.print(
                "A word between two processors took "
                f"{figure(statistics.median(words))} ns there and back "
                f"({figure(min(words))} to {figure(max(words))})."
            )
        n_disturbed = sum(row["disturbed"] for row in rows)
        if n_disturbed:
            console.print(
                f"{n_disturbed} of {len(self.outcome.windows)} windows were disturbed "
                "by other processes of this machine."
            )


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
      KVXferError: It cannot be written.
    """
    try:
        path.write_text(text)
    except OSError as error:
        raise KVXferError(f"cannot write {path}: {error.strerror}") from error


def figure(value: float | None) -> str:
    """Return three digits that count, or a dash."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _checked(row: Mapping[str, Any]) -> str:
    if row["verified_blocks"] is None:
        return "-"
    if row["wrong_blocks"]:
        return f"{row['wrong_blocks']} WRONG"
    unseen = row["unseen_blocks"]
    return f"{row['verified_blocks']:,}" + (f", {unseen} late" if unseen else "")


def title_of(contender: Contender, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say who was measured and by what: a NIC, or copies of memory."""
    wires = dict.fromkeys(str(row["wire"]) for row in rows)
    way = way_of({**rows[-1], "wire": ", ".join(wires)})
    return f"{contender.name}: {contender.what}" + (f"; {way}" if way else "")


def _table(contender: Contender, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title_of(contender, rows), title_justify="left")
    null = all_null(rows)
    amounts = ("ns/block",) if null else ("GB/s", "low-high", "blocks/s")
    for name in (
        *("block", "batch", *amounts, "p50 us", "p99 us"),
        *("CPU s/GB, from", "to", "WRs/block", "verified blocks"),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        if null:
            amounts = (figure(1e9 / row["blocks_per_s"]),)
        else:
            amounts = (
                figure(row["gb_per_s"]),
                f"{figure(row['low_gb_per_s'])}-{figure(row['high_gb_per_s'])}",
                f"{row['blocks_per_s']:,.0f}",
            )
        table.add_row(
            *names_of(case_of(row)),
            *amounts,
            figure(row["p50_us"]),
            figure(row["p99_us"]),
            "-" if null else figure(row["cpu_initiator_s_per_gb"]),
            "-" if null else figure(row["cpu_target_s_per_gb"]),
            figure(row["wrs_per_block"]),
            _checked(row),
        )
    return table


def names_of(case: Case) -> tuple[str, str]:
    """Return how the bytes of a block and the blocks of a batch are shown."""
    return format_size(case.block_bytes), f"{case.batch:,}"


def _with_ends(of: Mapping[str, float] | None) -> str:
    if of is None:
        return "-"
    return f"{figure(of['median'])} ({figure(of['low'])} to {figure(of['high'])})"


def _comparison(ours: str, rows: list[dict[str, Any]], by_time: bool) -> Table:
    names = list(dict.fromkeys(row["against"] for row in rows))
    what = "p50 of a batch" if by_time else "GB/s"
    table = Table(
        title=f"{what}: {ours} over the others, median and interval of "
        f"{min(row['pairs'] for row in rows)} pairs of the same round",
        title_justify="left",
    )
    table.add_column("block", justify="right")
    table.add_column("batch", justify="right")
    for name in names:
        table.add_column(f"/ {name}", justify="right")
        if by_time:
            table.add_column(f"- {name}, us", justify="right")
    keys = ("p50_ratio", "p50_difference_us") if by_time else ("rate_ratio",)
    cells = {
        (case_of(row), row["against"]): [_with_ends(row[key]) for key in keys]
        for row in rows
    }
    for case in sorted({case_of(row) for row in rows}):
        line = [
            cell
            for name in names
            for cell in cells.get((case, name), ["-"] * len(keys))
        ]
        table.add_row(*names_of(case), *line)
    return table
