"""``kvxfer bench`` from the outside: a tiny run, what is refused, how it ends."""

from __future__ import annotations

import asyncio
import csv
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvxfer.bench import contenders
from kvxfer.bench.cli import main, sweep
from kvxfer.bench.presets import PRESETS
from kvxfer.options import OPTIONS
from tests.bench.processes import descendants, gone
from tests.endpoints import SOON
from tests.patience import patient
from tests.test_cli import running, serving

pytestmark = pytest.mark.usefixtures("commands")

WIRES = sorted(
    {*next(option for option in OPTIONS if option.name == "soft_wire").choices}
    - {"auto"}
)
#: Seconds do not matter here, only that all of it is gone through.
TINY = ["--pool", "1M", "--batch", "32", "--window", "0.001"]


#: Some of these start a dozen processes, one after the other.
LONG = patient(120.0)


async def bench(*arguments: str) -> tuple[int, str, str]:
    async with running("kvxfer", "bench", *arguments) as command:
        out, err = await asyncio.wait_for(command.process.communicate(), LONG)
        assert "Traceback" not in err.decode(), err.decode()
        assert command.process.returncode is not None
        return command.process.returncode, out.decode(), err.decode()


async def document(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "out.json"
    code, out, err = await bench(*TINY, "--json", str(path), *arguments)
    assert (code, err) == (0, ""), err
    assert "block" in out
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# -- runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
async def test_a_sweep_on_each_wire(wire: str, tmp_path: Path) -> None:
    lines = tmp_path / "out.csv"
    found = await document(
        tmp_path,
        *("--sizes", "1K,4K", "--wire", wire, "--rounds", "2", "--csv", str(lines)),
    )
    windows = found["windows"]
    assert [(w["round"], w["block_bytes"]) for w in windows] == [
        (number, size) for number in (0, 1) for size in (1024, 4096)
    ]
    for window in windows:
        assert (window["device"], window["wire"]) == ("soft0", wire)
        assert window["page_bytes"] in (mmap.PAGESIZE, 2 << 20)
        assert (window["wrong_blocks"], window["unseen_blocks"]) == (0, 0)
        assert window["verified_blocks"] == 2 * 32
        assert window["batches"] >= 3
        assert window["bytes"] == window["batches"] * 32 * window["block_bytes"]
        assert window["gb_per_s"] > 0 and window["p50_us"] <= window["p99_us"]
        assert window["wrs_per_block"] >= 1
    assert found["method"]["options"] == {"soft_wire": wire}
    assert found["method"]["complete"]
    with lines.open() as file:
        assert len(list(csv.DictReader(file))) == 4


async def test_a_sweep_over_batches(tmp_path: Path) -> None:
    lines = tmp_path / "out.csv"
    found = await document(
        tmp_path,
        *("--sizes", "1K,2K", "--batch", "1,8..16", "--against", "memcpy"),
        *("--csv", str(lines)),
    )
    cases = {(size, batch) for size in (1024, 2048) for batch in (1, 8, 16)}
    for rows in (found["windows"], found["summary"]):
        for name in ("kvxfer", "memcpy"):
            own = [row for row in rows if row["contender"] == name]
            assert {(row["block_bytes"], row["batch"]) for row in own} == cases
            assert len(own) == 6
    for window in found["windows"]:
        each = window["batch"] * window["block_bytes"]
        assert window["bytes"] == window["batches"] * each
        assert window["verified_blocks"] == 2 * window["batch"]
        assert window["wrong_blocks"] == 0
    compared = found["comparisons"]
    assert {(row["block_bytes"], row["batch"]) for row in compared} == cases
    assert found["workload"]["batch"] == [1, 8, 16]
    with lines.open() as file:
        assert {line["batch"] for line in csv.DictReader(file)} == {"1", "8", "16"}


async def test_several_in_flight_of_several_threads(tmp_path: Path) -> None:
    found = await document(
        tmp_path,
        *("--sizes", "2K", "--depth", "2", "--threads", "2", "--planes", "k,v"),
        *("--memory", "ordinary", "--batch", "16", "--qps", "2"),
        *("--window", "0.3"),  # each of them gets its turn
    )
    assert found["method"]["options"] == {"qps_per_connection": 2}
    (window,) = found["windows"]
    assert window["batches"] >= 4
    assert window["wrong_blocks"] == 0
    assert window["verified_blocks"] == 4 * 16 * 2
    assert window["bytes"] == window["batches"] * 16 * 2 * 2048


async def test_neighbours_share_a_wr(tmp_path: Path) -> None:
    found = await document(tmp_path, "--sizes", "1K", "--pattern", "contiguous")
    assert found["windows"][0]["wrs_per_block"] < 0.2
    assert found["windows"][0]["wrong_blocks"] == 0


async def test_kvxfer_against_kvxfer(tmp_path: Path) -> None:
    found = await document(
        tmp_path, "--sizes", "1K", "--against", "kvxfer:chain=1+soft_wire=tcp"
    )
    by_name = {w["contender"]: w for w in found["windows"]}
    assert by_name["kvxfer:chain=1+soft_wire=tcp"]["wire"] == "tcp"
    (compared,) = found["comparisons"]
    assert compared["against"] == "kvxfer:chain=1+soft_wire=tcp"
    assert compared["pairs"] == 1 and compared["rate_ratio"]["median"] > 0


async def test_a_look_makes_small_what_nobody_asked_for(tmp_path: Path) -> None:
    """The pool holds the batches of the blocks named; what is named itself stays."""
    path = tmp_path / "out.json"
    look = ("--quick", "--sizes", "24K", "--json", str(path))
    code, _, err = await bench(*look, "--rounds", "3")
    assert (code, err) == (0, ""), err
    found = json.loads(path.read_text())
    assert len(found["windows"]) == 3
    assert all(w["wrong_blocks"] == 0 for w in found["windows"])
    code, _, err = await bench(*look, "--pool", "65M")
    assert code == 2 and "a pool of 65M does not hold" in err


LIMITS = ["memcpy", "shm-memcpy", "pvm-readv", "tcp"]
OURS = ["no-asyncio", "verbs", "read"]


@pytest.mark.parametrize("name", [*LIMITS, *OURS])
async def test_limits_and_ways_around_asyncio(name: str, tmp_path: Path) -> None:
    """All move the same blocks, and every byte of them."""
    found = await document(
        tmp_path,
        *("--sizes", "1K,4K", "--planes", "k,v", "--batch", "16"),
        *("--contender", name),
    )
    assert [w["block_bytes"] for w in found["windows"]] == [1024, 4096]
    for window in found["windows"]:
        assert window["verified_blocks"] == 2 * 16 * 2
        assert (window["wrong_blocks"], window["unseen_blocks"]) == (0, 0)
        assert window.get("device") == (None if name in LIMITS else "soft0")


async def test_a_device_that_does_nothing(tmp_path: Path) -> None:
    found = await document(
        tmp_path, "--preset", "null", "--rounds", "1", "--sizes", "1K", "--batch", "64"
    )
    assert [w["contender"] for w in found["windows"]].count("verbs") == 1
    for window in found["windows"]:
        assert (window["device"], window["wire"]) == ("null0", "null")
        assert window["verified_blocks"] is None


async def test_many_awaits_beside_few(tmp_path: Path) -> None:
    found = await document(
        tmp_path,
        *("--sizes", "1K", "--contender", "writes:40x4K", "--against", "writes:5x32K"),
    )
    for window in found["windows"]:
        assert window["bytes"] == window["batches"] * 160 * 1024
        assert window["wrong_blocks"] == 0


async def test_what_a_large_cache_costs(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, out, err = await bench(
        *("scale", "--blocks", "2000000", "--layers", "1"),
        *("--rounds", "1", "--json", str(path)),
    )
    assert (code, err) == (0, "")
    assert "2,000,000" in out and "1,000" in out
    rows = {(r["memory"], r["blocks"]): r for r in json.loads(path.read_text())["rows"]}
    assert list(rows) == [
        *(("ordinary", 1000), ("ordinary", 2_000_000)),
        *(("shared", 1000), ("shared", 2_000_000)),
    ]
    for memory in ("ordinary", "shared"):
        few, many = rows[memory, 1000], rows[memory, 2_000_000]
        assert few["used"] == many["used"] == 500
        # A bit for each of two connections, or for what is offered. Whatever has a byte
        # a block or more is looked at in 480 pages at least, by the blocks used.
        for side in ("initiator_bytes", "target_bytes"):
            assert many[side] - few[side] < 2_000_000 / 2


async def test_a_large_cache_of_one_kind_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, out, err = await bench(
        *("scale", "--blocks", "20", "--layers", "2", "--memory", "shared"),
        *("--wire", "shm", "--rounds", "1", "--json", str(path)),
    )
    assert (code, err) == (0, "")
    assert "shm" in out and "ordinary" not in out
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["memory"], row["blocks"], row["used"]) == ("shared", 20, 20)
    assert row["initiator_bytes"] > 0 and row["target_bytes"] > 0


async def test_other_engines_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, out, err = await bench(
        *TINY,
        *("--sizes", "1K", "--against", "nixl,mooncake", "--json", str(path)),
        *("--peer-python", "/usr/bin/false"),
    )
    assert code == 0 and "GB/s" in out
    assert "nixl was left out" in err and "mooncake was left out" in err
    assert "/usr/bin/false -m pip install" in err
    assert "mooncake-transfer-engine-non-cuda" in err
    found = json.loads(path.read_text())
    assert set(found["absent"]) == {"mooncake", "nixl"}
    assert {w["contender"] for w in found["windows"]} == {"kvxfer"}


async def test_who_does_one_at_a_time_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, out, _ = await bench(
        *(*TINY, "--sizes", "1K", "--threads", "2", "--qps", "2", "--chain", "8"),
        *("--against", ",".join(["memcpy", *OURS]), "--json", str(path)),
    )
    assert code == 0
    assert "memcpy does without --threads 2." in out
    assert out.count("does without") == 1
    found = json.loads(path.read_text())
    assert {c["name"]: c["unheeded"] for c in found["contenders"]} == {
        "kvxfer": [],
        "memcpy": ["--threads 2"],
        **{name: [] for name in OURS},
    }
    assert all(w["wrong_blocks"] == 0 for w in found["windows"])


def test_the_other_engines_python_needs_no_extension() -> None:
    """What runs there is found without anything but numpy."""
    code = (
        "import sys; from kvxfer.bench import pair, peers, side; "
        "print(*(m for m in sys.modules if m.split('.')[0] in "
        "('click', 'msgspec', 'rich', 'zmq') or m.startswith('kvxfer._')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["kvxfer._version"]


def test_help_names_presets_and_contenders() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    words = [*PRESETS, *contenders.names(), "--against", "scale", "KVXFER_BENCH"]
    assert [word for word in words if word not in result.output] == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_of_the_sweep(name: str) -> None:
    names = {parameter.name for parameter in sweep.params}
    assert set(PRESETS[name].defaults) <= names
    for key in ("against", "contender"):
        for contender in str(PRESETS[name].defaults.get(key, "kvxfer")).split(","):
            contenders.find(contender)


# -- what is refused ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sizes", "1T"], ["1T", "not a size"]),
        (["--sizes", "1001"], ["1001", "multiples of 8"]),
        (["--batch", "0"], ["'0'", "number of blocks"]),
        (["--batch", "8..4"], ["8..4", "backwards"]),
        (["--batch", "1K"], ["'1K'", "1538"]),
        (["--pattern", "zigzag"], ["zigzag", "runs:N"]),
        (["--sizes", "1M"], ["1M", "--pool", "--batch"]),
        (["--pool", "900G"], ["900G", "available", "--pool"]),
        (["--wire", "morse"], ["morse", "cma"]),
        (["--against", "memmove"], ["memmove", "kvxfer:option=value"]),
        (["--against", "kvxfer:chain"], ["chain", "option=value"]),
        (["--threads", "0"], ["--threads"]),
        (["--planes", "k,k"], ["k,k", "twice"]),
        (["--contender", "writes:many"], ["writes:many", "writes:1000x4M"]),
        (["--against", "kvxfer:device=soft0"], ["one device", "--device"]),
        (["--against", "memcpy,memcpy"], ["memcpy", "twice"]),
        (["--contender", "memcpy", "--depth", "3"], ["memcpy", "--depth 3"]),
        (
            ["--contender", "tcp", "--threads", "2"],
            ["tcp", "--threads 2", "--contender kvxfer, no-asyncio, verbs, read"],
        ),
        (
            ["--sizes", "1K", "--contender", "nixl", "--peer-python", "/usr/bin/false"],
            ["nixl cannot be measured", "/usr/bin/false -m pip install"],
        ),
        (["--plot", "out.pdf"], ["out.pdf", ".svg"]),
        (["--json", "/nowhere/out.json"], ["/nowhere"]),
        (["--target", "127.0.0.1:1", "--against", "tcp"], ["--target"]),
        (["--target", "nowhere"], ["nowhere", "HOST:PORT"]),
    ],
)
def test_wrong_use(arguments: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(main, [*TINY, *arguments])
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    assert "Traceback" not in result.output


async def test_nobody_at_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_CONNECT_TIMEOUT", "0.2")
    code, _, err = await bench(*TINY, "--sizes", "512", "--target", "127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1" in err


async def test_a_device_that_is_not_there() -> None:
    code, _, err = await bench(*TINY, "--sizes", "1K", "--device", "mlx5_77")
    assert code == 1
    assert err.startswith("kvxfer: no device 'mlx5_77'")


# -- the end ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_no_process_outlives_it(number: int) -> None:
    async with running(
        "kvxfer", "bench", "--pool", "64M", "--sizes", "1K", "--window", "60"
    ) as command:
        pid = command.process.pid
        below: set[int] = set()

        async def both() -> None:
            while len(below) < 2:
                below.update(descendants(pid))
                await asyncio.sleep(0.01)

        await asyncio.wait_for(both(), SOON)
        os.kill(pid, number)
        code, out, _ = await command.end()
        assert (code, out) == (-9 if number == signal.SIGKILL else 130, "")

        async def ended() -> None:
            while not gone(below):  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.01)

        await asyncio.wait_for(ended(), SOON)


async def test_a_target_with_blocks_of_several_sizes(tmp_path: Path) -> None:
    sizes = ("--sizes", "512,4K..8K")
    async with serving(*sizes, "--verify", "--blocks", "64") as (serve, endpoint):
        path = tmp_path / "out.json"
        target = ("--target", endpoint, "--window", "0.001", "--planes", "k,v")
        code, out, err = await bench(
            *(*target, *sizes, "--batch", "4,8", "--pool", "1M", "--json", str(path))
        )
        assert (code, err) == (0, "")
        windows = json.loads(path.read_text())["windows"]
        assert [(w["block_bytes"], w["batch"]) for w in windows] == [
            (size, batch) for size in (512, 4096, 8192) for batch in (4, 8)
        ]
        seen: set[tuple[str, int]] = set()
        while len(seen) < 6:
            event = await serve.event()
            assert event["verified"]
            seen.add((event["group"], event["blocks"]))
        assert seen == {(name, n) for name in ("512", "4K", "8K") for n in (4, 8)}
        # It takes those sizes together, or none of them.
        code, _, err = await bench(
            *(*target, "--sizes", "512", "--batch", "4", "--pool", "64K")
        )
        assert code == 1 and "group 4K" in err and "present at the peer" in err
        code, _, err = await bench(*target, *sizes, "--batch", "4", "--pool", "2M")
        assert code == 1 and "1024 blocks of 512" in err and "--blocks" in err
        code, out, _ = await serve.end(signal.SIGTERM)
        assert code == 0, out


async def test_a_target_with_one_size_that_both_sides_name() -> None:
    size = ("--sizes", "4K")
    async with serving(*size, "--verify", "--blocks", "64") as (serve, endpoint):
        code, _, err = await bench(
            *("--target", endpoint, *size, "--window", "0.001", "--planes", "k,v"),
            *("--batch", "8", "--pool", "512K"),
        )
        assert (code, err) == (0, "")
        assert (await serve.event())["verified"]


async def test_ways_around_asyncio_by_the_same_wires(tmp_path: Path) -> None:
    """The engine chooses for each size, as it does for a client."""
    found = await document(
        tmp_path,
        *("--sizes", "1K,4K", "--memory", "ordinary", "--against", "no-asyncio"),
        *("--pool", "128M"),  # more than the ring, which other processes can map
    )
    for name in ("kvxfer", "no-asyncio"):
        own = [w for w in found["windows"] if w["contender"] == name]
        assert [(w["block_bytes"], w["wire"]) for w in own] == [
            (1024, "tcp"),
            (4096, "cma"),
        ]
        assert all(w["wrong_blocks"] == 0 for w in own)


@pytest.mark.parametrize(
    ("arguments", "together"),
    [
        (("--against", "memcpy"), True),
        (("--against", "memcpy", "--progress", "spin"), False),
        (("--against", "kvxfer:progress=spin"), False),
        (("--contender", "memcpy", "--against", "shm-memcpy"), True),
    ],
)
async def test_who_spins_lives_alone(
    arguments: tuple[str, ...], together: bool, tmp_path: Path
) -> None:
    found = await document(tmp_path, "--sizes", "1K", *arguments)
    assert found["method"]["together"] is together


async def test_a_target_that_somebody_else_runs(tmp_path: Path) -> None:
    async with serving("--verify") as (serve, endpoint):
        path = tmp_path / "out.json"
        code, _, err = await bench(
            *("--target", endpoint, "--json", str(path)),
            *("--sizes", "512", "--batch", "8", "--window", "0.001", "--pool", "64K"),
            *("--planes", "k,v"),
        )
        assert (code, err) == (0, "")
        (window,) = json.loads(path.read_text())["windows"]
        assert window["verified_blocks"] is None
        assert window["cpu_target_s_per_gb"] is None
        event = await serve.event()
        assert event["blocks"] == 8 and event["verified"]
        code, out, _ = await serve.end(signal.SIGTERM)
        assert code == 0, out
