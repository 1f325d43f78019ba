"""What people install: both ways to build, the wheel, and one line on failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvxfer

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", "build", "dist", "*.so", "*.egg-info", "__pycache__"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources as a clean clone would have them."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT, symlinks=True)
    return copy


def run(
    *command: str | Path, cwd: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return done.stdout


def only(directory: Path, pattern: str) -> Path:
    (path,) = directory.glob(pattern)
    return path


def our_words(done: subprocess.CompletedProcess[str]) -> str:
    """What the build said, less what old versions of setuptools warn of."""
    assert "Traceback" not in done.stdout
    (line,) = [li for li in done.stdout.splitlines() if li.startswith("kvxfer: ")]
    assert done.stdout.endswith(line + "\n"), "something comes after the reason"
    return line


def without_headers(tmp_path: Path) -> str:
    """A compiler that finds no infiniband headers, as on a machine without them."""
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\n"
        "input=$(cat)\ncase $input in *infiniband*) exit 1 ;; esac\n"
        'printf "%s\\n" "$input" | exec cc "$@"\n'
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_the_version_is_the_one_of_the_metadata() -> None:
    versions = succeed(sys.executable, "setup.py", "--version", cwd=ROOT)
    assert versions.split()[-1] == kvxfer.__version__


def test_a_build_without_verbs_headers_stops_with_one_line(
    source: Path, tmp_path: Path
) -> None:
    build = (sys.executable, "setup.py", "-q", "build_ext")
    done = run(*build, cwd=source, CC=without_headers(tmp_path))
    assert done.returncode != 0
    line = our_words(done)
    assert "infiniband/verbs.h is missing" in line
    assert "libibverbs-dev" in line and "rdma-core-devel" in line


def test_a_build_on_another_platform_stops_with_one_line(source: Path) -> None:
    code = (
        "import platform, runpy, sys; platform.machine = lambda: 'sparc64'; "
        "sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py')"
    )
    done = run(sys.executable, "-c", code, cwd=source)
    assert done.returncode != 0
    assert "Linux on x86-64 or aarch64 only" in our_words(done)


@pytest.mark.slow
def test_setup_py_bdist_wheel_makes_a_wheel_that_works(source: Path) -> None:
    succeed(sys.executable, "setup.py", "bdist_wheel", cwd=source)
    wheel = only(source / "dist", "*.whl")
    succeed(sys.executable, "scripts/try_wheel.py", wheel, cwd=source)
