"""A libibverbs that is not there, is something else, or is older than some symbols."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endpoints import SOON

SOURCE = Path(__file__).parent.parent / "kvxfer/native/verbs_dynamic.c"
WANTED = re.findall(
    r'"(ibv_\w+)",\s+"IBVERBS_[\d.]+",\s+(REQUIRED|OPTIONAL)', SOURCE.read_text()
)
REQUIRED = [name for name, need in WANTED if need == "REQUIRED"]


# A process loads one libibverbs in its life.
PROGRAM = """
import sys
from kvxfer._verbs import Device, list_devices
from kvxfer.errors import DeviceUnavailableError

for call in (
    lambda: list_devices("libibverbs", path=sys.argv[1]),
    lambda: Device("mlx5_0", provider="libibverbs", path=sys.argv[1]),
):
    try:
        print(call())
    except DeviceUnavailableError as error:
        print(error)
"""


def load(path: str) -> list[str]:
    """List the devices of a library and open one; what comes of it, a line each."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path],
        stdout=subprocess.PIPE,
        text=True,
        timeout=SOON,
        check=True,
    )
    return done.stdout.splitlines()


def library(path: Path, symbols: list[str]) -> str:
    """Compile a library with these symbols, which knows of no device."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    lines = ["static void *none[1];"]
    for name in symbols:
        ends = name == "ibv_get_device_list"
        body = "if (n) *n = 0; return none;" if ends else "(void)n; return 0;"
        lines.append(f"void *{name}(int *n) {{ {body} }}")
    code = path.with_suffix(".c")
    code.write_text("\n".join(lines))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, code], check=True)
    return str(path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/libibverbs.so.1", "No such file or directory"),
        ("libc.so.6", "libc.so.6 has no symbol ibv_get_device_list"),
    ],
)
def test_what_is_not_there_and_what_is_something_else(path: str, words: str) -> None:
    listed, opened = load(path)
    for said in (listed, opened):
        assert words in said and "install rdma-core" in said


@pytest.mark.parametrize("missing", ["ibv_query_qp", "ibv_get_async_event"])
def test_a_symbol_that_is_needed_and_missing_is_named(
    missing: str, tmp_path: Path
) -> None:
    assert missing in REQUIRED
    path = library(tmp_path / "old.so", [n for n in REQUIRED if n != missing])
    for said in load(path):
        assert f"has no symbol {missing}" in said


def test_what_came_later_is_not_needed(tmp_path: Path) -> None:
    """ibv_reg_mr_iova2 and ibv_reg_dmabuf_mr: of rdma-core 29 and 34."""
    assert len(WANTED) - len(REQUIRED) == 2
    listed, opened = load(library(tmp_path / "old.so", REQUIRED))
    assert listed == "[]"
    assert "mlx5_0" in opened and "symbol" not in opened
