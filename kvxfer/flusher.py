"""READs of this side's own cache: what has arrived is in place once they are answered.

A NIC may tell of an arrival, in host memory, while the bytes before it are still on
their way into a GPU. A READ of that memory by the same NIC goes behind them, so the
side that is written to reads a few bytes, by a pair of QPs of its own, before it tells
anyone. No packet leaves the host, and one READ serves all that came before it.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterable

from kvxfer._verbs import CompletionQueue
from kvxfer.adapter import Adapter
from kvxfer.cache import Region
from kvxfer.errors import KVXferError, status_name
from kvxfer.link import Link, RingMemory
from kvxfer.verbs_types import SGE, Access, Opcode, SendWR

__all__ = ["Flusher"]

_READ_BYTES = 8
_PAGE_BYTES = 4096
_MAX_READS = 64


class Flusher:
    """Puts what has arrived on one device into its place. Made by :meth:`open`.

    Args:
      regions: What the cache was registered as, in that order.
      on_failed: Called once, with the reason, if the READs do not work any more. What
        was held then is never called back for.
    """

    def __init__(
        self,
        adapter: Adapter,
        regions: list[Region],
        on_failed: Callable[[str], None],
    ) -> None:
        self._adapter = adapter
        self._regions = regions
        self._on_failed = on_failed
        self._held: collections.deque[tuple[set[int], Callable[[], None]]] = (
            collections.deque()
        )
        self._flying: list[Callable[[], None]] = []
        self._to_read: list[int] = []
        self._n_taken = self._n_landed = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._failed = False
        self._link: Link | None = None
        self._cq: CompletionQueue | None = None
        self._page: RingMemory | None = None

    @classmethod
    async def open(
        cls,
        adapter: Adapter,
        regions: list[Region],
        on_failed: Callable[[str], None],
    ) -> Flusher:
        """Make the QPs and connect them with each other.

        Raises:
          DeviceUnavailableError, VerbsError: Nothing is left open.
        """
        self = cls(adapter, regions, on_failed)

        def prepare() -> None:
            self._cq = CompletionQueue(adapter.pd.device, 2 * _MAX_READS)
            # Host memory: some NICs put short READs there by the processor.
            self._page = RingMemory(adapter, _PAGE_BYTES, Access.LOCAL_WRITE)

        try:
            await adapter.call(prepare)
            link = await Link.open(
                adapter, Access.REMOTE_READ, receives=0, n_qps=2, cq=self._cq
            )
            self._link = link
            await link.connect(link.infos[::-1], "")
            assert self._cq is not None and adapter.completions is not None
            self._cq.arm()
            adapter.completions.watch(self._cq.fd, self._look)
        except BaseException:
            await self.close()
            raise
        return self

    def after(self, regions: Iterable[int], call: Callable[[], None]) -> None:
        """Call back once all that has arrived in these regions by now is in place.

        In the order of the calls, from the event loop, and not if it fails.

        Args:
          regions: Their numbers.
        """
        if self._failed:
            return
        self._n_taken += 1
        self._held.append((set(regions), call))
        if not self._flying:
            self._begin()

    async def settle(self) -> None:
        """Wait until all that has been given so far is called back for, or failed."""
        if not self._failed and self._n_landed < self._n_taken:
            landed = asyncio.get_running_loop().create_future()
            self._waiting.append((self._n_taken, landed))
            await landed

    def _begin(self) -> None:
        """Read for all that is held by now."""
        wanted: set[int] = set()
        while self._held:
            regions, call = self._held.popleft()
            wanted |= regions
            self._flying.append(call)
        self._to_read = sorted(wanted)
        self._post()

    def _post(self) -> None:
        """Post as many of the READs as go at a time; the last one tells."""
        assert self._link is not None and self._page is not None
        qp = self._link.qp
        n = min(_MAX_READS, qp.max_send_wr)
        now, self._to_read = self._to_read[:n], self._to_read[n:]
        wrs = []
        for i, index in enumerate(now):
            region = self._regions[index]
            at = SGE(
                self._page.addr + i * _READ_BYTES,
                min(_READ_BYTES, region.length),
                self._page.mr.lkey,
            )
            wrs.append(
                SendWR(
                    opcode=Opcode.RDMA_READ,
                    sges=(at,),
                    remote_addr=region.addr,
                    rkey=self._adapter.region(index).rkey,
                    signaled=i == len(now) - 1,
                )
            )
        try:
            posted = qp.post_send(wrs)
        except KVXferError as error:
            self._fail(str(error))
            return
        if posted != len(wrs):
            self._fail(f"{posted} of {len(wrs)} READs were taken")

    def _look(self) -> None:
        """Take what has completed: the CQ's descriptor is readable."""
        cq = self._cq
        if cq is None or cq.closed:
            return
        try:
            cq.drain_events()
            cq.arm()
            found = cq.poll()
        except KVXferError as error:
            self._fail(str(error))
            return
        for wc in found:
            if wc.status != 0:
                self._fail(status_name(wc.status))
            if self._failed:
                return
            if self._to_read:
                self._post()
            else:
                self._landed()

    def _landed(self) -> None:
        calls, self._flying = self._flying, []
        for call in calls:
            call()
        self._n_landed += len(calls)
        self._wake()
        if self._held and not self._flying:
            self._begin()

    def _wake(self) -> None:
        """Let those go on who wait for no more than this."""
        waiting, self._waiting = self._waiting, []
        for n, landed in waiting:
            if landed.done():
                continue
            if self._failed or n <= self._n_landed:
                landed.set_result(None)
            else:
                self._waiting.append((n, landed))

    def _give_up(self) -> None:
        self._failed = True
        self._held.clear()
        self._flying.clear()
        self._wake()

    def _fail(self, reason: str) -> None:
        if self._failed:
            return
        self._give_up()
        self._on_failed(
            f"{self._adapter.name}: what has arrived cannot be read back: {reason}"
        )

    async def close(self) -> None:
        """Destroy the QPs; what is held is never called back for. Twice is fine."""
        self._give_up()
        cq, link, page = self._cq, self._link, self._page
        completions = self._adapter.completions
        if cq is not None and not cq.closed and completions is not None:
            completions.unwatch(cq.fd)
        if link is not None:
            await link.close()
        for handle in (page, cq):
            if handle is not None:
                await self._adapter.call(handle.close)
