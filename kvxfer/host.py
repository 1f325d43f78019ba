"""What a client and a server of this process have in common: cache and devices."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from kvxfer import agreement, cuda, devices, wire
from kvxfer.adapter import Adapter, OnArrival, OnFailed
from kvxfer.cache import KVCache
from kvxfer.counters import Counters
from kvxfer.errors import (
    ClosedResourceError,
    DeviceUnavailableError,
    UsageError,
    VerbsError,
)
from kvxfer.options import Options
from kvxfer.reach import INSTEAD
from kvxfer.route import geometry_to_wire
from kvxfer.soft_wire import accepted, suited
from kvxfer.verbs_types import Access

_log = logging.getLogger("kvxfer.host")

#: A device, the number of its QP or None for all, and what is wrong.
OnBroken = Callable[[Adapter, int | None, str], None]
# As the messages have it.
_MAX_CANDIDATES = 64


@dataclass(frozen=True)
class DeviceState:
    """An open device at one moment.

    Attributes:
      name: As peers are told it.
      kind: ``rdma``, ``soft`` or ``null``.
      link_layer: ``ethernet`` or ``infiniband``.
      gid: That new connections leave from.
      trouble: Why they had better not go by it; empty if they do.
      in_flight: Operations that it has not finished.
    """

    name: str
    kind: str
    link_layer: str
    gid: str
    trouble: str
    in_flight: int


class Host:
    """The cache of one client or server on the devices that it uses.

    The best NIC and the software device are opened at once; the others that may be
    used are offered to peers, and opened when one of them can be reached no other
    way.

    Args:
      cache: Stays pinned, and must not be closed, while this is open.
      access: What peers may do with the cache.
    """

    needs_flush: bool
    """Whether the cache's memory shows what has landed with a READ only; once
    prepared."""
    wires: tuple[str, ...]
    """What a peer's QPs are to travel by on the software device: one, or both; once
    prepared."""

    def __init__(self, cache: KVCache, access: Access, options: Options) -> None:
        self.cache = cache
        self.options = options
        self.incarnation = secrets.token_bytes(16)
        self.adapters: list[Adapter] = []
        self.counters = Counters()
        self._access = access
        self._retired: list[Adapter] = []
        """Lost devices, until the links on them are closed."""
        self._replacing: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()

    def prepare(self) -> None:
        """Look at what the cache lies in; :meth:`open` does so, too."""
        self.needs_flush = self.options.flush == "auto" and _needs_flush(self.cache)
        writable = bool(self._access & Access.REMOTE_WRITE)
        wire = self.options.soft_wire
        self.wires = accepted(wire) if writable else suited(wire, self.cache)
        if writable and (self.flushes or self.options.flush == "target_read"):
            # What is read is read to flush: here, or by the QPs of writers that say so.
            self._access |= Access.REMOTE_READ

    async def open(
        self,
        address: str | None,
        on_arrival: OnArrival,
        on_failed: OnFailed,
        on_broken: OnBroken,
    ) -> None:
        """Open the devices and register the cache.

        Raises:
          DeviceUnavailableError, VerbsError: Nothing is left open.
        """
        self._loop = asyncio.get_running_loop()
        self.geometry = self.cache.describe()
        self.wire_geometry = geometry_to_wire(self.geometry)
        self._address = address
        self._on_arrival = on_arrival
        self._on_failed = on_failed
        self._on_broken = on_broken
        self._opening = asyncio.Lock()
        self.prepare()
        self.cache._pin()
        try:
            verdicts = devices.survey(self.options)
            for verdict in verdicts:
                _log.info("%s: %s", verdict.spec.label, verdict.reason)
            self._usable = [verdict for verdict in verdicts if verdict.usable]
            if not self.cache.on_host:
                self._usable = _for_gpu_memory(self._usable)
            for i, verdict in enumerate(self._usable):
                if i == 0 or verdict.is_software:
                    await self._open_adapter(verdict.spec)
        except BaseException:
            await self.close()
            raise
        if all(adapter.is_software for adapter in self.adapters):
            _log.info("no NIC in use: bytes travel by the software device")

    async def _open_adapter(self, spec: devices.DeviceSpec) -> Adapter:
        adapter = await Adapter.open(
            spec,
            self.cache,
            self._access,
            self.options,
            address=self._address,
            on_arrival=self._on_arrival,
            on_failed=self._on_failed,
            on_broken=lambda qp_num, why: self._broken(adapter, qp_num, why),
        )
        self.adapters.append(adapter)
        return adapter

    def _broken(self, adapter: Adapter, qp_num: int | None, why: str) -> None:
        self._on_broken(adapter, qp_num, why)
        if adapter.lost and adapter in self.adapters and self._loop is not None:
            self.adapters.remove(adapter)
            self._retired.append(adapter)
            task = self._loop.create_task(self._replace(adapter.spec))
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _replace(self, spec: devices.DeviceSpec) -> None:
        """Open a device anew that was lost."""
        async with self._opening:
            try:
                adapter = await self._open_adapter(spec)
            except (DeviceUnavailableError, VerbsError) as error:
                _log.error("%s cannot be opened again: %s", spec.label, error)
            else:
                _log.warning("%s is open again", adapter.name)

    def check(self, who: str) -> None:
        """Raise unless this is open, in the process and loop that opened it."""
        if self._pid != os.getpid():
            raise ClosedResourceError(
                f"this {who} belongs to process {self._pid}; a forked child must make "
                "its own"
            )
        if self._loop is None:
            raise ClosedResourceError(f"this {who} is not open")
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(f"this {who} belongs to another event loop")

    @property
    def flushes(self) -> bool:
        """Whether writes end with a READ of the writer's that has them in place."""
        return self.options.flush == "initiator_read" or self.needs_flush

    @property
    def features(self) -> int:
        """What is offered to peers, as far as it is of use here.

        READs only where they flush something, QPs of two wires only where both are
        wanted.
        """
        found = wire.FEATURES
        if not self.flushes:
            found &= ~wire.FEATURE_FLUSH
        if len(self.wires) == 1:
            found &= ~wire.FEATURE_WIRES
        return found

    def flushes_arrivals(self, features: int) -> bool:
        """Whether what a writer with these features writes is to be read back here.

        By itself that is for GPUs that need it, where the writer does not read.
        """
        if self.options.flush == "target_read":
            return True
        return self.needs_flush and not features & wire.FEATURE_FLUSH

    @property
    def memory(self) -> dict[str, str]:
        """How the cache is registered, by device: ``host``, ``dmabuf``, ``peermem``."""
        return {
            adapter.name: "+".join(sorted(adapter.ways)) for adapter in self.adapters
        }

    @property
    def candidates(self) -> list[wire.DeviceCandidate]:
        """The devices as peers are told them, best first."""
        opened = {adapter.spec: adapter for adapter in self.adapters}
        retired = {adapter.spec for adapter in self._retired} - set(opened)
        found: list[wire.DeviceCandidate] = []
        troubled: list[wire.DeviceCandidate] = []
        for verdict in self._usable:
            adapter = opened.get(verdict.spec)
            if adapter is not None:
                # A port that is down may be up when the connection is made.
                (troubled if adapter.trouble else found).append(adapter.candidate)
            elif verdict.gid is not None and verdict.spec not in retired:
                found.append(
                    agreement.candidate(
                        verdict.spec.label,
                        devices.KINDS[verdict.spec.provider],
                        verdict.port,
                        verdict.gid,
                        only=self.options.gid_index is not None,
                    )
                )
        return [*found, *troubled][:_MAX_CANDIDATES]

    def device_states(self) -> list[DeviceState]:
        """Describe the open devices; from any thread."""
        return [
            DeviceState(
                name=adapter.name,
                kind=devices.KINDS[adapter.spec.provider],
                link_layer=adapter.described.link_layer,
                gid=adapter.gid.text,
                trouble=adapter.trouble,
                in_flight=adapter.in_flight,
            )
            for adapter in list(self.adapters)
        ]

    def check_devices(self) -> None:
        """Raise if no device can take a new connection now.

        Raises:
          DeviceUnavailableError: Names each, and what is wrong with it.
        """
        if not self.candidates:
            raise DeviceUnavailableError(
                "no device can be used: "
                + ("; ".join(f"{a.name}: {a.trouble}" for a in self._retired) or "none")
            )

    async def agree(
        self, theirs: list[wire.DeviceCandidate]
    ) -> tuple[Adapter, agreement.Agreement]:
        """Choose the pair of devices for a peer, and open ours if need be.

        Raises:
          DeviceUnavailableError: No pair can work; both tables and why.
        """
        self.check_devices()
        while True:
            agreed = agreement.agree(self.candidates, theirs)
            try:
                adapter = await self.adapter(agreed.ours.name)
                if adapter.has(agreed.our_gid.gid, agreed.our_gid.gid_type):
                    return adapter, agreed
                # It was opened just now, and its table is another one by now.
            except (DeviceUnavailableError, VerbsError) as error:
                _log.warning("%s is given up: %s", agreed.ours.name, error)
                self._usable = [
                    v for v in self._usable if v.spec.label != agreed.ours.name
                ]

    async def adapter(self, name: str) -> Adapter:
        """Return a device that was offered, opened if it was not.

        Raises:
          DeviceUnavailableError: It was not offered, or cannot be opened.
          VerbsError: The cache cannot be registered on it.
        """
        async with self._opening:
            for adapter in self.adapters:
                if adapter.name == name:
                    return adapter
            for verdict in self._usable:
                if verdict.spec.label == name and self._loop is not None:
                    return await self._open_adapter(verdict.spec)
        raise DeviceUnavailableError(f"device {name!r} was not offered")

    async def close(self) -> None:
        """Close the devices; links must be closed before. Twice is fine."""
        if self._loop is None:
            return
        self._loop = None
        if self._replacing:
            await asyncio.wait(self._replacing)
        try:
            while self.adapters or self._retired:
                await (self.adapters or self._retired).pop().close()
        finally:
            self.cache._unpin()


def _for_gpu_memory(usable: list[devices.Verdict]) -> list[devices.Verdict]:
    """Leave out what moves bytes by the processor.

    Raises:
      DeviceUnavailableError: Nothing is left.
    """
    nics = [verdict for verdict in usable if not verdict.is_software]
    if not nics:
        raise DeviceUnavailableError(
            "the cache lies in GPU memory, which the software device cannot reach, and "
            "there is no NIC that can be used",
            hint=INSTEAD,
        )
    return nics


def _needs_flush(cache: KVCache) -> bool:
    """Say whether the cache is on a GPU that may see a completion before the bytes.

    Those of compute capability 8.x may.
    """
    on_gpu = [region.addr for region in cache.regions if not region.on_host]
    if not on_gpu:
        return False
    try:
        driver = cuda.load()
        gpu = driver.gpu_of(on_gpu[0])
        return gpu is not None and driver.compute_capability(gpu)[0] == 8
    except DeviceUnavailableError as error:
        _log.warning("no flush: the GPU's generation is not known: %s", error)
        return False
