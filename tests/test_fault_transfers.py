"""What the library makes of faults on purpose: its promises on a bad day."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, KVXferError, Server
from kvxfer.errors import (
    WC_STATUSES,
    BrokenPeerError,
    CompletionError,
    RetryExceededError,
    UsageError,
)
from kvxfer.testing import (
    Loopback,
    check_plan,
    faults,
    live_objects,
    loopback,
    no_leaks,
    set_faults,
)
from kvxfer.verbs_types import Opcode
from tests.children import Nursery
from tests.device_ends import PATIENCE, SUCCESS, Spec, Target
from tests.device_ends import Rig as VerbsRig
from tests.endpoints import QUICK, SOON, Arena, arena, dial, until
from tests.engine_rig import Rig, Shape

#: A lost answer is noticed after half a second: less, and a busy machine that stops
#: a thread for so long would be taken for one.
HASTY: dict[str, Any] = {**QUICK, "ib_timeout": 14, "retry_cnt": 7}
SAID_BY_TARGET = {9, 10, 11, 13}


@pytest.fixture(params=["tcp", "cma", "shm"])
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


def fill(pair: Loopback, seed: int) -> None:
    """Give the source new bytes."""
    rng = np.random.default_rng(seed)
    for layer in range(4):
        for plane in "kv":
            view = pair.source.view(layer, plane)
            view[:] = rng.integers(0, 256, view.shape, np.uint8)


def is_written(pair: Loopback, ours: int, theirs: int, layer: int = 0) -> bool:
    return all(
        np.array_equal(
            pair.source.view(layer, plane)[ours], pair.target.view(layer, plane)[theirs]
        )
        for plane in "kv"
    )


async def failure_of(call: Awaitable[Any]) -> KVXferError:
    with pytest.raises(KVXferError) as caught:
        await asyncio.wait_for(call, SOON)
    return caught.value


async def check_recovers(pair: Loopback) -> None:
    """Without faults, a new connection writes as if nothing had been."""
    set_faults(pair.client, "")
    set_faults(pair.server, "")
    peer = await pair.reconnect()
    await pair.client.write_cache(peer, [5, 6], [7, 8])
    assert all(
        is_written(pair, 5, 7, layer) and is_written(pair, 6, 8, layer)
        for layer in range(4)
    )


# -- the tools themselves -----------------------------------------------------------


def test_a_plan_is_checked_before_it_is_given_to_anybody() -> None:
    before = dict(os.environ)
    with pytest.raises(UsageError, match="offset 9"):
        check_plan("act=drop;nonsense")
    with pytest.raises(UsageError), faults("act=nothing"):
        raise AssertionError("not reached")
    assert dict(os.environ) == before


async def test_plans_of_what_is_opened_inside() -> None:
    with faults("nth=1,act=status:general"):
        async with loopback(**QUICK) as pair:
            # The helper's own plans begin with the first write.
            await pair.client.write_cache(pair.peer, [1], [2], 0)
        assert os.environ["KVXFER_SOFT_FAULT"]
        with arena(seed=1) as source, arena(seed=2) as target:
            async with (
                Server(target.cache, host="127.0.0.1", port=0, **QUICK) as server,
                Client(source.cache, **QUICK) as client,
            ):
                peer = await dial(client, server)
                error = await failure_of(client.write_cache(peer, [1], [2], 0))
                assert isinstance(error, CompletionError)
                assert error.status == 21
    assert "KVXFER_SOFT_FAULT" not in os.environ


async def test_what_is_left_is_named() -> None:
    with no_leaks():
        async with loopback(**QUICK):
            assert live_objects()["QueuePair"] == 2
    rig = VerbsRig(Target("soft0", "soft"))
    left = r"1 Device, .*, 1 soft\.contexts"
    with pytest.raises(AssertionError, match=left), no_leaks():
        end = rig.end()
    end.close()


# -- a failed WR --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["first", "middle", "last"])
async def test_every_status_is_its_exception(wire: str, place: str) -> None:
    """Whichever WR of a write fails, and however: never a success."""
    async with loopback(**QUICK, merge_bytes=4096, max_sge=1) as pair:
        for row in WC_STATUSES[1:]:
            # Four blocks of two planes, a record, and its announcement.
            nth = {"first": 1, "middle": 5, "last": 10}[place]
            set_faults(pair.client, "")
            set_faults(pair.server, "")
            fill(pair, row.status)
            by = pair.server if row.status in SAID_BY_TARGET else pair.client
            peer = await pair.reconnect()
            set_faults(by, f"nth={nth},act=status:{row.name}")
            error = await failure_of(
                pair.client.write_cache(peer, [1, 3, 5, 7], [2, 4, 6, 8], 1)
            )
            if row.name == "IBV_WC_WR_FLUSH_ERR":
                assert type(error) is BrokenPeerError
            else:
                assert type(error) is row.error, row.name
                assert (error.status, error.layer) == (row.status, 1)
                assert error.vendor_err == 0x40
            assert error.fenced is True
            assert not peer.connected
        await check_recovers(pair)


async def test_a_write_that_arrived_and_failed(wire: str) -> None:
    """Its acknowledgement was lost: it raises, and writing it again is right."""
    async with loopback(client_faults="nth=1,act=ack_lost", **HASTY) as pair:
        fill(pair, 1)
        error = await failure_of(pair.client.write_cache(pair.peer, [1], [2], 0))
        assert type(error) is RetryExceededError
        # The truth: the server's QP is in ERR before the wait ends.
        assert error.fenced is True
        assert is_written(pair, 1, 2)
        before = pair.target.view(0, "k").copy()
        fill(pair, 2)
        await asyncio.sleep(0.05)
        assert np.array_equal(pair.target.view(0, "k"), before)
        peer = await pair.reconnect()
        await pair.client.write_cache(peer, [1], [2], 0)
        assert is_written(pair, 1, 2)


async def test_a_late_write_of_an_old_life_is_discarded(wire: str) -> None:
    """After a failure that says it is fenced, blocks may be used for others."""
    async with loopback(client_faults="nth=2,act=late_write,us=200000", **HASTY) as p:
        fill(p, 1)
        error = await failure_of(p.client.write_cache(p.peer, [1, 3], [2, 4], 0))
        assert type(error) is RetryExceededError
        assert error.fenced is True
        for plane in "kv":
            p.target.view(0, plane)[:] = 0xEE
        peer = await p.reconnect()
        await p.client.write_cache(peer, [9], [9], 3)
        await asyncio.sleep(0.4)
        assert all((p.target.view(0, plane) == 0xEE).all() for plane in "kv")
        assert is_written(p, 9, 9, 3)


# -- visibility ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", ["act=posted_write_delay,us=1000..30000", "act=reorder_bytes"]
)
async def test_an_arrival_comes_after_its_bytes(wire: str, plan: str) -> None:
    """Whatever the order of bytes and acknowledgements, and on every layer."""
    async with loopback(server_faults=plan, **QUICK) as pair:
        arrivals = pair.server.arrivals()
        for round_ in range(12):
            fill(pair, round_)
            ids = random.Random(round_).sample(range(16), 6)
            write = asyncio.ensure_future(
                pair.client.write_cache(pair.peer, ids, ids[::-1])
            )
            for _ in range(4):
                arrival = await asyncio.wait_for(anext(arrivals), SOON)
                for ours, theirs in zip(ids, ids[::-1], strict=True):
                    assert is_written(pair, ours, theirs, arrival.layer)
            await write


# -- what ends a QP, a port, a device -----------------------------------------------


@pytest.mark.parametrize("whose", ["client", "server"])
@pytest.mark.parametrize("act", ["qp_fatal", "drop", "cq_overflow", "port_down"])
async def test_a_write_ends_in_time(wire: str, act: str, whose: str) -> None:
    """With a typed exception; both sides close, and nothing is left."""
    if act == "drop" and whose == "server":
        pytest.skip("a target sends no WRs that could be dropped")
    with no_leaks():
        async with loopback(**HASTY) as pair:
            on = "target" if whose == "server" else "initiator"
            end = pair.server if whose == "server" else pair.client
            set_faults(end, f"nth=3,act={act},on={on}")
            for _ in range(3):
                write = pair.client.write_cache(
                    pair.peer, [1, 3, 5], [2, 4, 6], request_id="r"
                )
                try:
                    await asyncio.wait_for(write, SOON)
                except KVXferError as error:
                    assert isinstance(error, BrokenPeerError | CompletionError)
                    # One that began after the end was refused: nothing to fence.
                    assert error.fenced is (True if error.request_id else None)
                    break
            else:
                raise AssertionError("no write failed")
            if act in ("qp_fatal", "drop"):
                await check_recovers(pair)
            if act == "port_down":
                set_faults(end, "act=port_up@t=0us;act=reorder_bytes,times=1")
                await asyncio.wait_for(pair.reconnect(), SOON)
                await check_recovers(pair)


async def test_a_slow_device_is_only_slow(wire: str) -> None:
    plan = "seed=3;rate=0.3,act=delay,us=1000..20000"
    async with loopback(client_faults=plan, **QUICK) as pair:
        fill(pair, 1)
        await asyncio.gather(
            *(pair.client.write_cache(pair.peer, [i], [15 - i]) for i in range(16))
        )
        assert all(
            is_written(pair, i, 15 - i, layer) for i in range(16) for layer in range(4)
        )


# -- small queues -------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 8, 13, 16, 31, 64])
@pytest.mark.parametrize("notify", [False, True])
def test_tiny_queues_against_numpy(depth: int, notify: bool) -> None:
    """Every byte of the target, the gaps between its blocks among them."""
    rng = random.Random(depth)
    shape = Shape(n_rows=3)
    with Rig(shape, depth=depth, receives=2, notify=notify, max_sge=2) as rig:
        rig.source.device.set_faults(f"seed={depth};rate=0.05,act=delay,us=1..1000")
        # An announcement puts in place what was acknowledged early. Without one,
        # writes to the same block would overtake each other, as they may.
        late = "rate=0.3,act=posted_write_delay,us=1..2000;" if notify else ""
        rig.target.device.set_faults(f"seed={depth};{late}act=reorder_bytes")
        rig.let_go()
        for done in range(10):
            n = rng.randrange(1, 24)
            ours = [rng.randrange(shape.n_local) for _ in range(n)]
            theirs = rng.sample(range(shape.n_remote), n)
            row = rng.randrange(shape.n_rows)
            ops = rig.submit(ours, theirs, (row,))
            assert rig.finish(ops)[-1].status == SUCCESS
            rig.before[:] = rig.expected(ours, theirs, (row,))
            if notify:
                n_found = done + 1
                rig.target.wait(partial(has, rig.target.found, n_found))
                # Announced: every byte is in place.
                assert np.array_equal(rig.target.memory, rig.before)
                head = rig.target.found[-1].head
                rig.source.engine.grant(rig.slot, head, n_found)
        rig.target.qp.to_error()  # what was acknowledged is in place by now
        assert np.array_equal(rig.target.memory, rig.before)


def has(found: list[Any], n: int) -> bool:
    return len(found) >= n


# -- wake-ups -----------------------------------------------------------------------


@pytest.mark.parametrize("progress", ["event", "adaptive", "spin"])
@pytest.mark.parametrize("seconds", [0.5, pytest.param(10, marks=pytest.mark.slow)])
def test_no_wake_up_is_lost(wire: str, seconds: float, progress: str) -> None:
    """Whoever drives the engines: ends that come as the sleeper falls asleep.

    Of one completion, and of a few that come close to each other: the last of them
    as the CQ is armed after the one before. The thread of ``adaptive`` falls asleep
    and is woken as often as not.
    """
    rng = random.Random(5)
    n = 0
    with Rig(progress=progress, chain=1, receives=16) as rig:
        rig.let_go()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ids = rng.sample(range(64), rng.choice((1, 2, 3, 4, 20)))
            op_ids = rig.submit(ids, ids)
            until_ns = time.perf_counter_ns() + rng.randrange(50_000)
            while time.perf_counter_ns() < until_ns:
                pass
            start = time.monotonic()
            (finished,) = rig.finish(op_ids)
            assert finished.status == 0
            n += 1
            rig.target.wait(partial(has, rig.target.found, 1))
            (arrival,) = rig.target.found
            rig.source.engine.grant(rig.slot, arrival.head, n)
            assert time.monotonic() - start < PATIENCE / 2
            rig.source.found.clear()
            rig.target.found.clear()
    assert n > 50 * seconds


@pytest.mark.parametrize("seconds", [0.5, pytest.param(10, marks=pytest.mark.slow)])
def test_no_event_is_lost(wire: str, seconds: float) -> None:
    """One completion at a time, each met by a sleeper who is just falling asleep."""
    rng = random.Random(5)
    n = 0
    with VerbsRig(Target("soft0", "soft", wire=wire)) as rig:
        a, b = rig.pair(Spec(cq_depth=8))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            b.post_recv(n)
            opcode = Opcode.RDMA_WRITE_WITH_IMM if n % 2 else Opcode.SEND
            a.post(a.write(b, 0, 0, 0, opcode=opcode, wr_id=n))
            until_ns = time.perf_counter_ns() + rng.randrange(50_000)
            while time.perf_counter_ns() < until_ns:
                pass
            start = time.monotonic()
            for one in (a, b):
                (wc,) = one.reap(1)  # arms, polls, and sleeps until the event
                assert (wc.wr_id, wc.status) == (n, SUCCESS)
            assert time.monotonic() - start < PATIENCE / 2
            n += 1
    assert n > 100 * seconds


# -- storms -------------------------------------------------------------------------


async def storm(n_clients: int, n_cycles: int) -> None:
    """Clients connect, write and go, some in the middle of a fault."""
    # All share one event loop with the server: who waits for his turn is not gone.
    options = {**QUICK, "ping_timeout": SOON, "sq_depth": 64, "notify_ring_bytes": 4096}
    with arena(seed=2, n_blocks=256) as target:
        async with Server(target.cache, host="127.0.0.1", port=0, **options) as server:
            # With the first connection the server's device has its thread.
            base = live_objects() | {"soft.threads": 1}

            async def cycle(client: Client, number: int, round_: int) -> None:
                peer = await client.connect("127.0.0.1", server.port)
                plan = "nth=2,act=qp_fatal" if (number + round_) % 4 == 0 else ""
                set_faults(client, plan)
                try:
                    await client.write_cache(peer, [number], [number])
                except (BrokenPeerError, CompletionError):
                    assert plan
                else:
                    assert not plan
                set_faults(client, "")
                await peer.close()

            async def run(number: int) -> None:
                with arena(seed=number, n_blocks=256) as source:
                    async with Client(source.cache, **options) as client:
                        for round_ in range(n_cycles):
                            await cycle(client, number, round_)

            await asyncio.gather(*(run(number) for number in range(n_clients)))
            await until(lambda: not server.peers)
            await until(lambda: live_objects() == base)


async def test_a_reconnect_storm() -> None:
    with no_leaks():
        await storm(8, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_clients", "n_cycles", "times"), [(20, 50, 10), (200, 5, 1)]
)
async def test_a_long_reconnect_storm(
    n_clients: int, n_cycles: int, times: int
) -> None:
    for _ in range(times):
        with no_leaks():
            await storm(n_clients, n_cycles)


# -- death --------------------------------------------------------------------------

SHAPE: dict[str, Any] = {"n_blocks": 32, "layers": 2, "planes": {"k": (8192, 8256)}}


#: The WRs of a layer of SHAPE: its blocks, the record of them, and the announcement.
A_LAYER = range(1, 35)


async def kill_servers(
    nursery: Nursery,
    wire: str,
    directory: Path,
    n: int,
    seconds: float,
    nths: range = A_LAYER,
) -> int:
    """Servers that die with half of some WR written; return how many did in time."""
    rng = random.Random(n)
    ids = range(SHAPE["n_blocks"])
    end = time.monotonic() + seconds
    # Deaths are to be seen by the device; a busy machine is no death.
    options = {**HASTY, "ping_interval": 0.2, "ping_timeout": 5.0}
    options |= {"drain_timeout": 0.3, "fence_timeout": 0.3}
    done = 0
    with arena(**SHAPE, seed=1) as source:
        async with Client(source.cache, **options) as client:
            while done < n and time.monotonic() < end:
                path = directory / "memory"
                path.unlink(missing_ok=True)
                plan = f"nth={rng.choice(nths)},act=partial_then_die"
                async with nursery.start(
                    "serve",
                    path=str(path),
                    shape={**SHAPE, "seed": 2},
                    environ={"KVXFER_SOFT_WIRE": wire, "KVXFER_SOFT_FAULT": plan},
                    **options,
                ) as child:
                    port = (await child.event())["port"]
                    peer = await client.connect("127.0.0.1", port)
                    with pytest.raises((BrokenPeerError, CompletionError)):
                        write = client.write_cache(peer, ids, ids)
                        await asyncio.wait_for(write, SOON)
                    await child.ended()
                    assert not peer.connected
                check_red_zones(path)
                done += 1
    return done


def check_red_zones(path: Path) -> None:
    """No byte outside the blocks has changed."""
    with arena(**SHAPE, seed=2, path=path) as target, arena(**SHAPE, seed=2) as fresh:
        for one in (target, fresh):
            for _, place in rows(one):
                one.blocks(place)[:] = 0
        assert (target.memory == fresh.memory).all()


def rows(one: Arena) -> Iterator[Any]:
    for group in one.cache.groups:
        for layer in group.layers:
            yield from group.rows(layer)


async def test_servers_that_die_in_the_middle_of_a_wr(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    assert await kill_servers(nursery, wire, tmp_path, 10, 60) == 10


async def test_servers_that_die_of_an_announcement(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    """It has no bytes of which half could be written; they die all the same."""
    assert await kill_servers(nursery, wire, tmp_path, 2, 60, A_LAYER[-1:]) == 2


@pytest.mark.slow
async def test_many_servers_that_die_in_the_middle_of_a_wr(
    nursery: Nursery, wire: str, tmp_path: Path
) -> None:
    """A thousand deaths, with those at random moments of ``test_processes.py``."""
    assert await kill_servers(nursery, wire, tmp_path, 250, 300) == 250
