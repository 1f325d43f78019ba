"""Ports that the examples of the documentation name."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def fixed_port(port: int) -> Iterator[None]:
    """Have a port for oneself, among all tests of this machine; skip if it is taken.

    Two runs of an example at a time are one too many even where both could bind: they
    would find each other.
    """
    path = Path(tempfile.gettempdir()) / f"kvxfer-test-port-{port}"
    # It may be another user's, to be read by us: that will do for a lock.
    if not path.exists():
        path.touch()
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            pytest.skip(f"another program here has an example's port, {port}")
        yield
