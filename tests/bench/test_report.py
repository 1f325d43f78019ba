"""What is made of the windows: medians, ratios, tables, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvxfer.bench.contenders import WRITE_CACHE, Contender
from kvxfer.bench.labels import SOFTWARE, kind_of
from kvxfer.bench.report import Report, compare, figure, interval, summarize
from kvxfer.bench.runner import Outcome, Settings
from kvxfer.bench.workload import Workload
from kvxfer.errors import KVXferError

OTHER = Contender("memcpy", "memcpy", "one process copies")


def window(name: str, number: int, rate: float, **changes: Any) -> dict[str, Any]:
    return {
        "contender": name,
        "round": number,
        "batch": 10,
        "planes": 1,
        "block_bytes": 1024,
        "gb_per_s": rate,
        "blocks_per_s": rate * 1e6,
        "p50_us": 100.0,
        "p99_us": 200.0,
        "cpu_initiator_s_per_gb": 0.5,
        "cpu_target_s_per_gb": 0.25,
        "wrs_per_block": 1.0,
        "verified_blocks": 20,
        "wrong_blocks": 0,
        "unseen_blocks": 0,
        "disturbed": False,
        "device": "soft0",
        "wire": "cma",
        "page_bytes": 2 << 20,
        **changes,
    }


def report(
    windows: list[dict[str, Any]], by_time: bool = False, **absent: str
) -> Report:
    return Report(
        contenders=[WRITE_CACHE, OTHER],
        workload=Workload((1024,), (10,), pool_bytes=1 << 20),
        settings=Settings(rounds=3, extra={"by_time": by_time}),
        outcome=Outcome(windows, complete=True),
        absent=absent,
    )


def printed(of: Report) -> str:
    out = io.StringIO()
    of.print(Console(file=out, width=160))
    return out.getvalue()


# -- figures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # The ranks of the sign test's interval: for 12 values the 3rd and the 10th.
    [(1, 1, 1), (3, 1, 3), (5, 1, 5), (6, 1, 6), (9, 2, 8), (12, 3, 10), (20, 6, 15)],
)
def test_the_interval_of_a_median(count: int, low: int, high: int) -> None:
    found = interval([float(i) for i in range(count, 0, -1)])
    assert (found.low, found.high) == (low, high)
    assert found.median == (count + 1) / 2


def test_figures_have_three_digits() -> None:
    values = [None, 0.0, 0.00123456, 0.5, 1.0, 12.345, 123.45, 12345.6]
    assert [figure(v) for v in values] == (
        ["-", "0", "0.00123", "0.500", "1.00", "12.3", "123", "12,346"]
    )


def test_medians_over_rounds() -> None:
    rates = [3.0, 1.0, 2.0]
    (row,) = summarize([window("kvxfer", i, rate) for i, rate in enumerate(rates)])
    assert row["gb_per_s"] == 2.0
    assert (row["low_gb_per_s"], row["high_gb_per_s"], row["rounds"]) == (1.0, 3.0, 3)
    assert row["verified_blocks"] == 60


def test_comparisons_are_of_the_same_round() -> None:
    windows = [window("kvxfer", i, rate) for i, rate in enumerate([2.0, 8.0, 3.0])]
    windows += [
        window("memcpy", i, rate, p50_us=80.0) for i, rate in enumerate([1.0, 4.0])
    ]

    def always(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    (row,) = compare(windows, "kvxfer")
    assert row == {
        "contender": "kvxfer",
        "against": "memcpy",
        "block_bytes": 1024,
        "batch": 10,
        "pairs": 2,
        "rate_ratio": always(2.0),
        "p50_ratio": always(1.25),
        "p50_difference_us": always(20.0),
    }


def test_who_has_no_time_of_a_batch_is_compared_by_throughput_alone() -> None:
    windows = [window("kvxfer", 0, 4.0), window("memcpy", 0, 2.0, p50_us=None)]
    (row,) = compare(windows, "kvxfer")
    assert row["rate_ratio"]["median"] == 2.0
    assert row["p50_ratio"] is None and row["p50_difference_us"] is None
    assert [r["p50_us"] for r in summarize(windows)] == [100.0, None]
    (row,) = compare(windows, "memcpy")
    assert row["rate_ratio"]["median"] == 0.5 and row["p50_ratio"] is None


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("soft0", "memory copies"),
        (None, "memory copies"),  # the limits of the machine
        ("null0", "nothing moves"),
        ("mlx5_0", "nic"),
        ("mlx5_0:2", "nic"),
        ("softroce0", "nic"),  # any name that is not ours
    ],
)
def test_what_a_figure_is_of(device: str | None, kind: str) -> None:
    assert kind_of({"device": device}) == kind
    assert device is not None or kind_of({}) == kind


# -- what people see ----------------------------------------------------------------


def test_the_table() -> None:
    text = printed(report([window("kvxfer", 0, 1.5), window("memcpy", 0, 3.0)]))
    line = next(li for li in text.splitlines() if "1,500,000" in li)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == [
        *("1K", "10", "1.50", "1.50-1.50", "1,500,000", "100", "200"),
        *("0.500", "0.250", "1.00", "20"),
    ]
    assert "0.500 (0.500 to 0.500)" in text
    assert "memory copies on pages of 2M" in text and SOFTWARE in text


def test_a_nic_is_not_called_a_memory_copy() -> None:
    text = printed(report([window("kvxfer", 0, 1.5, device="mlx5_0", wire="rdma")]))
    assert "mlx5_0 (rdma)" in text
    assert "memory cop" not in text and "soft0" not in text


def test_a_table_names_all_wires() -> None:
    windows = [
        window("kvxfer", 0, 1.5, wire="tcp"),
        window("kvxfer", 0, 1.5, wire="cma", block_bytes=4096),
    ]
    assert "soft0 (tcp, cma), memory copies" in printed(report(windows))


def test_the_null_device_has_no_bandwidth() -> None:
    null = {"device": "null0", "wire": "null", "verified_blocks": None}
    windows = [window("kvxfer", 0, 1.5, **null), window("memcpy", 0, 3.0, **null)]
    text = printed(report(windows, by_time=True))
    assert "GB/s" not in text.replace("s/GB", "") and "nothing moves" in text
    assert "667" in text  # ns a block at 1,500,000 blocks a second
    assert "p50 of a batch" in text and "1.00 (1.00 to 1.00)" in text


def test_who_has_no_time_of_a_batch_has_a_dash() -> None:
    windows = [window("kvxfer", 0, 1.5), window("memcpy", 0, 3.0, p50_us=None)]
    text = printed(report(windows, by_time=True))
    line = text.splitlines()[-3]
    assert [cell.strip() for cell in line.strip("│ ").split("│")][-2:] == ["-", "-"]


def test_wrong_and_late_blocks_are_shown() -> None:
    assert "3 WRONG" in printed(report([window("kvxfer", 0, 1.0, wrong_blocks=3)]))
    assert "20, 4 late" in printed(report([window("kvxfer", 0, 1.0, unseen_blocks=4)]))


def test_disturbed_windows_are_counted() -> None:
    windows = [window("kvxfer", i, 1.0, disturbed=i == 0) for i in range(3)]
    assert "1 of 3 windows were disturbed" in printed(report(windows))


# -- files --------------------------------------------------------------------------


def test_json_holds_everything(tmp_path: Path) -> None:
    windows = [window("kvxfer", 0, 1.5), window("memcpy", 0, 3.0)]
    report(windows, nixl="not installed").write_json(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["schema"] == 2
    assert set(found) == {
        *("schema", "kvxfer", "command", "machine", "method", "workload"),
        *("contenders", "windows", "summary", "comparisons", "failures", "absent"),
    }
    assert found["windows"] == [{**each, "kind": "memory copies"} for each in windows]
    assert {row["kind"] for row in found["summary"]} == {"memory copies"}
    assert found["absent"] == {"nixl": "not installed"}
    assert found["comparisons"][0]["rate_ratio"]["median"] == 0.5
    assert {row["contender"] for row in found["summary"]} == {"kvxfer", "memcpy"}
    assert found["machine"]["processors"] >= 1
    assert found["workload"]["block_bytes"] == [1024]


def test_csv_holds_a_line_a_window(tmp_path: Path) -> None:
    report([window("kvxfer", i, 1.5 + i) for i in range(2)]).write_csv(
        tmp_path / "out.csv"
    )
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["gb_per_s"] for line in lines] == ["1.5", "2.5"]
    assert lines[0]["contender"] == "kvxfer"
    assert [line["kind"] for line in lines] == ["memory copies"] * 2


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(KVXferError, match="cannot write"):
        report([]).write_json(tmp_path / "none" / "out.json")
