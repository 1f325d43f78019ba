"""The parts of the documentation that a program writes.

    python -m tests.pages

writes them anew. What is between ``<!-- generated: WHAT -->`` and the next
``<!-- end of generated -->`` in a page of docs/ is the answer to WHAT.
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
from tests.machines import make

ROOT = Path(__file__).parent.parent
PART = re.compile(
    r"(<!-- generated: ([^\n]*) -->\n)(.*?)(<!-- end of generated -->)", re.S
)


def devices(machine: str, *arguments: str) -> str:
    """What ``kvxfer devices`` says of a machine that is made up."""
    with tempfile.TemporaryDirectory() as directory:
        sysfs = make(machine, Path(directory) / "machine").sys
        result = CliRunner().invoke(
            devices_cli.main, ["--sysfs", str(sysfs), *arguments]
        )
    return f"```\n{result.stdout}{result.stderr}```\n"


WRITERS: dict[str, Callable[..., str]] = {
    "devices": devices,
    "options": config_cli.markdown,
}


def current(text: str) -> str:
    """Return a page with its generated parts as they should be."""

    def part(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[2])
        return match[1] + WRITERS[name](*arguments) + match[4]

    return PART.sub(part, text)


def main() -> None:
    """Write all pages; say which have changed."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        before = page.read_text()
        after = current(before)
        if after != before:
            page.write_text(after)
            sys.stdout.write(f"{page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
