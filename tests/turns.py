"""One device, several test processes: some tests must have it to themselves."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(alone: bool) -> Iterator[None]:
    """Wait for a turn on the RDMA device of this machine, and have it meanwhile.

    Whoever wants it alone, since it takes a link down or counts what the kernel
    holds, waits until all others are done, and they wait for him.
    """
    path = Path(tempfile.gettempdir()) / f"kvxfer-rdma-{os.getuid()}.lock"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
