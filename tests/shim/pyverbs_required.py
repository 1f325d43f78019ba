"""Say which of rdma-core's pyverbs tests the software device must pass.

    python3 tests/shim/pyverbs_required.py <RESULTS >tests/pyverbs_required.txt

``RESULTS`` is what :mod:`pyverbs_results` printed for Soft-RoCE. Required is what
passes there, less what the software device does not have: it has RC, CQs, MRs and
events. Each of those stands in the list with its reason.
"""

from __future__ import annotations

import re
import sys

HEAD = """\
# rdma-core's pyverbs tests that the software device must pass; scripts/test-shim
# holds it to them. Made by tests/shim/pyverbs_required.py from what passes on
# Soft-RoCE (rdma_rxe of Linux 6.1.192) with rdma-core 44.0 of Debian 12.
#
# A line with "-" is not required although it passes there; the reason follows.
"""

REASONS = (
    (r"test_addr\.", "address handles: they belong to datagrams"),
    (r"_uc_qp", "UC: the device has RC only"),
    (
        r"test_resize_cq",
        "fills its CQ with sends of a UD QP; over RC: tests/c/test_cq.c",
    ),
    (r"_ud_|_ud$|query_data_in_order", "its QPs are UD, not RC"),
    (r"test_qp\..*raw_qp_ex_with_illegal_caps", "its QPs are UD, not RC"),
    (r"test_qpex\..*_bad_flow", "its QPs are UD, not RC"),
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


def main() -> None:
    results = (line.rstrip("\n").split("\t") for line in sys.stdin)
    passed = sorted(name for verdict, name, *_ in results if verdict == "ok")
    sys.stdout.write(f"{HEAD}\n")
    for name in passed:
        reason = reason_to_leave_out(name)
        sys.stdout.write(f"- {name}  # {reason}\n" if reason else f"{name}\n")


if __name__ == "__main__":
    main()
