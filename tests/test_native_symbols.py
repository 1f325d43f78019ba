"""The extensions import where there is no rdma-core: they link to none of it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

VERBS = ["_handles", "_providers", "_structs", "_device", "_memory", "_verbs"]
ENGINE = ["_core", "_post", "_progress", "_driver", "_queues", "_submission"]
ENGINE += ["_engine"]
EXTENSIONS = [f"kvxfer.{name}" for name in [*VERBS, *ENGINE]]


def shared_object(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is not built"
    return Path(spec.origin)


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} of binutils is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", EXTENSIONS)
def test_no_verb_is_called_by_name(module: str) -> None:
    lines = run("nm", "-D", "--undefined-only", str(shared_object(module))).splitlines()
    symbols = [line.split()[-1] for line in lines]
    assert symbols, "nm showed nothing at all"
    assert [name for name in symbols if name.startswith("ibv_")] == []


@pytest.mark.parametrize("module", EXTENSIONS)
def test_no_library_of_rdma_core_is_needed(module: str) -> None:
    dynamic = run("readelf", "-d", str(shared_object(module)))
    needed = [line for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert needed, "readelf showed no libraries at all"
    assert [line for line in needed if "ibverbs" in line or "rdma" in line] == []


@pytest.mark.parametrize("module", EXTENSIONS)
def test_only_the_module_is_exported(module: str) -> None:
    lines = run("nm", "-D", "--defined-only", str(shared_object(module))).splitlines()
    symbols = {line.split()[-1] for line in lines}
    assert symbols - {"_init", "_fini"} == {"PyInit_" + module.rpartition(".")[2]}


def test_the_software_device_is_linked_once() -> None:
    names = {
        module: run("nm", str(shared_object(module))).count(" kvx_load_softdev")
        for module in EXTENSIONS
    }
    if not any(names.values()):
        pytest.skip("the extensions are stripped")
    assert names == {name: int(name == "kvxfer._providers") for name in EXTENSIONS}
