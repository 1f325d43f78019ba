"""Drawings and the page: made of figures, and saying what they are."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from kvxfer.bench import plots
from kvxfer.bench.report import Report
from kvxfer.bench.workload import Workload
from kvxfer.errors import UsageError
from tests.bench.test_report import report, window


def drawing(test: Any) -> Any:
    """Mark a test that needs matplotlib, which keeps its fonts' files open."""
    missing = importlib.util.find_spec("matplotlib") is None
    test = pytest.mark.skipif(missing, reason="matplotlib is not installed")(test)
    return pytest.mark.leaky("matplotlib keeps its fonts open")(test)


WINDOWS = [
    window(name, number, rate * (number + 1), block_bytes=size)
    for name, rate in (("kvxfer", 2.0), ("memcpy", 4.0))
    for number in range(2)
    for size in (1024, 4096)
]


@drawing
@pytest.mark.parametrize(
    ("name", "magic"), [("out.png", b"\x89PNG\r\n"), ("out.svg", b"<?xml")]
)
def test_a_drawing(name: str, magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    plots.check_plot(path)
    plots.draw(report(WINDOWS), path)
    assert path.read_bytes().startswith(magic)


@drawing
def test_the_page_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    plots.write_page(report(WINDOWS), path)
    text = path.read_text()
    assert "data:image/png;base64," in text
    assert "http" not in text and "<script" not in text
    assert "memory copies, not a NIC" in text
    for cell in ("kvxfer", "memcpy", "0.500", "3.00", "1K", "4K"):
        assert f">{cell}" in text


@drawing
def test_the_null_device_has_no_bandwidth(tmp_path: Path) -> None:
    null = {"device": "null0", "wire": "null"}
    windows = [window("kvxfer", 0, 1.0, block_bytes=size, **null) for size in (8, 64)]
    path = tmp_path / "out.svg"
    plots.draw(report(windows), path)
    assert path.stat().st_size
    assert plots.caption(report(windows)).endswith("null0 (null): nothing moves")
    assert len(plots._figure(report(windows)).axes) == 1
    assert len(plots._figure(report(WINDOWS)).axes) == 2


def lines(of: Report) -> tuple[set[str], list[str]]:
    axes = plots._figure(of).axes[0]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    return {line.get_label() for line in axes.lines}, ticks


@drawing
def test_several_batches_are_lines_of_their_own() -> None:
    windows = [{**w, "batch": batch} for w in WINDOWS for batch in (10, 2000)]
    load = Workload((1024, 4096), (10, 2000), pool_bytes=1 << 20)
    of = dataclasses.replace(report(windows), workload=load)
    assert lines(of) == (
        {
            *("kvxfer, 10 a batch", "kvxfer, 2,000 a batch"),
            *("memcpy, 10 a batch", "memcpy, 2,000 a batch"),
        },
        ["1K", "4K"],
    )


@drawing
def test_batches_of_one_size_are_drawn_along_the_axis() -> None:
    windows = [window("kvxfer", 0, 1.0, batch=batch) for batch in (10, 2000)]
    load = Workload((1024,), (10, 2000), pool_bytes=1 << 20)
    of = dataclasses.replace(report(windows), workload=load)
    assert lines(of) == ({"kvxfer"}, ["10", "2,000"])
    assert plots.caption(of).startswith("10, 2,000 random blocks a batch")


def rows_of(page: str) -> list[list[str]]:
    """The rows of all tables of a page, and their captions."""
    found = re.findall(r"<caption>.*?</caption>|<tr>.*?</tr>", page)
    return [re.findall(r"<(?:td|th|caption)>(.*?)</", each) for each in found]


@drawing
def test_the_page_has_no_bandwidth_of_the_null_device(tmp_path: Path) -> None:
    null = {"device": "null0", "wire": "null", "verified_blocks": None}
    windows = [window("kvxfer", 0, 1.5, p50_us=50.0, **null)]
    windows += [window("memcpy", 0, 3.0, **null)]
    path = tmp_path / "out.html"
    plots.write_page(report(windows, by_time=True), path)
    rows = rows_of(path.read_text())
    header = ["block", "batch", "ns/block", "p50 us", "p99 us", "WRs/block"]
    assert rows[1] == [*header, "verified blocks", "wrong"]
    assert rows[2] == ["1K", "10", "667", "50.0", "200", "1.00", "-", "0"]
    assert not any("GB/s" in cell for row in rows for cell in row)


@drawing
def test_the_page_of_a_run_by_time_compares_times(tmp_path: Path) -> None:
    windows = [window("kvxfer", i, 1.5, p50_us=90.0 + i) for i in range(3)]
    windows += [window("memcpy", i, 3.0) for i in range(3)]
    path = tmp_path / "out.html"
    plots.write_page(report(windows, by_time=True), path)
    rows = rows_of(path.read_text())
    at = next(i for i, row in enumerate(rows) if row[0].startswith("p50 of a batch: "))
    assert rows[at + 1] == [
        *("against", "block", "batch", "median", "low", "high"),
        *("us more median", "us more low", "us more high", "pairs"),
    ]
    assert rows[at + 2] == [
        *("memcpy", "1K", "10", "0.910", "0.900", "0.920"),
        *("-9.00", "-10.0", "-8.00", "3"),
    ]
    assert not any(row[0].startswith("GB/s") for row in rows)


@drawing
def test_who_has_no_time_of_a_batch_is_drawn_in_its_colour(tmp_path: Path) -> None:
    """The legend is of the first drawing; a dash in the page, nothing in the second."""
    windows = [window("kvxfer", 0, 1.5), window("memcpy", 0, 3.0, p50_us=None)]
    of = report([windows[1], windows[0]])
    by_rate, by_time = plots._figure(of).axes
    colours = [
        {line.get_label(): line.get_color() for line in axes.lines}
        for axes in (by_rate, by_time)
    ]
    assert colours[0] == colours[1] and set(colours[0]) == {"kvxfer", "memcpy"}
    path = tmp_path / "out.html"
    plots.write_page(report(windows, by_time=True), path)
    rows = rows_of(path.read_text())
    assert ["memcpy", "1K", "10", *["-"] * 6, "1"] in rows


def test_a_nic_is_not_called_a_memory_copy() -> None:
    nic = [window("kvxfer", 0, 40.0, device="mlx5_0", wire="rdma")]
    assert plots.caption(report(nic)) == "10 random blocks a batch, mlx5_0 (rdma)"


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(UsageError, match="png"):
        plots.check_plot(Path("out.pdf"))
