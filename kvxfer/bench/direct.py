"""The same data path without asyncio, and without the engine: what each of them adds.

Both sides are brought up as a client and a server bring up theirs, without a control
connection: what the two must know of each other goes through the bench's own pipe.
Then the initiator either writes by the engine and waits for its descriptor, or posts
its WRs itself, by a bare loop in C. Only that can also read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import select
from typing import TYPE_CHECKING, Any

import msgspec

from kvxfer import devices
from kvxfer._engine import RingArrival
from kvxfer.adapter import Adapter
from kvxfer.bench import _limits
from kvxfer.bench.side import Control, Initiator, Job, Target
from kvxfer.bench.transfer import Pool, options_of
from kvxfer.bench.workload import Case, Tables
from kvxfer.errors import InternalError, completion_error
from kvxfer.link import Link
from kvxfer.verbs_types import Access
from kvxfer.wire import NotifyRing, QPInfo

if TYPE_CHECKING:
    from kvxfer._engine import Pair, Row

_LOOPBACK = "127.0.0.1"
# Large enough for every notification of a window: credit is given between windows.
_RING_BYTES = 1 << 26
_RECEIVES = 128
_RECORDS = 1 << 24


class Ends:
    """One side: pool, device, QP. Lives in an event loop that runs now and then."""

    def __init__(self, job: Job, access: Access) -> None:
        self.job = job
        self.options = dataclasses.replace(options_of(job), region_bytes=0)
        self.pool = Pool(job, shared=job["memory"] == "shared")
        self.access = access
        self.consumed = [0, 0]
        self.adapter: Adapter
        self.link: Link

    async def open(self) -> None:
        """Open the device and make a QP."""
        spec = devices.usable(self.options)[0]
        self.adapter = await Adapter.open(
            spec,
            self.pool.cache,
            self.access,
            self.options,
            address=_LOOPBACK,
            on_arrival=self._consume,
            on_failed=self._failed,
            on_broken=self._broken,
        )
        remote = self.access & (Access.REMOTE_WRITE | Access.REMOTE_READ)
        self.link = await Link.open(self.adapter, remote, _RECEIVES)

    def _consume(self, adapter: Adapter, arrival: RingArrival) -> None:
        self.consumed[0] = arrival.head
        self.consumed[1] += 1

    def _failed(self, adapter: Adapter, slot: int) -> None:
        raise InternalError(f"queue {slot} failed")

    def _broken(self, qp_num: int | None, reason: str) -> None:
        raise InternalError(reason)

    @property
    def info(self) -> str:
        """What the other side must know of the QP, as JSON."""
        return msgspec.json.encode(self.link.infos[0]).decode()

    async def connect(self, info: str) -> None:
        """Bring the QP to RTS."""
        remote = msgspec.json.decode(info, type=QPInfo)
        await self.link.connect([remote], _LOOPBACK)

    def keys(self) -> list[tuple[int, int]]:
        """Return ``lkey`` and ``rkey`` of each plane."""
        found = []
        for base in self.pool.bases:
            for i, region in enumerate(self.pool.cache.regions):
                if region.addr <= base < region.addr + region.length:
                    mr = self.adapter.region(i)
                    found.append((mr.lkey, mr.rkey))
        return found

    async def close(self) -> None:
        """Take the QP down, close the device."""
        await self.link.fail()
        await self.link.close()
        await self.adapter.close()


class _Direct(Initiator):
    """What both ways have in common."""

    access = Access(0)

    def open(self) -> None:
        """Open this side, start the target, connect."""
        self.ends = Ends(self.job, self.access)
        self.fill()
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.ends.open())
        super().open()

    def fill(self) -> None:
        """Fill the source."""
        self.ends.pool.fill()

    def connect(self, hello: dict[str, Any]) -> None:
        """Tell the target of our QP, and bring ours up towards its."""
        assert self.control is not None
        self.control.ask("connect", info=self.ends.info)
        self.loop.run_until_complete(self.ends.connect(hello["info"]))
        self.hello = hello

    def facts(self) -> dict[str, Any]:
        """Say which device moved the blocks, and by which wire."""
        return {
            "device": self.ends.adapter.name,
            "wire": self.ends.link.wire,
            "page_bytes": min(
                self.ends.pool.cache.page_bytes, self.hello["page_bytes"]
            ),
        }

    def close(self) -> None:
        """Close this side, then let the target go."""
        self.loop.run_until_complete(self.ends.close())
        self.loop.close()
        super().close()


class ByEngine(_Direct):
    """Writes by the engine as a client does: no event loop, no task, no future."""

    def connect(self, hello: dict[str, Any]) -> None:
        """Connect, and give the engine a row for each block size."""
        super().connect(hello)
        ring = hello["ring"]
        self.loop.run_until_complete(
            self.ends.link.start_initiator(
                self._rows(), None if ring is None else NotifyRing(**ring)
            )
        )

    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        for size in self.workload.sizes:
            n_blocks = self.workload.n_blocks(size)
            pairs: list[Pair] = [
                (ours, size, theirs, size, size, lkey, rkey)
                for ours, (lkey, _), theirs, (_, rkey) in zip(
                    self.ends.pool.bases,
                    self.ends.keys(),
                    self.hello["bases"],
                    self.hello["keys"],
                    strict=True,
                )
            ]
            rows.append((0, 0, n_blocks, n_blocks, pairs))
        return rows

    def prepare(self, tables: Tables) -> None:
        """Choose the row, and take the credit for what the target has consumed."""
        self._rows_asked = [self.workload.sizes.index(tables.block_bytes)]
        self._n_wrs = 0
        self._news = select.poll()
        self._news.register(self.ends.adapter.engine.fd, select.POLLIN)
        assert self.control is not None
        consumed = self.control.ask("credit")["consumed"]
        self.ends.adapter.engine.grant(self.ends.link.slot, *consumed)

    def batch(self, source_set: int, target_set: int) -> None:
        """Write one batch."""
        engine = self.ends.adapter.engine
        ended = engine.write(
            self.ends.link.slot,
            self._rows_asked,
            self.tables.source[source_set],
            self.tables.target[target_set],
        )
        if isinstance(ended, tuple):
            self._n_wrs = ended[1]
            return
        while not (finished := engine.progress().finished):
            self._news.poll()
        self._n_wrs = finished[0].n_wrs
        if finished[0].status:
            raise completion_error(
                finished[0].status,
                wr_id=finished[0].wr_id,
                qp_num=finished[0].qp_num,
                vendor_err=finished[0].vendor_err,
            )

    def facts(self) -> dict[str, Any]:
        """Say also how many WRs it took."""
        return {**super().facts(), "wrs_per_block": self._n_wrs / self.blocks_of_batch}


class ByLoop(_Direct):
    """Posts its WRs itself: a WR a block, nothing merged, nobody told."""

    read = False

    def prepare(self, tables: Tables) -> None:
        """Nothing is to be done."""

    def batch(self, source_set: int, target_set: int) -> None:
        """Move one batch, plane by plane."""
        tables = self.tables
        ours, theirs = tables.source[source_set], tables.target[target_set]
        if self.read:
            ours, theirs = tables.target[target_set], tables.source[source_set]
        for base, (lkey, _), remote, (_, rkey) in zip(
            self.ends.pool.bases,
            self.ends.keys(),
            self.hello["bases"],
            self.hello["keys"],
            strict=True,
        ):
            _limits.post_blocks(
                self.ends.link.qp,
                base,
                lkey,
                remote,
                rkey,
                tables.block_bytes,
                ours,
                theirs,
                self.read,
            )

    def facts(self) -> dict[str, Any]:
        """Say also how many WRs it took."""
        return {**super().facts(), "wrs_per_block": 1.0}


class ByReading(ByLoop):
    """The same with RDMA READ: the blocks come from the target's memory into ours."""

    access = Access.LOCAL_WRITE
    read = True

    def fill(self) -> None:
        """Have our memory there; the target has the contents."""
        self.ends.pool.touch()

    def begin(self, tables: Tables) -> None:
        """Forget what was read before."""
        self.tables = tables
        self.ends.pool.touch()
        self.checked = Target(self.job, self.ends.pool.planes)
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


class DirectTarget(Target):
    """Brings its QP up when it is told of the initiator's."""

    def __init__(self, job: Job, ends: Ends, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(job, ends.pool.planes)
        self._ends = ends
        self._loop = loop

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Connect, tell what was consumed, or answer as any target."""
        if message["command"] == "connect":
            connecting = self._ends.connect(message["info"])
            asyncio.run_coroutine_threadsafe(connecting, self._loop).result()
            return {}
        if message["command"] == "credit":
            return {"consumed": self._ends.consumed}
        return super().answer(message)


async def _serve(job: Job, control: Control) -> None:
    access = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
    ends = Ends(job, access)
    if job["kind"] == "read":
        ends.pool.fill()
    else:
        ends.pool.touch()
    await ends.open()
    ring = None
    if job["kind"] == "engine":
        ring = await ends.link.start_target(_RING_BYTES, _RECEIVES)
    control.send(
        info=ends.info,
        bases=ends.pool.bases,
        keys=ends.keys(),
        page_bytes=ends.pool.cache.page_bytes,
        ring=None
        if ring is None
        else {**msgspec.structs.asdict(ring), "receives": _RECORDS},
    )
    loop = asyncio.get_running_loop()
    target = DirectTarget(job, ends, loop)
    await loop.run_in_executor(None, target.serve, control)
    await ends.close()


def serve(job: Job, control: Control) -> None:
    """Be the target until the initiator lets go."""
    asyncio.run(_serve(job, control))
