"""A streamed request at the side that writes, as a state machine. Pure; no I/O.

What is ready and what is offered come in any order. Where both are there, pieces
become chunks that may be written, in an order that never lets older bytes land on
newer ones: a piece waits until every earlier piece that shares a position with it
has been acknowledged. An owner feeds in what happens and carries out what
:meth:`Outbound.take` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvxfer.blocks import Ids
from kvxfer.errors import InternalError, KVXferError, LayoutError
from kvxfer.positions import Window, overlap
from kvxfer.requests import End, EndCode, Key, LayerState, LayerTimes, RequestState

__all__ = [
    "Action",
    "Chunk",
    "Finished",
    "Flush",
    "LayerFinal",
    "Offered",
    "Outbound",
    "Over",
    "Piece",
    "Stop",
    "Tag",
    "Write",
]


@dataclass(frozen=True)
class Offered:
    """What a writer knows of an offer.

    Attributes:
      generation: Names it; 0 for blocks that were named here and not offered.
      windows: The blocks of each group.
      block_bytes: What can be written to: bytes of a block, all planes together, for
        each layer and group that both sides hold.
      announced: Complete already.
      max_blocks: Blocks that one chunk may have, for each layer and group.
    """

    generation: int
    windows: Mapping[str, Window]
    block_bytes: Mapping[Key, int]
    announced: frozenset[Key] = frozenset()
    chunk_bytes: int = 1 << 22
    max_blocks: int = 1 << 16


@dataclass(eq=False)
class Piece:
    """Blocks of one layer that one call said to be ready."""

    key: Key
    first_block: int
    local_ids: Ids
    open: bool
    """Its bytes may be read: the event that they wait for has happened."""
    queued: bool = False
    unposted: int = 0
    unacknowledged: int = 0

    @property
    def stop(self) -> int:
        """The position behind its last block."""
        return self.first_block + int(self.local_ids.size)

    @property
    def settled(self) -> bool:
        """Whether every block of it has been acknowledged."""
        return self.queued and not self.unacknowledged

    def shares(self, other: Piece) -> bool:
        """Whether some position is in both."""
        return self.first_block < other.stop and other.first_block < self.stop


@dataclass(eq=False)
class Chunk:
    """Blocks that go out in one operation."""

    piece: Piece
    position: int
    local_ids: Ids
    remote_ids: Ids
    n_bytes: int
    epoch: int

    @property
    def key(self) -> Key:
        """Group and layer."""
        return self.piece.key


@dataclass(frozen=True)
class Tag:
    """What a chunk's record says besides its blocks; ``final`` ends its layer."""

    generation: int
    total: int
    final: bool


@dataclass(frozen=True)
class Write:
    """This chunk may be written."""

    chunk: Chunk


@dataclass(frozen=True)
class LayerFinal:
    """Say that this layer is complete: its last record did not."""

    key: Key
    total: int


@dataclass(frozen=True)
class Finished:
    """Say that all has been written."""

    total: int
    aux: bytes


@dataclass(frozen=True)
class Flush:
    """Write a block of this chunk again, with a record, then call ``flushed``.

    A chunk was stopped in its middle, and no record follows what was written of it:
    acknowledged is not yet visible. A record behind it on the same connection is.
    """

    chunk: Chunk


@dataclass(frozen=True)
class Stop:
    """Post nothing further; tell when what is posted has ended."""


@dataclass(frozen=True)
class Over:
    """Nothing of the request is in flight any more: its last action."""


Action = Write | LayerFinal | Finished | Flush | Stop | Over


@dataclass(eq=False)
class _Layer:
    pieces: list[Piece] = field(default_factory=list)
    optional: bool = True
    """Only named by "all layers": the other side need not have it."""
    final: bool = False
    records: int = 0
    closed: bool = False
    """The other side knows, or is being told, how many records it had."""
    visible: bool = False
    ready_at: float | None = None
    posted_at: float | None = None
    acknowledged_at: float | None = None
    visible_at: float | None = None

    @property
    def drained(self) -> bool:
        """Whether all that is ready has been posted."""
        return all(piece.queued and not piece.unposted for piece in self.pieces)


class Outbound:
    """One request until its end.

    Attributes:
      state: Set by ``_set_state`` only.
      end: Why it ended, if not well.
      in_flight: Chunks that a device has.
      bytes_done: Bytes of blocks acknowledged, those sent again counted again.
      progress_at: When something last moved, for the stall timeout.
    """

    _MOVES: ClassVar[Mapping[RequestState, frozenset[RequestState]]] = {
        RequestState.OPEN: frozenset(
            {RequestState.STREAMING, RequestState.DONE, RequestState.ENDING}
        ),
        RequestState.STREAMING: frozenset(
            {
                RequestState.OPEN,
                RequestState.FINISHING,
                RequestState.DONE,
                RequestState.ENDING,
            }
        ),
        RequestState.FINISHING: frozenset(
            {RequestState.OPEN, RequestState.DONE, RequestState.ENDING}
        ),
        RequestState.ENDING: frozenset({RequestState.ABORTED, RequestState.FAILED}),
        RequestState.DONE: frozenset(),
        RequestState.ABORTED: frozenset(),
        RequestState.FAILED: frozenset(),
    }

    def __init__(self, request_id: str, now: Callable[[], float]) -> None:
        self.request_id = request_id
        self.state = RequestState.OPEN
        self.end: End | None = None
        self.offer: Offered | None = None
        self.in_flight = 0
        self.bytes_done = 0
        self.progress_at = now()
        self._now = now
        self._epoch = 0
        self._layers: dict[Key, _Layer] = {}
        self._records = 0
        self._aux: bytes | None = None
        self._told_finished = False
        self._complete = False
        self._unflushed: Chunk | None = None
        self._actions: list[Action] = []

    @property
    def records(self) -> int:
        """Records that the present connection has carried, or will."""
        return self._records

    # -- looks -----------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen to it any more."""
        return not self._MOVES[self.state]

    @property
    def is_live(self) -> bool:
        """Whether it goes on."""
        return not self.is_over and self.state is not RequestState.ENDING

    @property
    def finishing(self) -> bool:
        """Whether the caller has said that this is all."""
        return self._aux is not None

    @property
    def waits_for_the_wire(self) -> bool:
        """Whether something is both ready and offered, and not acknowledged yet."""
        if self.offer is None or not self.is_live:
            return False
        return any(
            piece.open and not piece.settled
            for layer in self._layers.values()
            for piece in layer.pieces
        )

    def layer_state(self, key: Key) -> LayerState:
        """How far a layer is, of what is ready of it."""
        layer = self._layers[key]
        if layer.visible:
            return LayerState.VISIBLE
        if not layer.drained or not layer.pieces:
            return LayerState.WAITING
        if all(piece.settled for piece in layer.pieces):
            return LayerState.ACKNOWLEDGED
        return LayerState.POSTED

    def layers(self) -> list[Key]:
        """The layers that something has been said about."""
        return list(self._layers)

    def times(self) -> tuple[LayerTimes, ...]:
        """When each layer got how far."""
        return tuple(
            LayerTimes(
                *key,
                layer.ready_at,
                layer.posted_at,
                layer.acknowledged_at,
                layer.visible_at,
            )
            for key, layer in sorted(self._layers.items())
        )

    def source_ids(self, key: Key) -> Ids:
        """The blocks that a layer's offered positions come from, in their order."""
        assert self.offer is not None
        first = self.offer.windows[key[0]].first_block
        latest: dict[int, int] = {}
        for piece in self._layers[key].pieces:
            for i, block_id in enumerate(piece.local_ids.tolist(), piece.first_block):
                if i >= first:
                    latest[i] = block_id
        return np.array([latest[i] for i in sorted(latest)], np.int64)

    def waiting(self) -> list[tuple[Piece, bool]]:
        """Pieces not given out yet; true: they wait for an earlier one. Any thread."""
        found = []
        for layer in list(self._layers.values()):
            pieces = list(layer.pieces)
            found += [
                (piece, _is_blocked(pieces, piece))
                for piece in pieces
                if not piece.queued
            ]
        return found

    def take(self) -> list[Action]:
        """Return what is to be done, each thing once, in its order."""
        actions, self._actions = self._actions, []
        return actions

    # -- what the caller says ----------------------------------------------------

    def ready(
        self,
        key: Key,
        first_block: int,
        local_ids: Ids,
        *,
        final: bool,
        is_open: bool,
        optional: bool = False,
    ) -> Piece:
        """Take blocks of a layer that have been computed, or will be once opened."""
        layer = self._layers.setdefault(key, _Layer())
        layer.optional = layer.optional and optional
        piece = Piece(key, first_block, local_ids, is_open)
        if not self.is_live or layer.visible:
            # What was announced before a reconnection is not touched again.
            return piece
        layer.ready_at = self._now()
        layer.final = layer.final or final
        layer.pieces.append(piece)
        self._go_on(key)
        return piece

    def opened(self, piece: Piece) -> None:
        """The bytes of a piece may be read now."""
        piece.open = True
        self._layers[piece.key].ready_at = self._now()
        self._go_on(piece.key)
        self._finish()  # no write of it may follow: what is not offered is skipped

    def finish(self, aux: bytes) -> None:
        """Nothing more will become ready."""
        self._aux = aux
        for layer in self._layers.values():
            layer.final = True
        for key in self.layers():
            self._go_on(key)
        self._finish()

    # -- what the other side and the device say ----------------------------------

    def attach(self, offer: Offered) -> None:
        """Take an offer, the first one or the same one on a new connection."""
        if self.state is not RequestState.OPEN:
            raise InternalError(f"an offer for a request that is {self.state.value}")
        self._set_state(RequestState.STREAMING)
        self.offer = offer
        self.progress_at = self._now()
        self._see(offer.announced)
        for key in self.layers():
            self._go_on(key)
        self._finish()

    def detach(self) -> None:
        """The connection is gone: what was not announced is to be written again."""
        self._epoch += 1
        self._records = 0
        self._told_finished = False
        self._unflushed = None
        for layer in self._layers.values():
            layer.records = 0
            layer.closed = layer.visible
            for piece in layer.pieces:
                piece.queued = False
                piece.unposted = piece.unacknowledged = 0
        if self.is_live and self.state is not RequestState.OPEN:
            self._set_state(RequestState.OPEN)

    def tag(self, chunk: Chunk) -> Tag | None:
        """Give the tag of a chunk that is about to be posted; None: drop it."""
        if chunk.epoch != self._epoch or not self.is_live or self.offer is None:
            return None
        layer = self._layers[chunk.key]
        final = (
            layer.final
            and all(piece.queued for piece in layer.pieces)
            and sum(piece.unposted for piece in layer.pieces) == 1
        )
        return Tag(self.offer.generation, layer.records + 1 if final else 0, final)

    def posted(self, chunk: Chunk, tag: Tag) -> None:
        """A chunk has been posted: the other side may wait for its record."""
        layer = self._layers[chunk.key]
        layer.records += 1
        self._records += 1
        self.in_flight += 1
        chunk.piece.unposted -= 1
        if layer.drained:
            layer.posted_at = self._now()
        layer.closed = layer.closed or tag.final
        self._finish()

    def written(self, chunk: Chunk, *, ok: bool, stopped: bool = False) -> None:
        """A posted chunk has ended: the device is done with its blocks.

        Args:
          ok: All of it is acknowledged, and its record.
          stopped: It was stopped: some of it may have been acknowledged, and there
            is no record of it. Neither: its connection is broken.
        """
        self.in_flight -= 1
        if stopped and chunk.epoch == self._epoch:
            self._records -= 1
            self._unflushed = chunk
        if ok:
            self.bytes_done += chunk.n_bytes
        if ok and chunk.epoch == self._epoch:
            self.progress_at = self._now()
            chunk.piece.unacknowledged -= 1
            layer = self._layers[chunk.key]
            if all(piece.settled for piece in layer.pieces):
                layer.acknowledged_at = self._now()
            self._go_on(chunk.key)
            self._finish()
        self._come_to_rest()

    def flushed(self, chunk: Chunk, *, ok: bool) -> None:
        """What Flush asked for has ended."""
        self.in_flight -= 1
        if not ok and chunk.epoch == self._epoch:
            self._records -= 1
        self._come_to_rest()

    def announced(self, keys: Iterable[Key], *, complete: bool) -> None:
        """The other side has these layers; with ``complete`` it has all."""
        if not self.is_live:
            return
        self.progress_at = self._now()
        self._see(keys)
        # It may have been complete when the last connection broke.
        if complete and self._aux is not None and self.offer is not None:
            self._see(self._layers)
            self._complete = True
            self._come_to_rest()

    def stop(self, end: End) -> None:
        """End it badly. Does nothing if it has ended, or is about to."""
        if not self.is_live or self._complete:
            return
        self.end = End(
            end.code,
            end.reason,
            end.layer,
            self.bytes_done,
            end.by_peer,
            end.cause,
            end.block_ids,
        )
        self._set_state(RequestState.ENDING)
        self._actions.append(Stop())
        self._come_to_rest()

    # -- inside ------------------------------------------------------------------

    def _set_state(self, state: RequestState) -> None:
        if state not in self._MOVES[self.state]:
            raise InternalError(f"request: no way from {self.state} to {state}")
        self.state = state

    def _come_to_rest(self) -> None:
        if self.in_flight:
            # The other side may have all before the device here has said so.
            return
        if self._complete and self.is_live:
            self._set_state(RequestState.DONE)
            self._actions.append(Over())
        elif self.state is RequestState.ENDING and self._unflushed is not None:
            chunk, self._unflushed = self._unflushed, None
            self.in_flight += 1
            self._records += 1
            self._actions.append(Flush(chunk))
        elif self.state is RequestState.ENDING:
            assert self.end is not None
            given_up = self.end.given_up
            self._set_state(RequestState.ABORTED if given_up else RequestState.FAILED)
            self._actions.append(Over())

    def _see(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            layer = self._layers.setdefault(key, _Layer())
            if layer.visible:
                continue
            layer.visible = layer.closed = layer.final = True
            layer.visible_at = self._now()
            # Nothing of it is written any more, and nobody asks for its pieces.
            layer.pieces = [p for p in layer.pieces if p.queued and not p.settled]

    def _go_on(self, key: Key) -> None:
        """Give out what may be written of a layer; say so if it is complete."""
        offer = self.offer
        layer = self._layers[key]
        if self.state is not RequestState.STREAMING or offer is None or layer.visible:
            return
        if key not in offer.block_bytes or key[0] not in offer.windows:
            if not layer.optional:
                self._refuse(
                    key,
                    LayoutError(
                        f"layer {key[1]} of group {key[0]!r} is not held by both "
                        "sides, or no blocks are offered for it"
                    ),
                )
            return
        for piece in layer.pieces:
            if not piece.queued and piece.open and not _is_blocked(layer.pieces, piece):
                try:
                    self._give_out(piece, offer)
                except LayoutError as error:
                    self._refuse(key, error)
                    return
        if layer.final and not layer.closed and layer.drained:
            layer.closed = True
            self._actions.append(LayerFinal(key, layer.records))

    def _give_out(self, piece: Piece, offer: Offered) -> None:
        window = offer.windows[piece.key[0]]
        n = int(piece.local_ids.size)
        part = overlap(piece.first_block, n, window.first_block, len(window))
        piece.queued = True
        block_bytes = offer.block_bytes[piece.key]
        step = max(1, min(offer.chunk_bytes // block_bytes, offer.max_blocks))
        for low in range(0, part.n, step):
            n = min(step, part.n - low)
            local = part.skip + low
            remote = part.start + low
            piece.unposted += 1
            piece.unacknowledged += 1
            chunk = Chunk(
                piece,
                window.first_block + remote,
                piece.local_ids[local : local + n],
                window.block_ids[remote : remote + n],
                n * block_bytes,
                self._epoch,
            )
            self._actions.append(Write(chunk))

    def _refuse(self, key: Key, error: KVXferError) -> None:
        self.stop(End(EndCode.FAILED, str(error), key[1], cause=error))

    def _finish(self) -> None:
        """Once all is posted, say that it was all."""
        if (
            self._aux is None
            or self._told_finished
            or self.state not in (RequestState.STREAMING, RequestState.FINISHING)
            or self.offer is None
        ):
            return
        if any(
            not layer.closed
            for key, layer in self._layers.items()
            if key in self.offer.block_bytes
        ):
            return
        self._told_finished = True
        self._set_state(RequestState.FINISHING)
        self._actions.append(Finished(self._records, self._aux))


def _is_blocked(pieces: list[Piece], piece: Piece) -> bool:
    """Whether an earlier piece of a layer has to be acknowledged first."""
    for earlier in pieces:
        if earlier is piece:
            return False
        if not earlier.settled and earlier.shares(piece):
            return True
    raise InternalError("a piece that is not its layer's")
