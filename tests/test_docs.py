"""The documentation says what is so: its programs are files, and they run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixed_port import fixed_port
from tests.pages import RECORDED, current

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PROGRAM = re.compile(r"<!-- (examples/\S+) -->\n```python\n(.*?)```", re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
SCRIPT = re.compile(r"\bscripts/([a-z-]+)\b")
EXAMPLE = ROOT / "examples" / "quickstart"


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_scripts_that_are_named_exist(page: Path) -> None:
    named = set(SCRIPT.findall(page.read_text()))
    assert {name for name in named if not (ROOT / "scripts" / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_programs_shown_are_the_files(page: Path) -> None:
    for name, text in PROGRAM.findall(page.read_text()):
        assert text == (ROOT / name).read_text(), f"{name} is shown otherwise"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_programs_write_is_current(page: Path) -> None:
    text = page.read_text()
    assert current(text) == text, "run python -m tests.pages"


def test_the_quickstart_prints_what_it_says() -> None:
    said = (ROOT / "docs" / "quickstart.md").read_text()
    command = [sys.executable, "-W", "error"]
    with (
        fixed_port(7777),
        subprocess.Popen(
            [*command, EXAMPLE / "decode.py"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as decode,
    ):
        assert decode.stdout is not None
        try:
            first = decode.stdout.readline()
            prefill = subprocess.run(
                [*command, EXAMPLE / "prefill.py"],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                timeout=60,
                check=True,
            )
            rest, _ = decode.communicate(timeout=60)
        finally:
            decode.kill()
    assert decode.returncode == 0
    assert f"decode.py\n{first}{rest}```" in said
    assert f"prefill.py\n{prefill.stdout}```" in said


def test_what_machines_have_said_is_what_they_would_say() -> None:
    """The words, not the values: every check that is shown is still one, and told."""
    page = (ROOT / "docs" / "doctor.md").read_text()
    table = {
        word
        for row in re.findall(r"^\| ([^|]+) \|", page, re.M)
        for word in row.split(", ")
    }
    for _, name, text, _ in RECORDED.findall(page):
        found = re.findall(r"^(?:ok|note|warning|PROBLEM) +(\w[\w ]*?)  ", text, re.M)
        checks = {re.sub(r"^(device|MTU|write) \w+$", r"\1 NAME", f) for f in found}
        assert checks >= {"kvxfer", "memlock", "write NAME"}, name
        assert checks <= table, f"{name}: {checks - table}"


def test_each_defect_of_the_original_has_its_test() -> None:
    page = (ROOT / "docs" / "fastdeploy.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", page, re.M)
    rows = [row for row in rows if "::" in row[1]]
    assert [int(number) for number, _ in rows] == list(range(1, 37))
    for _, shown in rows:
        for file, name in re.findall(r"`(\S+)::(\w+)`", shown):
            text = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^(?:async )?def {name}\(", text, re.M), shown
