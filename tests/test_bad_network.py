"""The TCP wire and the control connection over a network that is not good.

The network is a namespace of the test's own, and netem the kernel's; where either is
not to be had the tests are skipped. ``scripts/test-rdma`` runs them in its guest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import patient

pytestmark = pytest.mark.netem

ROOT = Path(__file__).parent.parent


#: As netem has it: late by so much and so much around it, and one in a hundred lost;
#: some without the delay that the others have, and so before them.
TREATMENTS = ["delay 10ms 5ms loss 1%", "delay 5ms reorder 25% 50%"]


def test_every_byte_arrives_and_nobody_waits_for_ever() -> None:
    """And when nothing arrives any more, that is an error; later it goes on."""
    for program in ("unshare", "ip", "tc"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    alone = ["unshare", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here")
    done = subprocess.run(
        [*alone, sys.executable, "-m", "tests.lossy", *TREATMENTS],
        capture_output=True,
        text=True,
        timeout=patient(100.0),
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if "no netem" in found[0]:
        pytest.skip(f"no netem here: {found[0]['no netem']}")
    assert [each["how"] for each in found] == TREATMENTS
    *others, last = [each["error"] for each in found]
    assert not any(others)
    assert last in ("BrokenPeerError", "RetryExceededError")
