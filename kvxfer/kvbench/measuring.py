"""What the engines share: how often, the bar, and times to a row of results."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from kvxfer.kvbench.errors import PlanError
from kvxfer.kvbench.plan import Plan
from kvxfer.kvbench.results import Result, percentile, result_for

__all__ = ["Bar", "at_once", "check_sizes", "iterations", "measured_result"]

T = TypeVar("T")

_LARGE_BLOCK = 1 << 20


def check_sizes(params: dict[str, Any]) -> None:
    """Raise PlanError where there is nothing to transfer."""
    block, batch = params["max_block_size"], params["max_batch_size"]
    if block < 1 or batch < 1:
        raise PlanError(f"nothing to transfer: {batch} blocks of {block} bytes")


def iterations(params: dict[str, Any]) -> tuple[int, int]:
    """Return the iterations of warm-up and of the measurement, over all threads.

    As nixlbench: both are rounded up to a multiple of threads x the factor for
    large blocks, and then fewer by that factor if a block is over 1 MiB.
    """
    step = params["num_threads"] * params["large_blk_iter_ftr"]
    counts = []
    for name in ("warmup_iter", "num_iter"):
        count = -(-params[name] // step) * step
        if params["max_block_size"] > _LARGE_BLOCK:
            count //= params["large_blk_iter_ftr"]
        counts.append(count)
    return counts[0], counts[1]


def measured_result(
    plan: Plan,
    engine: str,
    *,
    prep: Sequence[float],
    post: Sequence[float],
    tx: Sequence[float],
    seconds: float,
) -> Result:
    """Return the row for what all threads measured.

    Args:
      plan: What was run.
      engine: What ran it.
      prep: Seconds that each request took to make; none if none was made anew.
      post: Seconds that each batch took to post.
      tx: Seconds from the post of each batch until all of it was there.
      seconds: All of it, by the clock on the wall.
    """
    params = plan.params
    batch = params["max_batch_size"]
    moved = params["max_block_size"] * batch * len(tx)
    per_thread = len(tx) / params["num_threads"]
    return result_for(
        plan,
        engine,
        bandwidth_gb_s=moved / seconds / 1e9,
        avg_latency_us=1e6 * seconds / (per_thread * batch),
        avg_prep_us=1e6 * sum(prep) / len(prep) if prep else None,
        p99_prep_us=1e6 * percentile(prep, 0.99) if prep else None,
        avg_post_us=1e6 * sum(post) / len(post),
        p99_post_us=1e6 * percentile(post, 0.99),
        avg_tx_us=1e6 * sum(tx) / len(tx),
        p50_tx_us=1e6 * percentile(tx, 0.5),
        p90_tx_us=1e6 * percentile(tx, 0.9),
        p99_tx_us=1e6 * percentile(tx, 0.99),
        iterations=len(tx),
        seconds=seconds,
    )


def at_once(
    work: Callable[[T], None], workers: Sequence[T], stop: Callable[[], None]
) -> None:
    """Do ``work`` for each of ``workers`` in a thread of its own, all at once.

    No thread is left when this returns or raises, whichever way.

    Args:
      work: What to do.
      workers: For whom.
      stop: Makes all work end soon; called when one fails, or on Ctrl-C.

    Raises:
      BaseException: The first that any of the work raised.
    """
    failures: list[BaseException] = []

    def guarded(worker: T, ended: threading.Event) -> None:
        try:
            work(worker)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)
            stop()
        finally:
            ended.set()

    ends = [threading.Event() for _ in workers]
    threads = [
        threading.Thread(target=guarded, args=arguments)
        for arguments in zip(workers, ends, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        # Not join(): CPython takes one that is interrupted for a thread's end.
        for ended in ends:
            ended.wait()
    except BaseException:
        stop()
        for thread, ended in zip(threads, ends, strict=True):
            while thread.ident is not None and not ended.is_set():
                # What they use is freed next: a second Ctrl-C makes it no quicker.
                with suppress(BaseException):
                    ended.wait()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]


class Bar:
    """A bar on stderr; of no steps, it shows nothing."""

    _WIDTH = 40
    _EVERY = 0.2  # seconds

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._start = self._shown = time.monotonic()
        self._lock = threading.Lock()

    def step(self) -> None:
        """Count one; from any thread."""
        with self._lock:
            self._done += 1
            now = time.monotonic()
            if self._steps and now - self._shown >= self._EVERY:
                self._shown = now
                left = (now - self._start) / self._done * (self._steps - self._done)
                filled = self._WIDTH * self._done // self._steps
                sys.stderr.write(
                    f"\r[{'#' * filled:<{self._WIDTH}}] {self._done}/{self._steps}, "
                    f"{left:.0f} s left "
                )
                sys.stderr.flush()

    def end(self) -> None:
        """Take the bar off the screen."""
        if self._steps:
            sys.stderr.write(f"\r{' ' * (self._WIDTH + 50)}\r")
            sys.stderr.flush()
