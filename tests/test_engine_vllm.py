"""vLLM's connector interface over kvxfer, driven by synchronous engine threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvxfer.testing import faults
from tests.endpoints import QUICK, SOON
from tests.engines.driver import Job, run, some_jobs
from tests.engines.pool import Pool
from tests.engines.vllm_engine import Decode, Prefill

CHUNK_TOKENS = 10  # not a multiple of a block's tokens


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


@contextlib.contextmanager
def engines(
    jobs: Sequence[Job],
    order: Sequence[Job] | None = None,
    *,
    n_blocks: int = 64,
    **options: Any,
) -> Iterator[tuple[Prefill, Decode]]:
    """Give both engines; ``order`` is in which the decode engine takes the jobs."""
    gone: set[str] = set()
    common = {**QUICK, "device": "soft", **options}
    with contextlib.ExitStack() as stack:
        pools = [Pool(n_blocks, seed) for seed in (1, 2)]
        for pool in pools:
            stack.enter_context(pool.arena)
        prefill = Prefill(
            pools[0],
            jobs,
            {**common, "listen": "127.0.0.1:0"},
            gone,
            chunk_tokens=CHUNK_TOKENS,
            patience=SOON,
        )
        stack.callback(prefill.worker.shutdown)
        decode = Decode(
            pools[1],
            order or jobs,
            {**common, "host": "127.0.0.1", "port": 0},
            prefill.worker.listening,
            gone,
            patience=SOON,
        )
        stack.callback(decode.worker.shutdown)
        yield prefill, decode


def check(prefill: Prefill, decode: Decode) -> None:
    """Run both engines to their end, and look at both memories."""
    run([prefill, decode], 2 * SOON)  # a lease of half of that may have to pass
    for pool in (prefill.pool, decode.pool):
        assert pool.n_free == pool.n_blocks
        pool.check()


def test_prompts_in_chunks_arrive_byte_for_byte() -> None:
    jobs = [Job("short", 3), Job("even", 20), Job("long", 41)]
    with engines(jobs, jobs[::-1]) as (prefill, decode):
        check(prefill, decode)
        assert sorted(decode.arrived) == ["even", "long", "short"]


def test_a_prefix_that_is_here_already_is_neither_sent_nor_touched() -> None:
    jobs = [Job("prefix", 41, n_prefix=16), Job("all but one", 21, n_prefix=20)]
    with engines(jobs) as (prefill, decode):
        check(prefill, decode)
        assert sorted(decode.arrived) == ["all but one", "prefix"]
        # Blocks 4 to 10, and block 7 twice: a chunk ended in it; and block 5.
        block_bytes = prefill.pool.block_bytes
        assert prefill.worker.n_bytes_sent == {
            "prefix": 8 * block_bytes,
            "all but one": block_bytes,
        }


def test_a_preempted_prompt_that_has_an_offer_begins_anew() -> None:
    """Its blocks are others' at once: nothing is read from them, whatever breaks."""
    job = Job("r", 41, preempt_after=2)
    # Each write leaves late, so that one is in flight.
    with faults("act=delay,us=2000"), engines([job]) as (prefill, decode):
        prefill.step()
        while not prefill.worker.is_streaming("r"):
            decode.step()
        check(prefill, decode)
        assert prefill.n_preempted == 1 and decode.arrived == ["r"]
        # Eleven, and blocks 2 and 7, in which chunks end, twice; of its second life.
        assert prefill.worker.n_bytes_sent == {"r": 13 * prefill.pool.block_bytes}


def test_a_preempted_prompt_without_an_offer_begins_anew() -> None:
    """Nothing is ever read from the blocks that it had before."""
    jobs = [Job(f"r{i}", 41, preempt_after=1 + i % 3) for i in range(4)]
    with engines(jobs) as (prefill, decode):
        while prefill.n_preempted < 4:
            prefill.step()
        check(prefill, decode)
        assert sorted(decode.arrived) == ["r0", "r1", "r2", "r3"]
        assert set(prefill.worker.n_bytes_sent.values()) == {
            13 * prefill.pool.block_bytes
        }


def test_a_prompt_of_which_the_reader_goes_away_frees_its_blocks() -> None:
    jobs = [Job("gone", 41, give_up="at once"), Job("stays", 20)]
    with engines(jobs) as (prefill, decode):
        check(prefill, decode)
        assert decode.in_vain == ["gone"] and decode.arrived == ["stays"]


def test_a_prompt_that_is_given_up_half_way_fails_at_the_other_engine() -> None:
    job = Job("gone", 41, give_up="arriving")
    with engines([job]) as (prefill, decode):
        prefill.step()
        while not decode.in_vain:  # a chunk comes, and no other one
            decode.step()
        check(prefill, decode)
        assert prefill.failed == ["gone"] and not decode.arrived
        assert prefill.worker.n_bytes_sent["gone"] == 3 * prefill.pool.block_bytes


def go_through_few_blocks(seed: int) -> None:
    """Prompts of every kind, all of them to their end; each byte is looked at."""
    jobs = some_jobs(40, seed)
    with engines(jobs, n_blocks=36) as (prefill, decode):
        check(prefill, decode)
        unwanted = {job.name for job in jobs if job.give_up}
        # One may have arrived before it was given up.
        assert set(decode.in_vain) <= unwanted
        assert {*decode.in_vain, *decode.arrived} == {job.name for job in jobs}
        assert prefill.n_preempted and decode.in_vain


def test_many_prompts_through_few_blocks() -> None:
    go_through_few_blocks(seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_prompts_of_many_kinds(seed: int) -> None:
    """What one of them misses for its timing, another one meets."""
    go_through_few_blocks(1000 + seed)


def test_what_the_interface_promises_of_its_calls() -> None:
    """A failed load names its blocks once; an unknown request is nobody's."""
    job = Job("alone", 9, give_up="at once")
    with engines([], [job]) as (prefill, decode):
        decode.step()
        while not decode.is_done:
            decode.step()
        assert decode.in_vain == ["alone"]
        assert decode.worker.get_block_ids_with_load_errors() == set()
        assert decode.worker.get_finished(frozenset({"nobody"})) == (set(), set())
        prefill.worker.handle_preemptions(frozenset({"nobody"}))
