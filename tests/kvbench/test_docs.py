"""The pages of ``docs/kvbench``: every command in them prints what stands there.

A ``console`` block is typed in a copy of ``examples/kvbench``; a block with a title
is a file. A line ``...`` stands for any lines.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvxfer.kvbench.loading import shipped_models

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "kvbench"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block with what it prints."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def as_pattern(output: str) -> str:
    return re.escape(output).replace(re.escape("...\n"), "(?:.*\n)+")


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    """A copy of the examples, with ``kvxfer`` and ``python`` on PATH."""
    here = tmp_path / "kvbench"
    shutil.copytree(
        ROOT / "examples" / "kvbench",
        here,
        ignore=shutil.ignore_patterns(".venv", "venv", "uv.lock"),
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, words in (("kvxfer", "-m kvxfer.cli"), ("python", "")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        tool.chmod(0o755)
    return here


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_commands_print_what_stands_there(page: str, typed: Path) -> None:
    env = {
        "PATH": f"{typed.parent / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "88",
    }
    for kind, title, body in BLOCK.findall((DOCS / page).read_text()):
        if title:
            path = typed / title
            path.parent.mkdir(exist_ok=True)
            path.write_text(body)
        elif kind == "console":
            for command, output in commands(body):
                done = subprocess.run(
                    ["sh", "-c", command],
                    cwd=typed,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, f"{command}\n{done.stderr}"
                assert re.fullmatch(as_pattern(output), done.stdout), command


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name}: {target}"


def test_the_shipped_models_are_listed() -> None:
    text = (DOCS / "creating-a-model-config.md").read_text()
    listed = re.findall(r"`([a-z0-9.-]+)`", text.partition("## Models that come")[2])
    assert sorted(listed) == shipped_models()
