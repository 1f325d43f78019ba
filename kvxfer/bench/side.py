"""What every pair of processes has in common: the window, the clock, the two ends.

A contender has an *initiator*, which moves the blocks and takes the time, and mostly a
*target* in a process of its own, whose memory it writes. The initiator starts the
target and speaks with it over two pipes, one JSON object a line, outside the timed
windows. The initiator is itself started by ``runner``, which asks it for one case
after the other on its standard input; it reports on its standard output, one JSON
object a window.

Runs in other engines' Python as well: standard library and numpy alone.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvxfer.bench.workload import (
    Case,
    Tables,
    Workload,
    unseen_blocks,
    wrong_blocks,
)

Job = dict[str, Any]
"""What a pair is to do; made by ``runner``, plain JSON."""

SAME_WINDOW_AGAIN = 2
"""How often a window is taken again that other processes disturbed."""
FOREIGN_SHARE = 0.05
"""Of all processors: more of them used by others, and a window counts as disturbed."""

_HUGE_PAGE = 2 << 20
_PR_SET_PDEATHSIG = 1


def workload_of(job: Job) -> Workload:
    """Return the workload that a job describes."""
    fields = dict(job["workload"])
    for name in ("sizes", "batches"):
        fields[name] = tuple(fields[name])
    return Workload(**fields)


def die_with_parent(parent: int) -> None:
    """Be killed by the kernel when the parent, a process id, ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it has ended before we asked


def cpu_seconds() -> float:
    """Return what this process has used of the processors, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def busy_seconds() -> float:
    """Return what all processes of the machine have used, the kernel's own left out."""
    with open("/proc/stat") as file:
        fields = file.readline().split()[1:4]
    return sum(map(int, fields)) / os.sysconf("SC_CLK_TCK")


def map_pool(n_bytes: int) -> NDArray[np.uint64]:
    """Map private memory on huge pages, if there are any; the array owns it."""
    memory = mmap.mmap(
        -1, n_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        memory.madvise(mmap.MADV_NORMAL)  # a kernel without them
    whole = np.frombuffer(memory, np.uint8)
    start = -address_of(whole) % _HUGE_PAGE
    return whole[start : start + n_bytes].view(np.uint64)


def address_of(array: NDArray[Any]) -> int:
    """Return where an array begins."""
    return int(array.__array_interface__["data"][0])


class Control:
    """One end of the two pipes between an initiator and its target."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._reader = os.fdopen(read_fd, "r")
        self._writer = os.fdopen(write_fd, "w")

    def send(self, **message: Any) -> None:
        """Send one message."""
        self._writer.write(json.dumps(message) + "\n")
        self._writer.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for one message.

        Raises:
          EOFError: The other end is gone.
        """
        line = self._reader.readline()
        if not line:
            raise EOFError("the other process of the pair has ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer.

        Raises:
          TargetError: The other end could not do it.
        """
        self.send(command=command, **arguments)
        return _checked(self.receive())

    def close(self) -> None:
        """Close this end of both pipes. Twice is fine."""
        self._reader.close()
        self._writer.close()


class TargetError(Exception):
    """The target failed; the text is its own."""


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "error" in answer:
        raise TargetError(answer["error"])
    return answer


class Target:
    """The side that is written to: answers its initiator until that lets go.

    Args:
      job: As the initiator got it.
      planes: Words of each plane of its pool, and the index of the first in the pool.
    """

    def __init__(self, job: Job, planes: list[tuple[NDArray[np.uint64], int]]) -> None:
        self.job = job
        self.planes = planes
        self._workload = workload_of(job)
        self._tables: Tables | None = None

    def begin(self, case: Case) -> None:
        """Forget what was written, and make ready for a case."""
        self._tables = self._workload.tables(case)
        for words, _ in self.planes:
            words[:] = 0

    @property
    def tables(self) -> Tables:
        """The tables of the case at hand."""
        assert self._tables is not None, "no case was begun"
        return self._tables

    def _count(self, sets: Iterable[tuple[int, int]], check: Callable[..., int]) -> int:
        tables = self.tables
        return sum(
            check(
                words,
                tables.block_bytes,
                tables.source[source],
                tables.target[target],
                first,
            )
            for words, first in self.planes
            for source, target in sets
        )

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what the initiator asks for; return the answer."""
        command = message["command"]
        if command == "case":
            self.begin(Case(*message["case"]))
            return {}
        if command == "cpu":
            return {"seconds": cpu_seconds()}
        if command == "verify":
            return {"wrong": self._count(message["sets"], wrong_blocks)}
        if command == "peek":
            return {"unseen": self._count(message["sets"], unseen_blocks)}
        raise ValueError(f"unknown command {command!r}")

    def serve(self, control: Control) -> None:
        """Answer until the initiator quits or is gone."""
        while True:
            try:
                message = control.receive()
            except EOFError:
                return
            if message["command"] == "quit":
                control.send()
                return
            control.send(**self.answer(message))


def start_target(job: Job) -> tuple[subprocess.Popen[bytes], Control, dict[str, Any]]:
    """Start the target of a job; return it and the first that it says."""
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    command = [sys.executable, *job["boot"], "target"]
    process = subprocess.Popen(
        [
            *command,
            json.dumps({**job, "parent": os.getpid()}),
            str(theirs_in),
            str(theirs_out),
        ],
        pass_fds=(theirs_in, theirs_out),
        stdin=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    control = Control(ours_in, ours_out)
    return process, control, _checked(control.receive())


class Initiator:
    """The side that moves blocks. Contenders are sub-classes.

    The windows of all cases are taken in one life, so memory is mapped once.
    """

    #: Whether there is a target process to start.
    has_target = True

    def __init__(self, job: Job) -> None:
        self.job = job
        self.workload = workload_of(job)
        self.tables: Tables
        self.process: subprocess.Popen[bytes] | None = None
        self.control: Control | None = None

    def open(self) -> None:
        """Map the source, start the target, connect."""
        if self.has_target:
            self.process, self.control, hello = start_target(self.job)
            self.connect(hello)

    def connect(self, hello: dict[str, Any]) -> None:
        """Take what the target says first."""

    def prepare(self, tables: Tables) -> None:
        """Make ready for one case; ``tables`` are kept already."""
        raise NotImplementedError

    def batch(self, source_set: int, target_set: int) -> None:
        """Move one batch; return once it is known to have landed."""
        raise NotImplementedError

    @property
    def blocks_of_batch(self) -> int:
        """How many blocks a batch moves, all planes together."""
        return self.tables.batch * self.workload.planes

    def facts(self) -> dict[str, Any]:
        """Say how it went: ``device``, ``wire``, ``wrs_per_block``.

        ``page_bytes`` is the smaller page of the two sides' memory, 0: not known.
        """
        return {}

    def close(self) -> None:
        """Let the target go."""
        if self.control is not None:
            self.control.ask("quit")
            self.control.close()
        if self.process is not None:
            self.process.wait()

    # -- windows ---------------------------------------------------------------

    def begin(self, tables: Tables) -> None:
        """Tell the target, then make ready."""
        self.tables = tables
        if self.control is not None:
            self.control.ask("case", case=[tables.block_bytes, tables.batch])
        self.prepare(tables)

    def target_cpu(self) -> float:
        """Return the processor time of the target, if there is one of its own."""
        return 0.0 if self.control is None else self.control.ask("cpu")["seconds"]

    def peek(self, sets: list[tuple[int, int]]) -> int | None:
        """Count blocks that were said to have landed and cannot be seen."""
        if self.control is None:
            return None
        found: int = self.control.ask("peek", sets=sets)["unseen"]
        return found

    def verify(self, sets: list[tuple[int, int]]) -> int | None:
        """Count blocks of these sets that hold other bytes; None: it cannot be told."""
        if self.control is None:
            return None
        found: int = self.control.ask("verify", sets=sets)["wrong"]
        return found

    def run_batches(self, tables: Tables, window: Window) -> None:
        """Move batches until the window is over; one lane."""
        while window.more():
            sets = tables.pick(0, window.next(0))
            start = time.perf_counter()
            self.batch(*sets)
            window.note(time.perf_counter() - start)

    def measure(self, case: Case) -> dict[str, Any]:
        """Warm up, take the window, check what it left; return it all."""
        return measure(self, case)


@dataclass
class Window:
    """One timed window: how long it goes on, and the batches in it.

    Attributes:
      seconds: How long, unless it has fewer batches by then than it must have.
      at_least: Batches that it has in any case.
      counts: Batches begun by each lane, warm-up included.
      times: Seconds of each batch.
    """

    seconds: float
    at_least: int
    counts: list[int]
    times: list[float] = field(default_factory=list)
    begin: float = 0.0
    begun: int = 0
    warm: int = 0

    def more(self) -> bool:
        """Say whether another batch belongs to it."""
        if self.warm:
            return self.begun < self.warm
        late = time.perf_counter() - self.begin >= self.seconds
        return self.begun < self.at_least or not late

    def next(self, lane: int) -> int:
        """Count a lane's next batch."""
        n = self.counts[lane]
        self.counts[lane] = n + 1
        self.begun += 1
        return n

    def note(self, seconds: float) -> None:
        """Take the time of one batch."""
        self.times.append(seconds)


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _timed(side: Initiator, tables: Tables, counts: list[int]) -> dict[str, Any]:
    """Take one window; return what was measured."""
    job = side.job
    window = Window(job["window"], max(job["at_least"], len(counts)), counts)
    theirs, ours, all_ = side.target_cpu(), cpu_seconds(), busy_seconds()
    window.begin = time.perf_counter()
    side.run_batches(tables, window)
    seconds = time.perf_counter() - window.begin
    all_, ours = busy_seconds() - all_, cpu_seconds() - ours
    theirs = side.target_cpu() - theirs
    n_batches = len(window.times)
    n_blocks = n_batches * side.blocks_of_batch
    gb = n_blocks * tables.block_bytes / 1e9
    return {
        "batches": n_batches,
        "seconds": seconds,
        "bytes": n_blocks * tables.block_bytes,
        "gb_per_s": gb / seconds,
        "blocks_per_s": n_blocks / seconds,
        "p50_us": 1e6 * percentile(window.times, 0.5),
        "p99_us": 1e6 * percentile(window.times, 0.99),
        "max_us": 1e6 * max(window.times),
        "cpu_initiator_s_per_gb": ours / gb,
        "cpu_target_s_per_gb": theirs / gb if side.has_target else None,
        "foreign_cores": max(0.0, all_ - ours - theirs) / seconds,
    }


def measure(side: Initiator, case: Case) -> dict[str, Any]:
    """Do what :meth:`Initiator.measure` says, as contenders do without a word.

    A window in which other processes used the machine is taken again, twice at most;
    the least disturbed counts.
    """
    workload = side.workload
    tables = workload.tables(case)
    side.begin(tables)
    counts = [0] * workload.lanes
    warm = Window(0.0, 0, counts, warm=1)
    side.run_batches(tables, warm)
    checked = side.job.get("verify", True)
    # Whichever lane came first has written it.
    begun = [lane for lane, n in enumerate(counts) if n]
    first = [tables.pick(lane, counts[lane] - 1) for lane in begun]
    unseen = side.peek(first) if checked else None
    warm = Window(0.0, 0, counts, warm=workload.lanes)
    side.run_batches(tables, warm)
    limit = FOREIGN_SHARE * (os.cpu_count() or 1)
    found: dict[str, Any] = {}
    for _ in range(1 + SAME_WINDOW_AGAIN):
        taken = _timed(side, tables, counts)
        if not found or taken["foreign_cores"] < found["foreign_cores"]:
            found = taken
        if found["foreign_cores"] <= limit:
            break
    lanes = range(workload.lanes)
    at_most = 2 if workload.lanes == 1 else 1
    sets = [pair for lane in lanes for pair in tables.last(lane, counts[lane], at_most)]
    wrong = side.verify(sets) if checked else None
    return {
        **found,
        "disturbed": found["foreign_cores"] > limit,
        "verified_blocks": (
            None if wrong is None else len(sets) * case.batch * workload.planes
        ),
        "wrong_blocks": wrong,
        "unseen_blocks": unseen,
        **side.facts(),
    }


def run_initiator(
    side: Initiator, asked: Iterable[str], report: Callable[..., None]
) -> None:
    """Measure each case that is asked for, until no more are."""
    side.open()
    report(event="ready")
    for line in asked:
        report(event="window", **side.measure(Case(*json.loads(line))))
    side.close()
    report(event="done")


def questions() -> Iterable[str]:
    """Take standard input for ourselves; who else reads it finds nothing there."""
    lines = os.fdopen(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return lines


def reporter() -> Callable[..., None]:
    """Take standard output for reports; what else is printed goes to stderr."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    return report


Making = tuple[Callable[[Job], Initiator], Callable[[Job, Control], None]]
"""Makes the initiator; runs the target until its initiator lets go."""


def main(find: Callable[[str], Making], arguments: list[str]) -> None:
    """Be one process of a pair: ``initiator JOB`` or ``target JOB FD FD``.

    It ends without the interpreter's own end: some engines crash in it, and none
    has anything left to do.
    """
    role, job = arguments[0], json.loads(arguments[1])
    die_with_parent(job["parent"])
    code = 0
    tell: Callable[..., None]
    try:
        if role == "target":
            control = Control(int(arguments[2]), int(arguments[3]))
            tell = control.send
            find(job["kind"])[1](job, control)
        else:
            tell = reporter()
            run_initiator(find(job["kind"])[0](job), questions(), tell)
    except Exception as error:  # noqa: BLE001 - the other process tells the user
        name = "" if isinstance(error, TargetError) else f"{type(error).__name__}: "
        tell(event="failed", error=f"{name}{error}")
        code = 1
    sys.stderr.flush()
    os._exit(code)
