"""Measure a storage plan on local files.

Each thread moves its own batch, as often as the plan says, between its own part
of the files and memory: the POSIX backend's work without NIXL. No more than
``DEPTH`` requests of a thread are with the kernel at once, and memory is for
those alone, so that a plan need not fit into memory.

A block holds one byte value that tells its place among its neighbours, so that
``check_consistency`` notices blocks that went astray, not only lost ones.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from kvxfer.kvbench.errors import PlanError, RunError
from kvxfer.kvbench.fileio import Job, Queue, open_queue
from kvxfer.kvbench.measuring import (
    Bar,
    at_once,
    check_sizes,
    iterations,
    measured_result,
)
from kvxfer.kvbench.nixlbench import TIMED_OUT
from kvxfer.kvbench.plan import Plan
from kvxfer.kvbench.results import Result

__all__ = ["DEPTH", "run_file"]

DEPTH = 256  # requests of a thread with the kernel, as nixlbench's default
_MAX_MEMORY = 256 << 20  # bytes for a thread's requests
_SECTOR = 512


@dataclass(slots=True)
class _Worker:
    """One thread: its requests, its memory and what it measured."""

    queue: Queue
    memory: mmap.mmap
    jobs: list[Job]
    slots: int
    prep: list[float] = field(default_factory=list)
    post: list[float] = field(default_factory=list)
    tx: list[float] = field(default_factory=list)

    def close(self) -> None:
        self.queue.close()
        self.memory.close()


def run_file(plan: Plan, *, timeout: float, progress: bool) -> Result:
    """Run ``plan`` on files in its ``filepath`` and return what it measured.

    The files are made for it and removed afterwards, whatever happens.

    Args:
      plan: A storage plan.
      timeout: Seconds that the run may take, between two iterations.
      progress: Show a bar on stderr.

    Raises:
      PlanError: The plan cannot be run here, by its figures.
      RunError: The disk or the kernel would not, a check failed, or it took too
        long (exit code 124).
    """
    params = plan.params
    _check(params)
    folder = params["filepath"] or "."
    try:
        room = shutil.disk_usage(folder).free
        needed = _bytes_on_disk(params)
        if needed > room:
            raise PlanError(
                f"the files take {needed} bytes and {folder} has {room} free: "
                "fewer requests or threads, or another --filepath"
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix="kvbench-") as inside:
            return _run(plan, inside, time.monotonic() + timeout, timeout, progress)
    except OSError as error:
        where = error.filename or folder
        raise RunError(f"{where}: {error.strerror or error}") from error


def _check(params: dict[str, Any]) -> None:
    check_sizes(params)
    block = params["max_block_size"]
    if params["storage_enable_direct"] and block % _SECTOR:
        raise PlanError(
            f"direct I/O of {block} bytes: not a multiple of {_SECTOR} "
            "(--repair rounds it up)"
        )


def _bytes_on_disk(params: dict[str, Any]) -> int:
    return int(
        params["max_block_size"] * params["max_batch_size"] * params["num_threads"]
    )


def _run(
    plan: Plan, folder: str, deadline: float, timeout: float, progress: bool
) -> Result:
    params = plan.params
    warmup, counted = iterations(params)
    bar = Bar(warmup + counted if progress else 0)
    files = _make_files(params, folder)
    workers: list[_Worker] = []
    try:
        for thread in range(params["num_threads"]):
            workers.append(_worker(params, files, thread))
        share = params["num_threads"]
        stopped = threading.Event()

        def repeat(times: int) -> None:
            at_once(
                lambda one: _repeat(one, params, times, deadline, stopped, bar),
                workers,
                stopped.set,
            )

        repeat(warmup // share)
        for worker in workers:
            worker.prep.clear()
            worker.post.clear()
            worker.tx.clear()
        start = time.perf_counter()
        repeat(counted // share)
        seconds = time.perf_counter() - start
        if any(len(worker.tx) < counted // share for worker in workers):
            raise RunError(f"the run took more than {timeout:g} s", TIMED_OUT)
        if params["check_consistency"]:
            for worker in workers:
                _verify(worker, params)
        return measured_result(
            plan,
            "file",
            prep=[value for worker in workers for value in worker.prep],
            post=[value for worker in workers for value in worker.post],
            tx=[value for worker in workers for value in worker.tx],
            seconds=seconds,
        )
    finally:
        bar.end()
        for worker in workers:
            worker.close()
        for file in files:
            os.close(file)


def _make_files(params: dict[str, Any], folder: str) -> list[int]:
    """Make the plan's files, filled for a READ, and open them as it wants."""
    count = params["num_files"]
    blocks = params["max_batch_size"] * params["num_threads"]
    direct = os.O_DIRECT if params["storage_enable_direct"] else 0
    files: list[int] = []
    try:
        for i in range(count):
            path = os.path.join(folder, f"{i}.data")
            held = len(range(i, blocks, count))
            with open(path, "wb", buffering=0) as file:
                if params["op_type"] == "READ":
                    for block in range(i, blocks, count):
                        in_batch = block % params["max_batch_size"]
                        _write_whole(file.fileno(), _content(params, in_batch))
                    os.fsync(file.fileno())
                    # Else the first pass reads memory, not the disk.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    file.truncate(held * params["max_block_size"])
            files.append(os.open(path, os.O_RDWR | direct))
    except BaseException:
        for file_fd in files:
            os.close(file_fd)
        raise
    return files


def _write_whole(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _slots(params: dict[str, Any]) -> int:
    fitting = max(1, _MAX_MEMORY // params["max_block_size"])
    return int(min(params["max_batch_size"], DEPTH, fitting))


def _content(params: dict[str, Any], block: int) -> bytes:
    value = 1 + block % _slots(params) % 251
    return bytes([value]) * int(params["max_block_size"])


def _worker(params: dict[str, Any], files: list[int], thread: int) -> _Worker:
    size, batch = params["max_block_size"], params["max_batch_size"]
    slots = _slots(params)
    memory = mmap.mmap(-1, slots * size)
    if params["op_type"] == "WRITE":
        for slot in range(slots):
            memory[slot * size : (slot + 1) * size] = _content(params, slot)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    jobs = []
    for block in range(batch):
        place = thread * batch + block
        jobs.append(
            Job(
                fd=files[place % len(files)],
                offset=place // len(files) * size,
                address=address + block % slots * size,
                length=size,
            )
        )
    try:
        queue = open_queue(params["posix_api_type"], slots)
        queue.prepare(jobs, params["op_type"] == "WRITE")
    except BaseException:
        memory.close()
        raise
    return _Worker(queue, memory, jobs, slots)


def _repeat(
    worker: _Worker,
    params: dict[str, Any],
    times: int,
    deadline: float,
    stopped: threading.Event,
    bar: Bar,
) -> None:
    write = params["op_type"] == "WRITE"
    for _ in range(times):
        if time.monotonic() >= deadline or stopped.is_set():
            return
        start = time.perf_counter()
        if params["recreate_xfer"]:
            worker.queue.prepare(worker.jobs, write)
            worker.prep.append(time.perf_counter() - start)
            start = time.perf_counter()
        worker.post.append(worker.queue.run())
        worker.tx.append(time.perf_counter() - start)
        bar.step()


def _verify(worker: _Worker, params: dict[str, Any]) -> None:
    """Read every block back, a memory's worth at a time, and look at it."""
    size = params["max_block_size"]
    for first in range(0, len(worker.jobs), worker.slots):
        jobs = worker.jobs[first : first + worker.slots]
        worker.memory[:] = bytes(len(worker.memory))
        worker.queue.prepare(jobs, False)
        worker.queue.run()
        for i in range(len(jobs)):
            held = worker.memory[i * size : (i + 1) * size]
            if held != _content(params, first + i):
                raise RunError(f"block {first + i} does not hold what was written")
