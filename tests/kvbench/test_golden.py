"""The reference's own figures: every case agrees, or differs for a stated reason."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench.cli import main
from kvxfer.kvbench.config import load_config
from kvxfer.kvbench.formats import MASK
from kvxfer.kvbench.loading import load_model
from kvxfer.kvbench.options import BACKENDS, SECRETS, choice
from kvxfer.kvbench.sizing import kv_bytes, reference_sizes

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = [
    json.loads(line) for line in (GOLDEN / "cases.jsonl").read_text().splitlines()
]
MODELS = {
    load_model(str(path)).name: path for path in (GOLDEN / "examples").glob("model_*")
}

# Error cases in which the reference was narrow, and kvxfer does what was meant.
# The rest have to fail.
NARROW = {
    "no --backend means UCX": {"2026-08-289"},
    "UCX takes no file, so without --source it is memory": {
        "2026-08-755",
        "2026-08-770",
        "seed-198",
    },
    "a backend that it had not yet, or no longer": {
        "2026-08-712",
        "seed-199",
        "seed-201",
    },
    "iosize was dropped": {"2026-08-285"},
    "option names with dashes, and prefixes": {"2026-08-286", "2026-08-287"},
    "precisions it does not know": {
        "2026-08-967",
        "2026-08-1048",
        "2026-08-1118",
        "2026-08-1126",
        "2026-08-1139",
        "2026-08-1145",
    },
}
NARROW_IDS = {case_id for ids in NARROW.values() for case_id in ids}


def cases(*kinds: str) -> list[Any]:
    return [
        pytest.param(case, id=case["id"])
        for case in CASES
        if case["expect"]["kind"] in kinds
    ]


@pytest.fixture(autouse=True)
def in_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)


def as_planned(expected: dict[str, Any]) -> dict[str, Any]:
    """Turn the reference's options into those that kvxfer plans instead."""
    planned = dict(expected)
    # Printed only if the user gave it; a warning says where the default is short.
    planned.pop("total_buffer_size", None)
    if "gds_filepath" in planned:
        planned["filepath"] = planned.pop("gds_filepath")
    if "backend" in planned:  # nixlbench minds the case
        planned["backend"] = choice(planned["backend"], BACKENDS)
    if str(planned.get("backend", "")).startswith("GDS"):
        # nixlbench knows no segment type FILE.
        planned["target_seg_type"] = "VRAM"
    for name in SECRETS:
        if planned.get(name):
            planned[name] = MASK
    return planned


def parse_commands(text: str) -> list[dict[str, str]]:
    commands = []
    for part in text.split("nixlbench \\\n")[1:]:
        words = shlex.split(part.split("\n\n")[0].replace("\\\n", " "))
        names = [word.removeprefix("--") for word in words[::2]]
        commands.append(dict(zip(names, words[1::2], strict=True)))
    return commands


@pytest.mark.parametrize("case", cases("plan-text"))
def test_plan_as_text(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case["argv"]) == 0
    commands = parse_commands(capsys.readouterr().out)
    assert commands == [as_planned(one) for one in case["expect"]["commands"]]


@pytest.mark.parametrize("case", cases("plan-json"))
def test_plan_as_json(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case["argv"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row, expected in zip(rows, case["expect"]["configs"], strict=True):
        wanted = as_planned(expected)
        assert {name: row[name] for name in wanted} == wanted
        # The order of the reference's keys is kept.
        if "benchmark_group" in wanted:
            assert [name for name in row if name in wanted] == list(wanted)


@pytest.mark.parametrize("case", cases("kvcache"))
def test_kvcache_table(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*case["argv"], "--format", "table"]) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    starts = [i for i in range(len(rule)) if rule[i] == "-" and rule[:i][-1:] != "-"]
    ends = [*starts[1:], None]

    def cells(line: str) -> list[str]:
        return [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]

    rows = [dict(zip(cells(head), cells(line), strict=True)) for line in lines]
    for row, expected in zip(rows, case["expect"]["rows"], strict=True):
        assert {name: row[name] for name in expected} == expected
        assert list(row)[: len(expected)] == list(expected)


@pytest.mark.parametrize("case", cases("kvcache-seed"))
def test_kvcache_lines(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(case["argv"]) == 0
    lines: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, value = line.partition(":")
        lines[name.strip()] = value.strip()
    expected = dict(case["expect"]["lines"])
    # The June 2025 release printed no name: its own README has one.
    expected["Model"] = load_model(case["argv"][case["argv"].index("--model") + 1]).name
    assert lines == expected


@pytest.mark.parametrize("case", cases("iosize"))
def test_iosize(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(case["argv"]) == 0
    assert capsys.readouterr().out == f"IO Size per GPU: {case['expect']['bytes']}\n"


@pytest.mark.parametrize("case", cases("error"))
def test_errors(
    case: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = list(case["argv"])
    if argv[:1] == ["profile"]:
        argv += ["--dry_run", "--engine=nixlbench"]
    code = main(argv)
    out, err = capsys.readouterr()
    if case["id"] in NARROW_IDS:
        assert code == 0
        assert out
        return
    assert code in (1, 2)
    assert code == 2 or case["expect"]["upstream_exit"] != 2
    assert out == ""
    assert err
    assert "Traceback" not in err


def test_narrow_cases_are_cases() -> None:
    errors = {case["id"] for case in CASES if case["expect"]["kind"] == "error"}
    assert errors >= NARROW_IDS


def test_matrix() -> None:
    with open("matrix.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        model = load_model(str(MODELS[row["model"]]))
        config = load_config(f"examples/{row['config']}", {})
        sizes = reference_sizes(model, config)
        got = (sizes.io_bytes, sizes.batch, sizes.total_bytes)
        wanted = tuple(int(row[k]) for k in ("io_size", "batch_size", "total_buffer"))
        assert got == wanted, row
        assert kv_bytes(model, config, 1) == int(row["kv_bytes_per_token_fp8"])
