"""Measure the figures of docs/performance.md, one command each, and write them there.

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; what is between them is
made from the JSON that the command left in .cache/performance.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvxfer.bench.presets import PRESETS
from kvxfer.bench.report import figure
from kvxfer.sizes import format_size

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / ".cache" / "performance"
SCALE = "scale"
DRAWN = ("shm", "ordinary", "tcp")

Row = dict[str, Any]


def command_of(name: str) -> list[str]:
    """Return the command that measures a figure, as people type it."""
    if name == SCALE:
        return ["kvxfer", "bench", "scale"]
    return ["kvxfer", "bench", "--preset", name]


def measure(name: str, options: argparse.Namespace) -> bool:
    """Run one command; return whether it succeeded."""
    command = [*command_of(name), "--json", str(RESULTS / f"{name}.json")]
    if options.rounds:
        command += ["--rounds", str(options.rounds)]
    if name != SCALE and options.peer_python:
        command += ["--peer-python", options.peer_python]
    if name in DRAWN:
        command += ["--plot", str(PAGE.parent / f"performance-{name}.svg")]
    print("$", *command, flush=True)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command[:1] = [sys.executable, "-m", "kvxfer"]
    return subprocess.run(command, env=environ, check=False).returncode == 0


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a table in Markdown, all but the first column to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def with_ends(of: Row) -> str:
    """Return a median with its interval."""
    return f"{figure(of['median'])} ({figure(of['low'])} to {figure(of['high'])})"


def sweep_tables(document: Row) -> str:
    """Return throughput by block size, and the comparisons beside it."""
    names = [contender["name"] for contender in document["contenders"]]
    rows = {(row["contender"], row["block_bytes"]): row for row in document["summary"]}
    compared = {
        (row["against"], row["block_bytes"]): row for row in document["comparisons"]
    }
    sizes = document["workload"]["block_bytes"]
    ours, others = names[0], names[1:]
    own = [
        *("block", f"{ours} GB/s", "blocks/s", "p50 us", "p99 us"),
        *("CPU s/GB, from + to", "WRs/block"),
    ]
    lines = []
    for size in sizes:
        row = rows[ours, size]
        cpu = (row["cpu_initiator_s_per_gb"], row["cpu_target_s_per_gb"])
        lines.append(
            [
                *(format_size(size), figure(row["gb_per_s"])),
                *(f"{row['blocks_per_s']:,.0f}", figure(row["p50_us"])),
                *(figure(row["p99_us"]), " + ".join(map(figure, cpu))),
                figure(row["wrs_per_block"]),
            ]
        )
    found = [table(own, lines)]
    if others:
        beside = [
            cell for name in others for cell in (f"{name} GB/s", f"{ours} / {name}")
        ]
        lines = [
            [
                format_size(size),
                *(
                    cell
                    for name in others
                    for cell in (
                        figure(rows[name, size]["gb_per_s"])
                        if (name, size) in rows
                        else "-",
                        with_ends(compared[name, size]["rate_ratio"])
                        if (name, size) in compared
                        else "-",
                    )
                ),
            ]
            for size in sizes
        ]
        found.append(table(["block", *beside], lines))
    return "\n\n".join(found)


def time_table(document: Row) -> str:
    """Return the time of a batch, ours beside the other's."""
    rows = {(row["contender"], row["block_bytes"]): row for row in document["summary"]}
    ours = document["contenders"][0]["name"]
    lines = []
    for row in document["comparisons"]:
        size, other = row["block_bytes"], row["against"]
        own = rows[ours, size]
        lines.append(
            [
                *(format_size(size), figure(own["p50_us"])),
                figure(1e9 / own["blocks_per_s"]),
                figure(rows[other, size]["p50_us"]),
                *(with_ends(row["p50_ratio"]), with_ends(row["p50_difference_us"])),
            ]
        )
    other = document["comparisons"][0]["against"]
    header = ["block", f"{ours} p50 us", "ns a block", f"{other} p50 us"]
    return table([*header, f"{ours} / {other}", f"{ours} - {other}, us"], lines)


def scale_table(document: Row) -> str:
    """Return what a small and a large cache cost, of either kind of memory."""
    rows = document["rows"]
    keys = {
        "open_s": ("opened, ms", 1e3),
        "connect_s": ("connected, ms", 1e3),
        "initiator_bytes": ("client grew, KB", 1e-3),
        "target_bytes": ("server grew, KB", 1e-3),
    }
    lines = []
    for cache in dict.fromkeys((row["blocks"], row["memory"]) for row in rows):
        own = [row for row in rows if (row["blocks"], row["memory"]) == cache]
        n_blocks, memory = cache
        lines.append(
            [
                f"{n_blocks:,} x {document['layers']}, {memory}",
                f"{own[0]['used']:,}",
                *(
                    figure(statistics.median(row[key] for row in own) * factor)
                    for key, (_, factor) in keys.items()
                ),
            ]
        )
    header = ["blocks x layers, memory", "of them used"]
    return table([*header, *(name for name, _ in keys.values())], lines)


def text_for(name: str) -> str:
    """Return the table of a figure, with how it was measured."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    machine = document["machine"]
    kernel = machine["kernel"].partition("-")[0]
    where = f"{machine['processors']} processors, Linux {kernel}"
    if name == SCALE:
        where += f"; blocks of {document['block_bytes']} bytes"
        return f"{scale_table(document)}\n\n{where}."
    method = document["method"]
    disturbed = sum(bool(w.get("disturbed")) for w in document["windows"])
    where += (
        f"; {method['rounds']} rounds, windows of {method['window_seconds']:g} s, "
        f"{disturbed} of {len(document['windows'])} windows disturbed by others"
    )
    by_time = name.startswith(("null", "latency"))
    body = time_table(document) if by_time else sweep_tables(document)
    drawing = f"performance-{name}.svg"
    if (PAGE.parent / drawing).exists():
        body += f"\n\n![Throughput and time by block size]({drawing})"
    return f"{body}\n\n{where}."


def write(name: str) -> None:
    """Put the table of a figure into the page."""
    page = PAGE.read_text()
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(page):
        raise SystemExit(f"{PAGE} has no place for {name}: <!-- {name} -->")
    text = text_for(name)
    PAGE.write_text(place.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page))


def main() -> None:
    """Measure what was asked for, and write each as soon as it is there."""
    names = [*PRESETS, SCALE]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(names), help="figures, by commas")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--peer-python", default="")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"no figure {', '.join(unknown)}; there is {', '.join(names)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen:
        if not options.tables and not measure(name, options):
            failed.append(name)
        elif (RESULTS / f"{name}.json").exists():
            write(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
