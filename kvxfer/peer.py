"""A peer whose blocks a client writes: one control connection and one link.

The two live and die together. Whatever ends first, a failed WR, a fence that the
peer asks for, its silence or its goodbye, :meth:`Peer.break_` takes both down in
an order that leaves nothing in flight: QP to ERR, fence at the peer, operations
ended, QP destroyed, goodbye.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from kvxfer import wire as messages
from kvxfer._engine import CANCELLED_STATUS
from kvxfer._quick import QuickWrites
from kvxfer._transfer import Outcome, Transfer
from kvxfer._version import __version__
from kvxfer.adapter import Adapter, finish
from kvxfer.blocks import AnyIds
from kvxfer.control import CloseCause, CloseReason, ControlClient
from kvxfer.curve import CurveKeys
from kvxfer.errors import (
    BrokenPeerError,
    ClosedResourceError,
    FlushedError,
    KVXferError,
    NotQuiescentError,
    ProtocolError,
    RetryExceededError,
    VersionMismatchError,
    WriteTimeoutError,
    completion_error,
    status_name,
    verbs_error,
)
from kvxfer.host import Host
from kvxfer.link import Link
from kvxfer.logs import Bound, bind
from kvxfer.route import Route, build, geometry_from_wire, shards_to_wire
from kvxfer.scheduler import PLAIN_KEY, Plan, Scheduler, make_key
from kvxfer.sharding import Shard
from kvxfer.verbs_types import Access

_log = logging.getLogger("kvxfer.peer")


class PeerState(enum.Enum):
    """Where a peer stands; it only moves downwards."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    BROKEN = "broken"
    CLOSED = "closed"


# Made once a write; a frozen dataclass would set each field by a call of its own.
class WriteResult(msgspec.Struct, frozen=True):
    """What a write moved.

    Attributes:
      bytes: Bytes of blocks, all layers and planes together.
      wrs: WRs that it took, notifications included.
      seconds: From the call to the acknowledgement of the last byte.
      device: Name of the device that moved them.
      wire: How they travelled: ``rdma``; of the software device ``tcp``, or ``shm``
        or ``cma`` on the same host, or ``cma+tcp`` if some layers have large blocks and
        others small ones. ``null`` of the null device: they did not.
      layers: The layers written.
    """

    bytes: int
    wrs: int
    seconds: float
    device: str
    wire: str
    layers: tuple[int, ...]


class Peer:
    """A connection to a server's cache; made by ``Client.connect``."""

    def __init__(
        self,
        host: Host,
        address: str,
        shards: tuple[Shard, ...] = (),
        keys: CurveKeys | None = None,
        *,
        invite: bytes = b"",
        on_request: Callable[[messages.RequestMessage], None] | None = None,
        on_broken: Callable[[], None] | None = None,
    ) -> None:
        self.address = address
        self.shards = shards
        """The parts of blocks that are written; empty: whole blocks."""
        self.state = PeerState.CONNECTING
        self.error: KVXferError | None = None
        """Why it is broken."""
        self.draining = ""
        """Why the server is about to leave, once it has said so."""
        self.host = host
        self._control = ControlClient(self, options=host.options, keys=keys)
        self._link: Link | None = None
        self.scheduler: Scheduler
        """Of the device that reaches this peer; there once it is connected."""
        self._route = Route([], {})
        self._invite = invite
        self._on_request = on_request
        self._on_broken = on_broken
        self.plans: dict[tuple[str | None, int | None], Plan] = {}
        """Those looked up so far, by group and layer as the caller gave them."""
        self.quick: QuickWrites | None = None
        """Begins writes that need no words; not there before the first of them."""
        self._writes = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._fenced: bool | None = None
        self._breaking: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Peer {self.address}, {self.state.value}>"

    @property
    def link(self) -> Link:
        """The link, once the peer has accepted."""
        if self._link is None:
            raise ClosedResourceError(f"{self.address} is not connected")
        return self._link

    @property
    def device(self) -> str:
        """Name of the device that reaches this peer."""
        return self.link.adapter.name

    @property
    def wire(self) -> str:
        """How bytes travel to this peer, ``none`` before the first of them.

        Two wires have a plus sign between them, once both have been used.
        """
        return self.link.wire

    @property
    def connected(self) -> bool:
        """Whether writes are possible, as far as this side knows."""
        return self.state is PeerState.CONNECTED

    @property
    def conn_id(self) -> int:
        """What names the control connection; 0 before there is one."""
        return self._control.conn_id

    def layers(self, group: str | None = None) -> list[int]:
        """List the layers that both sides hold, of one group or of all."""
        return sorted(
            {layer for name, layer in self._route.index if group in (None, name)}
        )

    def n_blocks(self, group: str | None = None) -> int:
        """Return how many blocks the peer has in all of those layers."""
        return min(
            self._route.rows[row][3]
            for (name, _), row in self._route.index.items()
            if group in (None, name)
        )

    # -- connecting ------------------------------------------------------------

    async def connect(self, timeout: float) -> None:
        """Dial, agree on a device, bring up the link; nothing is left on failure."""
        self.host.check_devices()
        await self._control.connect(self.address, timeout=timeout)
        if self.state is not PeerState.CONNECTING:
            raise BrokenPeerError(f"{self.address} went away while connecting")
        self.state = PeerState.CONNECTED
        self._log().info(
            "connected to %s by %s (%s)",
            self.address,
            self.device,
            "software" if self.link.adapter.is_software else "RDMA",
        )

    def _log(self, request: str = "") -> Bound:
        facts = {} if self._link is None else self._link.facts
        return bind(_log, peer=self.address, request=request, **facts)

    def hello(self) -> messages.Hello:
        """Say who dials (for the control connection)."""
        host = self.host
        return messages.Hello(
            incarnation=host.incarnation,
            versions=messages.VERSIONS,
            features=host.features,
            role="initiator",
            agent=f"kvxfer {__version__}",
            geometry=host.wire_geometry,
            devices=host.candidates,
            nonce=messages.new_nonce(),
            shards=shards_to_wire(self.shards),
            invite=self._invite,
            n_qps=host.options.qps_per_connection,
        )

    async def accept(self, offer: messages.Offer) -> messages.Accept:
        """Bring up this side's half of what the peer offers."""
        host = self.host
        adapter = await host.adapter(offer.dialer_device)
        if offer.endpoint.windows is None:
            raise ProtocolError(f"{self.address} offers nothing that can be written")
        if self.shards and not offer.features & messages.FEATURE_SHARDS:
            raise VersionMismatchError(
                f"{self.address} is of a release that knows no shards"
            )
        if host.flushes and not offer.features & messages.FEATURE_FLUSH:
            raise VersionMismatchError(
                f"{self.address} does not permit the READs that flush what is written",
                hint="Set flush to initiator_read there as well, or to none here; an "
                "older release knows no flush.",
            )
        self._route = build(
            host.cache.groups,
            adapter.lkeys,
            geometry_from_wire(offer.geometry),
            offer.endpoint.windows,
            self.shards,
        )
        by_wires = bool(offer.features & messages.FEATURE_WIRES) and adapter.has_wires
        link = await Link.open(
            adapter,
            Access(0),
            receives=0,
            gid=offer.dialer_gid,
            gid_type=offer.dialer_gid_type,
            n_qps=min(
                len(offer.endpoint.qps),
                adapter.n_qps(host.options.qps_per_connection, by_wires),
            ),
            wires=host.wires if by_wires else ("",),
        )
        try:
            await link.connect(offer.endpoint.qps, self._control.peer_address)
            await link.start_initiator(
                self._route.rows, offer.endpoint.ring, flush=host.flushes
            )
        except BaseException:
            await link.close()
            raise
        self._link = link
        self.scheduler = adapter.scheduler
        return messages.Accept(
            conn_id=offer.conn_id, endpoint=messages.Endpoint(qps=link.infos)
        )

    # -- writing ---------------------------------------------------------------

    def plan(self, group: str, layers: Sequence[int] | None) -> Plan:
        """Look up what is to be written; ``None`` is all layers of the group.

        Raises:
          LayoutError: A layer is not on both sides.
        """
        found = self._route.find(
            group, self._route.layers(group) if layers is None else layers
        )
        rows = tuple(row for row, _ in found)
        return Plan(
            rows, tuple(layer for _, layer in found), self.link.wires_of_rows(rows)
        )

    def n_qps(self, group: str, layer: int) -> int:
        """Return how many QPs the data of a layer may go by."""
        return self.link.n_qps_of(self.plan(group, [layer]).wires)

    def begin(
        self, plan: Plan, local_ids: AnyIds, remote_ids: AnyIds, request: bytes
    ) -> WriteResult | Transfer:
        """Hand a write to the engine; what it comes to, or what to :meth:`finish`.

        Raises:
          LayoutError: An id is out of range or named twice. Nothing was posted.
          BrokenPeerError, ClosedResourceError: The connection is gone.
        """
        if self.state is not PeerState.CONNECTED or self.draining:
            self._ensure_connected()
            raise BrokenPeerError(
                f"{self.address} is about to leave and takes no new writes: "
                f"{self.draining}",
                hint="Connect to another server.",
            )
        assert self._link is not None
        try:
            ended = self.scheduler.write(
                self._link.slot, plan, local_ids, remote_ids, request
            )
        except ClosedResourceError as error:
            raise self._failed_meanwhile() from error
        n_blocks = len(local_ids) * len(plan.layers)
        if isinstance(ended, Transfer):
            ended.n_blocks = n_blocks
            return ended
        return self._result(plan.layers, plan.wires, n_blocks, *ended)

    def await_(self, transfer: Transfer, request: bytes, timeout: float) -> None:
        """A write has to be waited for: whoever calls this awaits it.

        Then one of these: :meth:`written`, if it is done; :meth:`finish`, if it is not,
        or if the await was cancelled; or :meth:`unbound`.
        """
        self._begin_write()
        transfer.request = request
        self.scheduler.bound(transfer, timeout, self._undrained)

    def written(self, transfer: Transfer) -> WriteResult:
        """A write is done: count it, and say what it came to."""
        self.unbound(transfer)
        return self._result_of(transfer)

    def _result_of(self, transfer: Transfer) -> WriteResult:
        return self._result(
            transfer.layers,
            transfer.wires,
            transfer.n_blocks,
            transfer.n_bytes,
            transfer.n_wrs,
            time.monotonic() - transfer.began,
        )

    def unbound(self, transfer: Transfer) -> None:
        """Nobody waits for a write any more."""
        self.scheduler.unbound(transfer)
        self._end_write()

    def _undrained(self) -> None:
        self.break_("a write could not be drained")

    def _be_quick(self, link: Link) -> None:
        """From the first bytes on it is known how they travel."""
        names = link.wire_names()
        if not any(names) or not self.connected or self.draining:
            return
        self.quick = QuickWrites(
            link.adapter.engine,
            link.slot,
            PLAIN_KEY,
            self.plans,
            self.host.counters,
            self.scheduler.turns,
            WriteResult,
            link.adapter.name,
            names,
        )

    def _result(
        self,
        layers: tuple[int, ...],
        wires: int,
        n_blocks: int,
        n_bytes: int,
        n_wrs: int,
        seconds: float,
    ) -> WriteResult:
        link = self._link
        assert link is not None
        self.host.counters.wrote(n_bytes, n_blocks, n_wrs, seconds)
        if self.quick is None or not self.quick.knows(wires):
            self._be_quick(link)
        return WriteResult(
            n_bytes, n_wrs, seconds, link.adapter.name, link.wire_of(wires), layers
        )

    async def finish(
        self, transfer: Transfer, cancelled: asyncio.CancelledError | None = None
    ) -> WriteResult:
        """Wait until the device is done with the local blocks of a write.

        Args:
          cancelled: What has ended an await of it already.

        Raises and cancellation: see ``Client.write_cache``.
        """
        try:
            outcome = await self.scheduler.run(transfer, cancelled)
        except asyncio.CancelledError:
            self.host.counters.transfers["cancelled"] += 1
            self._tell_failed(transfer, "cancelled")
            raise
        except NotQuiescentError as error:
            self._tell_failed(transfer, str(error))
            error.peer = self.address
            error.request_id = transfer.request.decode() or None
            error.fenced = self._fenced
            raise
        finally:
            self._end_write()
        if outcome is not Outcome.DONE:
            raise await self._failure(transfer, outcome)
        return self._result_of(transfer)

    def start(
        self,
        group: str,
        layer: int,
        local_ids: AnyIds,
        remote_ids: AnyIds,
        request_id: str,
        tag: tuple[int, int, int],
        deadline: float | None,
        priority: int,
        on_end: Callable[[Transfer], None],
    ) -> Transfer:
        """Begin to write blocks of one layer; does not wait.

        Args:
          tag: Generation, total and digest of the record.
          deadline: On the loop's clock, when it should be done: an earlier one goes
            first, and nothing happens when it has passed. None: a fair share.
          priority: Among the same deadline, or none, the higher goes first.
          on_end: Called once, when the device is done with the local blocks, or, with
            ``abandoned`` set, cannot be brought to be.

        Raises:
          LayoutError, BrokenPeerError, ClosedResourceError: Nothing was posted.
        """
        self._ensure_connected()
        scheduler = self.scheduler
        try:
            transfer = scheduler.submit(
                self.link.slot,
                self.plan(group, [layer]),
                local_ids,
                remote_ids,
                request_id.encode(),
                make_key(deadline, priority, layer),
                tag,
            )
        except ClosedResourceError as error:
            raise self._failed_meanwhile() from error
        self._begin_write()
        began = time.monotonic()

        def ended(transfer: Transfer) -> None:
            self._end_write()
            self._count(transfer, len(local_ids), time.monotonic() - began)
            on_end(transfer)

        transfer.undrained = self._undrained
        scheduler.watch(transfer, ended)
        return transfer

    def stop(self, transfer: Transfer) -> None:
        """Post nothing further of what :meth:`start` began; it ends soon."""
        self.scheduler.stop(transfer)

    def max_blocks(self, request_id: bytes) -> int:
        """How many blocks one write may name: its record has to fit the ring."""
        return self.link.max_record_blocks(len(request_id))

    def send_request(self, message: messages.RequestMessage) -> bool:
        """Say something about a request; false if the peer is gone."""
        return self._control.send_request(message)

    def drain(self, conn_id: int, reason: str) -> None:
        """The peer is about to leave (for the control connection)."""
        _log.info("%s is about to leave: %s", self.address, reason)
        self.draining = reason or "no reason given"
        self.quick = None
        if self._writes == 0:
            self._control.send_drained()

    async def wait_idle(self) -> None:
        """Wait until no write is under way."""
        await self._idle.wait()

    def request(self, conn_id: int, message: messages.RequestMessage) -> None:
        """The peer says something about a request (for the control connection)."""
        if self._on_request is not None:
            self._on_request(message)

    def _count(self, transfer: Transfer, n_ids: int, seconds: float) -> None:
        """Count a transfer of one layer that nobody awaits."""
        counters = self.host.counters
        if transfer.ended and transfer.outcome is Outcome.DONE:
            counters.wrote(transfer.n_bytes, n_ids, transfer.n_wrs, seconds)
        elif transfer.ended and transfer.outcome is Outcome.EXPIRED:
            counters.transfers["expired"] += 1
        else:
            counters.transfers["failed"] += 1

    def _begin_write(self) -> None:
        self._writes += 1
        self._idle.clear()

    def _end_write(self) -> None:
        self._writes -= 1
        if self._writes == 0:
            self._idle.set()
            if self.draining:
                self._control.send_drained()

    def _failed_meanwhile(self) -> BrokenPeerError:
        """The QP has failed, and the engine's word of it is still on its way."""
        self.break_("a WR failed")
        return BrokenPeerError(
            f"the connection to {self.address} has just broken: a WR failed",
            hint="Connect again.",
        )

    def _ensure_connected(self) -> None:
        if self.state is PeerState.CONNECTED:
            return
        if self.state is PeerState.CLOSED and self.error is None:
            raise ClosedResourceError(f"the connection to {self.address} is closed")
        raise BrokenPeerError(
            f"the connection to {self.address} is {self.state.value}"
            + (f": {self.error}" if self.error is not None else ""),
            hint="Connect again.",
        ) from self.error

    def _tell_failed(self, transfer: Transfer, reason: str) -> None:
        done = set(transfer.layers_done)
        missing = [layer for layer in transfer.layers if layer not in done]
        if missing:
            self._control.send_failed(transfer.request, missing, reason)

    async def _failure(self, transfer: Transfer, outcome: Outcome) -> KVXferError:
        """Make the exception for a transfer that ended badly."""
        assert transfer.failures is not None
        layer = transfer.failures[0][0]
        expired = outcome is Outcome.EXPIRED or transfer.expired
        self.host.counters.transfers["expired" if expired else "failed"] += 1
        if outcome is Outcome.EXPIRED:
            # All that was posted has been acknowledged: nothing can come late.
            error: KVXferError = _timeout_error(transfer)
            self._tell_failed(transfer, str(error))
            error.fenced = True
        else:
            layer, error = self.error_of(transfer)
            # While there is a control connection to say it by.
            self._tell_failed(transfer, str(error))
            self.break_("a write failed")
            assert self._breaking is not None
            await asyncio.shield(self._breaking)
            if transfer.expired:
                cause, error = error, _timeout_error(transfer)
                error.__cause__ = cause
            error.fenced = self._fenced
        error.peer = self.address
        error.layer = layer
        request = transfer.request.decode()
        error.request_id = request or None
        self._log(request).info("a write failed: %s", error)
        return error

    def error_of(self, transfer: Transfer) -> tuple[int, KVXferError]:
        """Return layer and exception of the failure that came first."""
        assert transfer.failures is not None
        failures = [f for f in transfer.failures if f[1].status != CANCELLED_STATUS]
        layer, record = next((f for f in failures if f[1].culprit), failures[0])
        if record.status < 0:
            return layer, verbs_error(-record.status, "ibv_post_send")
        self.host.counters.completion_errors[status_name(record.status)] += 1
        cause = completion_error(
            record.status,
            wr_id=record.wr_id,
            qp_num=record.qp_num,
            vendor_err=record.vendor_err,
        )
        # Where it is known why the peer is silent, that is the better answer.
        gone = (
            FlushedError if self.error is None else (FlushedError, RetryExceededError)
        )
        if isinstance(cause, RetryExceededError) and self.link.suspicion:
            cause.hint = f"Known here: {self.link.suspicion}."
        if record.culprit and not isinstance(cause, gone):
            return layer, cause
        error = BrokenPeerError(
            str(self.error)
            if self.error is not None
            else f"the connection to {self.address} broke"
        )
        error.__cause__ = cause
        return layer, error

    # -- the end ---------------------------------------------------------------

    def break_(
        self, reason: str, error: KVXferError | None = None, *, patient: bool = False
    ) -> None:
        """Begin to take the connection down, if that has not begun.

        Args:
          reason: For the peer's log.
          error: What later calls name as the cause.
          patient: Let writes that are in flight complete first, for a moment.
        """
        self.quick = None
        if self._breaking is not None:
            return
        if self.state is PeerState.CONNECTED:
            self.host.counters.broken += 1
            self._log().warning("the connection to %s broke: %s", self.address, reason)
        if self.state is not PeerState.CLOSED:
            self.state = PeerState.BROKEN
        if self.error is None:
            self.error = error
        loop = asyncio.get_running_loop()
        self._breaking = loop.create_task(self._break(reason, patient))
        if self._on_broken is not None:
            loop.call_soon(self._on_broken)

    async def _break(self, reason: str, patient: bool) -> None:
        try:
            if self._link is not None:
                await self._break_link(self._link, reason, patient)
        finally:
            self._control.send_bye(reason)

    async def _break_link(self, link: Link, reason: str, patient: bool) -> None:
        if patient:
            await self._drained()
        try:
            await link.fail()
        except KVXferError as error:
            # The close says it again. Until then the peer can do what we cannot.
            self._log().error("%s: a QP does not let go: %s", self.address, error)
        if self._control.is_established:
            start = time.monotonic()
            self._fenced = await self._control.request_fence(
                reason, timeout=self.host.options.fence_timeout
            )
            self.host.counters.stages["fence"].observe(time.monotonic() - start)
        else:
            self._fenced = False
        await self._drained()
        await link.close()

    async def _drained(self) -> None:
        """Wait, not for ever, until no write is in flight."""
        try:
            await asyncio.wait_for(self._idle.wait(), self.host.options.drain_timeout)
        except asyncio.TimeoutError:
            self._log().warning("%s: a QP is given up with WRs in flight", self.address)

    def credit(self, conn_id: int, consumed_bytes: int, consumed_records: int) -> None:
        """Take the peer's credit for its notify ring (for the control connection)."""
        if self._link is not None and self._link.slot >= 0:
            self._link.adapter.engine.grant(
                self._link.slot, consumed_bytes, consumed_records
            )

    def failed(self, conn_id: int, message: messages.Failed) -> None:
        """The peer writes nothing here, so it has nothing to give up."""
        _log.debug("%s sends a meaningless Failed", self.address)

    async def fence(self, conn_id: int, reason: str) -> None:
        """The peer wants nothing to land any more (for the control connection)."""
        error = BrokenPeerError(f"{self.address} fenced the connection: {reason}")
        # If one of our WRs is the reason, its completion says more; it is due.
        self.break_("fenced by the peer", error, patient=True)
        await self._drained()
        if self._link is not None:
            await self._link.fail()

    async def closed(self, reason: CloseReason) -> None:
        """The control connection is over (for the control connection)."""
        # The goodbye travels apart from the data: acknowledgements of what the peer
        # has taken may still be on their way. If its QP is gone, that shows at once.
        self.break_(
            str(reason),
            BrokenPeerError(f"the connection to {self.address}: {reason}"),
            patient=reason.cause is CloseCause.BYE,
        )
        assert self._breaking is not None
        await asyncio.shield(self._breaking)

    async def close(self) -> None:
        """Take the connection down and wait for it. Twice is fine.

        Raises:
          ClosedResourceError: In a forked child, where there is nothing to close.
          UsageError: In another event loop. Nothing was closed.

        Cancellation:
          Raised when it is closed.
        """
        if self._breaking is None or not self._breaking.done():
            self.host.check("peer")
        if self.state is PeerState.CONNECTED:
            self.state = PeerState.CLOSED
        self.break_("the client closed")
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await finish(self._closing)

    async def _close(self) -> None:
        assert self._breaking is not None
        try:
            await self._breaking
        finally:
            await self._control.close()
            self.state = PeerState.CLOSED

    def uses(self, adapter: Adapter, slot: int) -> bool:
        """Say whether a queue of an engine is this peer's."""
        link = self._link
        return link is not None and link.adapter is adapter and link.slot == slot

    def is_on(self, adapter: Adapter, qp_num: int | None) -> bool:
        """Say whether this peer is reached by a QP, or by a device if that is None."""
        return self._link is not None and self._link.is_on(adapter, qp_num)


def _timeout_error(transfer: Transfer) -> WriteTimeoutError:
    done = len(transfer.layers_done)
    return WriteTimeoutError(
        f"not written within {transfer.timeout:g} s: {done} of {len(transfer.layers)} "
        f"layers are done"
    )
