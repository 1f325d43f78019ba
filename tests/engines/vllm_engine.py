"""Two engines of vLLM's shape, each a thread that goes from step to step.

The prefill engine computes prompts in chunks and preempts; the decode engine takes
requests, some of them with a prefix that it has already, and gives some up. Both have
fewer blocks than the requests need, so that blocks go from one request to the next.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.engines.driver import Job
from tests.engines.pool import BLOCK_TOKENS, Pool, blocks_for
from tests.engines.vllm_connector import KvxferConnector
from tests.engines.vllm_interface import Request, Role, Scheduled, SchedulerOutput

__all__ = ["Decode", "Prefill"]


class Engine:
    """What both engines have: a pool, and the two halves of a connector.

    ``gone``, which both share, has the requests of which nobody is there any more.
    """

    def __init__(
        self, pool: Pool, options: Mapping[str, Any], *, prefill: bool, patience: float
    ) -> None:
        config = {
            "block_tokens": BLOCK_TOKENS,
            "options": options,
            "prefill": prefill,
            "patience": patience,
        }
        self.pool = pool
        self.scheduler = KvxferConnector(config, Role.SCHEDULER)
        self.worker = KvxferConnector(config, Role.WORKER)
        self.worker.register_kv_caches(pool.arena.cache)


@dataclass(eq=False)
class Computing:
    """A prompt in the prefill engine."""

    job: Job
    request: Request
    block_ids: list[int]
    n_computed: int = 0
    n_chunks: int = 0
    preempted: bool = False


class Prefill(Engine):
    """Computes some tokens of some prompts in each step."""

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job],
        options: Mapping[str, Any],
        gone: set[str],
        *,
        chunk_tokens: int,
        patience: float,
    ) -> None:
        super().__init__(pool, options, prefill=True, patience=patience)
        self._gone = gone
        self._waiting = [
            (job, Request(job.name, job.n_tokens, {"do_remote_decode": True}))
            for job in jobs
        ]
        self._running: list[Computing] = []
        self._sending: dict[str, Computing] = {}
        self._chunk_tokens = chunk_tokens
        self.n_preempted = 0
        self.failed: list[str] = []

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._running or self._sending)

    def step(self) -> None:
        self._waiting = [w for w in self._waiting if w[0].name not in self._gone]
        preempted = self._preempt()
        self._admit()
        output = SchedulerOutput(
            tuple(
                Scheduled(
                    each.request,
                    tuple(each.block_ids),
                    each.n_computed,
                    min(self._chunk_tokens, each.job.n_tokens - each.n_computed),
                )
                for each in self._running
            ),
            preempted,
        )
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(output))
        self.worker.start_load_kv()
        for layer in self.pool.layers:
            self.worker.wait_for_layer_load(layer)
            computed = threading.Event()
            # The event happens behind the call, as it does on a GPU's stream.
            self.worker.save_kv_layer(layer, computed.is_set)
            for step in output.scheduled:
                stop = step.n_computed + step.n_tokens
                name = step.request.request_id
                self.pool.compute(name, layer, step.block_ids, step.n_computed, stop)
            computed.set()
        self.worker.wait_for_save()
        self._account(output)
        sent, _ = self.worker.get_finished(frozenset(self._gone))
        for name in sent:
            each = self._sending.pop(name, None)
            if each is None:  # given up by the decode side before it was computed
                (each,) = (x for x in self._running if x.job.name == name)
                self._running.remove(each)
            self.pool.give(each.block_ids)
        self.failed += sent & self.worker.failed

    def _admit(self) -> None:
        while self._waiting:
            job, request = self._waiting[0]
            if blocks_for(job.n_tokens) > self.pool.n_free:
                return
            del self._waiting[0]
            block_ids = self.pool.take(blocks_for(job.n_tokens))
            self._running.append(Computing(job, request, block_ids))

    def _preempt(self) -> frozenset[str]:
        """Take the blocks of some prompts away; they begin anew, in other ones."""
        found = [
            each
            for each in self._running
            if each.n_chunks == each.job.preempt_after and not each.preempted
        ]
        names = frozenset(each.job.name for each in found)
        self.worker.handle_preemptions(names)
        for each in found:
            self.pool.give(each.block_ids)
            each.block_ids = self.pool.take(len(each.block_ids))
            each.n_computed, each.preempted = 0, True
            self.n_preempted += 1
        return names

    def _account(self, output: SchedulerOutput) -> None:
        for each, step in zip(list(self._running), output.scheduled, strict=True):
            each.n_computed += step.n_tokens
            each.n_chunks += 1
            if each.n_computed == each.job.n_tokens:
                self._running.remove(each)
                assert self.scheduler.request_finished(each.request, each.block_ids)
                self._sending[each.job.name] = each


@dataclass(eq=False)
class Awaiting:
    """A prompt that the decode engine waits for."""

    job: Job
    request: Request
    block_ids: list[int]
    given_up: bool = False


class Decode(Engine):
    """Waits for prompts, looks at every byte, and appends tokens of its own."""

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job],
        options: Mapping[str, Any],
        remote: str,
        gone: set[str],
        *,
        patience: float,
    ) -> None:
        super().__init__(pool, options, prefill=False, patience=patience)
        self._gone = gone
        params = {"do_remote_prefill": True, "remote": remote}
        self._waiting = [(job, Request(job.name, job.n_tokens, params)) for job in jobs]
        self._loading: dict[str, Awaiting] = {}
        self.arrived: list[str] = []
        self.in_vain: list[str] = []

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._loading)

    def step(self) -> None:
        self._admit()
        self.worker.bind_connector_metadata(
            self.scheduler.build_connector_meta(SchedulerOutput())
        )
        self.worker.start_load_kv()
        self.worker.wait_for_save()
        given_up = frozenset(
            name
            for name, each in self._loading.items()
            if not each.given_up and self._is_unwanted(each.job)
        )
        self._gone.update(
            name for name in given_up if self._loading[name].job.give_up == "at once"
        )
        for name in given_up:
            self._loading[name].given_up = True
        _, received = self.worker.get_finished(given_up)
        errors = self.worker.get_block_ids_with_load_errors()
        for name in received:
            self._take(self._loading.pop(name), errors)

    def _is_unwanted(self, job: Job) -> bool:
        return job.give_up == "at once" or (
            job.give_up == "arriving" and self.worker.bytes_received(job.name) > 0
        )

    def _admit(self) -> None:
        while self._waiting:
            job, request = self._waiting[0]
            if blocks_for(job.n_tokens + 1) > self.pool.n_free:
                return
            del self._waiting[0]
            block_ids = self.pool.take(blocks_for(job.n_tokens + 1))
            for layer in self.pool.layers:  # the prefix that is here already
                self.pool.compute(job.name, layer, block_ids, 0, job.n_prefix)
            n, beside = self.scheduler.get_num_new_matched_tokens(request, job.n_prefix)
            assert beside and n == job.n_tokens - job.n_prefix
            # The block of the next token alone is not asked for.
            asked = block_ids[: blocks_for(job.n_tokens)]
            self.scheduler.update_state_after_alloc(request, asked, n)
            self._loading[job.name] = Awaiting(job, request, block_ids)

    def _take(self, each: Awaiting, errors: set[int]) -> None:
        job, block_ids = each.job, each.block_ids
        asked = block_ids[job.n_prefix // BLOCK_TOKENS : blocks_for(job.n_tokens)]
        if set(asked) & errors:
            assert set(asked) <= errors
            self.in_vain.append(job.name)
            self.pool.settle(asked)
        else:
            self.arrived.append(job.name)
            self.pool.received(job.name, block_ids, job.n_prefix, job.n_tokens)
            for layer in self.pool.layers:  # the first token of its own
                self.pool.compute(
                    f"{job.name} here", layer, block_ids, job.n_tokens, job.n_tokens + 1
                )
        self.pool.give(block_ids)
