"""Other engines beside kvxfer: measured, checked, and each way in which one can fail.

What stands for them is in ``stubs``: foreign code with its API, that moves bytes
between the two processes for real.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvxfer.bench import contenders, flags, runner
from kvxfer.bench.presets import PRESETS
from kvxfer.bench.runner import Settings
from kvxfer.bench.workload import Workload
from tests import nics
from tests.bench.processes import gone
from tests.bench.stubs import moving
from tests.bench.test_bench_cli import LONG, TINY
from tests.commands import ROOT, start
from tests.machines import Machine
from tests.nics import Network
from tests.patience import patient

pytestmark = pytest.mark.usefixtures("commands")
#: Each runs the whole command; two of them go through all of it in the quick run too.
slow = pytest.mark.slow

STUBS = Path(__file__).parent / "stubs"
BENCH = "transfer_engine_bench"
PEERS = ["mooncake", "mooncake-bench", "nixl", "nixl-tcp"]
#: With the second of these sizes a stub that misbehaves begins to.
SIZES = f"1K,{moving.MIDDLE}"


@dataclass
class Engines:
    """Where the stubs are, and what they were given."""

    directory: Path
    environ: dict[str, str]

    async def bench(
        self, *arguments: str, behaves: str = moving.WELL, **environ: str
    ) -> tuple[int, str, str, dict[str, Any]]:
        """Run the bench; return code, stdout, stderr and what it wrote as JSON."""
        path = self.directory / "out.json"
        path.unlink(missing_ok=True)
        environ = {**self.environ, "STUB_BEHAVES": behaves, **environ}
        command = ["kvxfer", "bench", *TINY, "--json", str(path), *arguments]
        async with start(*command, environ=environ) as process:
            out, err = await asyncio.wait_for(process.communicate(), LONG)
        assert "Traceback" not in err.decode(), err.decode()
        assert process.returncode is not None
        found = json.loads(path.read_text()) if path.exists() else {}
        return process.returncode, out.decode(), err.decode(), found

    def said(self, engine: str) -> list[dict[str, Any]]:
        """What the processes of an engine were given."""
        log = Path(self.environ["STUB_LOG"])
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [line for line in lines if line["engine"] == engine]


@pytest.fixture
def engines(tmp_path: Path) -> Engines:
    """All of them, for a Python that finds them by PYTHONPATH, and the program."""
    program = tmp_path / "bin" / BENCH
    program.parent.mkdir()
    words = [sys.executable, str(STUBS / f"{BENCH}.py")]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{STUBS}{os.pathsep}{ROOT}",
        "STUB_LOG": str(tmp_path / "log"),
        "STUB_UVERBS": str(tmp_path / "uverbs3"),
    }
    (tmp_path / "uverbs3").touch()
    return Engines(tmp_path, environ)


# -- what goes well -----------------------------------------------------------------


async def test_all_are_measured_and_checked(engines: Engines) -> None:
    code, out, err, found = await engines.bench(
        *("--sizes", SIZES, "--planes", "k,v", "--against", ",".join(PEERS))
    )
    assert (code, err) == (0, "")
    windows = {(w["contender"], w["block_bytes"]): w for w in found["windows"]}
    assert set(windows) == {
        (name, size) for name in ("kvxfer", *PEERS) for size in (1024, 4096)
    }
    for (name, size), window in windows.items():
        assert window["kind"] == "memory copies"
        assert window["bytes"] == window["batches"] * 2 * 32 * size
        assert window["gb_per_s"] > 0
        if name == "mooncake-bench":  # it tells no times, and checks nothing
            assert window["p50_us"] is window["verified_blocks"] is None
        else:
            assert 0 < window["p50_us"] <= window["p99_us"]
            assert window["verified_blocks"] == 2 * 32 * 2
            assert (window["wrong_blocks"], window["unseen_blocks"]) == (0, 0)
    ways = {name: windows[name, 1024]["wire"] for name in PEERS}
    assert ways == dict(
        zip(PEERS, ["tcp", "tcp", "ucx default", "ucx tcp"], strict=True)
    )
    compared = {(c["against"], c["block_bytes"]): c for c in found["comparisons"]}
    assert set(compared) == {(name, size) for name in PEERS for size in (1024, 4096)}
    for (name, _), row in compared.items():
        assert row["pairs"] == 1 and row["rate_ratio"]["median"] > 0
        assert (row["p50_ratio"] is None) == (name == "mooncake-bench")
        assert f"/ {name}" in out


@slow
async def test_none_of_them_uses_a_nic_that_nobody_measures(engines: Engines) -> None:
    """Mooncake would take any that it finds, and UCX as well."""
    code, _, err, _ = await engines.bench(
        *("--sizes", "1K", "--against", ",".join(PEERS))
    )
    assert (code, err) == (0, "")
    for said in engines.said("mooncake"):
        assert said["arguments"] == ["127.0.0.1", "P2PHANDSHAKE", "tcp", ""]
        assert said["environ"]["MC_FORCE_TCP"] == "1"
    for said in engines.said("nixl"):
        assert said["environ"]["UCX_NET_DEVICES"] == "lo"
    # Progress threads are the target's alone.
    assert {(s["name"], s["progress"]) for s in engines.said("nixl")} == {
        *(("initiator", False), ("target", True)),
    }
    for said in engines.said("mooncake-bench"):
        assert said["protocol"] == "tcp"


@slow
async def test_mooncakes_own_program_is_given_free_ports(engines: Engines) -> None:
    """Two at a time, as on any machine that more than one person uses."""
    other = Engines(engines.directory / "other", dict(engines.environ))
    other.directory.mkdir()
    other.environ["STUB_LOG"] = str(other.directory / "log")
    runs = [engines, other]
    results = await asyncio.gather(
        *(
            run.bench(
                *("--sizes", SIZES, "--window", "1.6", "--contender", "mooncake-bench")
            )
            for run in runs
        )
    )
    assert [(code, err) for code, _, err, _ in results] == [(0, "")] * 2
    targets = set()
    for run in runs:
        said = run.said("mooncake-bench")
        assert [s["mode"] for s in said] == ["target", "initiator", "initiator"]
        names = [s["local_server_name"].rpartition(":") for s in said]
        assert {host for host, *_ in names} == {"127.0.0.1"}
        assert all(1024 <= int(port) < 65536 for *_, port in names)
        targets.add(said[0]["local_server_name"])
        assert {s["segment_id"] for s in said[1:]} == {said[0]["local_server_name"]}
        asked = [(s["block_size"], s["batch_size"]) for s in said[1:]]
        assert asked == [(1024, 32), (4096, 32)]
        assert {s["duration"] for s in said[1:]} == {2}  # whole seconds
    assert len(targets) == 2


# -- what does not ------------------------------------------------------------------


BINDS = "does not come up as a target: F0000 bind: Address already in use"


@pytest.mark.parametrize(
    ("behaves", "words"),
    [
        (
            moving.FAILS,
            {
                "mooncake": "RuntimeError: batch_transfer_sync_write returned -1",
                "nixl": "RuntimeError: NIXL's transfer ended as ERR",
                "mooncake-bench": "RuntimeError: transfer_engine_bench: I0000 FAILED",
            },
        ),
        (
            moving.DIES,
            {
                "mooncake": "it ended early",
                "nixl": "it ended early",
                "mooncake-bench": f"RuntimeError: transfer_engine_bench {BINDS}",
            },
        ),
        (
            moving.KILLS,
            {
                "mooncake": "RuntimeError: batch_transfer_sync_write returned -1",
                "nixl": "RuntimeError: NIXL's transfer ended as ERR",
            },
        ),
    ],
)
@slow
async def test_one_that_fails_is_left_out(
    behaves: str, words: dict[str, str], engines: Engines
) -> None:
    """It says why, the run fails, and what was measured stays."""
    code, out, err, found = await engines.bench(
        *("--sizes", SIZES, "--rounds", "2", "--against", ",".join(words)),
        behaves=behaves,
    )
    assert code == 1
    for name, why in words.items():
        assert f"kvxfer: {name}: {why}" in err
    failures = {each["contender"]: each["error"] for each in found["failures"]}
    assert len(found["failures"]) == len(failures) == len(words)
    assert all(failures[name].startswith(why) for name, why in words.items())
    assert found["method"]["complete"] and "GB/s" in out
    sizes: dict[str, list[int]] = {}
    for window in found["windows"]:
        sizes.setdefault(window["contender"], []).append(window["block_bytes"])
    # It fails with the second size, but for the program that does not even start.
    at_once = {"mooncake-bench"} if behaves == moving.DIES else set()
    assert sizes == {
        "kvxfer": [1024, 4096] * 2,
        **{name: [1024] for name in words if name not in at_once},
    }


async def test_wrong_bytes_are_found(engines: Engines) -> None:
    names = ["mooncake", "nixl", "nixl-tcp"]
    code, out, err, found = await engines.bench(
        *("--sizes", SIZES, "--against", ",".join(names)), behaves=moving.WRONG
    )
    wrong = {
        (w["contender"], w["block_bytes"]): w["wrong_blocks"] for w in found["windows"]
    }
    assert wrong == {
        # One in each of the two batches that are looked at.
        **{(name, size): 0 for name in ("kvxfer", *names) for size in (1024, 4096)},
        **{(name, 4096): 2 for name in names},
    }
    assert code == 1
    assert out.count("2 WRONG") == 3
    assert err == "kvxfer: 6 blocks hold other bytes\n"


@pytest.mark.parametrize("name", ["mooncake", "mooncake-bench", "nixl"])
@slow
async def test_one_that_hangs_is_ended(
    name: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {**engines.environ, "STUB_BEHAVES": moving.HANGS}.items():
        monkeypatch.setenv(key, value)
    found, absent = await asyncio.to_thread(
        flags.find_peers, [contenders.find(name)], sys.executable
    )
    assert absent == {}
    settings = Settings(
        window=0.001, extra={"plane_names": ("kv",)}, patience=patient(3.0)
    )
    workload = Workload((1024, moving.MIDDLE), (32,), pool_bytes=1 << 20)
    outcome = await runner.run(found, workload, settings)
    assert [w["block_bytes"] for w in outcome.windows] == [1024]
    assert outcome.failures == [
        {"contender": name, "error": f"not window after {settings.patience:g} s"}
    ]
    pids = {said["pid"] for said in engines.said(name)}
    assert len(pids) >= 2

    async def ended() -> None:
        while not gone(pids):  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)

    await asyncio.wait_for(ended(), LONG)


# -- beside a NIC -------------------------------------------------------------------


@pytest.fixture
def beside(engines: Engines, network: Network) -> Engines:
    """The same on a machine with the NIC mlx5_0, whose file is uverbs3."""
    root = network.directory / "machine"
    machine = Machine(root)
    nics.one_port_each(machine, ["mlx5_0"])
    described = machine.sys / "class" / "infiniband_verbs" / "uverbs3" / "ibdev"
    described.parent.mkdir(parents=True)
    described.write_text("mlx5_0\n")
    return Engines(engines.directory, {**engines.environ, **network.environ(root)})


@pytest.mark.parametrize("device", ["auto", "mlx5_0", "mlx5_0:1"])
@slow
async def test_who_can_use_the_nic_is_told_to(device: str, beside: Engines) -> None:
    code, out, err, found = await beside.bench(
        *("--device", device, "--sizes", "1K", "--against", "verbs,mooncake,nixl")
    )
    assert (code, err) == (0, "")
    assert {w["contender"] for w in found["windows"]} == {
        *("kvxfer", "verbs", "mooncake", "nixl"),
    }
    for window in found["windows"]:
        assert (window["device"], window["wire"]) == ("mlx5_0", "rdma")
        assert window["kind"] == "nic" and window["wrong_blocks"] == 0
    assert found["method"]["options"] == {"device": "mlx5_0"}
    assert "memory copies" not in out and "over TCP" not in out
    for said in beside.said("mooncake"):
        assert said["arguments"][2:] == ["rdma", "mlx5_0"]
        assert said["environ"]["MC_FORCE_HCA"] == said["environ"]["MC_IB_PORT"] == "1"
        assert "MC_FORCE_TCP" not in said["environ"]
    for said in beside.said("nixl"):
        assert said["environ"]["UCX_NET_DEVICES"] == "mlx5_0:1"
        assert said["environ"]["UCX_TLS"] == "rc"


@pytest.mark.parametrize("name", ["mooncake", "nixl"])
@slow
async def test_who_goes_another_way_has_no_figure_beside_a_nic(
    name: str, beside: Engines
) -> None:
    code, _, err, found = await beside.bench(
        *("--sizes", "1K", "--against", name), behaves=moving.ASIDE
    )
    assert code == 1
    assert f"kvxfer: {name}: RuntimeError: the engine has not opened mlx5_0" in err
    assert {w["contender"] for w in found["windows"]} == {"kvxfer"}


@slow
async def test_what_a_user_has_set_does_not_lead_mooncake_aside(
    beside: Engines,
) -> None:
    code, _, err, _ = await beside.bench(
        *("--sizes", "1K", "--against", "mooncake"), MC_FORCE_TCP="1"
    )
    assert code == 1
    assert "the engine has not opened mlx5_0" in err


@pytest.mark.parametrize(
    "name", ["memcpy", "shm-memcpy", "pvm-readv", "tcp", "nixl-tcp", "mooncake-bench"]
)
@slow
async def test_who_cannot_use_the_nic_is_not_beside_it(
    name: str, beside: Engines
) -> None:
    """Neither one that was named nor one that was found, nor compared the other way."""
    for arguments, nic in (
        (("--device", "mlx5_0", "--against", name), "--device mlx5_0"),
        (("--against", name), "mlx5_0, which --device auto takes here,"),
        (("--contender", name, "--against", "kvxfer"), "mlx5_0, which"),
    ):
        code, out, err, found = await beside.bench("--sizes", "1K", *arguments)
        assert (code, out, found) == (2, "", {})
        assert err.count("\n") == 1 and err.startswith(f"kvxfer: {nic} ")
        assert f"is a NIC: {name} " in err and "--device soft" in err


@slow
async def test_on_the_software_device_all_stand_together(beside: Engines) -> None:
    """The machine has a NIC, and the run is of copies of memory all the same."""
    code, _, err, found = await beside.bench(
        *("--device", "soft", "--sizes", "1K", "--against", "memcpy,mooncake,nixl-tcp")
    )
    assert (code, err) == (0, "")
    assert {w["kind"] for w in found["windows"]} == {"memory copies"}
    assert len(found["windows"]) == 4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_memory_copies_name_their_device(name: str) -> None:
    """Else they would be refused on a machine with a NIC."""
    defaults = PRESETS[name].defaults
    against = [who for who in defaults.get("against", "").split(",") if who]
    copies = any(contenders.find(who).no_nic for who in against)
    assert (defaults.get("device") == "soft") == (copies or "wire" in defaults)


@slow
async def test_options_that_choose_another_device_have_no_contender(
    beside: Engines,
) -> None:
    for option in ("nics=mlx5_1", "require_rdma=true", "device=soft"):
        code, _, err, _ = await beside.bench(
            *("--sizes", "1K", "--against", f"kvxfer:{option}")
        )
        assert code == 2
        assert f"kvxfer:{option}: a run has one device, see --device" in err
