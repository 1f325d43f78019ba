"""What goes to devices, and what comes back: the chunks of a client's requests.

A chunk waits in one :class:`~kvxfer.policy.Admission` for its turn and for room in the
windows, is posted with the tag that its record carries, and is accounted for when the
device is done with its blocks.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable

from kvxfer._transfer import Outcome, Transfer
from kvxfer.errors import BrokenPeerError, ClosedResourceError, KVXferError
from kvxfer.host import Host
from kvxfer.outbound import Chunk, Tag
from kvxfer.peer import Peer
from kvxfer.policy import Admission, Window
from kvxfer.remotes import Remote, Stream
from kvxfer.requests import End, EndCode, Key
from kvxfer.stream_statistics import Lacks, PeerLoad

__all__ = ["Dispatcher"]


class Dispatcher:
    """The chunks of all requests of one client.

    Args:
      drive: Carries out what a request's state asks for.
    """

    def __init__(self, host: Host, drive: Callable[[Stream], None]) -> None:
        options = host.options
        self._host = host
        self._options = options
        self._drive = drive
        self._policy: Admission[Chunk] = Admission(
            Window(options.peer_window_bytes, options.peer_window_wrs),
            Window(options.device_window_bytes, options.device_window_wrs),
        )
        self._owners: dict[Chunk, tuple[Stream, Remote]] = {}
        self._dispatching = False

    def forget(self, request: Stream) -> None:
        """Let nothing of a request wait any more."""
        for chunk in self._policy.remove(request._flow):
            del self._owners[chunk]

    def lacks(self, request: Stream) -> Lacks:
        """Say what the chunks of a request that wait for a device lack."""
        full = self._policy.blocked(request._flow)
        return Lacks.WINDOW if full else Lacks.TURN

    def loads(self) -> tuple[PeerLoad, ...]:
        """Say what is in flight, by peer."""
        return tuple(
            PeerLoad(getattr(remote, "address", ""), load.n_bytes, load.n_wrs)
            for remote, load in list(self._policy.peers.items())
        )

    def queue(self, request: Stream, chunk: Chunk) -> None:
        remote = request.remote
        assert remote is not None
        peer = remote.live_peer
        planes = len(self._host.cache.group(chunk.key[0]).rows(chunk.key[1]))
        self._owners[chunk] = (request, remote)
        self._policy.push(
            request._flow,
            chunk,
            peer=remote,
            device=peer.device,
            layer=chunk.key[1],
            n_bytes=chunk.n_bytes,
            n_wrs=planes * len(chunk.local_ids) + 2,
        )

    def dispatch(self) -> None:
        """Give devices what their windows have room for."""
        if self._dispatching:
            return
        self._dispatching = True
        try:
            while (chunk := self._policy.pop()) is not None:
                self._post(chunk)
        finally:
            self._dispatching = False

    def _post(self, chunk: Chunk) -> None:
        request, remote = self._owners.pop(chunk)
        peer = remote.peer
        tag = request._core.tag(chunk) if peer is not None else None
        if tag is None or peer is None:
            self._policy.done(chunk)
            return
        due = request._flow.deadline
        try:
            transfer = peer.start(
                chunk.key[0],
                chunk.key[1],
                chunk.local_ids,
                chunk.remote_ids,
                request.request_id,
                (tag.generation, tag.total, self._digest(request, chunk, tag)),
                due if math.isfinite(due) else None,
                request._flow.priority,
                functools.partial(self._written, request, peer, chunk),
            )
        except KVXferError as error:
            self._policy.done(chunk)
            gone = isinstance(error, BrokenPeerError | ClosedResourceError)
            if remote.is_direct or not gone:
                reason = f"layer {chunk.key[1]} cannot be written: {error}"
                request._core.stop(
                    End(EndCode.FAILED, reason, chunk.key[1], cause=error)
                )
            self._drive(request)
            return
        request.transfers[transfer] = peer
        request._core.posted(chunk, tag)
        self._drive(request)

    def _digest(self, request: Stream, chunk: Chunk, tag: Tag) -> int:
        if not request.checksum or not tag.final:
            return 0
        return self.layer_digest(request, chunk.key)

    def layer_digest(self, request: Stream, key: Key) -> int:
        from kvxfer.digest import digest

        ids = request._core.source_ids(key)
        return digest(self._host.cache.group(key[0]), key[1], ids) if ids.size else 0

    def _written(
        self, request: Stream, peer: Peer, chunk: Chunk, transfer: Transfer
    ) -> None:
        """A chunk has ended, well or badly; there may be another connection by now."""
        request.transfers.pop(transfer, None)
        self._policy.done(chunk)
        request._n_wrs += transfer.n_wrs
        request._wires |= transfer.wires
        request._way = (peer.device, peer.link.wire_of(request._wires))
        if transfer.abandoned:
            request.abandoned = True
        ok = not transfer.abandoned and transfer.outcome is Outcome.DONE
        if not ok and transfer.outcome is Outcome.FAILED:
            # Whether the peer has executed it is not known: before it has been fenced
            # nobody may be told that nothing can land any more.
            peer.break_("a write failed")
        assert request.remote is not None
        if not ok and request._core.is_live and request.remote.is_direct:
            request._core.stop(_end_of(peer, chunk, transfer))
        stopped = not transfer.abandoned and transfer.outcome is Outcome.EXPIRED
        request._core.written(chunk, ok=ok, stopped=stopped)
        self._drive(request)

    def flush(self, request: Stream, chunk: Chunk) -> None:
        """Write a block again, so that a record follows what was stopped."""
        remote = request.remote
        peer = remote.peer if remote is not None and not remote.is_direct else None
        offer = request._core.offer
        if peer is None or offer is None:
            request._core.flushed(chunk, ok=False)
            return
        if peer.n_qps(*chunk.key) > 1:
            # A record would speak for one QP, and the chunk was on several. The end
            # of the connection speaks for all; the rest is repeated on the next one.
            peer.break_("a write was stopped on several QPs")
            request._core.flushed(chunk, ok=False)
            return
        try:
            transfer = peer.start(
                chunk.key[0],
                chunk.key[1],
                chunk.local_ids[:1],
                chunk.remote_ids[:1],
                request.request_id,
                (offer.generation, 0, 0),
                0.0,  # a deadline that is past: before all else
                0,
                functools.partial(self._flushed, request, peer, chunk),
            )
        except KVXferError:
            request._core.flushed(chunk, ok=False)
            return
        request.timers.append(
            asyncio.get_running_loop().call_later(
                self._options.drain_timeout, _break_unless_ended, peer, transfer
            )
        )

    def _flushed(
        self, request: Stream, peer: Peer, chunk: Chunk, transfer: Transfer
    ) -> None:
        if transfer.abandoned:
            request.abandoned = True
        ok = not transfer.abandoned and transfer.outcome is Outcome.DONE
        if not ok:
            peer.break_("a write failed")
        request._core.flushed(chunk, ok=ok)
        self._drive(request)

    def cancel(self, request: Stream) -> None:
        self.forget(request)
        for task in list(request.waits):
            task.cancel()
        for transfer, peer in list(request.transfers.items()):
            peer.stop(transfer)


def _end_of(peer: Peer, chunk: Chunk, transfer: Transfer) -> End:
    """Say how a request without an offer ends whose chunk could not be written."""
    if transfer.abandoned:
        reason = "its QP can be neither drained nor destroyed"
        return End(EndCode.FAILED, reason, chunk.key[1])
    layer, error = peer.error_of(transfer)
    return End(EndCode.FAILED, str(error), layer, cause=error)


def _break_unless_ended(peer: Peer, transfer: Transfer) -> None:
    if not transfer.ended:
        peer.break_("a write could not be drained")
