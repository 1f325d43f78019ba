"""What a client and a server of this process have in common: cache and devices."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable

from kvxfer import devices, wire
from kvxfer._engine import RingArrival
from kvxfer.adapter import Adapter
from kvxfer.cache import KVCache
from kvxfer.errors import ClosedResourceError, UsageError
from kvxfer.layout import PlaneLayer
from kvxfer.options import Options
from kvxfer.route import geometry_to_wire
from kvxfer.verbs_types import Access

_log = logging.getLogger("kvxfer.host")


class Host:
    """The cache of one client or server on every device that it may use.

    Args:
      cache: Stays pinned, and must not be closed, while this is open.
      access: What peers may do with the cache.
    """

    def __init__(self, cache: KVCache, access: Access, options: Options) -> None:
        self.cache = cache
        self.options = options
        self.incarnation = secrets.token_bytes(16)
        self.adapters: list[Adapter] = []
        self._access = access
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()

    async def open(
        self,
        address: str | None,
        on_arrival: Callable[[Adapter, RingArrival], None],
        on_failed: Callable[[Adapter, int], None],
    ) -> None:
        """Open the devices and register the cache.

        Raises:
          DeviceUnavailableError, VerbsError: Nothing is left open.
        """
        self._loop = asyncio.get_running_loop()
        self.geometry = self.cache.describe()
        self.wire_geometry = geometry_to_wire(self.geometry)
        self.cache._pin()
        try:
            for spec in devices.usable(self.options):
                self.adapters.append(
                    await self._open_adapter(spec, address, on_arrival, on_failed)
                )
        except BaseException:
            await self.close()
            raise
        if all(adapter.is_software for adapter in self.adapters):
            _log.info("no NIC in use: bytes travel by the software device")

    async def _open_adapter(
        self,
        spec: devices.DeviceSpec,
        address: str | None,
        on_arrival: Callable[[Adapter, RingArrival], None],
        on_failed: Callable[[Adapter, int], None],
    ) -> Adapter:
        adapter = await Adapter.open(
            spec,
            self.cache,
            self._access,
            self.options,
            address=address,
            on_arrival=lambda arrival: on_arrival(adapter, arrival),
            on_failed=lambda slot: on_failed(adapter, slot),
        )
        return adapter

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

    def lkey_of(self, adapter: Adapter) -> Callable[[PlaneLayer], int]:
        """Return what gives the lkey of a plane's layer on a device."""
        return lambda place: adapter.region(self.cache.region_index(place)).lkey

    def rkey_of(self, adapter: Adapter) -> Callable[[PlaneLayer], int]:
        """Return what gives the rkey of a plane's layer on a device."""
        return lambda place: adapter.region(self.cache.region_index(place)).rkey

    @property
    def candidates(self) -> list[wire.DeviceCandidate]:
        """The devices as peers are told them, best first."""
        return [adapter.candidate for adapter in self.adapters]

    def adapter(self, name: str) -> Adapter | None:
        """Find an open device by its name."""
        return next((a for a in self.adapters if a.name == name), None)

    async def close(self) -> None:
        """Close the devices; links must be closed before. Twice is fine."""
        if self._loop is None:
            return
        self._loop = None
        try:
            while self.adapters:
                await self.adapters.pop().close()
        finally:
            self.cache._unpin()
