"""Say which of rdma-core's pyverbs tests the software device must pass.

    python3 tests/shim/pyverbs_required.py [--write] RELEASES <RESULTS

``RESULTS`` is what :mod:`pyverbs_results` printed for Soft-RoCE, ``RELEASES`` says
which one that was. Required is what passes there, less what has nothing to try on the
software device. Each of those stands in the list with its reason. ``--write`` puts the
list into ``tests/pyverbs_required.txt``; without it, one that names other tests than
that file is a failure. ``scripts/test-rdma --pyverbs`` runs both in a guest.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

LIST = Path(__file__).parent.parent / "pyverbs_required.txt"
HEAD = """\
# rdma-core's pyverbs tests that the software device must pass; scripts/test-shim
# holds it to them. Made by scripts/test-rdma --pyverbs from what passes on Soft-RoCE:
# {releases}.
#
# A line with "-" is not required although it passes there; the reason follows.
"""

REASONS = (
    (r"_uc_qp", "its QPs are UC: the device has RC and UD"),
    (
        r"query_gid_ex_bad_flow",
        "wants a GID table with holes; this one has a single entry",
    ),
)
"""Patterns of names, and why those that match are not required."""


def reason_to_leave_out(name: str) -> str | None:
    for pattern, reason in REASONS:
        if re.search(pattern, name):
            return reason
    return None


def read_required(text: str) -> tuple[list[str], dict[str, str]]:
    """Take the list apart: what is required, and what is not and why."""
    required, left_out = [], {}
    for line in text.splitlines():
        if line.startswith("- "):
            name, _, reason = line[2:].partition("  # ")
            left_out[name] = reason
        elif line and not line.startswith("#"):
            required.append(line)
    return required, left_out


def make_list(results: str, releases: str) -> str:
    """Make the list from what was printed for Soft-RoCE, whatever else is in it."""
    fields = (line.split("\t") for line in results.splitlines() if "\t" in line)
    passed = sorted(name for verdict, name, *_ in fields if verdict == "ok")
    lines = [HEAD.format(releases=releases)]
    for name in passed:
        reason = reason_to_leave_out(name)
        lines.append(f"- {name}  # {reason}" if reason else name)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("releases")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    made = make_list(sys.stdin.read(), arguments.releases)
    required, left_out = read_required(made)
    if not required:
        sys.stdout.write("no test that is required has passed: was that Soft-RoCE?\n")
        return 1
    sys.stdout.write(
        f"{len(required) + len(left_out)} tests pass on Soft-RoCE; required are "
        f"{len(required)}, left out {len(left_out)}\n"
    )
    before = LIST.read_text()
    if arguments.write:
        LIST.write_text(made)
    elif read_required(before) != (required, left_out):
        sys.stdout.writelines(
            difflib.unified_diff(
                before.splitlines(True), made.splitlines(True), LIST.name, "this run"
            )
        )
        sys.stdout.write("scripts/test-rdma --pyverbs --write updates the list\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
