"""The side that is written to when kvxfer's own engine measures a plan.

It is a ``python -m kvxfer.serve``: one that is started here and ended with the
run, or one that somebody started elsewhere, by the command that is spelled here.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from kvxfer.kvbench.errors import PlanError, RunError, WrongUseError
from kvxfer.kvbench.measuring import check_sizes
from kvxfer.kvbench.nixlbench import TIMED_OUT

__all__ = ["DTYPE", "MAX_BYTES", "PLANE", "Endpoint", "Pool", "parse_target"]
__all__ += ["pool_for", "serve_argv", "serve_line", "unwound_by_sigterm"]

MAX_BYTES = 1 << 30  # blocks of each side; a plan that has more uses them again
PLANE = "kv"
DTYPE = "u8"
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Pool:
    """The blocks that a plan is measured with.

    Attributes:
      n_blocks: Blocks of the target.
      share: Blocks of each thread, here and there.
      places: Those of them that a batch goes to; fewer than the batch has where
        memory is short, and then each is written more than once.
    """

    block_bytes: int
    n_blocks: int
    share: int
    places: int


def pool_for(params: dict[str, Any]) -> Pool:
    """Return blocks enough for every thread's batch, twice over, or what fits.

    Twice, so that those of a batch lie scattered.

    Raises:
      PlanError: Not one block for each thread fits into ``MAX_BYTES``.
    """
    check_sizes(params)
    size, batch = params["max_block_size"], params["max_batch_size"]
    threads = params["num_threads"]
    share = min(2 * batch, MAX_BYTES // size // threads)
    if share < 1:
        raise PlanError(
            f"{threads} threads with a block of {size} bytes each take more than the "
            f"{MAX_BYTES} bytes that are measured with: fewer threads or smaller blocks"
        )
    return Pool(size, share * threads, share, min(batch, share))


def parse_target(text: str) -> tuple[str, int | None]:
    """Return host and port of ``HOST:PORT``, or ``ipc://PATH`` and None.

    Raises:
      WrongUseError: It is neither.
    """
    if text.startswith("ipc://") and len(text) > len("ipc://"):
        return text, None
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise WrongUseError(f"--target {text!r} is not HOST:PORT or ipc://PATH")
    return host, int(port)


def serve_argv(
    pool: Pool, host: str, port: int | None, *, verify: bool = False
) -> list[str]:
    """Return the command that starts an endpoint which ``pool`` fits."""
    argv = ["python", "-m", "kvxfer.serve", "--host", host.strip("[]")]
    if port is not None:
        argv += ["--port", str(port)]
    argv += ["--layers", "1", "--planes", PLANE, "--dtype", DTYPE]
    argv += ["--blocks", str(pool.n_blocks), "--block-bytes", str(pool.block_bytes)]
    return [*argv, "--verify"] if verify else argv


def serve_line(pool: Pool, host: str, port: int | None, *, verify: bool = False) -> str:
    """Return the same, to be pasted into a shell."""
    return shlex.join(serve_argv(pool, host, port, verify=verify))


class Endpoint:
    """An endpoint in a process of its own, on this machine.

    Use as a context manager: nothing of it is left after it, however it ends.

    Args:
      pool: Its blocks.
      verify: Let it check every block that arrives.
      deadline: When waiting for it ends, by ``time.monotonic``.
    """

    def __init__(self, pool: Pool, *, verify: bool, deadline: float) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self._deadline = deadline
        self._news = threading.Condition()
        self._arrived = 0
        self._wrong: list[int] = []
        self._ended = False
        argv = serve_argv(pool, self.host, 0, verify=verify)
        # Ctrl-C is for us: in our process group it would end under our writes.
        self._popen = subprocess.Popen(
            [sys.executable, *argv[1:], "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="kvbench-endpoint")
        self._reader.start()

    def _read(self) -> None:
        """Follow what it says until its end, whether anybody waits or not."""
        assert self._popen.stdout is not None
        try:
            for line in self._popen.stdout:
                event = json.loads(line)
                with self._news:
                    if event["event"] == "ready":
                        self.port = event["port"]
                    elif event["event"] == "arrival":
                        self._arrived += event["blocks"]
                        self._wrong += event.get("wrong_blocks", ())
                    self._news.notify_all()
        finally:
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _wait(self, enough: Callable[[], bool], what: str) -> None:
        with self._news:
            left = min(self._deadline - time.monotonic(), threading.TIMEOUT_MAX)
            self._news.wait_for(lambda: enough() or self._ended, left)
            if enough():
                return
        if self._ended:
            code = self._popen.wait()
            raise RunError(f"the endpoint ended with exit code {code} {what}")
        raise RunError(f"the endpoint took too long {what}", TIMED_OUT)

    def __enter__(self) -> Endpoint:
        try:
            self._wait(lambda: self.port != 0, "before it was ready")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def check(self, n_blocks: int) -> None:
        """Wait until so many blocks have been checked; to be asked with ``verify``.

        Raises:
          RunError: One does not hold what was sent, or it took too long.
        """
        self._wait(
            lambda: self._arrived >= n_blocks, "before it had checked all blocks"
        )
        if self._wrong:
            raise RunError(f"block {self._wrong[0]} does not hold what was written")

    def close(self) -> None:
        """End the process, by force if need be. Twice is fine."""
        if self._popen.poll() is None:
            self._popen.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(_STOP_SECONDS)
        finally:  # whoever is interrupted here does not leave it behind either
            if self._popen.poll() is None:
                self._popen.kill()
                self._popen.wait()
            self._reader.join()
            assert self._popen.stdout is not None
            self._popen.stdout.close()


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that no process stays behind.

    It does nothing outside the main thread, where signals are not ours.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
