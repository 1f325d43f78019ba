"""Measure a plan on kvxfer's own transfer engine.

A thread of the plan is a thread here, with an event loop, a client, a connection
and blocks of its own. It writes its batch as often as the plan says, one after the
other, into blocks of an endpoint in another process: scattered blocks to scattered
blocks. Memory is bounded; a larger batch uses the same blocks again.

The rest of kvbench does without numpy, asyncio and the compiled extension: this
module is imported when a plan is about to be measured, and not before.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvxfer import Client, KVCache, Peer, WriteResult, pattern
from kvxfer.errors import (
    GeometryMismatchError,
    KVXferError,
    LayoutError,
    OptionError,
    UsageError,
    WriteTimeoutError,
)
from kvxfer.kvbench.endpoint import (
    DTYPE,
    PLANE,
    Endpoint,
    Pool,
    parse_target,
    pool_for,
    serve_line,
    unwound_by_sigterm,
)
from kvxfer.kvbench.errors import KVBenchError, RunError, WrongUseError
from kvxfer.kvbench.measuring import Bar, at_once, iterations, measured_result
from kvxfer.kvbench.nixlbench import TIMED_OUT
from kvxfer.kvbench.plan import Plan
from kvxfer.kvbench.results import Result

__all__ = ["run_transfer"]

_SEED = 1
_TOO_LONG = "the run took longer than --timeout allows"

Piece = tuple[Any, Any]
"""Local and remote ids of one write."""


@dataclass(eq=False)
class _Worker:
    """One thread: its blocks, where they go, and what it measured."""

    cache: KVCache
    local: Any
    remote: Any
    pieces: list[Piece] = field(default_factory=list)
    prep: list[float] = field(default_factory=list)
    post: list[float] = field(default_factory=list)
    tx: list[float] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0
    sent_blocks: int = 0
    way: str = ""
    loop: asyncio.AbstractEventLoop | None = None
    task: asyncio.Task[None] | None = None


class _Posting:
    """Awaits a write and notes how long its first step took: until it was posted."""

    def __init__(self, write: Coroutine[Any, Any, WriteResult]) -> None:
        self._write = write
        self.seconds = 0.0

    def __await__(self) -> Generator[Any, Any, WriteResult]:
        start = time.perf_counter()
        try:
            waited_for = self._write.send(None)
            self.seconds = time.perf_counter() - start
            while True:
                try:
                    value = yield waited_for
                except BaseException as error:  # noqa: BLE001 - theirs to handle
                    waited_for = self._write.throw(error)
                else:
                    waited_for = self._write.send(value)
        except StopIteration as end:
            result: WriteResult = end.value
            return result


class _Run:
    """What the threads of one run share."""

    def __init__(
        self,
        params: dict[str, Any],
        pool: Pool,
        address: tuple[str, int | None],
        deadline: float,
        bar: Bar,
    ) -> None:
        self.params = params
        self.pool = pool
        self.address = address
        self.bar = bar
        self._deadline = deadline
        self._lock = threading.Lock()
        self._stopped = False
        self._workers: list[_Worker] = []
        self._barrier = threading.Barrier(self.params["num_threads"])

    def left(self) -> float:
        """Return the seconds that the run may still take.

        Raises:
          RunError: None (exit code 124).
        """
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise RunError(_TOO_LONG, TIMED_OUT)
        return seconds

    def work(self, worker: _Worker) -> None:
        """Do one thread's share, in that thread."""
        asyncio.run(self._measure(worker))

    def stop(self) -> None:
        """Let every thread end soon. What is in flight completes first."""
        with self._lock:
            self._stopped = True
            workers = list(self._workers)
        self._barrier.abort()
        for worker in workers:
            assert worker.loop is not None
            assert worker.task is not None
            try:
                worker.loop.call_soon_threadsafe(worker.task.cancel)
            except RuntimeError:
                continue  # its loop is closed: it has ended by itself

    def _join(self, worker: _Worker) -> None:
        worker.loop = asyncio.get_running_loop()
        worker.task = asyncio.current_task()
        with self._lock:
            if self._stopped:
                raise asyncio.CancelledError
            self._workers.append(worker)

    async def _measure(self, worker: _Worker) -> None:
        self._join(worker)
        share = self.params["num_threads"]
        warmup, counted = (count // share for count in iterations(self.params))
        async with Client(worker.cache) as client:
            peer, piece = await self._connect(client, worker)
            worker.pieces = _pieces(worker, self.params["max_batch_size"], piece)
            for _ in range(warmup):
                await self._batch(client, peer, worker, piece)
            for times in (worker.prep, worker.post, worker.tx):
                times.clear()
            # In a thread: the connections must go on answering while some wait.
            await asyncio.get_running_loop().run_in_executor(None, self._barrier.wait)
            worker.begin = time.perf_counter()
            for _ in range(counted):
                await self._batch(client, peer, worker, piece)
            worker.end = time.perf_counter()

    async def _connect(self, client: Client, worker: _Worker) -> tuple[Peer, int]:
        """Connect, and find out how many blocks one write may have.

        Raises:
          RunError: The target's blocks are others, or fewer, than the plan's.
        """
        try:
            seconds = min(client.options.connect_timeout, self.left())
            peer = await client.connect(*self.address, timeout=seconds)
            return peer, await self._find_piece(client, peer, worker)
        except (GeometryMismatchError, LayoutError) as error:
            verify = self.params["check_consistency"]
            line = serve_line(self.pool, *self.address, verify=verify)
            raise RunError(
                f"the target does not fit the plan: {error}\nstart it with: {line}"
            ) from error

    async def _find_piece(self, client: Client, peer: Peer, worker: _Worker) -> int:
        """Return how many blocks one write may have, by making one.

        The record that announces a write holds its ids, in a ring whose size is
        the target's affair.
        """
        n = len(worker.local)
        while True:
            ids = worker.local[:n], worker.remote[:n]
            try:
                await self._write(client, peer, ids, worker)
            except LayoutError:
                raise
            except UsageError:
                if n == 1:
                    raise
                n = (n + 1) // 2
            else:
                return n

    async def _batch(
        self, client: Client, peer: Peer, worker: _Worker, piece: int
    ) -> None:
        """Write one batch, all its pieces at once, and note the times."""
        start = time.perf_counter()
        if self.params["recreate_xfer"]:
            worker.pieces = _pieces(worker, self.params["max_batch_size"], piece)
            worker.prep.append(time.perf_counter() - start)
            start = time.perf_counter()
        if len(worker.pieces) == 1:
            posting = await self._write(client, peer, worker.pieces[0], worker)
            post = posting.seconds
        else:
            tasks = [
                asyncio.ensure_future(self._write(client, peer, ids, worker))
                for ids in worker.pieces
            ]
            try:
                # The first failure ends them all; and none may outlive the batch.
                postings = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            post = sum(posting.seconds for posting in postings)
        worker.tx.append(time.perf_counter() - start)
        worker.post.append(post)
        self.bar.step()

    async def _write(
        self, client: Client, peer: Peer, ids: Piece, worker: _Worker
    ) -> _Posting:
        posting = _Posting(client.write_cache(peer, *ids, 0, timeout=self.left()))
        result = await posting
        worker.sent_blocks += len(ids[0])
        worker.way = f"{result.device} ({result.wire})"
        return posting


def _pieces(worker: _Worker, batch: int, piece: int) -> list[Piece]:
    """Split a batch into writes, none of which names a block twice."""
    places = len(worker.local)
    order = [
        np.arange(start, min(start + piece, batch)) % places
        for start in range(0, batch, piece)
    ]
    return [(worker.local[at], worker.remote[at]) for at in order]


def run_transfer(
    plan: Plan, *, target: str | None, timeout: float, progress: bool
) -> Result:
    """Run ``plan`` on kvxfer's engine and return what it measured.

    Nothing is left of it, whatever happens: no process, thread or memory.

    Args:
      plan: A plan that writes.
      target: ``HOST:PORT`` or ``ipc://PATH`` of an endpoint; ``None`` starts one
        for the run, on this machine.
      timeout: Seconds that the run may take.
      progress: Show a bar on stderr.

    Raises:
      PlanError: The plan cannot be run here, by its figures.
      RunError: The endpoint could not be reached, a write failed, a check did, or
        it took too long (exit code 124).
      WrongUseError: An option of kvxfer, from the environment, is out of range.
    """
    params = plan.params
    deadline = time.monotonic() + timeout
    pool = pool_for(params)
    address = None if target is None else parse_target(target)
    try:
        with unwound_by_sigterm(), ExitStack() as stack:
            endpoint = None
            if address is None:
                endpoint = stack.enter_context(
                    Endpoint(
                        pool, verify=params["check_consistency"], deadline=deadline
                    )
                )
                address = endpoint.host, endpoint.port
            workers = _workers(pool, params["num_threads"], stack)
            bar = Bar(sum(iterations(params)) if progress else 0)
            stack.callback(bar.end)
            run = _Run(params, pool, address, deadline, bar)
            at_once(run.work, workers, run.stop)
            if endpoint is not None and params["check_consistency"]:
                endpoint.check(sum(worker.sent_blocks for worker in workers))
    except KVBenchError:
        raise
    except OptionError as error:
        raise WrongUseError(str(error)) from error
    except KVXferError as error:
        if isinstance(error, WriteTimeoutError) or time.monotonic() >= deadline:
            raise RunError(_TOO_LONG, TIMED_OUT) from error
        raise RunError(str(error)) from error
    _tell_way(workers)
    return measured_result(
        plan,
        "kvxfer",
        prep=[value for worker in workers for value in worker.prep],
        post=[value for worker in workers for value in worker.post],
        tx=[value for worker in workers for value in worker.tx],
        seconds=max(one.end for one in workers) - min(one.begin for one in workers),
    )


def _workers(pool: Pool, threads: int, stack: ExitStack) -> list[_Worker]:
    """Make the threads' blocks, filled with what belongs where they go."""
    random = np.random.default_rng(_SEED)
    targets = random.permutation(pool.n_blocks)
    workers = []
    for thread in range(threads):
        cache = stack.enter_context(
            KVCache.allocate(
                n_layers=1,
                n_blocks=pool.share,
                block_bytes=pool.block_bytes,
                planes=(PLANE,),
                dtype=DTYPE,
            )
        )
        local = random.permutation(pool.share)[: pool.places]
        first = thread * pool.share
        remote = targets[first : first + pool.places]
        pattern.fill(cache.view(0, PLANE), local, remote, plane=0, layer=0)
        workers.append(_Worker(cache, local, remote))
    return workers


def _tell_way(workers: list[_Worker]) -> None:
    ways = sorted({worker.way for worker in workers})
    text = f"measured over {', '.join(ways)}"
    if any(way.startswith("soft") for way in ways):
        text += ": memory copies, not a NIC"
    print(f"kvbench: note: {text}", file=sys.stderr)
