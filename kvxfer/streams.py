"""Requests of a client: opened by an engine, offered by a decode side, written here.

Calls come from any thread and are carried out on the client's event loop. There each
request is an :class:`~kvxfer.outbound.Outbound`; what it has to write waits for its
turn in one :class:`~kvxfer.policy.Admission` and goes to the peer's device from
there. Who offers, and over what connection, is the matter of :mod:`kvxfer.remotes`.
"""

from __future__ import annotations

import asyncio
import collections
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from kvxfer import wire
from kvxfer.blocks import Ids, as_ids
from kvxfer.dispatch import Dispatcher
from kvxfer.errors import (
    ClosedResourceError,
    LayoutError,
    NotQuiescentError,
    UsageError,
)
from kvxfer.events import happens, has_happened
from kvxfer.handover import Mailbox
from kvxfer.host import Host
from kvxfer.outbound import (
    Finished,
    Flush,
    LayerFinal,
    Offered,
    Piece,
    Stop,
    Write,
)
from kvxfer.peer import Peer
from kvxfer.positions import Window as Blocks
from kvxfer.remotes import Remote, Remotes, Stream
from kvxfer.request import as_groups
from kvxfer.requests import End, EndCode, Key, RequestState
from kvxfer.stream_statistics import ClientStatistics, Lacks, LayerWaits
from kvxfer.waiting import MAX_FINISHED, Ending, take_all

__all__ = ["Streams"]

_MAX_TOMBSTONES = 65536


class Streams:
    """All requests of one client; made and closed on its event loop."""

    def __init__(self, host: Host) -> None:
        options = host.options
        self._host = host
        self._options = options
        self._mailbox = Mailbox("client")
        self._lock = threading.Lock()
        self._requests: dict[str, Stream] = {}
        self._tombstones: collections.OrderedDict[str, End] = collections.OrderedDict()
        self._finished: collections.deque[Stream]
        self._finished = collections.deque(maxlen=MAX_FINISHED)
        self._dispatcher = Dispatcher(host, self.drive)
        self._closed = False
        self._stall: asyncio.TimerHandle | None = None
        self.remotes = Remotes(host, self)

    # -- any thread --------------------------------------------------------------

    def post(self, call: Callable[[], None]) -> None:
        """Have something carried out on the loop."""
        self._mailbox.post(call)

    def check(self) -> None:
        """Raise unless this is the process and the loop of the client."""
        self._host.check("client")

    def check_elsewhere(self) -> None:
        """Raise on the loop's own thread, where nobody may wait."""
        self._mailbox.check_elsewhere()

    def group(self, name: str | None) -> str:
        """Return a group's name, which may be left out if there is one only."""
        return self._host.cache.group(name).name

    def layers(self, group: str, layer: int | None) -> list[int]:
        """Return the layer asked for, or all of a group.

        Raises:
          LayoutError: The cache has no such layer.
        """
        have = self._host.cache.group(group)
        if layer is None:
            return list(have.layers)
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise LayoutError(f"layer {layer!r} is no integer")
        have.rows(layer)
        return [layer.__index__()]

    def check_ids(self, group: str, layers: list[int], ids: Ids) -> None:
        """Raise LayoutError for blocks that are not in all of these layers."""
        have = self._host.cache.group(group)
        limit = min(place.n_blocks for layer in layers for _, place in have.rows(layer))
        if ids.size and not 0 <= ids.min() <= ids.max() < limit:
            raise LayoutError(
                f"local_block_ids: {int(ids.min())} to {int(ids.max())}, of {limit} "
                f"blocks in group {group!r}"
            )

    def check_aux(self, request: Stream, aux: bytes) -> None:
        """Raise UsageError where nobody is there to take ``aux``."""
        if aux and request.remote is not None and request.remote.is_direct:
            raise UsageError("without an offer there is no ticket that aux goes to")

    def open(
        self,
        request_id: str,
        *,
        deadline: float,
        priority: int,
        lease: float,
    ) -> Stream:
        """Open a request; see ``Client.open``. ``deadline`` is in seconds from now."""
        request = self._new(request_id, deadline, priority)
        self.post(lambda: self._opened(request, deadline, lease))
        return request

    def direct(
        self,
        peer: Peer,
        request_id: str,
        blocks: object,
        *,
        first_block: int,
        deadline: float,
        priority: int,
        lease: float,
    ) -> Stream:
        """Open a request whose remote blocks are known; see ``Client.request``."""
        names = [group.name for group in self._host.cache.groups]
        groups = as_groups(blocks, names[0] if len(names) == 1 else None)
        windows: dict[str, Blocks] = {}
        for name, ids in groups.items():
            found = as_ids(ids, "remote_block_ids").copy()
            limit = peer.n_blocks(self.group(name))
            if found.size and not 0 <= found.min() <= found.max() < limit:
                raise LayoutError(
                    f"remote_block_ids: {int(found.min())} to {int(found.max())}, of "
                    f"{limit} blocks of the peer"
                )
            windows[name] = Blocks(first_block, found)
        request = self._new(request_id, deadline, priority)
        remote = Remote.of_peer(peer)
        request.remote = remote

        def begin() -> None:
            self._opened(request, deadline, lease)
            self._attach(request, remote, 0, windows, frozenset())

        self.post(begin)
        return request

    def _new(self, request_id: str, deadline: float, priority: int) -> Stream:
        due = time.monotonic() + deadline if math.isfinite(deadline) else deadline
        request = Stream(self, request_id, deadline=due, priority=priority)
        with self._lock:
            if self._closed:
                raise ClosedResourceError("the client is closed")
            if request_id in self._requests:
                raise UsageError(
                    f"request {request_id!r} is open already, "
                    f"{self._requests[request_id].state.value}"
                )
            self._requests[request_id] = request
            self._tombstones.pop(request_id, None)
        return request

    def finished(self) -> list[Stream]:
        """Take the requests that are over; see ``Client.finished``."""
        return take_all(self._finished)

    def abort(self, request: Stream, end: End) -> Ending:
        """See ``Request.abort``."""
        if not request._core.is_over:
            self.post(lambda: self.stop(request, end))
        options = self._options
        patience = 2 * options.drain_timeout + options.fence_timeout + 5.0
        return Ending(request._over, self._mailbox.is_here, patience)

    # -- what the engine says, on the loop -----------------------------------------

    def _opened(self, request: Stream, deadline: float, lease: float) -> None:
        loop = asyncio.get_running_loop()
        if math.isfinite(deadline):
            end = End(EndCode.DEADLINE, f"not sent within {deadline:g} s")
            request.timers.append(loop.call_later(deadline, self.stop, request, end))
        self._set_lease(request, lease)
        if self._stall is None:
            self._arm_stall()
        if request.remote is None:
            self.remotes.opened(request)

    def _set_lease(self, request: Stream, seconds: float) -> None:
        if request.lease is not None:
            request.lease.cancel()
        end = End(EndCode.LEASE, f"not complete within a lease of {seconds:g} s")
        loop = asyncio.get_running_loop()
        request.lease = loop.call_later(seconds, self.stop, request, end)

    def ready(
        self,
        request: Stream,
        keys: list[Key],
        ids: Ids,
        first_block: int,
        final: bool,
        event: Any,
        optional: bool,
    ) -> None:
        """Take what has become ready."""
        if not request._core.is_live:
            return
        try:
            is_open = has_happened(event)
        except Exception as error:  # noqa: BLE001 - an engine's own, told as it is
            self._event_failed(request, keys[0], error)
            return
        pieces = [
            request._core.ready(
                key, first_block, ids, final=final, is_open=is_open, optional=optional
            )
            for key in keys
        ]
        self.drive(request)
        if not is_open:
            task = asyncio.get_running_loop().create_task(
                self._wait_for(request, pieces, event)
            )
            request.waits.add(task)
            task.add_done_callback(request.waits.discard)

    async def _wait_for(self, request: Stream, pieces: list[Piece], event: Any) -> None:
        try:
            await happens(event)
        except Exception as error:  # noqa: BLE001 - an engine's own, told as it is
            self._event_failed(request, pieces[0].key, error)
            return
        for piece in pieces:
            request._core.opened(piece)
        self.drive(request)

    def _event_failed(self, request: Stream, key: Key, error: Exception) -> None:
        reason = f"the event of layer {key[1]} failed: {error!r}"
        self.stop(request, End(EndCode.FAILED, reason, key[1], cause=error))

    def finish(self, request: Stream, aux: bytes) -> None:
        """Nothing more will become ready."""
        request._core.finish(aux)
        self.drive(request)

    def stop(self, request: Stream, end: End) -> None:
        """End a request badly."""
        request._core.stop(end)
        self.drive(request)

    # -- what the other side says --------------------------------------------------

    def find(self, request_id: str) -> Stream | None:
        """Find a request that is not over."""
        return self._requests.get(request_id)

    def tombstone(self, request_id: str) -> End | None:
        """Say how a request ended lately, if badly."""
        return self._tombstones.get(request_id)

    def attach(self, request: Stream, remote: Remote, offer: wire.OfferBlocks) -> None:
        """Let an offer and a request come together."""
        request.remote = remote
        request.checksum = offer.checksum
        self._set_lease(request, offer.lease)
        if offer.checksum and not self._host.cache.on_host:
            reason = "digests are asked for, and the writer's cache lies on a GPU"
            self._refuse(request, remote, offer, End(EndCode.FAILED, reason))
            return
        windows: dict[str, Blocks] = {}
        announced = set()
        try:
            for group in offer.groups:
                ids = as_ids(memoryview(group.block_ids).cast("I"), "block ids").copy()
                limit = remote.live_peer.n_blocks(group.group)
                if ids.size and ids.max() >= limit:
                    raise LayoutError(
                        f"block {int(ids.max())} is offered, of {limit} blocks"
                    )
                windows[group.group] = Blocks(group.first_block, ids)
                announced |= {(group.group, layer) for layer in group.announced}
        except (LayoutError, ValueError) as error:
            reason = f"the offer makes no sense: {error}"
            end = End(EndCode.RULES, reason, cause=error)
            self._refuse(request, remote, offer, end)
            return
        self._attach(request, remote, offer.generation, windows, frozenset(announced))

    def _refuse(
        self, request: Stream, remote: Remote, offer: wire.OfferBlocks, end: End
    ) -> None:
        """End a request whose offer cannot be taken; its core has not seen it."""
        self.remotes.refuse(remote, offer, end)
        self.stop(request, end)

    def _attach(
        self,
        request: Stream,
        remote: Remote,
        generation: int,
        windows: dict[str, Blocks],
        announced: frozenset[Key],
    ) -> None:
        if request._core.state is not RequestState.OPEN:
            return
        peer = remote.live_peer
        cache = self._host.cache
        block_bytes = {
            (name, layer): sum(
                place.block_bytes for _, place in cache.group(name).rows(layer)
            )
            for name in windows
            for layer in peer.layers(name)
        }
        request._core.attach(
            Offered(
                generation,
                windows,
                block_bytes,
                announced,
                self._options.stream_chunk_bytes,
                peer.max_blocks(request.request_id.encode()),
            )
        )
        self.drive(request)

    def detach(self, request: Stream) -> None:
        """The connection of a request is gone; it may come back."""
        self._dispatcher.forget(request)
        request._core.detach()
        self.drive(request)

    # -- carrying out -----------------------------------------------------------------

    def drive(self, request: Stream) -> None:
        """Carry out what a request's state asks for."""
        core = request._core
        while actions := core.take():
            for action in actions:
                if isinstance(action, Write):
                    self._dispatcher.queue(request, action.chunk)
                elif isinstance(action, LayerFinal):
                    self._say_final(request, action)
                elif isinstance(action, Finished):
                    self._say_finished(request, action)
                elif isinstance(action, Flush):
                    self._dispatcher.flush(request, action.chunk)
                elif isinstance(action, Stop):
                    self._dispatcher.cancel(request)
                else:
                    self._end(request)
        if (
            core.state is RequestState.FINISHING
            and not core.in_flight
            and request.remote is not None
            and request.remote.is_direct
        ):
            # Nobody confirms: what has been acknowledged is all there is to know.
            core.announced((), complete=True)
            self.drive(request)
        self._dispatcher.dispatch()

    def _say_final(self, request: Stream, action: LayerFinal) -> None:
        remote = request.remote
        offer = request._core.offer
        if remote is None or remote.is_direct or offer is None:
            return
        digest = (
            self._dispatcher.layer_digest(request, action.key)
            if request.checksum
            else 0
        )
        remote.send(
            wire.LayersFinal(
                conn_id=remote.conn_id,
                generation=offer.generation,
                layers=[
                    wire.FinalLayer(
                        group=action.key[0],
                        layer=action.key[1],
                        total=action.total,
                        digest=digest,
                    )
                ],
            )
        )

    def _say_finished(self, request: Stream, action: Finished) -> None:
        remote = request.remote
        offer = request._core.offer
        if remote is not None and not remote.is_direct and offer is not None:
            remote.send(
                wire.Finish(
                    conn_id=remote.conn_id,
                    generation=offer.generation,
                    total=action.total,
                    aux=action.aux,
                )
            )

    def _end(self, request: Stream) -> None:
        """Nothing of a request is in flight: tell everybody."""
        core = request._core
        remote = request.remote
        for timer in (*request.timers, request.lease):
            if timer is not None:
                timer.cancel()
        peer = remote.address if remote is not None else ""
        if request.abandoned:
            request._error = NotQuiescentError(
                "the QP could be neither drained nor destroyed: the device may still "
                "read the source blocks; do not reuse or free them in this process"
            )
        elif core.end is not None:
            request._error = core.end.error(request.request_id, peer)
        with self._lock:
            self._requests.pop(request.request_id, None)
            if core.end is not None:
                self._tombstones[request.request_id] = core.end
                while len(self._tombstones) > _MAX_TOMBSTONES:
                    self._tombstones.popitem(last=False)
        request._died = time.monotonic()
        self._host.counters.streamed(core.times())
        self._finished.append(request)
        if remote is not None:
            self.remotes.ended(request, remote)
        request._over.wake()
        if not self._requests and self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # -- time ------------------------------------------------------------------------

    def _arm_stall(self) -> None:
        self._stall = asyncio.get_running_loop().call_later(
            self._options.stall_timeout / 4, self._look_for_stalls
        )

    def _look_for_stalls(self) -> None:
        self._arm_stall()
        limit = self._options.stall_timeout
        before = time.monotonic() - limit
        for request in list(self._requests.values()):
            core = request._core
            if core.waits_for_the_wire and core.progress_at < before:
                end = End(EndCode.STALLED, f"ready and offered, but {limit:g} s still")
                self.stop(request, end)

    # -- looks and the end -------------------------------------------------------------

    def statistics(self) -> ClientStatistics:
        """Say what goes on; see ``Client.statistics``."""
        states = collections.Counter(
            r.state.value for r in list(self._requests.values())
        )
        waiting: list[LayerWaits] = []
        for request in list(self._requests.values()):
            waiting += self._waiting(request)
        return ClientStatistics(
            dict(states),
            self.remotes.n_parked,
            tuple(waiting),
            self._dispatcher.loads(),
        )

    def _waiting(self, request: Stream) -> list[LayerWaits]:
        core = request._core
        found = []
        for piece, is_blocked in core.waiting():
            if not piece.open:
                lacks = Lacks.EVENT
            elif core.offer is None or core.state is RequestState.OPEN:
                lacks = Lacks.OFFER
            else:
                lacks = Lacks.EARLIER if is_blocked else Lacks.TURN
            n = int(piece.local_ids.size)
            found.append(LayerWaits(request.request_id, *piece.key, n, lacks))
        lacks = self._dispatcher.lacks(request)
        blocks: collections.Counter[Key] = collections.Counter()
        for _, _, item in list(request._flow.waiting):
            blocks[item.value.key] += len(item.value.local_ids)
        for key, n in blocks.items():
            found.append(LayerWaits(request.request_id, *key, n, lacks))
        return found

    async def open_listener(self) -> None:
        """Begin to listen for invitations, where the options say so."""
        await self.remotes.open()

    async def close(self) -> None:
        """End all requests, then all connections. Twice is fine."""
        with self._lock:
            self._closed = True
        self._mailbox.close()
        requests = list(self._requests.values())
        for request in requests:
            self.stop(request, End(EndCode.CLOSED, "the client was closed"))
        for request in requests:
            await request._over.wait()
        waits = {task for request in requests for task in request.waits}
        if waits:
            await asyncio.wait(waits)
        await self.remotes.close()
