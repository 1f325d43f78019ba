"""A streamed request at the side that is written to, as a state machine. Pure.

Sources join and leave, their records say what has landed, and once each of them has
finished the request is complete. It ends, well or badly, only when no byte of it can
land any more: :class:`Over` is that moment. An owner feeds in what happens and
carries out what :meth:`Inbound.take` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvxfer.blocks import Ids
from kvxfer.errors import InternalError, LayoutError, ProtocolError
from kvxfer.notify import Record
from kvxfer.positions import Spans, Window, runs_of
from kvxfer.requests import End, EndCode, Key, TicketState

__all__ = ["Action", "Announce", "Complete", "Inbound", "LayerDone", "Over", "Quiet"]

#: Digest of a layer's blocks, in the order of their positions.
DigestOf = Callable[[Key, Ids], int]


@dataclass(frozen=True)
class Announce:
    """Tell this source that its part of these layers is complete."""

    source: Hashable
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class LayerDone:
    """A layer is complete, whoever wrote it."""

    key: Key


@dataclass(frozen=True)
class Complete:
    """Tell every source that the request is complete."""


@dataclass(frozen=True)
class Quiet:
    """See to it that nothing of this source lands any more; then call ``quiet``."""

    source: Hashable


@dataclass(frozen=True)
class Over:
    """No byte of the request can land any more: its last action."""


Action = Announce | LayerDone | Complete | Quiet | Over


@dataclass(eq=False)
class _Source:
    """One writer: what it has said and what has landed of it."""

    present: bool = False
    keys: frozenset[Key] | None = None
    """What it can write at all; unknown before it has connected."""
    records: int = 0
    counts: dict[Key, int] = field(default_factory=dict)
    spans: dict[Key, Spans] = field(default_factory=dict)
    finals: dict[Key, tuple[int, int]] = field(default_factory=dict)
    done: set[Key] = field(default_factory=set)
    total: int | None = None
    finished: bool = False
    last: int | None = None
    """It has ended, with so many records: until they are here its bytes may land."""
    aux: bytes = b""


class Inbound:
    """One offered request until its end.

    Args:
      windows: The blocks of each group.
      sources: The writers that it is offered to, by whatever names them.
      needed: How many of them must finish.
      digest_of: Computes the digest of blocks that have landed; None: none is asked.

    Attributes:
      state: Set by ``_set_state`` only.
      end: Why it ended, if not well.
      layers_done: The layers that are complete.
      bytes_done: Bytes of blocks that have landed, sent again counted again.
    """

    _MOVES: ClassVar[Mapping[TicketState, frozenset[TicketState]]] = {
        TicketState.OFFERED: frozenset(
            {TicketState.ARRIVING, TicketState.DONE, TicketState.ENDING}
        ),
        TicketState.ARRIVING: frozenset({TicketState.DONE, TicketState.ENDING}),
        TicketState.ENDING: frozenset({TicketState.ABORTED, TicketState.FAILED}),
        TicketState.DONE: frozenset(),
        TicketState.ABORTED: frozenset(),
        TicketState.FAILED: frozenset(),
    }

    def __init__(
        self,
        windows: Mapping[str, Window],
        needed: int,
        digest_of: DigestOf | None = None,
    ) -> None:
        self.windows = windows
        self.needed = needed
        self.state = TicketState.OFFERED
        self.end: End | None = None
        self.layers_done: set[Key] = set()
        self.bytes_done = 0
        self._digest_of = digest_of
        self._sources: dict[Hashable, _Source] = {}
        self._actions: list[Action] = []

    # -- looks -----------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen to it any more."""
        return not self._MOVES[self.state]

    @property
    def is_live(self) -> bool:
        """Whether it goes on."""
        return not self.is_over and self.state is not TicketState.ENDING

    @property
    def aux(self) -> bytes:
        """What came along with the end; of several sources, the first that had some."""
        return next((s.aux for s in list(self._sources.values()) if s.aux), b"")

    @property
    def sources(self) -> list[Hashable]:
        """Those it is offered to."""
        return list(self._sources)

    def present(self, source: Hashable) -> bool:
        """Whether a source is connected and knows of the offer."""
        return self._sources[source].present

    def has_ended(self, source: Hashable) -> bool:
        """Whether a source has said that it will not write any more."""
        return self._sources[source].last is not None

    def announced_to(self, source: Hashable) -> set[Key]:
        """The layers that a source need not, and must not, write again."""
        return set(self._sources[source].done)

    def take(self) -> list[Action]:
        """Return what is to be done, each thing once, in its order."""
        actions, self._actions = self._actions, []
        return actions

    # -- who is there --------------------------------------------------------------

    def add_source(self, source: Hashable) -> None:
        """Count a writer in that it is offered to."""
        self._sources.setdefault(source, _Source())

    def join(self, source: Hashable, keys: Iterable[Key]) -> None:
        """A source is connected and is told; ``keys`` is what it can write."""
        state = self._sources[source]
        state.present = True
        state.last = None
        state.keys = frozenset(key for key in keys if key[0] in self.windows)
        # Layers may have waited for nothing but the word who can write them.
        for key in frozenset[Key]().union(*(s.done for s in self._sources.values())):
            self._see(key)

    def leave(self, source: Hashable) -> None:
        """The connection of a source is gone, and nothing of it lands any more.

        What it has not completed it will write again, if it comes back.
        """
        state = self._sources[source]
        if not state.present:
            return
        state.present = False
        state.records = 0
        state.counts.clear()
        state.finals.clear()
        state.spans = {k: s for k, s in state.spans.items() if k in state.done}
        if not state.finished:
            state.total = None
        self._come_to_rest()

    def quiet(self, source: Hashable, records: int) -> None:
        """A source has nothing in flight and will not write any more.

        What it has written is in place once ``records`` records of it are here.
        """
        state = self._sources[source]
        state.last = max(records, state.last or 0)
        self._see_quiet(state)

    def _see_quiet(self, state: _Source) -> None:
        if state.last is not None and state.records >= state.last:
            state.present = False
            self._come_to_rest()

    # -- what they say -------------------------------------------------------------

    def record(self, source: Hashable, record: Record) -> None:
        """Take a record of a source: these blocks have landed.

        Raises:
          ProtocolError: It names blocks that are not its own, or a layer that was
            announced: whoever wrote that has written where it must not.
        """
        state = self._sources[source]
        if not self.is_live:
            state.records += 1
            self._see_quiet(state)
            return
        key = (record.group, record.layer)
        window = self.windows.get(record.group)
        if window is None:
            raise ProtocolError(
                f"a record names group {record.group!r}, which is not offered"
            )
        try:
            positions = window.positions_of(record.block_ids)
        except LayoutError as error:
            raise ProtocolError(f"a record for layer {record.layer}: {error}") from None
        if key in state.done or key in self.layers_done:
            raise ProtocolError(
                f"layer {record.layer} of group {record.group!r} was written after it "
                "was announced"
            )
        if self.state is TicketState.OFFERED:
            self._set_state(TicketState.ARRIVING)
        self.bytes_done += record.n_bytes
        spans = state.spans.setdefault(key, Spans())
        for start, stop in runs_of(positions):
            spans.add(start, stop)
        state.records += 1
        state.counts[key] = state.counts.get(key, 0) + 1
        if record.total:
            self.final(source, key, record.total, record.digest)
        self._settle(source, key)
        self._finish(source)
        self._see_quiet(state)

    def final(self, source: Hashable, key: Key, total: int, digest: int) -> None:
        """A source says that a layer is complete with ``total`` records.

        Raises:
          ProtocolError: It has said so before, with another number.
        """
        if not self.is_live:
            return
        state = self._sources[source]
        if state.finals.setdefault(key, (total, digest)) != (total, digest):
            raise ProtocolError(f"layer {key[1]} ended twice, differently")
        self._settle(source, key)
        self._finish(source)

    def finish(self, source: Hashable, total: int, aux: bytes) -> None:
        """A source says that it has written all, in ``total`` records."""
        if not self.is_live:
            return
        state = self._sources[source]
        if state.finished:
            return
        state.total = total
        state.aux = aux
        self._finish(source)

    def stop(self, end: End) -> None:
        """End it badly. Does nothing if it has ended, or is about to."""
        if not self.is_live:
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
        self._set_state(TicketState.ENDING)
        for source, state in self._sources.items():
            if state.present:
                self._actions.append(Quiet(source))
        self._come_to_rest()

    # -- inside ----------------------------------------------------------------------

    def _set_state(self, state: TicketState) -> None:
        if state not in self._MOVES[self.state]:
            raise InternalError(f"ticket: no way from {self.state} to {state}")
        self.state = state

    def _come_to_rest(self) -> None:
        if self.state is not TicketState.ENDING:
            return
        if any(state.present for state in self._sources.values()):
            return
        assert self.end is not None
        given_up = self.end.given_up
        self._set_state(TicketState.ABORTED if given_up else TicketState.FAILED)
        self._actions.append(Over())

    def _settle(self, source: Hashable, key: Key) -> None:
        """See whether a source's part of a layer is complete."""
        state = self._sources[source]
        final = state.finals.get(key)
        if final is None or key in state.done or not self.is_live:
            return
        total, digest = final
        count = state.counts.get(key, 0)
        if count > total:
            raise ProtocolError(f"layer {key[1]} has {count} records, not {total}")
        if count < total or not self._verify(state, key, digest):
            return
        state.done.add(key)
        self._actions.append(Announce(source, (key,)))
        self._see(key)

    def _verify(self, state: _Source, key: Key, digest: int) -> bool:
        spans = state.spans.get(key)
        if self._digest_of is None or spans is None or not len(spans):
            return True
        ids = self.windows[key[0]].ids_at(spans.positions())
        found = self._digest_of(key, ids)
        if found == digest:
            return True
        self.stop(
            End(
                EndCode.CHECKSUM,
                f"layer {key[1]} of group {key[0]!r} has arrived with other bytes than "
                f"were sent, in blocks {_few(ids)}: digest {found:016x}, not "
                f"{digest:016x}",
                key[1],
                block_ids=tuple(ids.tolist()),
            )
        )
        return False

    def _see(self, key: Key) -> None:
        """See whether a layer is complete, of all that can write it."""
        if len(self._sources) < self.needed or key in self.layers_done:
            return
        for state in self._sources.values():
            if state.keys is None or (key in state.keys and key not in state.done):
                return
        self.layers_done.add(key)
        self._actions.append(LayerDone(key))

    def _finish(self, source: Hashable) -> None:
        state = self._sources[source]
        if state.total is None or not self.is_live or state.finished:
            return
        if state.records > state.total:
            raise ProtocolError(
                f"{state.records} records came, and {state.total} was to be all"
            )
        if state.records < state.total:
            return
        state.finished = True
        if sum(s.finished for s in self._sources.values()) < self.needed:
            return
        fault = self._fault()
        if fault is not None:
            self.stop(fault)
            return
        held = frozenset[Key]().union(*(s.keys or () for s in self._finishers()))
        for key in sorted(held):
            if key not in self.layers_done:
                self.layers_done.add(key)
                self._actions.append(LayerDone(key))
        self._set_state(TicketState.DONE)
        self._actions += [Complete(), Over()]

    def _finishers(self) -> list[_Source]:
        return [state for state in self._sources.values() if state.finished]

    def _fault(self) -> End | None:
        """Say what is missing of a request that all sources have finished."""
        union: dict[Key, Spans] = {}
        for state in self._finishers():
            for key in state.keys or ():
                spans = union.setdefault(key, Spans())
                spans.update(state.spans.get(key, Spans()))
        for group, window in self.windows.items():
            ends = {
                key: spans.run_end(window.first_block)
                for key, spans in union.items()
                if key[0] == group
            }
            stop = max(ends.values(), default=window.first_block)
            for key, spans in sorted(union.items()):
                if key[0] != group:
                    continue
                beyond = max((end for _, end in spans), default=window.first_block)
                if ends[key] < stop or beyond > ends[key]:
                    return End(
                        EndCode.INCOMPLETE,
                        f"finished, but layer {key[1]} of group {group!r} lacks the "
                        f"block at position {ends[key]}, of {max(stop, beyond)}",
                        key[1],
                    )
        return None


def _few(ids: Ids) -> str:
    shown = ", ".join(map(str, np.asarray(ids)[:16].tolist()))
    return shown if len(ids) <= 16 else f"{shown}, ... ({len(ids)} in all)"
