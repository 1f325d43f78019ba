"""Defects known of the original in how it works: what it copies, how it waits, what
it says, and what it is built for. See the docstrings."""

from __future__ import annotations

import ast
import ctypes
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvxfer import blocking
from kvxfer.peer import Peer
from tests.communicators import (  # noqa: F401
    initiator_faults,
    nodes,
    quick,
    run_program,
)
from tests.endpoints import QUICK, SOON, arena, expected

ROOT = Path(__file__).parent.parent

# -- what a call takes ----------------------------------------------------------------

# Address space of which only what is touched takes memory.
LARGE = """
    import re, threading
    from pathlib import Path
    import numpy as np
    from rdma_comm import RDMACommunicator
    from tests.communicators import HOST, free_port

    N_LAYERS, N_BLOCKS, BLOCK_BYTES = 64, 1 << 20, 8

    def most():
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", text)[1]) << 10

    def pointers(held):
        return [layer.ctypes.data for layer in held]

    source, target = (
        np.zeros((N_LAYERS, N_BLOCKS * BLOCK_BYTES), np.uint8) for _ in range(2)
    )
    source[-1, -BLOCK_BYTES:] = 7
    port, sizes = free_port(), (N_BLOCKS, BLOCK_BYTES)
    before = most()
    decode = RDMACommunicator("decode", 0, port, pointers(target), [], *sizes)
    prefill = RDMACommunicator("prefill", 0, "0", pointers(source), [], *sizes)
    assert prefill.connect(HOST, port) == 0

    def work():
        for _ in range(8):
            code = prefill.write_cache(
                HOST, port, [0, N_BLOCKS - 1], [1, N_BLOCKS - 1], N_LAYERS - 1
            )
            assert code == 0

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (target[-1, -BLOCK_BYTES:] == 7).all()
    print((most() - before) / (N_LAYERS * N_BLOCKS * 8))
    prefill.close()
    decode.close()
"""


def test_a_call_makes_no_table_of_the_cache() -> None:
    """The original has a pointer for each block of each layer, and every call copies
    all of them, once for each plane. Here not even one such table fits into what all
    of it takes at most."""
    run = run_program(LARGE)
    assert (run.returncode, run.stderr) == (0, "")
    assert float(run.stdout) < 0.5


# -- how it waits ---------------------------------------------------------------------


def switches(thread: threading.Thread) -> int:
    """Count how often a thread has gone to sleep so far."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)[0])


def wait_until_all_sleep(threads: list[threading.Thread]) -> None:
    """Return once none of them wakes while this thread, as the original, looks."""
    deadline, here = time.monotonic() + SOON, threading.current_thread()
    while True:
        before, start = [switches(thread) for thread in threads], switches(here)
        while switches(here) < start + 20:
            time.sleep(0.01)
        if [switches(thread) for thread in threads] == before:
            return
        assert time.monotonic() < deadline, "they wake, and nothing has happened"


def test_who_waits_for_a_layer_does_not_look_again_and_again() -> None:
    """The original's engine looks every 10 ms whether the next layer is computed,
    every millisecond whether blocks were offered, and every 5 ms whether all is sent.
    Here whoever waits sleeps until there is something, on both sides."""
    with arena(seed=1) as source, arena(seed=2) as target:
        after = expected(source, target, target.memory, [1, 2], [8, 9])
        with (
            blocking.Server(target.cache, port=0, **QUICK) as server,
            blocking.Client(source.cache, listen="127.0.0.1:0", **QUICK) as client,
        ):
            request = client.open("r")
            assert client.listening is not None
            ticket = server.offer(client.listening, "r", {"main": [8, 9]})
            waits: list[Callable[[], Any]] = [
                request.join,
                ticket.join,
                *(lambda n=n: ticket.join_layer(n) for n in range(3)),
            ]
            threads = [threading.Thread(target=wait, daemon=True) for wait in waits]
            for thread in threads:
                thread.start()
            wait_until_all_sleep(threads)
            for layer in range(3):
                request.ready(layer, [1, 2], final=True)
                threads[2 + layer].join(SOON)
            request.finish()
            for thread in threads:
                thread.join(SOON)
            assert not any(thread.is_alive() for thread in threads)
            assert (target.memory == after).all()


# -- what it says ---------------------------------------------------------------------


def test_a_refused_post_is_told_by_its_own_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ibv_post_send() returns its error and leaves errno alone. The original prints
    errno, which is that of anything before: "File name too long" in production."""
    begin, c_library = Peer.begin, ctypes.CDLL(None)

    def with_a_stale_errno(self: Peer, *arguments: Any) -> Any:
        # In the thread that posts, as late as Python can; it is still there then.
        assert c_library.open(b"x" * 5000, os.O_RDONLY) == -1
        return begin(self, *arguments)

    monkeypatch.setattr(Peer, "begin", with_a_stale_errno)
    with nodes() as pair:
        initiator_faults(pair, "act=enomem@post=1")
        assert pair.write([1], [2]) == -1
    assert f"[Errno {errno.ENOMEM}] ibv_post_send failed with ENOMEM" in caplog.text
    assert os.strerror(errno.ENAMETOOLONG) not in caplog.text


# -- what it is built for, and by what it is tested -----------------------------------


def test_the_import_leaves_arithmetic_alone() -> None:
    """The original is built with -ffast-math: to load such a library makes the
    smallest floats zero, in all of the process."""
    run = run_program(
        """
        import rdma_comm, sys
        import kvxfer.bench._limits
        smallest = sys.float_info.min
        assert 0 < smallest / 4 < smallest
        """
    )
    assert (run.returncode, run.stderr) == (0, "")


FLAGS = """
import json, runpy, setuptools
def show(ext_modules, **_):
    print(json.dumps([e.extra_compile_args for e in ext_modules]))
setuptools.setup = show
runpy.run_path("setup.py")
"""


def test_it_is_not_built_for_one_machine() -> None:
    """The original is built with -march=native, and the wheel says that it is for all
    machines; on an older processor it ends with an illegal instruction. What our
    wheels are called is looked at when one is tried."""
    run = subprocess.run(
        [sys.executable, "-c", FLAGS], cwd=ROOT, capture_output=True, check=True
    )
    for flags in json.loads(run.stdout):
        bad = [f for f in flags if re.match(r"-m|-Ofast|-ffast-math|-funsafe", f)]
        assert (bad, "-pthread" in flags) == ([], True)


def test_these_tests_meet_the_module_and_run_with_the_others() -> None:
    """The original's tests of Python replace the module by a mock, and its C++ and
    its verbs have none."""
    for path in sorted((ROOT / "tests").glob("test_rdma_comm*.py")):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
        assert not any("mock" in name for name in imported), path.name
    steps = re.findall(
        r"^run_step \w+ \d+ (\S+)", (ROOT / "scripts" / "check").read_text(), re.M
    )
    assert {"scripts/test", "tests/c/run.sh", "scripts/test-rdma"} <= set(steps)
    assert "exec scripts/check" in (ROOT / ".ci" / "run").read_text()
