"""The parts of the documentation that a program writes.

    python -m tests.pages

writes them anew. What is between ``<!-- generated: WHAT -->`` and the next
``<!-- end of generated -->`` in a page of docs/ is the answer to WHAT.

    kvxfer doctor | python -m tests.pages --record NAME
    scripts/test-rdma -n 0 -k test_the_command
    python -m tests.pages --record soft-roce < .cache/test-rdma.log

puts what a real machine has said between ``<!-- recorded: NAME -->`` and
``<!-- end of recorded -->``. Of a log it takes what is between the lines
``doctor says`` and ``doctor ends``.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from kvxfer import config_cli, devices_cli
from kvxfer.doctor import cli as doctor_cli
from tests.machines import make

ROOT = Path(__file__).parent.parent
PART = re.compile(
    r"(<!-- generated: ([^\n]*) -->\n)(.*?)(<!-- end of generated -->)", re.S
)


RECORDED = re.compile(
    r"(<!-- recorded: ([^\n]*) -->\n)(.*?)(<!-- end of recorded -->)", re.S
)
SAYS, ENDS = "doctor says", "doctor ends"


def devices(machine: str, *arguments: str) -> str:
    """What ``kvxfer devices`` says of a machine that is made up."""
    with tempfile.TemporaryDirectory() as directory:
        sysfs = make(machine, Path(directory) / "machine").sys
        result = CliRunner().invoke(
            devices_cli.main, ["--sysfs", str(sysfs), *arguments]
        )
    return f"```\n{result.stdout}{result.stderr}```\n"


def doctor(machine: str, *arguments: str) -> str:
    """What ``kvxfer doctor`` says of a machine that is made up."""
    with tempfile.TemporaryDirectory() as directory:
        root = make(machine, Path(directory) / "machine").root
        result = CliRunner(env={"KVXFER_CONFIG": ""}).invoke(
            doctor_cli.main, ["--root", str(root), *arguments]
        )
    return f"```\n{result.stdout}{result.stderr}```\n"


WRITERS: dict[str, Callable[..., str]] = {
    "devices": devices,
    "doctor": doctor,
    "options": config_cli.markdown,
}


def current(text: str) -> str:
    """Return a page with its generated parts as they should be."""

    def part(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[2])
        return match[1] + WRITERS[name](*arguments) + match[4]

    return PART.sub(part, text)


def record(page: str, name: str, said: str) -> str:
    """Return a page with what a machine has said."""
    lines = [line.rstrip() for line in said.splitlines()]
    if SAYS in lines:
        lines = lines[lines.index(SAYS) + 1 : lines.index(ENDS)]
    text = "```\n" + "\n".join(lines) + "\n```\n"
    return RECORDED.sub(lambda m: m[1] + text + m[4] if m[2] == name else m[0], page)


def main(arguments: list[str]) -> None:
    """Write all pages; say which have changed."""
    said = sys.stdin.read() if arguments[:1] == ["--record"] else ""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        before = page.read_text()
        after = record(before, arguments[1], said) if said else current(before)
        if after != before:
            page.write_text(after)
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
