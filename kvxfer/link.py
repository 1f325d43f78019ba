"""The QPs to one peer, from their creation to their destruction.

A link is made in INIT, connected once the peer's half of the exchange is known,
and ends in one of two ways, both of which leave the device done with all memory:
:meth:`Link.fail` moves the QP to ERR and lets what is posted come back, and
:meth:`Link.close` destroys the QP.
"""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Sequence

from kvxfer import _engine, ports
from kvxfer._records import max_ids
from kvxfer._verbs import CompletionQueue, MemoryRegion, QueuePair
from kvxfer.adapter import Adapter, finish
from kvxfer.agreement import is_global
from kvxfer.errors import ControlError, InternalError, KVXferError, ProtocolError
from kvxfer.gids import GID
from kvxfer.logs import bind
from kvxfer.memory import map_memory
from kvxfer.regions import Span
from kvxfer.soft_wire import which
from kvxfer.verbs_types import Access, PeerHint, QPLimits, QPPath
from kvxfer.wire import NotifyRing, QPInfo

_log = logging.getLogger("kvxfer.link")

_TOKEN_BYTES = 32
# The range of the option notify_ring_bytes. This side mirrors the ring that a peer
# names, and no peer may make it pin more.
_MIN_RING_BYTES = 1 << 12
_MAX_RING_BYTES = 1 << 26
# A bit for each that there can be.
_ALL_WIRES = 3
# A page for the few bytes that a flush reads.
_FLUSH_BYTES = 4096


class LinkState(enum.Enum):
    """Where a link stands; it only moves downwards."""

    INIT = enum.auto()
    CONNECTED = enum.auto()
    FAILED = enum.auto()
    CLOSED = enum.auto()


class RingMemory:
    """Page-aligned memory for notify records, registered on an adapter."""

    def __init__(self, adapter: Adapter, length: int, access: Access) -> None:
        self._memory: Span | None = map_memory(length)
        assert self._memory.allocation is not None
        self.length = length
        self.addr = self._memory.allocation[0]
        self.mr = MemoryRegion(
            adapter.pd, self.addr, length, access, fd=self._memory.fd
        )

    def close(self) -> None:
        """Deregister, then unmap. Twice is fine."""
        self.mr.close()
        self._memory = None


class Link:
    """One or several QPs of ours and what belongs to them; made by :meth:`open`.

    They live and die together: when one fails, all are moved to ERR.
    """

    def __init__(self, adapter: Adapter, address: str, gid: GID) -> None:
        self.adapter = adapter
        self.gid = gid
        self.state = LinkState.INIT
        self.slot = -1
        self._address = address
        self._qps: list[QueuePair] = []
        self._n_connected = 0
        self._asked: tuple[str, ...] = ("",)
        self._last_wires = ["none"]
        self._row_wires: list[int] = []
        self._ring: RingMemory | None = None
        self._flush: RingMemory | None = None
        self._psns: list[int] = []
        self._tokens: list[bytes] = []
        self._failing: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        adapter: Adapter,
        access: Access,
        receives: int,
        address: str = "",
        gid: bytes = b"",
        gid_type: str = "",
        n_qps: int = 1,
        wires: tuple[str, ...] = ("",),
        cq: CompletionQueue | None = None,
    ) -> Link:
        """Make QPs in INIT.

        Args:
          access: What the peer may do through them.
          receives: Receive WRs that each can hold, 0 where none is needed.
          address: Where the peer reaches this host, empty: where it reaches the
            control connection.
          gid: The GID that packets leave from; empty: the adapter's choice.
          gid_type: Its type; empty: any that the address is there by.
          n_qps: How many.
          wires: What of the software device's they travel by, one or two: the first
            of them by the first, as many by the second; empty: what it may.
          cq: Where they complete; None: the engine's, which drives them then.

        Raises:
          DeviceUnavailableError: The device has no such GID.
          VerbsError: The device has no QP left.
        """
        self = cls(adapter, address, adapter.gid_of(gid, gid_type))
        self._asked = wires
        self._last_wires = ["none"] * len(wires)
        limits = QPLimits(
            max_send_wr=min(adapter.options.sq_depth, adapter.max_qp_wr),
            max_recv_wr=max(1, receives),
            max_send_sge=adapter.max_sge,
        )

        def create() -> None:
            qp = QueuePair(adapter.pd, cq or adapter.engine.cq, limits)
            try:
                qp.to_init(
                    port_num=adapter.spec.port_num,
                    pkey_index=adapter.options.pkey_index,
                    access=access,
                )
            except BaseException:
                qp.close()
                raise
            self._qps.append(qp)
            self._psns.append(secrets.randbits(24))
            self._tokens.append(secrets.token_bytes(_TOKEN_BYTES))

        try:
            for _ in range(n_qps):
                await adapter.call(create)
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def qp(self) -> QueuePair:
        """The first QP; the link must be open."""
        if not self._qps:
            raise InternalError("the link has no QP")
        return self._qps[0]

    @property
    def qps(self) -> list[QueuePair]:
        """The QPs that are connected."""
        return self._qps[: self._n_connected]

    @property
    def n_qps(self) -> int:
        """How many QPs are connected."""
        return self._n_connected

    def is_on(self, adapter: Adapter, qp_num: int | None) -> bool:
        """Say whether this is a QP of a device, or any of its QPs if that is None."""
        if self.adapter is not adapter or self.state is LinkState.CLOSED:
            return False
        return qp_num is None or any(qp.qp_num == qp_num for qp in self._qps)

    @property
    def suspicion(self) -> str:
        """Why the peer may not hear this QP although nothing is broken, or empty."""
        adapter = self.adapter
        if adapter.trouble:
            return f"{adapter.name}: {adapter.trouble}"
        if self.wire == "none" and self._cma_error:
            return (
                f"{self._cma_error}, and soft_wire permits no other way: set it to "
                "auto on both sides, or permit the call (kvxfer doctor)"
            )
        if not adapter.has(self.gid.gid, self.gid.gid_type):
            return f"{adapter.name} no longer has the GID {self.gid.text}"
        return ""

    @property
    def wire(self) -> str:
        """How bytes travel, as the device reports it, or did while there was a QP."""
        return self.wire_of(_ALL_WIRES)

    def wire_of(self, wires: int) -> str:
        """How bytes travel by one of its wires or both: ``cma+tcp``, say."""
        if len(self._asked) == 1:
            return self._wire(0)
        found = [self._wire(i) for i in range(len(self._asked)) if wires >> i & 1]
        return "+".join(dict.fromkeys(w for w in found if w != "none")) or "none"

    def wire_names(self) -> tuple[str, ...]:
        """List what :meth:`wire_of` says for each mask, empty while it is not known."""
        n = len(self._asked)
        known = sum(1 << i for i in range(n) if self._wire(i) != "none")
        return tuple(
            self.wire_of(wires) if wires and not wires & ~known else ""
            for wires in range(1 << n)
        )

    def _wire(self, index: int) -> str:
        # Once it is known it is for life.
        lasts = self._last_wires
        if lasts[index] == "none" and self.state is not LinkState.CLOSED:
            self._look_at_wire(index)
            if index == 0 and lasts[0] != "none" and self._cma_error:
                bind(_log, **self.facts).warning(
                    "%s: bytes travel by %s", self._cma_error, lasts[0]
                )
        return lasts[index]

    def _look_at_wire(self, index: int) -> None:
        for i, qp in enumerate(self._qps):
            if self._wire_of_qp(i) == index:
                self._last_wires[index] = qp.wire
                return

    def _wire_of_qp(self, index: int) -> int:
        """Say which of the wires a QP is for."""
        return index * len(self._asked) // len(self._qps)

    def n_qps_of(self, wires: int) -> int:
        """Return how many connected QPs there are of some of the wires."""
        return self._lanes(wires).bit_count()

    def wires_of_rows(self, rows: Sequence[int]) -> int:
        """Return the wires that rows of :meth:`start_initiator` go by: bit mask."""
        found = 0
        for row in rows:
            found |= self._row_wires[row]
        return found

    def _lanes(self, wires: int) -> int:
        """Return the connected QPs of some of the wires, as the engine counts them."""
        return sum(
            1 << i for i in range(self._n_connected) if wires >> self._wire_of_qp(i) & 1
        )

    @property
    def _cma_error(self) -> str:
        """Why the peer, a process of this host, cannot read memory here, or empty."""
        errno = 0 if self.qp.closed else self.qp.cma_errno
        if not errno:
            return ""
        return (
            "the peer cannot read this process's memory "
            f"(process_vm_readv: {os.strerror(errno)})"
        )

    @property
    def facts(self) -> dict[str, object]:
        """What log records about this link carry."""
        qpn = next((qp.qp_num for qp in self._qps if not qp.closed), None)
        return {"qpn": qpn, "gid": self.gid.text}

    @property
    def _mtu(self) -> int:
        """The largest MTU this side takes, as enum ibv_mtu; both use the smaller."""
        active: int = self.adapter.port.active_mtu
        limit = self.adapter.options.path_mtu
        # 1 is 256 bytes, 5 is 4096.
        return active if limit is None else min(active, limit.bit_length() - 8)

    @property
    def infos(self) -> list[QPInfo]:
        """Our half of what each two QPs must know of each other."""
        adapter = self.adapter
        return [
            QPInfo(
                qp_num=qp.qp_num,
                psn=psn,
                gid=self.gid.gid,
                lid=adapter.port.lid,
                mtu=self._mtu,
                port_num=adapter.spec.port_num,
                address=self._address,
                token=token,
                max_rd_atomic=adapter.max_rd_atomic,
            )
            for qp, psn, token in zip(self._qps, self._psns, self._tokens, strict=True)
        ]

    async def connect(self, remotes: Sequence[QPInfo], control_address: str) -> None:
        """Bring the QPs to RTS, each towards one of the peer's.

        Where one side has more, the last of them stay unused.

        Args:
          remotes: The peer's half.
          control_address: Numeric address of the control connection, for a peer
            that names no other.

        Raises:
          DeviceUnavailableError: The GIDs of the two cannot reach each other.
          VerbsError: The device does not take the path.
        """
        for i, remote in enumerate(remotes[: len(self._qps)]):
            await self._connect(i, remote, control_address)
            self._n_connected = i + 1
        if self.state is LinkState.INIT:
            self.state = LinkState.CONNECTED

    async def _connect(self, index: int, remote: QPInfo, control_address: str) -> None:
        adapter = self.adapter
        ports.check_reachable(adapter.spec, self.gid, remote.gid)
        options = adapter.options
        qp = self._qps[index]
        path = QPPath(
            qp_num=remote.qp_num,
            psn=remote.psn,
            gid=remote.gid,
            lid=remote.lid,
            mtu=min(remote.mtu, self._mtu),
            own_psn=self._psns[index],
            port_num=adapter.spec.port_num,
            gid_index=self.gid.index,
            is_global=is_global(adapter.port.link_layer, self.gid.gid, remote.gid),
            timeout=options.ib_timeout,
            retry_cnt=min(options.retry_cnt, adapter.max_retries),
            rnr_retry=options.rnr_retry,
            min_rnr_timer=options.min_rnr_timer,
            max_rd_atomic=min(adapter.max_rd_atomic, max(1, remote.max_rd_atomic)),
            max_dest_rd_atomic=adapter.max_rd_atomic,
            traffic_class=options.traffic_class,
            service_level=options.service_level,
        )
        hint = PeerHint(
            address=remote.address or _numeric(control_address),
            local_token=self._tokens[index],
            remote_token=remote.token,
            wire=self._asked[self._wire_of_qp(index)],
        )

        def modify() -> None:
            qp.bind_peer(hint)
            qp.to_rtr(path)
            qp.to_rts(path)

        await adapter.call(modify)

    def max_record_blocks(self, request_bytes: int) -> int:
        """How many block ids a record of the peer's ring holds, of an initiator."""
        if self._ring is None:
            return 1 << 20
        return max(1, max_ids(self._ring.length, request_bytes))

    async def start_initiator(
        self,
        rows: Sequence[_engine.Row],
        ring: NotifyRing | None,
        *,
        flush: bool = False,
    ) -> None:
        """Let the engine write through these QPs, into ``rows`` of the peer.

        Args:
          flush: Have a few bytes read behind each submission.
        """
        adapter = self.adapter
        parameters: _engine.Ring | None = None
        if ring is not None:
            if not _MIN_RING_BYTES <= ring.length <= _MAX_RING_BYTES:
                raise ProtocolError(
                    f"the peer's notify ring has {ring.length} bytes, not "
                    f"{_MIN_RING_BYTES} to {_MAX_RING_BYTES}"
                )
            memory = await self._make_ring(ring.length, Access(0))
            parameters = (
                memory.addr,
                memory.mr.lkey,
                ring.address,
                ring.rkey,
                ring.length,
                ring.receives,
            )
        target: tuple[int, int] | None = None
        if flush:
            place = await adapter.call(self._make_flush)
            target = (place.addr, place.mr.lkey)
        self.slot = adapter.engine.add_initiator(
            self.qps, rows, parameters, target, self._choose(rows)
        )

    def _choose(self, rows: Sequence[_engine.Row]) -> list[int] | None:
        """Choose a wire for each row, by its largest block; return the lanes.

        None where there is no choice: one wire, or a peer with a single QP.
        """
        self._row_wires = [1] * len(rows)
        if len(self._asked) == 1 or self._n_connected == 1:
            return None
        self._row_wires = [
            1 << which(max(pair[4] for pair in pairs)) for *_, pairs in rows
        ]
        return [self._lanes(wires) for wires in self._row_wires]

    def _make_flush(self) -> RingMemory:
        # Host memory, whatever the cache lies in: some NICs put short READs there by
        # the processor.
        self._flush = RingMemory(self.adapter, _FLUSH_BYTES, Access.LOCAL_WRITE)
        return self._flush

    async def start_target(self, ring_bytes: int, receives: int) -> NotifyRing | None:
        """Let the peer write notify records; return what it must know for that.

        None from a device that moves nothing: there will be nothing to notify of.
        """
        adapter = self.adapter
        if adapter.is_null:
            self.slot = adapter.engine.add_target(self._qps, 0, 0, 0)
            return None
        memory = await self._make_ring(
            ring_bytes, Access.LOCAL_WRITE | Access.REMOTE_WRITE
        )
        self.slot = adapter.engine.add_target(
            self._qps, memory.addr, ring_bytes, receives
        )
        return NotifyRing(
            address=memory.addr,
            length=ring_bytes,
            rkey=memory.mr.rkey,
            receives=receives,
        )

    async def _make_ring(self, length: int, access: Access) -> RingMemory:
        def make() -> RingMemory:
            # Kept here and now: a cancelled call brings nothing back.
            self._ring = RingMemory(self.adapter, length, access)
            return self._ring

        return await self.adapter.call(make)

    def break_(self) -> None:
        """Begin to fail, if that has not begun: for callers that cannot wait."""
        if self._failing is None and self.state is not LinkState.CLOSED:
            self._failing = asyncio.get_running_loop().create_task(self._fail())

    async def fail(self) -> None:
        """Move the QPs to ERR.

        When this returns nothing of the peer lands through it any more, and
        operations on it have ended or are about to. Idempotent.

        Raises:
          VerbsError: The QP neither goes to ERR nor can it be destroyed: its peer
            may still write.

        Cancellation:
          Ends the wait only.
        """
        self.break_()
        if self._failing is not None:
            await asyncio.shield(self._failing)

    async def _fail(self) -> None:
        adapter = self.adapter
        self.state = LinkState.FAILED
        if self.slot >= 0:
            adapter.engine.abort(self.slot)
        try:
            for qp in self._qps:
                await adapter.call(qp.to_error)
        except KVXferError as error:
            bind(_log, **self.facts).warning(
                "a QP does not go to ERR and is destroyed: %s", error
            )
            await self._destroy()
            return
        if self.slot >= 0:
            adapter.engine.flush(self.slot)
            self._look()
            if adapter.engine.unretired(self.slot):
                asyncio.get_running_loop().call_later(
                    adapter.options.drain_timeout, self._destroy_unless_drained
                )

    def _look(self) -> None:
        if self.adapter.completions is not None:
            self.adapter.completions.catch_up()

    def _destroy_unless_drained(self) -> None:
        if self.state is LinkState.FAILED and self.adapter.engine.unretired(self.slot):
            self._begin_close()

    def _begin_close(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        return self._closing

    async def close(self) -> None:
        """Destroy the QP: when this returns the device touches nothing through it.

        Operations that were in flight end as failed. Twice is fine.

        Raises:
          VerbsError: The QP could not be destroyed; waiting transfers end with
            NotQuiescentError.

        Cancellation:
          Raised when it is closed.
        """
        await finish(self._begin_close())

    async def _close(self) -> None:
        if self.slot >= 0:
            # First nothing may land any more; then what has landed, and what the
            # peer has acknowledged, is told: the QP takes its completions along.
            self.break_()
            if self._failing is not None:
                await asyncio.wait({self._failing})
                self._failing.exception()  # what it says is said again below
            self._look()
        await self._destroy()

    async def _destroy(self) -> None:
        """Destroy the QPs and what belongs to them; what is left may be tried again.

        Raises:
          VerbsError: One could not be destroyed. Transfers that are in flight end as
            abandoned.
        """
        adapter = self.adapter
        if self._qps and not self.qp.closed:
            for i in range(len(self._asked)):
                self._look_at_wire(i)
        self.state = LinkState.CLOSED
        try:
            for qp in self._qps:
                await adapter.call(qp.close)
        except KVXferError:
            adapter.scheduler.abandon(self.slot)
            raise
        if self.slot >= 0:
            adapter.engine.forget(self.slot)
            self._look()
            adapter.engine.remove(self.slot)
            self.slot = -1
        for memory in (self._ring, self._flush):
            if memory is not None:
                await adapter.call(memory.close)


async def numeric_address(host: str) -> str:
    """Resolve a host to the numeric address that a device can listen on.

    Raises:
      ControlError: The name is unknown.
    """
    literal = _numeric(host)
    if literal:
        return literal
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise ControlError(f"host {host!r} does not resolve: {error}") from error
    # As the control connection does: IPv4 first where a name has both.
    infos.sort(key=lambda info: info[0] != socket.AF_INET)
    return str(infos[0][4][0])


def _numeric(address: str) -> str:
    """Return a numeric address as the device takes it, or empty if it is none."""
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        return ""
