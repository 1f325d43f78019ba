"""Run rdma-core's own pyverbs tests on a device and print one line for each.

    python3 pyverbs_results.py TESTS DEVICE GID_INDEX

``TESTS`` is a directory with the tests as rdma-core's package ships them,
unpacked. It needs the system's python3, which python3-pyverbs is built for, and
nothing of kvxfer: on the software device it is started with the shim preloaded,
in a guest or on a machine with a NIC without.

A line is the verdict (``ok``, ``skip`` or ``fail``), the test's name and the
reason, with tabs between. What a failure says in full goes to standard error.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

MODULES = (
    *("addr", "atomic", "cq", "cq_events", "cqex", "device", "fork", "mr", "odp"),
    *("parent_domain", "pd", "qp", "qpex", "relaxed_ordering"),
)
"""Those that concern one device and no vendor's; the rest needs rdma_cm, raw
packets, shared file descriptors of the kernel or a particular NIC."""


class Lines(unittest.TestResult):
    """Prints the verdict of each test as soon as it is known."""

    def _say(self, verdict: str, test: unittest.TestCase, reason: str = "") -> None:
        reason = " ".join(reason.split())
        sys.stdout.write(f"{verdict}\t{test.id()}\t{reason}".rstrip() + "\n")
        sys.stdout.flush()

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._say("ok", test)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._say("skip", test, reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._failed(test, self.failures[-1][1])

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._failed(test, self.errors[-1][1])

    def _failed(self, test: unittest.TestCase, trace: str) -> None:
        sys.stderr.write(trace)
        self._say("fail", test, trace.strip().splitlines()[-1])


def main() -> int:
    """Run them; the exit status is 0 unless a test failed."""
    directory, device, gid_index = sys.argv[1:]
    # As their own run_tests.py does it: the package is called "tests", and the
    # options are what is left of the command line.
    sys.path.insert(0, directory)
    sys.argv[1:] = ["--dev", device, "--gid", gid_index]
    SourceFileLoader("tests", str(Path(directory, "__init__.py"))).load_module()
    importlib.import_module("args_parser").parser.parse_args()

    loader = unittest.TestLoader()
    result = Lines()
    for module in MODULES:
        name = f"tests.test_{module}"
        if name not in sys.modules:
            raise SystemExit(f"{directory} has no test_{module}.py")
        loader.loadTestsFromModule(sys.modules[name]).run(result)
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
