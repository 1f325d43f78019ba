"""Two engines of SGLang's shape, each a thread that polls its requests."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.engines.driver import Job
from tests.engines.pool import BLOCK_TOKENS, Pool, blocks_for
from tests.engines.sglang_backend import KvxferManager, KvxferReceiver, KvxferSender
from tests.engines.sglang_interface import KVArgs, KVPoll, Mode

__all__ = ["Decode", "Prefill"]

AUX_ITEM_BYTES = (8, 24)
N_AUX = 64


def aux_of(job: Job) -> bytes:
    """What the prefill engine has to say of a prompt besides its pages."""
    return job.name.encode().ljust(sum(AUX_ITEM_BYTES), b".")


class Engine:
    """What both engines have: pages, auxiliary items and a manager."""

    def __init__(self, pool: Pool, mode: Mode, server_args: Mapping[str, Any]) -> None:
        self.pool = pool
        self._aux = [ctypes.create_string_buffer(N_AUX * n) for n in AUX_ITEM_BYTES]
        group = pool.arena.cache.group("main")
        places = [
            place
            for plane in ("k", "v")
            for layer in pool.layers
            for name, place in group.rows(layer)
            if name == plane
        ]
        args = KVArgs(
            kv_data_ptrs=[place.base for place in places],
            kv_data_lens=[place.n_blocks * place.block_bytes for place in places],
            kv_item_lens=[place.block_bytes for place in places],
            aux_data_ptrs=[ctypes.addressof(buffer) for buffer in self._aux],
            aux_item_lens=AUX_ITEM_BYTES,
            page_size=BLOCK_TOKENS,
        )
        self.manager = KvxferManager(args, mode, server_args)
        self.manager.register_to_bootstrap()
        self.succeeded: list[str] = []
        self.failed: dict[str, str] = {}

    def note(self, job: Job, state: KVPoll, end: KvxferSender | KvxferReceiver) -> None:
        """Note how a request ended."""
        if state is KVPoll.SUCCESS:
            self.succeeded.append(job.name)
            return
        try:
            end.failure_exception()
        except Exception as error:  # noqa: BLE001 - looked at by the tests
            self.failed[job.name] = f"{type(error).__name__}: {error}"


@dataclass(eq=False)
class Computing:
    """A prompt in the prefill engine."""

    job: Job
    room: int
    pages: list[int]
    sender: KvxferSender
    n_computed: int = 0
    n_chunks: int = 0


class Prefill(Engine):
    """Computes a chunk of each of its prompts in each step, and sends it.

    A prompt that is to be preempted is retracted instead: an engine of this kind
    aborts its request and tells whoever had asked for it.
    """

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job],
        server_args: Mapping[str, Any],
        gone: set[str],
        *,
        chunk_tokens: int,
    ) -> None:
        super().__init__(pool, Mode.PREFILL, server_args)
        self._gone = gone
        self._waiting = list(enumerate(jobs))
        self._open: list[Computing] = []
        self._chunk_tokens = chunk_tokens
        self.polled: dict[str, list[KVPoll]] = {job.name: [] for job in jobs}

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._open)

    def step(self) -> None:
        self._waiting = [w for w in self._waiting if w[1].name not in self._gone]
        while self._waiting and (
            blocks_for(self._waiting[0][1].n_tokens) <= self.pool.n_free
        ):
            room, job = self._waiting.pop(0)
            pages = self.pool.take(blocks_for(job.n_tokens))
            sender = KvxferSender(self.manager, room)
            sender.init(len(pages), room % N_AUX)
            self._open.append(Computing(job, room, pages, sender))
        for each in list(self._open):
            self._advance(each)

    def _advance(self, each: Computing) -> None:
        state = each.sender.poll()
        seen = self.polled[each.job.name]
        if not seen or seen[-1] is not state:
            seen.append(state)
        if state in (KVPoll.SUCCESS, KVPoll.FAILED):
            self.note(each.job, state, each.sender)
            each.sender.clear()
            self._open.remove(each)
            self.pool.give(each.pages)
        elif each.n_chunks == each.job.preempt_after or each.job.name in self._gone:
            each.sender.abort()
        elif each.n_computed < each.job.n_tokens:
            self._compute(each)

    def _compute(self, each: Computing) -> None:
        first = each.n_computed
        stop = min(first + self._chunk_tokens, each.job.n_tokens)
        for layer in self.pool.layers:
            self.pool.compute(each.job.name, layer, each.pages, first, stop)
        if stop == each.job.n_tokens:
            aux = aux_of(each.job)
            for item in self.manager.aux(each.room % N_AUX):
                item.raw, aux = aux[: len(item)], aux[len(item) :]
        each.sender.send(each.pages[first // BLOCK_TOKENS : blocks_for(stop)])
        each.n_computed = stop
        each.n_chunks += 1


@dataclass(eq=False)
class Awaiting:
    """A prompt that the decode engine waits for."""

    job: Job
    room: int
    pages: list[int]
    receiver: KvxferReceiver


class Decode(Engine):
    """Asks for prompts, and looks at every byte of what comes."""

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job],
        server_args: Mapping[str, Any],
        gone: set[str],
    ) -> None:
        super().__init__(pool, Mode.DECODE, server_args)
        self._gone = gone
        # Two by two the other way round than they are computed. With few pages the
        # engines must not differ by more: each would wait for what the other has not.
        self._waiting = [
            pair
            for i in range(0, len(jobs), 2)
            for pair in reversed(list(enumerate(jobs))[i : i + 2])
        ]
        self._open: list[Awaiting] = []
        self.in_pages: dict[str, bytes] = {}

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._open)

    def step(self) -> None:
        while self._waiting and (
            blocks_for(self._waiting[0][1].n_tokens) <= self.pool.n_free
        ):
            self._ask(*self._waiting.pop(0))
        for each in list(self._open):
            state = each.receiver.poll()
            if state in (KVPoll.SUCCESS, KVPoll.FAILED):
                self._open.remove(each)
                self._take(each, state)
            elif each.job.give_up == "at once":
                self._gone.add(each.job.name)
                each.receiver.abort()
            elif each.job.give_up == "arriving" and each.receiver.n_bytes:
                each.receiver.abort()

    def _ask(self, room: int, job: Job) -> None:
        pages = self.pool.take(blocks_for(job.n_tokens))
        for layer in self.pool.layers:  # the prefix that is here already
            self.pool.compute(job.name, layer, pages, 0, job.n_prefix)
        receiver = KvxferReceiver(self.manager, "bootstrap", room)
        assert receiver.poll() is KVPoll.BOOTSTRAPPING
        receiver.init(0)
        assert receiver.poll() is KVPoll.WAITING_FOR_INPUT
        asked = pages[job.n_prefix // BLOCK_TOKENS :]
        receiver.send_metadata(asked, room % N_AUX, job.n_prefix)
        self._open.append(Awaiting(job, room, pages, receiver))

    def _take(self, each: Awaiting, state: KVPoll) -> None:
        job = each.job
        if state is KVPoll.SUCCESS:
            self.pool.received(job.name, each.pages, job.n_prefix, job.n_tokens)
            items = self.manager.aux(each.room % N_AUX)
            self.in_pages[job.name] = b"".join(item.raw for item in items)
        else:
            self.pool.settle(each.pages[job.n_prefix // BLOCK_TOKENS :])
        self.note(job, state, each.receiver)
        each.receiver.clear()
        self.pool.give(each.pages)
