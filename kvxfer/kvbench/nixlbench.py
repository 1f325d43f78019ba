"""Run nixlbench, show what it prints, and read its table.

A network backend needs processes on both sides, which find each other through
etcd. All of them are started here unless told otherwise; where the other side is
another host, start one there by the same command.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvxfer.kvbench.errors import RunError
from kvxfer.kvbench.formats import plan_argv, processes
from kvxfer.kvbench.plan import Plan
from kvxfer.kvbench.results import Result, result_for

__all__ = ["TIMED_OUT", "parse_output", "run_nixlbench"]

TIMED_OUT = 124  # the exit code that timeout(1) gives
_GRACE = 10.0  # seconds that the others have to end once one has failed
_TERM_GRACE = 5.0  # seconds between asking a process to end and making it

# What the columns of its table mean, in every layout there has been.
_FIELDS = {
    "block size (b)": "block_size",
    "batch size": "batch_size",
    "b/w (gb/sec)": "bandwidth_gb_s",
    "b/w (gib/sec)": "bandwidth_gib_s",
    "b/w (mib/sec)": "bandwidth_mib_s",
    "aggregate b/w (gb/sec)": "aggregate_gb_s",
    "network util (%)": "network_util_percent",
    "avg lat. (us)": "avg_latency_us",
    "avg prep (us)": "avg_prep_us",
    "p99 prep (us)": "p99_prep_us",
    "avg post (us)": "avg_post_us",
    "p99 post (us)": "p99_post_us",
    "avg tx (us)": "avg_tx_us",
    "p99 tx (us)": "p99_tx_us",
}
_WHOLE = ("block_size", "batch_size")
_IN_GB = {"bandwidth_gib_s": 1.073741824, "bandwidth_mib_s": 0.001048576}
# Longest first: a name may be part of another.
_NAMES = re.compile(
    "|".join(sorted(map(re.escape, _FIELDS), key=len, reverse=True)), re.IGNORECASE
)


def parse_output(lines: Iterable[str]) -> list[dict[str, float]]:
    """Return the table's rows by field name, from all that nixlbench printed.

    Columns go by the names in the header, wherever they stand; unknown ones are
    passed over. Lines between the rows that are no rows are, too.
    """
    columns: list[tuple[int, str]] = []
    rows = []
    for line in lines:
        if "Block Size" in line and "Batch Size" in line:
            columns = _parse_header(line)
        elif columns and re.match(r"\s*\d", line):
            row = _parse_row(line, columns)
            if row is not None:
                rows.append(row)
    return rows


def _parse_header(line: str) -> list[tuple[int, str]]:
    """Return where each column begins, and its field; unknown ones have none."""
    columns = []
    for words in re.finditer(r"\S+(?: \S+)*", line):
        known = list(_NAMES.finditer(line, words.start(), words.end()))
        columns += [(name.start(), _FIELDS[name.group().lower()]) for name in known]
        if not known:
            columns.append((words.start(), ""))
    return columns


def _parse_row(
    line: str, columns: Sequence[tuple[int, str]]
) -> dict[str, float] | None:
    cells = line.split()
    if len(cells) != len(columns):
        # A value as wide as its column runs into the next: cut by position.
        starts = [start for start, _ in columns]
        ends = [*starts[1:], len(line)]
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
    row: dict[str, float] = {}
    for (_, name), cell in zip(columns, cells, strict=True):
        if not name:
            continue
        try:
            row[name] = int(cell) if name in _WHOLE else float(cell)
        except ValueError:
            return None
    for name, factor in _IN_GB.items():
        value = row.pop(name, None)
        if value is not None:
            row.setdefault("bandwidth_gb_s", value * factor)
    needed = ("block_size", "batch_size", "bandwidth_gb_s", "avg_latency_us")
    return row if all(name in row for name in needed) else None


@dataclass(slots=True)
class _Process:
    """One nixlbench and what it has printed."""

    popen: subprocess.Popen[bytes]
    prefix: str
    lines: list[str] = field(default_factory=list)
    rest: bytes = b""

    def read(self) -> bool:
        """Take what is there and show it; False at the end of its output."""
        assert self.popen.stdout is not None
        data = os.read(self.popen.stdout.fileno(), 65536)
        *whole, self.rest = (self.rest + data).split(b"\n")
        if not data and self.rest:
            whole, self.rest = [self.rest], b""
        for raw in whole:
            line = raw.decode("utf-8", "replace").rstrip("\r")
            self.lines.append(line)
            print(f"{self.prefix}{line}", flush=True)
        return bool(data)


def run_nixlbench(
    plan: Plan, *, timeout: float, here: int | None = None
) -> list[Result]:
    """Run ``plan``, ``here`` processes of it or as many as it needs.

    Their output goes to stdout as it comes. No process is left when this returns
    or raises, whichever way.

    Args:
      plan: What to run.
      timeout: Seconds that the run may take.
      here: Processes to start on this host.

    Raises:
      RunError: nixlbench is missing, failed (with its exit code), took too long
        (124) or printed no table.
    """
    program = shutil.which("nixlbench")
    if program is None:
        raise RunError("nixlbench is not on PATH", exit_code=127)
    argv = [program, *plan_argv(plan)[1:]]
    count = here if here is not None else processes(plan)
    running: list[_Process] = []
    try:
        for i in range(count):
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            running.append(_Process(popen, f"[{i}] " if count > 1 else ""))
        _follow(running, time.monotonic() + timeout, timeout)
    except OSError as error:
        raise RunError(f"cannot run {program}: {error.strerror}", 126) from error
    finally:
        _end(running)
    rows = [row for process in running for row in parse_output(process.lines)]
    if not rows:
        if here is not None and here < processes(plan):
            return []  # the table is on the host where the first process runs
        raise RunError("nixlbench ended well and printed no table that can be read")
    return [result_for(plan, "nixlbench", **row) for row in rows]


def _follow(running: Sequence[_Process], deadline: float, timeout: float) -> None:
    """Show all output until every process has ended well.

    Raises:
      RunError: One has failed, or the deadline is past.
    """
    failed: _Process | None = None
    with selectors.DefaultSelector() as selector:
        for process in running:
            assert process.popen.stdout is not None
            selector.register(process.popen.stdout, selectors.EVENT_READ, process)
        while selector.get_map():
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                process = key.data
                if process.read():
                    continue
                selector.unregister(key.fileobj)
                left = max(0.0, deadline - time.monotonic())
                try:
                    code = process.popen.wait(left)
                except subprocess.TimeoutExpired:
                    continue  # the deadline is past; seen below
                if code != 0 and failed is None:
                    failed = process
                    # The others wait for a peer that is gone.
                    deadline = min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() >= deadline:
                break
    if failed is None:
        failed = next((one for one in running if one.popen.poll()), None)
    if failed is not None:
        raise RunError(*_verdict(failed.popen.returncode))
    if any(process.popen.poll() is None for process in running):
        raise RunError(f"nixlbench took more than {timeout:g} s", TIMED_OUT)


def _verdict(code: int) -> tuple[str, int]:
    if code < 0:
        return f"nixlbench died of {signal.Signals(-code).name}", 128 - code
    return f"nixlbench failed with exit code {code}", code


def _end(running: Sequence[_Process]) -> None:
    """End what still runs, with all its children, and close the pipes."""
    for ask in (signal.SIGTERM, signal.SIGKILL):
        for process in running:
            if process.popen.poll() is None:
                try:
                    os.killpg(process.popen.pid, ask)
                except ProcessLookupError:
                    continue  # it has just ended by itself
        for process in running:
            try:
                process.popen.wait(_TERM_GRACE)
            except subprocess.TimeoutExpired:
                if ask is signal.SIGKILL:
                    pid = process.popen.pid
                    print(f"kvbench: process {pid} does not end", file=sys.stderr)
    for process in running:
        if process.popen.stdout is not None:
            process.popen.stdout.close()
