"""SGLang's transfer interface over kvxfer, driven by synchronous engine threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.endpoints import QUICK, SOON
from tests.engines.driver import Job, run, some_jobs
from tests.engines.pool import BLOCK_TOKENS, Pool
from tests.engines.sglang_backend import Bootstrap
from tests.engines.sglang_engine import Decode, Prefill, aux_of
from tests.engines.sglang_interface import KVPoll

CHUNK_TOKENS = 3 * BLOCK_TOKENS  # whole pages, but for the last one


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


@contextlib.contextmanager
def engines(
    jobs: Sequence[Job], *, n_blocks: int = 64
) -> Iterator[tuple[Prefill, Decode]]:
    """Give both engines."""
    bootstrap: Bootstrap = {}
    gone: set[str] = set()
    common: dict[str, Any] = {**QUICK, "device": "soft"}
    with contextlib.ExitStack() as stack:
        # Pages follow one another in this engine's buffers.
        pools = [Pool(n_blocks, seed, gaps=False) for seed in (1, 2)]
        for pool in pools:
            stack.enter_context(pool.arena)
        options = {**common, "listen": "127.0.0.1:0"}
        prefill = Prefill(
            pools[0],
            jobs,
            {"bootstrap": bootstrap, "options": options},
            gone,
            chunk_tokens=CHUNK_TOKENS,
        )
        stack.callback(prefill.manager.close)
        options = {**common, "host": "127.0.0.1", "port": 0}
        server_args = {"bootstrap": bootstrap, "options": options}
        decode = Decode(pools[1], jobs, server_args, gone)
        stack.callback(decode.manager.close)
        yield prefill, decode


def check(prefill: Prefill, decode: Decode) -> None:
    """Run both engines to their end, and look at both memories."""
    run([prefill, decode], SOON)
    for pool in (prefill.pool, decode.pool):
        assert pool.n_free == pool.n_blocks
        pool.check()


def test_prompts_in_chunks_arrive_with_their_auxiliary_items() -> None:
    jobs = [Job("short", 3), Job("even", 24), Job("long", 41)]
    with engines(jobs) as (prefill, decode):
        check(prefill, decode)
        assert decode.in_pages == {job.name: aux_of(job) for job in jobs}
        assert sorted(prefill.succeeded) == sorted(decode.succeeded)
        for seen in prefill.polled.values():
            assert seen == sorted(seen) and seen[-1] is KVPoll.SUCCESS


def test_a_prefix_that_is_here_already_is_neither_sent_nor_touched() -> None:
    jobs = [Job("prefix", 41, n_prefix=16), Job("none", 41)]
    with engines(jobs) as (prefill, decode):
        check(prefill, decode)
        assert sorted(decode.succeeded) == ["none", "prefix"]


def test_what_either_side_gives_up_fails_on_both() -> None:
    jobs = [
        Job("unwanted", 41, give_up="arriving"),
        Job("retracted", 41, preempt_after=1),
        Job("stays", 41),
    ]
    with engines(jobs) as (prefill, decode):
        prefill.step()
        while len(decode.failed) < 1:
            decode.step()
        check(prefill, decode)
        assert prefill.succeeded == decode.succeeded == ["stays"]
        for engine in (prefill, decode):
            assert "given up by the decode" in engine.failed["unwanted"]
            assert "given up by the prefill" in engine.failed["retracted"]
            assert all("RequestAbortedError" in why for why in engine.failed.values())


def test_many_prompts_through_few_pages() -> None:
    jobs = some_jobs(40, seed=9)
    with engines(jobs, n_blocks=36) as (prefill, decode):
        check(prefill, decode)
        names = {job.name for job in jobs}
        assert {*decode.succeeded, *decode.failed} == names
        # What one side has sent, the other one has. Who gives up at the last moment
        # may do so for what has arrived already.
        assert set(prefill.succeeded) <= set(decode.succeeded)
        wanted = {j.name for j in jobs if not j.give_up and j.preempt_after is None}
        assert wanted <= set(prefill.succeeded)
        assert len(decode.failed) > 1
