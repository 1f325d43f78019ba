"""The ends of a transfer without client and server: devices, and QPs between them.

Both sides are brought up as a client and a server bring up theirs, without a control
connection: what the two must know of each other goes through the bench's own pipe. The
side that moves the blocks has a device opened for each thread; the target opens one,
with a link to each of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import msgspec

from kvxfer import devices
from kvxfer._engine import RingArrival
from kvxfer.adapter import Adapter
from kvxfer.bench.side import Control, Job, Target
from kvxfer.bench.transfer import Pool, options_of
from kvxfer.errors import InternalError
from kvxfer.link import Link
from kvxfer.soft_wire import suited
from kvxfer.verbs_types import Access
from kvxfer.wire import QPInfo

_LOOPBACK = "127.0.0.1"
# Of all links together; each gets its share, in pages.
_RING_BYTES = 1 << 26
_PAGE_BYTES = 4096
_RECEIVES = 128
# No bound: the target's engine posts receives anew, and the bytes of the ring are one.
_RECORDS = 1 << 24


class Ends:
    """A device over a pool, and links. Lives in an event loop that runs now and then.

    Args:
      pool: Registered on the device.
      access: What is permitted there, by the device itself or by the other side.
      n_links: To so many threads of the other side.

    Attributes:
      links: In INIT once it is open, in the order of the other side's threads.
      consumed: What has been taken of the ring of each link's slot: bytes, records.
    """

    def __init__(self, job: Job, pool: Pool, access: Access, n_links: int = 1) -> None:
        self._by_engine = job["kind"] == "engine"
        self.options = dataclasses.replace(options_of(job), region_bytes=0)
        self.pool = pool
        self.access = access
        self.n_links = n_links
        self.links: list[Link] = []
        self.consumed: dict[int, list[int]] = {}
        self.adapter: Adapter

    async def open(self) -> None:
        """Open the device and make the QPs."""
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
        wires: tuple[str, ...] = ("",)
        if self._by_engine and self.adapter.has_wires:
            wires = suited(self.options.soft_wire, self.pool.cache)
        for _ in range(self.n_links):
            self.links.append(
                await Link.open(
                    self.adapter,
                    remote,
                    _RECEIVES,
                    n_qps=self.adapter.n_qps(
                        self.options.qps_per_connection, len(wires) > 1
                    ),
                    wires=wires,
                )
            )

    def _consume(self, adapter: Adapter, arrival: RingArrival) -> None:
        consumed = self.consumed.setdefault(arrival.slot, [0, 0])
        consumed[0] = arrival.head
        consumed[1] += 1

    def _failed(self, adapter: Adapter, slot: int) -> None:
        raise InternalError(f"queue {slot} failed")

    def _broken(self, qp_num: int | None, reason: str) -> None:
        raise InternalError(reason)

    @property
    def infos(self) -> list[list[QPInfo]]:
        """What the other side must know of the QPs of each link."""
        return [link.infos for link in self.links]

    async def connect(self, infos: list[list[QPInfo]]) -> None:
        """Bring the QPs to RTS, those of each link towards the other side's."""
        for link, remote in zip(self.links, infos, strict=True):
            await link.connect(remote, _LOOPBACK)

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
        """Take the QPs down, close the device."""
        for link in self.links:
            await link.fail()
            await link.close()
        await self.adapter.close()


def to_text(infos: list[list[QPInfo]]) -> str:
    """Return the halves of an exchange as JSON."""
    return msgspec.json.encode(infos).decode()


def from_text(text: str) -> list[list[QPInfo]]:
    """Return what :func:`to_text` was given."""
    return msgspec.json.decode(text, type=list[list[QPInfo]])


class DirectTarget(Target):
    """Brings its QPs up when it is told of the initiator's."""

    def __init__(self, job: Job, ends: Ends, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(job, ends.pool.planes)
        self._ends = ends
        self._loop = loop

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Connect, tell what was consumed, or answer as any target."""
        if message["command"] == "connect":
            connecting = self._ends.connect(from_text(message["infos"]))
            asyncio.run_coroutine_threadsafe(connecting, self._loop).result()
            return {}
        if message["command"] == "credit":
            slot = self._ends.links[message["link"]].slot
            return {"consumed": self._ends.consumed.get(slot, [0, 0])}
        return super().answer(message)


async def _serve(job: Job, control: Control) -> None:
    access = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
    pool = Pool(job, shared=job["memory"] == "shared")
    if job["kind"] == "read":
        pool.fill()
    else:
        pool.touch()
    ends = Ends(job, pool, access, job["threads"])
    await ends.open()
    share = _RING_BYTES // job["threads"] // _PAGE_BYTES * _PAGE_BYTES
    rings: list[dict[str, int] | None] = []
    for link in ends.links:
        ring = None
        if job["kind"] == "engine":
            ring = await link.start_target(share, _RECEIVES)
        rings.append(
            None
            if ring is None
            else {**msgspec.structs.asdict(ring), "receives": _RECORDS}
        )
    control.send(
        infos=to_text(ends.infos),
        bases=pool.bases,
        keys=ends.keys(),
        page_bytes=pool.cache.page_bytes,
        rings=rings,
    )
    loop = asyncio.get_running_loop()
    target = DirectTarget(job, ends, loop)
    await loop.run_in_executor(None, target.serve, control)
    await ends.close()


def serve(job: Job, control: Control) -> None:
    """Be the target until the initiator lets go."""
    asyncio.run(_serve(job, control))
