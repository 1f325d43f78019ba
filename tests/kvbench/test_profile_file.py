"""``profile --engine file`` moves real bytes through each kernel interface."""

from __future__ import annotations

import csv
import ctypes
import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench import fileengine, fileio
from kvxfer.kvbench.cli import main
from kvxfer.kvbench.errors import RunError
from kvxfer.kvbench.measuring import Bar, iterations
from kvxfer.kvbench.results import percentile

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kvbench" / "examples"
APIS = ("AIO", "URING", "POSIXAIO")


def require(api: str) -> None:
    try:
        fileio.open_queue(api, 4).close()
    except RunError as error:
        pytest.skip(f"this kernel has none: {error}")


def profile(folder: Path, *more: str) -> int:
    return main(
        [
            "profile",
            "--model",
            str(EXAMPLES / "model_llama_3_1_8b.yaml"),
            "--model_config",
            str(EXAMPLES / "block-tp8-pp4.yaml"),
            "--engine=file",
            "--backend=POSIX",
            "--num_requests=1",
            "--isl=64",
            f"--filepath={folder}",
            "--large_blk_iter_ftr=1",
            "--num_iter=4",
            "--warmup_iter=2",
            *more,
        ]
    )


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("source", ["file", "memory"])
@pytest.mark.parametrize("threads", [1, 2])
def test_moves_and_checks_bytes(
    api: str,
    source: str,
    threads: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require(api)
    out = tmp_path / "out.json"
    work = tmp_path / "work"
    work.mkdir()
    code = profile(
        work,
        f"--posix_api_type={api}",
        f"--source={source}",
        f"--num_threads={threads}",
        "--num_files=3",
        "--check_consistency",
        f"--output_json={out}",
    )
    assert code == 0, capsys.readouterr().err
    (row,) = json.loads(out.read_text())
    assert row["op_type"] == ("READ" if source == "file" else "WRITE")
    # 64 tokens of 8 layers of 8 heads of 128 over tp 8: 128 pages of 16 over all.
    assert (row["block_size"], row["batch_size"]) == (32768, 128)
    assert row["iterations"] == 4
    assert row["bandwidth_gb_s"] == pytest.approx(
        4 * 32768 * 128 / row["seconds"] / 1e9
    )
    assert row["p50_tx_us"] <= row["p90_tx_us"] <= row["p99_tx_us"]
    assert row["avg_post_us"] <= row["avg_tx_us"]
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("api", APIS)
def test_more_requests_than_the_kernel_takes_at_once(
    api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(api)
    monkeypatch.setattr(fileengine, "DEPTH", 7)
    assert profile(tmp_path, f"--posix_api_type={api}", "--check_consistency") == 0


@pytest.mark.parametrize("api", APIS)
def test_a_short_read_is_a_failure(api: str, tmp_path: Path) -> None:
    require(api)
    path = tmp_path / "short"
    path.write_bytes(b"x" * 6144)
    fd = os.open(path, os.O_RDWR)
    queue = fileio.open_queue(api, 4)
    memory = mmap.mmap(-1, 8192)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        jobs = [fileio.Job(fd, at, address + at, 4096) for at in (0, 4096)]
        queue.prepare(jobs, write=False)
        with pytest.raises(RunError, match="moved 2048 of 4096"):
            queue.run()
        os.truncate(path, 8192)
        queue.run()
        assert memory[:6144] == b"x" * 6144
        # A file that is only read cannot be written.
        read_only = os.open(path, os.O_RDONLY)
        queue.prepare([fileio.Job(read_only, 0, address, 4096)], write=True)
        with pytest.raises(RunError, match=r"Bad file descriptor|failed"):
            queue.run()
        os.close(read_only)
    finally:
        queue.close()
        queue.close()
        os.close(fd)


def test_blocks_gone_astray_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fileengine._worker

    def swapped(*args: object) -> fileengine._Worker:
        worker = real(*args)  # type: ignore[arg-type]
        jobs = worker.jobs
        first, second = jobs[0], jobs[1]
        wrong = fileio.Job(first.fd, second.offset, first.address, first.length)
        worker.queue.prepare([wrong, *jobs[1:]], True)
        return worker

    monkeypatch.setattr(fileengine, "_worker", swapped)
    assert profile(tmp_path, "--source=memory", "--check_consistency") == 1
    assert "does not hold what was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_direct_io(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O")
    code = profile(tmp_path, "--storage_enable_direct", "--check_consistency")
    assert code == 0, capsys.readouterr().err


def test_direct_io_of_odd_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path, "--storage_enable_direct", "--pp=81") == 1
    err = capsys.readouterr().err
    assert "not a multiple of 512" in err
    assert "--repair" in err


def test_a_run_that_takes_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path, "--timeout=0") == 124
    assert "took more than 0 s" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path / "gone") == 1
    assert "gone" in capsys.readouterr().err


def test_a_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path, "--isl=1000000000", "--num_requests=100000") == 1
    assert "free" in capsys.readouterr().err


def test_a_network_backend_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path, "--backend=UCX") == 2
    assert "--engine file measures storage plans" in capsys.readouterr().err


def test_table_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert profile(tmp_path, f"--output_csv={out}", "--recreate_xfer") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("Block Size (B)      Batch Size     B/W (GB/Sec)")
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert lines[-1].split()[:2] == [row["block_size"], row["batch_size"]]
    assert float(row["avg_prep_us"]) > 0


def test_dry_run_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(tmp_path, "--dry_run") == 0
    assert "READ 128 x 32768 bytes, 4 times after 2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_iterations_are_rounded_as_nixlbench_does() -> None:
    params = {
        "num_threads": 1,
        "large_blk_iter_ftr": 16,
        "warmup_iter": 100,
        "num_iter": 1000,
        "max_block_size": 4096,
    }
    assert iterations(params) == (112, 1008)
    assert iterations({**params, "max_block_size": (1 << 20) + 1}) == (7, 63)


def test_percentiles() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == 7


def test_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(Bar, "_EVERY", 0.0)
    bar = Bar(4)
    for _ in range(3):
        bar.step()
    assert "[##############################          ] 3/4" in capsys.readouterr().err
    bar.end()
    assert capsys.readouterr().err.strip() == ""
    silent = Bar(0)
    silent.step()
    silent.end()
    assert capsys.readouterr().err == ""
