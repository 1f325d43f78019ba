"""Running nixlbench: its table is read, its failure is ours, nothing is left behind."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvxfer.kvbench.cli import main
from kvxfer.kvbench.nixlbench import parse_output

HERE = Path(__file__).parent
OUTPUT = HERE / "nixlbench_output"
EXAMPLES = HERE.parents[1] / "examples" / "kvbench" / "examples"
REAL = shutil.which("nixlbench")

# After nixlbench's source: three ranks or more, pairwise.
WIDE = (
    "Block Size (B)      Batch Size     B/W (GB/Sec)   Aggregate B/W (GB/Sec)   "
    "Network Util (%)    Avg Lat. (us)  Avg Prep (us)  P99 Prep (us)  "
    "Avg Post (us)  P99 Post (us)  Avg Tx (us)    P99 Tx (us)    \n" + "-" * 160 + "\n"
    "65536               8              12.500000      50.000000                "
    "25.000000           5.2            10.0           11.0           "
    "2.0            3.0            40.0           44.0           \n"
)
# After the source of releases up to 0.5.0.
OLD = (
    "Block Size (B)      Batch Size     Avg Lat. (us)       B/W (MiB/Sec)       "
    "B/W (GiB/Sec)       B/W (GB/Sec)        \n"
    "65536               8              5.2                 11920.9             "
    "11.641532           12.5                \n"
)

Install = Callable[[str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a program named nixlbench, in Python, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(body: str) -> Path:
        tool = folder / "nixlbench"
        head = f"#!{sys.executable} -S\nimport os, signal, sys\n"
        tool.write_text(head + body)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        return tool

    return write


def profile(*more: str, backend: str = "POSIX") -> int:
    return main(
        [
            "profile",
            "--model",
            str(EXAMPLES / "model_llama_3_1_8b.yaml"),
            "--model_config",
            str(EXAMPLES / "block-tp8-pp4.yaml"),
            "--backend",
            backend,
            *more,
        ]
    )


def show(path: Path) -> str:
    return f"sys.stdout.write(open({str(path)!r}).read())\n"


# --- the parser ---------------------------------------------------------------


def test_reads_a_real_table() -> None:
    (row,) = parse_output((OUTPUT / "posix_read.txt").read_text().splitlines())
    assert row == {
        "block_size": 32768,
        "batch_size": 1280,
        "bandwidth_gb_s": 1.605863,
        "avg_latency_us": 20.4,
        "avg_prep_us": 74.0,
        "p99_prep_us": 74.0,
        "avg_post_us": 1681.4,
        "p99_post_us": 14555.0,
        "avg_tx_us": 24432.5,
        "p99_tx_us": 149878.0,
    }


def test_reads_a_real_sweep() -> None:
    text = (OUTPUT / "posix_sweep_threads.txt").read_text()
    rows = parse_output(text.splitlines())
    assert [(row["block_size"], row["batch_size"]) for row in rows] == [
        (block, batch) for block in (4096, 8192, 16384) for batch in (1, 2, 4)
    ]


@pytest.mark.parametrize("layout", [WIDE, OLD])
def test_reads_other_layouts_by_their_header(layout: str) -> None:
    (row,) = parse_output(layout.splitlines())
    assert row["block_size"] == 65536
    assert row["batch_size"] == 8
    assert row["bandwidth_gb_s"] == 12.5
    assert row["avg_latency_us"] == 5.2
    if layout is WIDE:
        assert row["aggregate_gb_s"] == 50
        assert row["network_util_percent"] == 25


def test_reads_binary_units_where_there_are_no_others() -> None:
    text = OLD.replace("B/W (GB/Sec)", "B/W (other)  ")
    (row,) = parse_output(text.splitlines())
    assert row["bandwidth_gb_s"] == pytest.approx(12.5, rel=1e-4)


def test_values_that_run_into_each_other() -> None:
    head, rule, line = WIDE.splitlines()
    line = line.replace("5.2            ", "123456789012345")
    (row,) = parse_output([head, rule, line])
    assert row["avg_latency_us"] == 123456789012345
    assert row["avg_prep_us"] == 10


def test_other_lines_are_no_rows() -> None:
    lines = WIDE.splitlines()
    noise = ["W0101 12:00:00 warning", "12 monkeys", "1 2 3 4 5 6 7 8 9 10 11 x", ""]
    assert len(parse_output([*noise, lines[0], *noise, *lines[1:], *noise])) == 1
    assert parse_output(noise) == []


@pytest.mark.parametrize(
    "name", ["buffer_too_small.txt", "pool_exhausted.txt", "segment_type.txt"]
)
def test_a_run_that_failed_has_no_rows(name: str) -> None:
    assert parse_output((OUTPUT / name).read_text().splitlines()) == []


# --- the runner ---------------------------------------------------------------


def test_runs_shows_and_writes(
    install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    called = tmp_path / "called"
    install(
        f"open({str(called)!r}, 'w').write('\\n'.join(sys.argv[1:]))\n"
        + show(OUTPUT / "posix_read.txt")
    )
    out_json, out_csv = tmp_path / "out.json", tmp_path / "out.csv"
    code = profile(
        f"--output_json={out_json}",
        f"--output_csv={out_csv}",
        "--filepath=/a b;rm",
        "--check_consistency",
        "--obj_secret_key=hush",
    )
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "NIXLBench Configuration" in out
    assert "hush" not in out
    words = called.read_text().splitlines()
    assert words[words.index("--filepath") + 1] == "/a b;rm"
    assert "--check_consistency=true" in words
    assert words[words.index("--obj_secret_key") + 1] == "hush"
    (row,) = json.loads(out_json.read_text())
    assert row["bandwidth_gb_s"] == 1.605863
    assert row["engine"] == "nixlbench"
    (line,) = csv.DictReader(out_csv.read_text().splitlines())
    assert line["batch_size"] == "1280"
    assert line["p50_tx_us"] == ""


@pytest.mark.parametrize(
    ("backend", "more", "count"),
    [
        ("POSIX", [], 1),
        ("UCX", [], 2),
        ("UCX", ["--num_initiator_dev=2", "--num_target_dev=2"], 4),
        ("UCX", ["--mode=MG", "--num_initiator_dev=8"], 2),
        ("UCX", ["--processes=1"], 1),
    ],
)
def test_starts_both_sides(
    install: Install, tmp_path: Path, backend: str, more: list[str], count: int
) -> None:
    install(
        f"open(f'{tmp_path}/{{os.getpid()}}.ran', 'w')\n"
        + show(OUTPUT / "posix_read.txt")
    )
    assert profile(*more, backend=backend) == 0
    assert len(list(tmp_path.glob("*.ran"))) == count


def test_its_exit_code_is_ours(
    install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install(show(OUTPUT / "segment_type.txt") + "sys.exit(37)\n")
    assert profile() == 37
    out, err = capfd.readouterr()
    assert "Invalid segment type: FILE" in out
    assert "failed with exit code 37" in err


def test_a_signal_is_told(install: Install, capfd: pytest.CaptureFixture[str]) -> None:
    install("os.kill(os.getpid(), signal.SIGSEGV)\n")
    assert profile() == 128 + 11
    assert "died of SIGSEGV" in capfd.readouterr().err


def test_success_without_a_table_is_a_failure(
    install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("print('nothing to see')\n")
    assert profile() == 1
    assert "no table" in capfd.readouterr().err


def test_a_run_that_takes_too_long_is_ended(
    install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pids = tmp_path / "pids"
    install(f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\nsignal.pause()\n")
    assert profile("--timeout=0.5", backend="UCX") == 124
    assert "took more than 0.5 s" in capfd.readouterr().err
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_one_side_that_fails_ends_the_other(
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kvxfer.kvbench.nixlbench._GRACE", 0.1)
    first = tmp_path / "first"
    install(
        "try:\n"
        f"    os.mkdir({str(first)!r})\n"
        "except FileExistsError:\n"
        "    sys.exit(3)\n"
        "signal.pause()\n"
    )
    assert profile("--timeout=60", backend="UCX") == 3
    assert "exit code 3" in capfd.readouterr().err


def test_results_so_far_survive_a_failure(install: Install, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    install(
        "try:\n"
        f"    os.mkdir({str(ran)!r})\n"
        "except FileExistsError:\n"
        "    sys.exit(5)\n" + show(OUTPUT / "posix_read.txt")
    )
    out = tmp_path / "out.json"
    more = ["--model_configs", str(EXAMPLES / "block-tp8-pp2.yaml")]
    assert profile(f"--output_json={out}", *more) == 5
    assert len(json.loads(out.read_text())) == 1


def test_dry_run_starts_nothing(
    install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("sys.exit(9)\n")
    assert profile("--dry_run", "--obj_secret_key=hush") == 0
    out = capfd.readouterr().out
    assert "--backend POSIX" in out
    assert "hush" not in out


def test_without_nixlbench(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile("--engine=nixlbench") == 127
    assert "not on PATH" in capfd.readouterr().err


@pytest.mark.skipif(REAL is None, reason="no nixlbench on PATH")
def test_the_real_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = profile(
        f"--filepath={tmp_path}",
        f"--output_json={out}",
        "--isl=64",
        "--num_requests=1",
        "--num_iter=16",
        "--warmup_iter=16",
        "--total_buffer_size=16777216",
        "--check_consistency",
    )
    assert code == 0
    (row,) = json.loads(out.read_text())
    assert (row["block_size"], row["batch_size"]) == (32768, 128)
    assert row["bandwidth_gb_s"] > 0
