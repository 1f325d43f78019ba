"""One open device with the cache registered on it, driven from one event loop.

What a client and a server have in common: device, protection domain, one memory
region an allocation, engine, completions, scheduler, and a thread for the verbs
that may wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from kvxfer import agreement, devices, gids, ports, registration
from kvxfer._engine import Engine, RingArrival
from kvxfer._verbs import Device, MemoryRegion, ProtectionDomain
from kvxfer.cache import KVCache
from kvxfer.completions import Completions
from kvxfer.errors import (
    ClosedResourceError,
    DeviceUnavailableError,
    InternalError,
    KVXferError,
)
from kvxfer.layout import PlaneLayer
from kvxfer.options import Options
from kvxfer.regions import Keys, Region, find_slices
from kvxfer.scheduler import Scheduler
from kvxfer.soft_wire import suited
from kvxfer.verbs_types import Access, AsyncEvent, EventType, PortState
from kvxfer.wire import DeviceCandidate

_log = logging.getLogger("kvxfer.adapter")

OnArrival = Callable[["Adapter", RingArrival], None]
OnFailed = Callable[["Adapter", int], None]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_OF_A_QP: dict[int, str] = {
    EventType.QP_FATAL: "its QP has failed (QP_FATAL)",
    EventType.QP_REQ_ERR: "the peer sent what its QP does not permit (QP_REQ_ERR)",
    EventType.QP_ACCESS_ERR: "the peer wrote where it may not (QP_ACCESS_ERR)",
}
# A CQ that has lost a completion would leave operations waiting for ever.
_OF_THE_DEVICE: dict[int, str] = {
    EventType.CQ_ERR: "a completion was lost (CQ_ERR)",
    EventType.DEVICE_FATAL: "the device has failed (DEVICE_FATAL)",
}
# After these the port may have another state, LID or table of GIDs.
_OF_THE_PORT = (
    EventType.PORT_ACTIVE,
    EventType.LID_CHANGE,
    EventType.PKEY_CHANGE,
    EventType.SM_CHANGE,
    EventType.CLIENT_REREGISTER,
    EventType.GID_CHANGE,
)
#: QPs of one connection at most.
MAX_QPS = 4
# WCs of writes that one engine may have in flight, beside the receives.
_CQ_DEPTH = 65535


class Adapter:
    """An open device of this process, see the module. Made by :meth:`open`."""

    def __init__(
        self,
        spec: devices.DeviceSpec,
        options: Options,
        on_broken: Callable[[int | None, str], None],
    ) -> None:
        self.spec = spec
        self.name = spec.label
        """Name of the device and port, as peers are told it."""
        self.options = options
        self._on_broken = on_broken
        self.trouble = ""
        """Why new connections had better go by another device; empty if not."""
        self.lost = False
        """Nothing goes by it any more: it has to be opened anew."""
        self._looking: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvxfer-verbs")
        self.regions: list[Region] = []
        """What of the cache is one memory region each; ascending and disjoint."""
        self._regions: list[MemoryRegion] = []
        self.ways: set[str] = set()
        """How the cache was registered: ``host``, ``dmabuf`` or ``peermem``."""
        self._device: Device | None = None
        self._engine: Engine | None = None
        self.completions: Completions | None = None
        self._scheduler: Scheduler | None = None

    @classmethod
    async def open(
        cls,
        spec: devices.DeviceSpec,
        cache: KVCache,
        access: Access,
        options: Options,
        *,
        address: str | None,
        on_arrival: OnArrival,
        on_failed: OnFailed,
        on_broken: Callable[[int | None, str], None],
    ) -> Adapter:
        """Open a device and register the cache on it.

        Args:
          access: What peers may do with the cache.
          address: Numeric address that peers reach this host at.
          on_arrival: Called with this and each notification that a peer has written.
          on_failed: Called with this and the slot of each queue that fails.
          on_broken: Called with the number of a QP, or None for all that the device
            has, and why: it is in ERR, or might as well be.

        Raises:
          DeviceUnavailableError, VerbsError: Nothing is left open.
        """
        self = cls(spec, options, on_broken)
        try:
            await self.call(self._open, cache, access, address)
        except BaseException:
            await self.close()
            raise
        self.completions = Completions(
            self.engine,
            partial(on_arrival, self),
            partial(on_failed, self),
            self._on_event,
        )
        self.completions.start()
        self._scheduler = Scheduler(
            self.engine, self.completions, options.drain_timeout
        )
        return self

    def _open(self, cache: KVCache, access: Access, address: str | None) -> None:
        options = self.options
        wire = options.soft_wire
        if not access & Access.REMOTE_WRITE:  # who is written to takes any wire
            wire = suited(wire, cache)[0]
        device = Device(
            self.spec.name,
            provider=self.spec.provider,
            address=address,
            wire=wire,
            path=options.ibverbs_path,
        )
        self._device = device
        limits = device.query()
        self.port = device.query_port(self.spec.port_num)
        self.look()
        self.max_rd_atomic = max(1, min(16, limits.max_qp_rd_atom))
        self.max_retries = ports.max_retries(self.spec)
        self.max_sge = max(1, min(options.max_sge, limits.max_sge))
        self.max_qp_wr = limits.max_qp_wr
        self.pd = ProtectionDomain(device)
        if options.relaxed_ordering:
            access |= Access.RELAXED_ORDERING
        self.regions = cache.regions_within(options.region_bytes)
        for region in self.regions:
            mr, way = registration.register(self.pd, region, access)
            self._regions.append(mr)
            self.ways.add(way)
        if _log.isEnabledFor(logging.INFO):
            _log.info(
                "%s: registered %d bytes in %d regions by %s, on pages of %d bytes",
                self.spec.name,
                sum(region.length for region in self.regions),
                len(self._regions),
                " and ".join(sorted(self.ways)),
                cache.page_bytes,
            )
        n_qps = options.max_connections * self.n_qps(options.qps_per_connection, True)
        self._engine = Engine(
            device,
            cq_depth=min(
                max(_CQ_DEPTH, n_qps * (options.notify_receives + 8)),
                limits.max_cqe,
            ),
            chain=options.chain,
            max_sge=self.max_sge,
            merge_bytes=options.merge_bytes,
            window_bytes=options.peer_window_bytes,
            device_window_bytes=options.device_window_bytes,
            max_wr_bytes=self.port.max_msg_bytes,
            progress=options.progress,
        )

    def look(self) -> None:
        """Read the port and its GID table, and choose the GID of new connections.

        Raises:
          DeviceUnavailableError: It has no GID to use.
          VerbsError: The device does not answer.
        """
        assert self._device is not None
        options = self.options
        self.described = ports.describe_port(self._device, self.spec, options)
        self.gid = gids.choose(
            self.described.gids,
            self.described.link_layer,
            f"{self.spec.name} port {self.spec.port_num}",
            self._gid_index,
            [options.socket_ifname] if options.socket_ifname else [],
        )

    @property
    def _gid_index(self) -> int | None:
        """The entry that is named; the software device has one GID, and no table."""
        return None if self.is_software else self.options.gid_index

    def _on_event(self, event: AsyncEvent) -> None:
        """See to it that an event reaches the connections that it concerns."""
        kind = event.event_type
        if event.port_num not in (None, self.spec.port_num):
            return
        of_a_qp = _OF_A_QP.get(kind)
        if of_a_qp is not None:
            self._on_broken(event.qp_num, f"{self.name}: {of_a_qp}")
        elif kind in _OF_THE_DEVICE:
            self.lost = True
            self.trouble = _OF_THE_DEVICE[kind]
            _log.error("%s: %s", self.name, self.trouble)
            self._on_broken(None, f"{self.name}: {self.trouble}")
        elif kind == EventType.PORT_ERR:
            # Connections survive a flap that is shorter than their retries.
            self._troubled("its port is down (PORT_ERR)")
            _log.warning("%s: the port is down; writes wait for it", self.name)
        elif kind in _OF_THE_PORT:
            _log.info("%s: %s", self.name, event.name)
            self._look_again()
        else:
            _log.debug("%s: %s", self.name, event.name)

    def _troubled(self, why: str) -> None:
        if not self.lost:
            self.trouble = why

    def _look_again(self) -> None:
        """Read the port anew, off the loop; once more if it changes meanwhile."""
        before = self._looking
        self._looking = asyncio.get_running_loop().create_task(self._relook(before))

    async def _relook(self, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        old = self.gid
        try:
            await self.call(self.look)
        except KVXferError as error:
            _log.warning("%s: %s", self.name, error)
            self._troubled(str(error))
            return
        if self.described.state == PortState.ACTIVE.name:
            self._troubled("")
        if old.gid != self.gid.gid:
            _log.warning(
                "%s: new connections leave from %s, no longer from %s",
                self.name,
                self.gid.text,
                old.text,
            )

    def has(self, gid: bytes, gid_type: str) -> bool:
        """Say whether a GID is in the port's table, as it was last read."""
        table = self.described.gids
        return any((gid, gid_type) == (entry.gid, entry.gid_type) for entry in table)

    def gid_of(self, gid: bytes, gid_type: str = "") -> gids.GID:
        """Find an entry of the GID table; the preferred one if ``gid`` is empty.

        One that is no longer there is replaced by another of its type and family:
        the table may have changed since the peer was told of it.

        Args:
          gid_type: One address may be there by several types, which do not reach each
            other; empty where the peer says nothing of it.

        Raises:
          DeviceUnavailableError: There is none.
        """
        if not gid:
            return self.gid
        usable = [self.gid]
        if self._gid_index is None:
            usable += gids.rank(self.described.gids, self.described.link_layer)
        usable = [entry for entry in usable if gid_type in ("", entry.gid_type)]
        found = [entry for entry in usable if entry.gid == gid]
        if not found and self._gid_index is None:
            family = gids.family_of(gid)
            found = [entry for entry in usable if entry.family is family]
        if found:
            return found[0]
        raise DeviceUnavailableError(
            f"{self.name} has no GID {gids.gid_address(gid)} {gid_type}; it has: "
            + gids.listing(self.described.gids)
        )

    @property
    def engine(self) -> Engine:
        """The engine; the adapter must be open."""
        if self._engine is None:
            raise InternalError("the adapter is not open")
        return self._engine

    @property
    def scheduler(self) -> Scheduler:
        """What admits to the engine; the adapter must be open."""
        if self._scheduler is None:
            raise InternalError("the adapter is not open")
        return self._scheduler

    @property
    def in_flight(self) -> int:
        """Operations that the device has not finished; 0 once it is closed."""
        try:
            return 0 if self._engine is None else self._engine.in_flight
        except ClosedResourceError:
            return 0

    @property
    def is_software(self) -> bool:
        """Whether no NIC is behind it."""
        return self.spec.provider != "libibverbs"

    def n_qps(self, n: int, by_wires: bool) -> int:
        """Return how many QPs make a connection of ``n``.

        Args:
          by_wires: There are as many for each of two wires, on the software device.
        """
        return min(2 * n, MAX_QPS) if by_wires and self.has_wires else n

    @property
    def has_wires(self) -> bool:
        """Whether bytes travel by one of several wires: on the software device."""
        return self.is_software and not self.is_null

    @property
    def is_null(self) -> bool:
        """Whether this is the null device: nothing it writes arrives anywhere."""
        return self.spec.provider == "null"

    @property
    def candidate(self) -> DeviceCandidate:
        """How this device is offered to peers."""
        return agreement.candidate(
            self.name,
            devices.KINDS[self.spec.provider],
            self.described,
            self.gid,
            only=self._gid_index is not None,
        )

    def region(self, index: int) -> MemoryRegion:
        """Return the memory region that one of :attr:`regions` was registered as."""
        return self._regions[index]

    def lkeys(self, place: PlaneLayer) -> Keys:
        """Return the lkeys of a plane's layer."""
        return find_slices(self.regions, place).keys(lambda i: self.region(i).lkey)

    def rkeys(self, place: PlaneLayer) -> Keys:
        """Return the rkeys of a plane's layer."""
        return find_slices(self.regions, place).keys(lambda i: self.region(i).rkey)

    async def call(
        self, verb: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Run verbs that may wait, one after the other, off the loop.

        Cancellation:
          A running verb cannot be stopped: raised when it has returned.
        """
        running = asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: verb(*args, **kwargs)
        )
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait({running})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not running.cancelled():
                # Its own failure matters less than the cancellation, but must
                # have been looked at.
                running.exception()
            raise cancelled
        return running.result()

    async def close(self) -> None:
        """Close all, children first. Twice is fine; links must be closed before."""
        if self._looking is not None:
            await asyncio.wait({self._looking})
        if self.completions is not None:
            self.completions.close()
        if self._scheduler is not None:
            self._scheduler.close()
        quiet = False
        try:
            await self.call(self._close)
            quiet = True
        finally:
            # Idle by now, so this returns at once; after a failure the thread may
            # hang in a verb, and must not take the loop with it.
            self._thread.shutdown(wait=quiet)

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._device is not None:
            self._device.close()


async def finish(closing: asyncio.Task[None]) -> None:
    """Wait for a close that goes on even if the waiting is cancelled.

    Cancellation:
      Raised when the task has ended.
    """
    cancelled: asyncio.CancelledError | None = None
    while not closing.done():
        try:
            await asyncio.wait({closing})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    closing.result()
