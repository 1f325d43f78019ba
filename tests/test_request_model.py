"""Both ends of a request against each other, without devices: anything may happen.

A world of two state machines, the messages between them and blocks that remember
what was written to them last. Chunks land between being posted and being
acknowledged; records and messages are taken in their own time; the connection breaks
in the middle of everything. Whatever happens, blocks hold what was ready last, no
block outside the offer is touched, and none after its layer was announced.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.errors import LayoutError, ProtocolError
from kvxfer.inbound import Announce, Complete, Inbound, LayerDone, Quiet
from kvxfer.inbound import Over as InOver
from kvxfer.notify import Record
from kvxfer.outbound import (
    Chunk,
    Finished,
    Flush,
    LayerFinal,
    Offered,
    Outbound,
    Over,
    Piece,
    Stop,
    Tag,
    Write,
)
from kvxfer.positions import Window
from kvxfer.requests import End, EndCode, Key, LayerState, RequestState, TicketState

GROUP = "main"
LAYERS = 3


def ids(values: Any) -> Any:
    return np.array(list(values), np.int64)


class World:
    """One request between one writer and one reader."""

    def __init__(self, rng: random.Random, first: int = 2, n: int = 9) -> None:
        self.rng = rng
        self.now = 0.0
        self.window = Window(first, ids(rng.sample(range(100), n)))
        self.inbound = Inbound({GROUP: self.window}, 1)
        self.inbound.add_source("p")
        self.outbound = Outbound("r", lambda: self.now)
        self.memory: dict[tuple[int, int], int] = {}
        """Layer and remote block to the version that was written last."""
        self.source: dict[tuple[int, int], int] = {}
        """Layer and local block to its version."""
        self.wanted: dict[tuple[int, int], int] = {}
        self.events_per_turn = rng.choice([1.0, 0.02])
        self.events: list[Piece] = []
        """Pieces whose bytes may not be read yet."""
        self.queued: list[Chunk] = []
        self.posted: list[tuple[Chunk, Tag, list[int], bool]] = []
        """With the versions that the device read, and whether they have landed."""
        self.records: list[Record] = []
        self.to_reader: list[Any] = []
        self.to_writer: list[Any] = []
        self.announced: set[Key] = set()
        self.versions = 0
        self.next_block = [0] * LAYERS
        self.final: set[int] = set()
        self.connected = False
        self.over = {"in": False, "out": False}

    # -- the writer ----------------------------------------------------------------

    def drive_out(self) -> None:
        for action in self.outbound.take():
            if isinstance(action, Write):
                self.queued.append(action.chunk)
            elif isinstance(action, LayerFinal | Finished):
                self.to_reader.append(action)
            elif isinstance(action, Stop):
                self.queued.clear()
            else:
                assert isinstance(action, Over)
                assert not self.posted
                self.over["out"] = True

    def compute(self) -> None:
        """Make more of a layer ready, beginning with a block that was partly filled."""
        layer = self.rng.randrange(LAYERS)
        if layer in self.final or self.outbound.finishing:
            return
        done = self.next_block[layer]
        first = max(0, done - self.rng.randrange(2))
        stop = min(self.window.stop, done + self.rng.randrange(5))
        blocks = range(first, max(first, stop))
        for position in blocks:
            self.versions += 1
            self.source[layer, position] = self.versions
            if position >= self.window.first_block:
                self.wanted[layer, position] = self.versions
        self.next_block[layer] = max(done, stop)
        final = stop == self.window.stop and self.rng.random() < 0.7
        if final:
            self.final.add(layer)
        is_open = self.rng.random() < 0.5
        piece = self.outbound.ready(
            (GROUP, layer), first, ids(blocks), final=final, is_open=is_open
        )
        if not is_open:
            self.events.append(piece)

    def open(self) -> None:
        """The event that a piece waits for happens, in any order."""
        if self.rng.random() < self.events_per_turn and self.events:
            piece = self.events.pop(self.rng.randrange(len(self.events)))
            self.outbound.opened(piece)

    def finish(self) -> None:
        """Make all ready, then say that this is all."""
        if self.outbound.finishing:
            return
        while len(self.final) < LAYERS:
            self.compute()
        self.outbound.finish(b"aux")

    def post(self) -> None:
        if self.queued and self.connected:
            chunk = self.queued.pop(self.rng.randrange(len(self.queued)))
            tag = self.outbound.tag(chunk)
            if tag is not None:
                self.outbound.posted(chunk, tag)
                layer = chunk.key[1]
                read = [self.source[layer, int(block)] for block in chunk.local_ids]
                self.posted.append((chunk, tag, read, False))

    def land(self) -> None:
        """The bytes of a posted chunk arrive, and its record is on its way."""
        waiting = [i for i, entry in enumerate(self.posted) if not entry[3]]
        if not waiting:
            return
        i = self.rng.choice(waiting)
        chunk, tag, read, _ = self.posted[i]
        self.posted[i] = (chunk, tag, read, True)
        layer = chunk.key[1]
        assert chunk.key not in self.announced, "written after it was announced"
        for version, remote in zip(read, chunk.remote_ids, strict=True):
            assert remote in self.window.block_ids
            self.memory[layer, int(remote)] = version
        self.records.append(
            Record(
                GROUP, layer, chunk.remote_ids, "r", chunk.n_bytes, 0, 1, tag.total, 0
            )
        )

    def acknowledge(self) -> None:
        landed = [entry for entry in self.posted if entry[3]]
        if landed:
            entry = self.rng.choice(landed)
            self.posted.remove(entry)
            self.outbound.written(entry[0], ok=True)

    # -- the reader ----------------------------------------------------------------

    def drive_in(self) -> None:
        for action in self.inbound.take():
            if isinstance(action, Announce):
                for key in action.keys:
                    self.announced.add(key)
                    self.check_layer(key)
                self.to_writer.append(action)
            elif isinstance(action, LayerDone):
                self.check_layer(action.key)
            elif isinstance(action, Complete | Quiet):
                self.to_writer.append(action)
            else:
                assert isinstance(action, InOver)
                self.over["in"] = True

    def check_layer(self, key: Key) -> None:
        """A layer that is told to be there is there, in its last version."""
        for (layer, position), version in self.wanted.items():
            if layer == key[1]:
                block = int(self.window.block_ids[position - self.window.first_block])
                assert self.memory[layer, block] == version

    def take_record(self) -> None:
        if self.records:
            record = self.records.pop(self.rng.randrange(len(self.records)))
            self.inbound.record("p", record)

    def hear_reader(self) -> None:
        if self.to_reader:
            message = self.to_reader.pop(0)
            if isinstance(message, LayerFinal):
                self.inbound.final("p", message.key, message.total, 0)
            elif isinstance(message, Finished):
                self.inbound.finish("p", message.total, message.aux)
            else:
                assert message == "ended"
                self.inbound.quiet("p", 0)

    def hear_writer(self) -> None:
        if self.to_writer:
            message = self.to_writer.pop(0)
            if isinstance(message, Announce):
                self.outbound.announced(message.keys, complete=False)
            elif isinstance(message, Complete):
                self.outbound.announced((), complete=True)
            else:
                self.outbound.stop(End(EndCode.ABORTED, "asked to", by_peer=True))

    # -- the connection --------------------------------------------------------------

    def connect(self) -> None:
        if self.connected or not (self.inbound.is_live and self.outbound.is_live):
            return
        self.connected = True
        self.inbound.join("p", [(GROUP, layer) for layer in range(LAYERS)])
        self.outbound.attach(
            Offered(
                1,
                {GROUP: self.window},
                {(GROUP, layer): 10 for layer in range(LAYERS)},
                frozenset(self.inbound.announced_to("p")),
                chunk_bytes=self.rng.choice([10, 30, 1000]),
            )
        )

    def break_(self) -> None:
        """The connection breaks: what is posted may have landed, or not."""
        if not self.connected:
            return
        self.connected = False
        while self.records and self.rng.random() < 0.5:
            self.take_record()
            self.drive_in()
        self.records.clear()
        self.to_reader.clear()
        self.to_writer.clear()
        self.queued.clear()
        self.inbound.leave("p")
        self.outbound.detach()
        for chunk, _, _, landed in self.posted:
            self.outbound.written(chunk, ok=landed and self.rng.random() < 0.5)
        self.posted.clear()

    def step(self, *, may_break: bool = True) -> None:
        self.now += 1
        acts = [
            self.compute,
            self.open,
            self.post,
            self.land,
            self.acknowledge,
            self.take_record,
            self.hear_reader,
            self.hear_writer,
            self.connect,
        ]
        if may_break and self.rng.random() < 0.02:
            acts = [self.break_]
        self.rng.choice(acts)()
        self.drive_out()
        self.drive_in()
        self.drive_out()

    def settle(self) -> None:
        """Go on without breaking until both sides are over."""
        for _ in range(20000):
            if all(self.over.values()):
                return
            self.step(may_break=False)
            done = self.outbound.is_over and self.inbound.is_live
            if done and self.outbound.state is RequestState.DONE:
                pytest.fail("the writer is done and the reader is not")
        pytest.fail(f"no end: {self.outbound.state}, {self.inbound.state}")


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_every_block_holds_what_was_ready_last(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng)
    for _ in range(rng.randrange(300)):
        world.step()
    world.finish()
    world.drive_out()
    for _ in range(rng.randrange(100)):
        world.step()
    lost = world.inbound.state is TicketState.DONE and not world.connected
    if lost and world.outbound.is_live:
        # The word of it was lost with the connection: the writer asks again.
        world.outbound.announced((), complete=True)
        world.drive_out()
    if not all(world.over.values()):
        world.settle()
    assert world.inbound.state is TicketState.DONE
    assert world.outbound.state is RequestState.DONE
    assert world.inbound.aux == b"aux"
    assert world.inbound.layers_done == {(GROUP, layer) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        world.check_layer((GROUP, layer))
        assert world.outbound.layer_state((GROUP, layer)) is LayerState.VISIBLE
    own = set(world.window.block_ids.tolist())
    assert {block for _, block in world.memory} <= own


@settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_an_abort_leaves_nothing_in_flight(seed: int, by_writer: bool) -> None:
    rng = random.Random(seed)
    world = World(rng)
    for _ in range(rng.randrange(200)):
        world.step()
    if not (world.inbound.is_live and world.outbound.is_live):
        return
    end = End(EndCode.ABORTED, "enough")
    if by_writer:
        world.outbound.stop(end)
    else:
        world.inbound.stop(end)
    for _ in range(20000):
        world.drive_out()
        world.drive_in()
        if world.over["out"] and by_writer and world.inbound.is_live:
            world.inbound.quiet("p", 0)
            world.inbound.stop(End(EndCode.ABORTED, "enough", by_peer=True))
            continue
        if world.over["out"] and not by_writer and not world.over["in"]:
            world.inbound.quiet("p", 0)
        if world.over["in"] and (world.over["out"] or not world.connected):
            break
        world.step(may_break=False)
    assert world.inbound.state is TicketState.ABORTED
    assert not world.posted
    before = dict(world.memory)
    for _ in range(50):
        world.step(may_break=False)
    assert world.memory == before


def record(layer: int, blocks: list[int], total: int = 0) -> Record:
    return Record(GROUP, layer, ids(blocks), "r", 10 * len(blocks), 0, 1, total, 0)


def reader(sources: int = 1, digest: int | None = None) -> Inbound:
    digest_of = None if digest is None else (lambda key, block_ids: digest)
    found = Inbound({GROUP: Window(0, ids([7, 5, 9]))}, sources, digest_of)
    for i in range(sources):
        found.add_source(i)
        found.join(i, [(GROUP, layer) for layer in range(2)])
    return found


def test_a_record_of_blocks_that_are_not_offered_is_refused() -> None:
    inbound = reader()
    with pytest.raises(ProtocolError, match="block 8 is not among those offered"):
        inbound.record(0, record(0, [7, 8]))
    with pytest.raises(ProtocolError, match="which is not offered"):
        inbound.record(0, Record("other", 0, ids([1]), "r", 10, 0, 1))


def test_nothing_may_follow_an_announcement() -> None:
    inbound = reader()
    inbound.record(0, record(0, [7, 5, 9], total=1))
    with pytest.raises(ProtocolError, match="after it was announced"):
        inbound.record(0, record(0, [9]))


def test_a_layer_may_wait_for_the_word_who_can_write_it() -> None:
    inbound = Inbound({GROUP: Window(0, ids([7]))}, 2)
    inbound.add_source(0)
    inbound.join(0, [(GROUP, 0)])
    inbound.record(0, record(0, [7], total=1))
    inbound.add_source(1)
    assert LayerDone((GROUP, 0)) not in inbound.take()
    inbound.join(1, [(GROUP, 1)])
    assert LayerDone((GROUP, 0)) in inbound.take()


def test_a_layer_of_several_sources_needs_them_all() -> None:
    inbound = reader(sources=2)
    inbound.record(0, record(0, [7, 5], total=1))
    assert LayerDone((GROUP, 0)) not in inbound.take()
    inbound.record(1, record(0, [9], total=1))
    assert LayerDone((GROUP, 0)) in inbound.take()
    inbound.record(0, record(1, [7, 5], total=1))
    inbound.finish(0, 2, b"")
    assert inbound.is_live
    inbound.record(1, record(1, [9], total=1))
    inbound.finish(1, 2, b"second")
    assert inbound.state is TicketState.DONE and inbound.aux == b"second"


@pytest.mark.parametrize(
    ("written", "layer", "position"),
    [
        ({0: [7, 5, 9], 1: [7, 5]}, 1, 2),
        ({0: [7, 9], 1: [7, 9]}, 0, 1),
        ({0: [7]}, 1, 0),
    ],
)
def test_what_is_finished_with_holes_fails(
    written: dict[int, list[int]], layer: int, position: int
) -> None:
    inbound = reader()
    for each, blocks in written.items():
        inbound.record(0, record(each, blocks, total=1))
    inbound.finish(0, len(written), b"")
    assert inbound.end is not None and inbound.end.code is EndCode.INCOMPLETE
    assert inbound.end.layer == layer
    assert f"lacks the block at position {position}" in inbound.end.reason


def test_a_wrong_digest_names_the_layer_and_its_blocks() -> None:
    inbound = reader(digest=0xABC)
    inbound.record(0, record(1, [7, 5]))
    inbound.record(0, record(1, [9], total=2))
    assert inbound.end is not None and inbound.end.code is EndCode.CHECKSUM
    assert inbound.end.layer == 1 and inbound.end.block_ids == (7, 5, 9)
    assert inbound.layers_done == set()
    assert Quiet(0) in inbound.take()


def test_more_records_than_were_announced_are_refused() -> None:
    inbound = reader()
    inbound.record(0, record(0, [7]))
    inbound.record(0, record(0, [5]))
    with pytest.raises(ProtocolError, match="2 records, not 1"):
        inbound.final(0, (GROUP, 0), 1, 0)
    with pytest.raises(ProtocolError, match="2 records came, and 1 was to be all"):
        inbound.finish(0, 1, b"")


def writer(**changes: Any) -> tuple[Outbound, Offered]:
    offered = Offered(
        1,
        {GROUP: Window(2, ids([7, 5, 9]))},
        {(GROUP, 0): 10, (GROUP, 1): 10},
        **changes,
    )
    return Outbound("r", lambda: 0.0), offered


def chunks(outbound: Outbound) -> list[Chunk]:
    return [a.chunk for a in outbound.take() if isinstance(a, Write)]


def post(outbound: Outbound, chunk: Chunk) -> Tag:
    tag = outbound.tag(chunk)
    assert tag is not None
    outbound.posted(chunk, tag)
    return tag


def test_blocks_beyond_the_offer_are_not_written() -> None:
    outbound, offered = writer()
    outbound.attach(offered)
    outbound.ready((GROUP, 0), 4, ids([1, 2]), final=False, is_open=True)
    assert chunks(outbound) == []
    assert outbound.state is RequestState.FAILED
    assert outbound.end is not None and isinstance(outbound.end.cause, LayoutError)


def test_what_is_ready_parks_until_the_offer_and_its_event() -> None:
    outbound, offered = writer()
    piece = outbound.ready((GROUP, 0), 0, ids([1, 2, 3, 4]), final=True, is_open=False)
    assert not outbound.waits_for_the_wire
    outbound.attach(offered)
    assert chunks(outbound) == [] and not outbound.waits_for_the_wire
    outbound.opened(piece)
    (chunk,) = chunks(outbound)
    assert chunk.local_ids.tolist() == [3, 4] and chunk.remote_ids.tolist() == [7, 5]
    assert outbound.source_ids((GROUP, 0)).tolist() == [3, 4]


def test_the_last_event_may_be_that_of_blocks_that_are_not_offered() -> None:
    """Nothing is written for it; the end is said all the same."""
    outbound, offered = writer()
    outbound.attach(offered)
    piece = outbound.ready((GROUP, 0), 0, ids([3, 4]), final=False, is_open=False)
    outbound.ready((GROUP, 0), 2, ids([5]), final=True, is_open=True)
    outbound.finish(b"aux")
    (chunk,) = chunks(outbound)
    assert post(outbound, chunk) == Tag(1, 0, False)
    outbound.written(chunk, ok=True)
    assert outbound.take() == []
    outbound.opened(piece)
    assert outbound.take() == [LayerFinal((GROUP, 0), 1), Finished(1, b"aux")]


def test_an_announced_layer_is_never_written_again() -> None:
    outbound, offered = writer(announced=frozenset({(GROUP, 0)}))
    outbound.ready((GROUP, 0), 2, ids([1]), final=True, is_open=True)
    outbound.attach(offered)
    assert chunks(outbound) == []
    outbound.ready((GROUP, 0), 3, ids([1]), final=False, is_open=True)
    assert chunks(outbound) == []
    assert outbound.layer_state((GROUP, 0)) is LayerState.VISIBLE


def test_all_layers_means_those_that_both_sides_hold() -> None:
    outbound, offered = writer()
    outbound.attach(offered)
    for layer in range(3):
        outbound.ready(
            (GROUP, layer), 2, ids([1]), final=True, is_open=True, optional=True
        )
    assert [chunk.key[1] for chunk in chunks(outbound)] == [0, 1]
    outbound.ready((GROUP, 2), 2, ids([1]), final=True, is_open=True)
    assert outbound.state is RequestState.FAILED


def test_the_three_states_of_a_layer() -> None:
    outbound, offered = writer()
    key = (GROUP, 0)
    outbound.ready(key, 2, ids([1, 2, 3]), final=True, is_open=True)
    assert outbound.layer_state(key) is LayerState.WAITING
    outbound.attach(offered)
    (chunk,) = chunks(outbound)
    assert outbound.layer_state(key) is LayerState.WAITING
    tag = post(outbound, chunk)
    assert tag == Tag(1, 1, True)
    assert outbound.layer_state(key) is LayerState.POSTED
    outbound.written(chunk, ok=True)
    assert outbound.layer_state(key) is LayerState.ACKNOWLEDGED
    outbound.announced([key], complete=False)
    assert outbound.layer_state(key) is LayerState.VISIBLE


def test_what_was_stopped_in_its_middle_is_flushed_before_the_end() -> None:
    outbound, offered = writer()
    outbound.attach(offered)
    outbound.ready((GROUP, 0), 2, ids([1, 2, 3]), final=False, is_open=True)
    (chunk,) = chunks(outbound)
    post(outbound, chunk)
    outbound.stop(End(EndCode.ABORTED, "enough"))
    assert outbound.take() == [Stop()]
    outbound.written(chunk, ok=False, stopped=True)
    assert outbound.take() == [Flush(chunk)]
    assert outbound.state is RequestState.ENDING
    outbound.flushed(chunk, ok=True)
    assert outbound.take() == [Over()]
    assert outbound.records == 1


def test_what_could_not_be_posted_is_not_counted() -> None:
    outbound, offered = writer()
    outbound.attach(offered)
    outbound.ready((GROUP, 0), 2, ids([1]), final=True, is_open=True)
    outbound.finish(b"aux")
    (chunk,) = chunks(outbound)
    assert outbound.tag(chunk) == Tag(1, 1, True)
    outbound.stop(End(EndCode.FAILED, "it is refused"))
    assert outbound.take() == [Stop(), Over()]
    assert outbound.records == 0


def test_a_source_is_quiet_when_its_records_are_here() -> None:
    inbound = reader()
    inbound.record(0, record(0, [7]))
    inbound.stop(End(EndCode.ABORTED, "enough"))
    inbound.quiet(0, 2)
    assert inbound.state is TicketState.ENDING and inbound.has_ended(0)
    inbound.quiet(0, 0)  # a second word, of one who knows nothing of it any more
    assert inbound.state is TicketState.ENDING
    assert InOver() not in inbound.take()
    inbound.record(0, record(0, [5]))
    assert InOver() in inbound.take()
