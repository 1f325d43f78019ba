"""``profile --engine kvxfer`` writes real blocks into another process."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench import endpoint, measuring
from kvxfer.kvbench.cli import main
from kvxfer.kvbench.endpoint import Endpoint, Pool, parse_target, pool_for, serve_line
from kvxfer.kvbench.errors import PlanError, WrongUseError

pytest.importorskip("kvxfer._engine", reason="the extension is not built")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kvbench" / "examples"
BATCH, BLOCK = 128, 32768  # what the command line below comes to


def profile(*more: str, engine: str = "--engine=kvxfer") -> int:
    words = [
        *("profile", "--num_requests=1", "--isl=64", "--large_blk_iter_ftr=1"),
        *("--model", str(EXAMPLES / "model_llama_3_1_8b.yaml")),
        *("--model_config", str(EXAMPLES / "block-tp8-pp4.yaml")),
        *("--num_iter=4", "--warmup_iter=2", engine, *more),
    ]
    return main([word for word in words if word])


@contextlib.contextmanager
def started() -> Iterator[Endpoint]:
    """An endpoint that somebody started, as large as one thread needs."""
    pool = Pool(BLOCK, 2 * BATCH, 2 * BATCH, BATCH)
    with Endpoint(pool, verify=True, deadline=time.monotonic() + 30) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def target() -> Iterator[Endpoint]:
    """One for all tests that leave it as it is; one of them alone writes to it."""
    with started() as endpoint:
        yield endpoint


def at(target: Endpoint) -> str:
    return f"--target={target.host}:{target.port}"


@pytest.mark.parametrize("threads", [1, 2])
def test_moves_and_checks_bytes(
    threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    code = profile(
        f"--num_threads={threads}", "--check_consistency", f"--output_json={out}"
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    (row,) = json.loads(out.read_text())
    assert (row["block_size"], row["batch_size"]) == (BLOCK, BATCH)
    assert (row["engine"], row["op_type"]) == ("kvxfer", "WRITE")
    assert row["num_threads"] == threads
    assert row["iterations"] == 4
    moved = 4 * BLOCK * BATCH
    assert row["bandwidth_gb_s"] == pytest.approx(moved / row["seconds"] / 1e9)
    assert 0 < row["avg_post_us"] <= row["avg_tx_us"]
    assert row["p50_tx_us"] <= row["p90_tx_us"] <= row["p99_tx_us"]
    assert row["avg_prep_us"] is row["aggregate_gb_s"] is None
    assert "measured over soft0 (shm): memory copies, not a NIC" in said.err


def test_table_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert profile(f"--output_csv={out}", "--recreate_xfer") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("Block Size (B)      Batch Size     B/W (GB/Sec)")
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert lines[-1].split()[:2] == [row["block_size"], row["batch_size"]]
    assert float(row["avg_prep_us"]) > 0


def test_it_is_the_default_without_nixlbench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile(engine="") == 0
    assert "measured over soft0" in capsys.readouterr().err


def test_a_batch_larger_than_a_write_is_split(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A ring that has room for the ids of some hundred blocks at once.
    monkeypatch.setenv("KVXFER_NOTIFY_RING_BYTES", "4096")
    assert profile("--isl=512", "--check_consistency") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == str(8 * BATCH)


def test_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "MAX_BYTES", 10 * BLOCK)
    assert profile("--num_threads=3", "--check_consistency") == 0
    assert "uses blocks again" in capsys.readouterr().err


def test_what_is_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvxfer import pattern

    monkeypatch.setattr(pattern, "fill", lambda *_args, **_more: None)
    assert profile("--check_consistency") == 1
    assert "does not hold what was written" in capsys.readouterr().err


# --- an endpoint that somebody started ----------------------------------------------


def test_a_target(target: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(at(target), "--check_consistency") == 0
    assert "if it was started with --verify" in capsys.readouterr().err
    target._deadline = time.monotonic() + 30
    target.check(BATCH * (4 + 2))


@pytest.mark.parametrize("more", ["--isl=128", "--pp=2"], ids=["blocks", "bytes"])
def test_a_target_that_does_not_fit(
    more: str, target: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(at(target), more) == 1
    err = capsys.readouterr().err
    assert "the target does not fit the plan" in err
    line = f"python -m kvxfer.serve --host 127.0.0.1 --port {target.port} --layers 1"
    assert f"start it with: {line}" in err


def test_a_target_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVXFER_CONNECT_TIMEOUT", "0.2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert profile(f"--target=127.0.0.1:{taken.getsockname()[1]}") == 1
    assert "error: " in capsys.readouterr().err


def test_a_target_that_dies(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with started() as target:
        monkeypatch.setenv("KVXFER_PING_INTERVAL", "0.1")
        monkeypatch.setenv("KVXFER_PING_TIMEOUT", "0.5")
        monkeypatch.setenv("KVXFER_FENCE_TIMEOUT", "0.2")
        monkeypatch.setattr(
            measuring.Bar,
            "step",
            lambda _bar: target._popen.send_signal(signal.SIGKILL),
        )
        assert profile(at(target), "--num_iter=100000") == 1
    assert "kvbench: error: " in capsys.readouterr().err


# --- the end before the end ---------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0", "2"])
def test_a_run_that_takes_too_long(
    seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(f"--timeout={seconds}", "--num_iter=10000000") == 124
    assert "took" in capsys.readouterr().err


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C counts: a shell has what it puts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_all_of_it(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is left of threads and processes, the check after each test finds.
    ident = threading.main_thread().ident
    assert ident is not None
    steps = itertools.count()

    def step(_bar: measuring.Bar) -> None:
        if next(steps) == 3:
            signal.pthread_kill(ident, number)

    monkeypatch.setattr(measuring.Bar, "step", step)
    assert profile("--num_threads=2", "--num_iter=10000000") == code


def test_an_endpoint_that_does_not_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVXFER_DEVICE", "no_such_device")
    assert profile() == 1
    assert "the endpoint ended with exit code 1" in capsys.readouterr().err


def test_an_option_of_kvxfer_that_is_wrong(
    target: Endpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVXFER_MAX_SGE", "many")
    assert profile(at(target)) == 2
    assert "KVXFER_MAX_SGE" in capsys.readouterr().err


# --- what is not run ----------------------------------------------------------------


def test_dry_run_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvxfer.kvbench.transferengine", None)
    assert profile("--dry_run", "--target=far:7777", "--check_consistency") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "engine kvxfer: WRITE 128 x 32768 bytes, 4 times after 2, 1 threads",
        "endpoint: python -m kvxfer.serve --host far --port 7777 --layers 1 "
        "--planes kv --dtype u8 --blocks 256 --block-bytes 32768 --verify",
    ]


def test_without_the_rest_of_kvxfer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvxfer.kvbench.transferengine", None)
    assert profile() == 1
    assert "needs the rest of kvxfer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--op_type=READ"], "writes and never reads"),
        (["--backend=POSIX", "--source=memory"], "--engine file measures it"),
        (["--target=nowhere"], "is not HOST:PORT"),
        (["--target=h:99999"], "is not HOST:PORT"),
    ],
)
def test_wrong_use(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(*more) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_what_differs_from_the_plan_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    devices = "--num_initiator_dev=2", "--num_target_dev=2"
    assert profile("--dry_run", "--source=gpu", "--scheme=tp", *devices) == 0
    err = capsys.readouterr().err
    assert "host memory, not VRAM" in err
    assert "one device on each side" in err
    assert "not scheme tp" in err


def test_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring.Bar, "_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert profile() == 0
    assert "] 6/6, 0 s left" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert profile("--no_progress") == 0
    assert "s left" not in capsys.readouterr().err


# --- the blocks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "batch", "size", "expected"),
    [
        (1, 10, 100, Pool(100, 20, 20, 10)),
        (4, 10, 100, Pool(100, 80, 20, 10)),
        (1, 1000, 1 << 20, Pool(1 << 20, 1024, 1024, 1000)),
        (3, 1000, 1 << 20, Pool(1 << 20, 1023, 341, 341)),
        (2, 5, 1 << 29, Pool(1 << 29, 2, 1, 1)),
    ],
)
def test_pools(threads: int, batch: int, size: int, expected: Pool) -> None:
    params: dict[str, Any] = {
        "num_threads": threads,
        "max_batch_size": batch,
        "max_block_size": size,
    }
    assert pool_for(params) == expected
    assert expected.n_blocks * size <= endpoint.MAX_BYTES
    with pytest.raises(PlanError, match="fewer threads or smaller blocks"):
        pool_for({**params, "max_block_size": 1 << 30, "num_threads": 2})


def test_targets() -> None:
    assert parse_target("10.0.0.2:7777") == ("10.0.0.2", 7777)
    assert parse_target("[::1]:7777") == ("[::1]", 7777)
    assert parse_target("ipc:///tmp/a:1") == ("ipc:///tmp/a:1", None)
    for text in ("", "host", ":1", "host:", "host:0", "host:x", "ipc://"):
        with pytest.raises(WrongUseError):
            parse_target(text)
    pool = Pool(8, 4, 4, 2)
    assert "--host ::1 --port 7777 " in serve_line(pool, "[::1]", 7777)
    assert "--host ipc:///tmp/a --layers" in serve_line(pool, "ipc:///tmp/a", None)
