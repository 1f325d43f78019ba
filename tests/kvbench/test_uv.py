"""``uv sync`` in ``examples/kvbench``, as the first release's readers type it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.skipif(UV is None, reason="uv is not installed")
@pytest.mark.parametrize("active", [True, False])
def test_uv_sync(tmp_path: Path, active: bool) -> None:
    assert UV is not None
    # A checkout with nothing in it that was built or installed.
    shutil.copytree(
        ROOT / "kvxfer",
        tmp_path / "kvxfer",
        ignore=shutil.ignore_patterns("*.so", "*.c", "*.h", "__pycache__"),
    )
    here = tmp_path / "examples" / "kvbench"
    shutil.copytree(
        ROOT / "examples" / "kvbench",
        here,
        ignore=shutil.ignore_patterns(".venv", "venv", "uv.lock", "__pycache__"),
    )
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    env.pop("PYTHONPATH", None)
    folder = here / ".venv"
    if active:
        folder = here / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        env["VIRTUAL_ENV"] = str(folder)
    words = [UV, "sync", *(["--active"] if active else [])]
    done = subprocess.run(words, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [str(folder / "bin" / "python"), "main.py", "iosize"]
    command += ["--model", "./examples/model_deepseek_r1.yaml"]
    command += ["--model_config", "./examples/block-tp1-pp8.yaml"]
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    assert done.stdout == "IO Size per GPU: 4608\n", done.stderr
