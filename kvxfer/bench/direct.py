"""The same data path without asyncio, and without the engine: what each of them adds.

The initiator either writes by the engine and waits for its descriptor, or posts its
WRs itself, by a bare loop in C. Only that can also read. Either way it has a device
and a connection for each thread, and a thread keeps so many batches in flight.
"""

from __future__ import annotations

import asyncio
import select
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from kvxfer.bench._limits import Poster
from kvxfer.bench.ends import Ends, from_text, serve, to_text
from kvxfer.bench.side import Initiator, Job, Target, Window
from kvxfer.bench.transfer import Pool
from kvxfer.bench.workload import Case, Tables
from kvxfer.errors import completion_error
from kvxfer.verbs_types import Access
from kvxfer.wire import NotifyRing

if TYPE_CHECKING:
    from kvxfer._engine import Finished, Pair, Row

__all__ = ["ByEngine", "ByLoop", "ByReading", "serve"]

# More than a notification has beside its block ids, of 4 bytes each.
_RECORD_BYTES = 256
# Only if the target was late to consume: credit is asked for long before it ends.
_CREDIT_MS = 100


class Mover(Protocol):
    """Moves the batches of one thread; *flights* are those under way, by number.

    Attributes:
      n_batches: Begun since the tables were taken.
      n_wrs: WRs that they took.
    """

    @property
    def n_batches(self) -> int: ...
    @property
    def n_wrs(self) -> int: ...
    def begin(self, flight: int, source_set: int, target_set: int) -> None:
        """Begin a batch."""

    def wait(self) -> list[int]:
        """Wait until batches have ended; return their flights, none if none fly."""


class Direct(Initiator):
    """What all ways have in common: a mover for each thread."""

    access = Access(0)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.loop = asyncio.new_event_loop()
        self._threads = ThreadPoolExecutor(job["threads"], "bench")

    def open(self) -> None:
        """Open a device for each thread, start the target, connect."""
        self.pool = Pool(self.job, shared=self.job["memory"] == "shared")
        self.fill()
        threads = range(self.job["threads"])
        self.ends = [Ends(self.job, self.pool, self.access) for _ in threads]
        for ends in self.ends:
            self.loop.run_until_complete(ends.open())
        super().open()

    def fill(self) -> None:
        """Fill the source."""
        self.pool.fill()

    def connect(self, hello: dict[str, Any]) -> None:
        """Tell the target of our QPs, and bring them up towards its."""
        assert self.control is not None
        self.hello = hello
        ours = [infos for ends in self.ends for infos in ends.infos]
        self.control.ask("connect", infos=to_text(ours))
        for ends, theirs in zip(self.ends, from_text(hello["infos"]), strict=True):
            self.loop.run_until_complete(ends.connect([theirs]))

    @property
    def movers(self) -> Sequence[Mover]:
        """One for each thread, once connected."""
        raise NotImplementedError

    def planes(self, ends: Ends) -> list[tuple[int, int, int, int]]:
        """Return base and key of each plane, ours and the target's."""
        return [
            (ours, lkey, theirs, rkey)
            for ours, (lkey, _), theirs, (_, rkey) in zip(
                self.pool.bases,
                ends.keys(),
                self.hello["bases"],
                self.hello["keys"],
                strict=True,
            )
        ]

    def run_batches(self, tables: Tables, window: Window) -> None:
        """Have every thread move batches until the window is over."""
        if len(self.movers) == 1:
            self._keep_moving(0, tables, window)
            return
        running = [
            self._threads.submit(self._keep_moving, thread, tables, window)
            for thread in range(len(self.movers))
        ]
        for work in running:
            work.result()

    def _keep_moving(self, thread: int, tables: Tables, window: Window) -> None:
        """Keep so many batches of a thread in flight until the window is over."""
        clock = time.perf_counter
        mover, depth = self.movers[thread], self.job["depth"]
        first = thread * depth
        began = [0.0] * depth
        idle = list(range(depth))
        while True:
            while idle and window.more():
                flight = idle.pop()
                lane = first + flight
                sets = tables.pick(lane, window.next(lane))
                began[flight] = clock()
                mover.begin(flight, *sets)
            ended = mover.wait()
            if not ended:
                return
            now = clock()
            for flight in ended:
                window.note(now - began[flight])
            idle += ended

    @property
    def wire(self) -> str:
        """How the blocks of the case at hand travel."""
        return self.ends[0].links[0].wire

    def facts(self) -> dict[str, Any]:
        """Say which device moved the blocks, by which wire, in how many WRs."""
        n_batches = sum(mover.n_batches for mover in self.movers)
        n_wrs = sum(mover.n_wrs for mover in self.movers)
        return {
            "device": self.ends[0].adapter.name,
            "wire": self.wire,
            "page_bytes": min(self.pool.cache.page_bytes, self.hello["page_bytes"]),
            "wrs_per_block": n_wrs / (n_batches * self.blocks_of_batch),
        }

    def close(self) -> None:
        """Close this side, then let the target go."""
        self._threads.shutdown()
        for ends in self.ends:
            self.loop.run_until_complete(ends.close())
        self.loop.close()
        super().close()


class EngineMover:
    """Writes by the engine of one thread.

    Args:
      ends: With a started link.
      ring_bytes: Of the target's ring for notifications, 0: it has none.
      credit: Asks the target for the bytes and records that it has consumed of it.
    """

    def __init__(
        self, ends: Ends, ring_bytes: int, credit: Callable[[], list[int]]
    ) -> None:
        self._engine = ends.adapter.engine
        self._write = self._engine.write
        self._slot = ends.links[0].slot
        self._ring_bytes = ring_bytes
        self._credit = credit
        self._news = select.poll()
        self._news.register(self._engine.fd, select.POLLIN)
        self._flights: dict[int, int] = {}
        self._ended: list[int] = []
        self.n_batches = 0
        self.n_wrs = 0

    def use(self, row: int, tables: Tables) -> None:
        """Choose the row of the engine and its tables."""
        self._rows = [row]
        self._source, self._target = tables.source, tables.target
        record = _RECORD_BYTES + 4 * tables.batch
        # While one half is used the other may still have to be consumed.
        self._batches_of_credit = self._ring_bytes // 2 // record or 1
        self.n_batches = self.n_wrs = 0
        self._take_credit()

    def _take_credit(self) -> None:
        self._left = self._batches_of_credit
        if self._ring_bytes:
            self._engine.grant(self._slot, *self._credit())

    def begin(self, flight: int, source_set: int, target_set: int) -> None:
        """Begin a batch."""
        if self._left == 0:
            self._take_credit()
        self._left -= 1
        self.n_batches += 1
        begun = self._write(
            self._slot, self._rows, self._source[source_set], self._target[target_set]
        )
        if isinstance(begun, tuple):
            self.n_wrs += begun[1]
            self._ended.append(flight)
        else:
            self._flights[begun[0]] = flight

    def wait(self) -> list[int]:
        """Wait until batches have ended; return their flights, none if none fly.

        Raises:
          CompletionError: A WR failed.
        """
        ended, self._ended = self._ended, []
        while self._flights and not ended:
            news = self._engine.progress()
            ended += map(self._end, news.finished)
            if not (ended or news.more or self._news.poll(_CREDIT_MS)):
                self._take_credit()
        return ended

    def _end(self, finished: Finished) -> int:
        if finished.status:
            raise completion_error(
                finished.status,
                wr_id=finished.wr_id,
                qp_num=finished.qp_num,
                vendor_err=finished.vendor_err,
            )
        self.n_wrs += finished.n_wrs
        return self._flights.pop(finished.op_id)


class ByEngine(Direct):
    """Writes by the engine as a client does: no event loop, no task, no future."""

    @property
    def movers(self) -> Sequence[EngineMover]:
        """One for each thread, once connected."""
        return self._movers

    def connect(self, hello: dict[str, Any]) -> None:
        """Connect, and give each engine a row for each block size."""
        super().connect(hello)
        self._asking = threading.Lock()
        self._movers = []
        for thread, ends in enumerate(self.ends):
            ring = hello["rings"][thread]
            self.loop.run_until_complete(
                ends.links[0].start_initiator(
                    self._rows(ends), None if ring is None else NotifyRing(**ring)
                )
            )
            ring_bytes = 0 if ring is None else ring["length"]
            self._movers.append(EngineMover(ends, ring_bytes, self._credit_of(thread)))

    def _rows(self, ends: Ends) -> list[Row]:
        rows: list[Row] = []
        for size in self.workload.sizes:
            n_blocks = self.workload.n_blocks(size)
            pairs: list[Pair] = [
                (ours, size, theirs, size, size, lkey, rkey)
                for ours, lkey, theirs, rkey in self.planes(ends)
            ]
            rows.append((0, 0, n_blocks, n_blocks, pairs))
        return rows

    @property
    def wire(self) -> str:
        """How the blocks of the case at hand travel; small ones may by another way."""
        link = self.ends[0].links[0]
        row = self.workload.sizes.index(self.tables.block_bytes)
        return link.wire_of(link.wires_of_rows([row]))

    def _credit_of(self, thread: int) -> Callable[[], list[int]]:
        """Return what asks for a thread's credit, of any thread."""

        def credit() -> list[int]:
            assert self.control is not None
            with self._asking:
                found: list[int] = self.control.ask("credit", link=thread)["consumed"]
            return found

        return credit

    def prepare(self, tables: Tables) -> None:
        """Choose the row, and take the credit for what the target has consumed."""
        row = self.workload.sizes.index(tables.block_bytes)
        for mover in self._movers:
            mover.use(row, tables)


class ByLoop(Direct):
    """Posts its WRs itself: a WR a block, nothing merged, nobody told."""

    read = False

    @property
    def movers(self) -> Sequence[Poster]:
        """One for each thread, once connected."""
        return self._posters

    def connect(self, hello: dict[str, Any]) -> None:
        """Connect, and give each thread a loop over its QPs."""
        super().connect(hello)
        self._posters = [
            Poster(
                ends.links[0].qps,
                self.planes(ends),
                chain=ends.options.chain,
                depth=self.job["depth"],
                reading=self.read,
            )
            for ends in self.ends
        ]

    def prepare(self, tables: Tables) -> None:
        """Take the tables."""
        for poster in self._posters:
            poster.use(tables.block_bytes, tables.source, tables.target)


class ByReading(ByLoop):
    """The same with RDMA READ: the blocks come from the target's memory into ours."""

    access = Access.LOCAL_WRITE
    read = True

    def fill(self) -> None:
        """Have our memory there; the target has the contents."""
        self.pool.touch()

    def begin(self, tables: Tables) -> None:
        """Forget what was read before."""
        self.tables = tables
        self.pool.touch()
        self.checked = Target(self.job, self.pool.planes)
        self.checked.begin(Case(tables.block_bytes, tables.batch))
        self.prepare(tables)

    def peek(self, sets: list[tuple[int, int]]) -> int | None:
        """Count blocks that cannot be seen."""
        found: int = self.checked.answer({"command": "peek", "sets": sets})["unseen"]
        return found

    def verify(self, sets: list[tuple[int, int]]) -> int | None:
        """Count blocks that hold other bytes."""
        found: int = self.checked.answer({"command": "verify", "sets": sets})["wrong"]
        return found
