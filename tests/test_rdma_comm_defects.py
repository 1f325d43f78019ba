"""Defects known of the original, one test each, that this does not have.

Each docstring says what the original does. The tests go through FastDeploy's
interface; what it cannot cause is caused in the software device.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvxfer.testing import live_objects
from rdma_comm import RDMACommunicator
from tests.communicators import (  # noqa: F401
    BLOCK_BYTES,
    HOST,
    N_BLOCKS,
    N_LAYERS,
    Memory,
    Nodes,
    communicator,
    free_port,
    initiator_faults,
    memory,
    nodes,
    program,
    quick,
    target_faults,
    wait_until,
    writers,
)
from tests.endpoints import SOON, until
from tests.leaks import take_census

OURS, THEIRS = list(range(24)), list(range(31, 7, -1))


def check_again(pair: Nodes) -> None:
    """The connection is gone; a new one carries writes."""
    assert not pair.prefill.is_connected(pair.host, pair.port)
    assert pair.write([1], [2]) == -1
    assert pair.prefill.connect(pair.host, pair.port) == 0
    assert pair.prefill.is_connected(pair.host, pair.port)
    pair.check_write(OURS, THEIRS, 1)


# -- silent corruption ----------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", ["nth=3,act=status:LOC_PROT_ERR", "nth=2,act=ack_lost", "nth=1,act=drop"]
)
def test_an_error_completion_is_no_success(plan: str) -> None:
    """The original ignores the status: -1 is never returned, and the connection
    stays up while the device flushes all that comes later."""
    with nodes() as pair:
        pair.check_write(OURS, THEIRS)
        initiator_faults(pair, plan)
        assert pair.write(OURS, THEIRS) == -1
        check_again(pair)


def test_an_error_of_the_target_is_no_success() -> None:
    with nodes() as pair:
        target_faults(pair, "nth=2,act=status:REM_OP_ERR")
        assert pair.write(OURS, THEIRS) == -1
        check_again(pair)


def test_32_threads_on_one_peer_get_their_own_completions() -> None:
    """The original's threads share a CQ and take each other's completions, so that a
    call returns before its bytes are there."""
    source = memory(1, n_blocks=64, n_layers=8, block_bytes=4096)
    target = memory(2, n_blocks=64, n_layers=8, block_bytes=4096)
    with nodes(source, target) as pair:

        def work(i: int) -> list[str]:
            wrong = []
            assert pair.prefill.connect(HOST, pair.port) == 0
            for layer in range(8):
                ours, theirs = [i, 63 - i], [63 - i, i]
                if pair.write(ours, theirs, layer) != 0:
                    wrong.append(f"thread {i} layer {layer} failed")
                for name, of in target.planes.items():
                    found = of[layer][theirs]
                    if not (found == source.planes[name][layer][ours]).all():
                        wrong.append(f"thread {i}: {name} {layer} told too soon")
            return wrong

        with ThreadPoolExecutor(32) as pool:
            assert [text for found in pool.map(work, range(32)) for text in found] == []
        assert writers(pair) == 1


def test_a_post_that_is_refused_goes_on_where_it_was() -> None:
    """The original drains the CQ and begins anew: it takes the completions of other
    calls with it, hides their errors, and writes twice what it had posted."""
    with nodes() as pair:
        for nth in (2, 3, 20, 49):
            initiator_faults(pair, f"act=enomem@post={nth}")
            pair.check_write(OURS, THEIRS, 1)
        # With nothing in flight no completion will ever say that there is room, so
        # this one is an error, and a new connection is as good as the first.
        initiator_faults(pair, "act=enomem@post=1")
        assert pair.write(OURS, THEIRS) == -1
        check_again(pair)


def test_posts_that_are_refused_are_the_business_of_their_own_call() -> None:
    """The original's other threads lose their completions to the one that drains."""
    n_threads, n_blocks = 8, 4
    with nodes() as pair:
        # The third WR of five of the writes, of 10 each: never one that finds the
        # queue empty. What was refused once is counted again.
        initiator_faults(
            pair, ";".join(f"act=enomem@post={3 + 51 * i}" for i in range(5))
        )

        def work(i: int) -> list[str]:
            ours = list(range(i * n_blocks, (i + 1) * n_blocks))
            theirs, wrong = ours[::-1], []
            for n in range(4):
                layer = n % N_LAYERS
                for of in pair.target.planes.values():
                    of[layer][theirs] = 0
                if pair.write(ours, theirs, layer) != 0:
                    wrong.append(f"thread {i} write {n} failed")
                for name, of in pair.target.planes.items():
                    found = of[layer][theirs]
                    if not (found == pair.source.planes[name][layer][ours]).all():
                        wrong.append(f"thread {i} write {n}: {name} is not there")
            return wrong

        with ThreadPoolExecutor(n_threads) as pool:
            found = list(pool.map(work, range(n_threads)))
        assert [text for texts in found for text in texts] == []
        assert pair.prefill.is_connected(HOST, pair.port)


def test_more_blocks_than_the_queue_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own accounting keeps the send queue from running over, for all threads."""
    monkeypatch.setenv("KVXFER_SQ_DEPTH", "16")
    monkeypatch.setenv("KVXFER_MAX_SGE", "1")
    with nodes() as pair:
        wanted = pair.target.copy()
        for name, of in wanted.items():
            for layer in range(N_LAYERS):
                of[layer][THEIRS] = pair.source.planes[name][layer][OURS]
        with ThreadPoolExecutor(8) as pool:
            layers = [*range(N_LAYERS)] * 8
            codes = list(pool.map(lambda x: pair.write(OURS, THEIRS, x), layers))
        assert codes == [0] * len(layers)
        assert pair.target.differs(wanted) == []


def test_nothing_lands_after_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original returns -1 with WRs in flight: they land in blocks that belong to
    another request by then, and their completions end the next call early."""
    monkeypatch.setenv("KVXFER_WRITE_TIMEOUT", "0.3")
    monkeypatch.setenv("KVXFER_DRAIN_TIMEOUT", "0.3")
    monkeypatch.setenv("KVXFER_SOFT_WIRE", "tcp")  # the others know no late write
    with nodes() as pair:
        # What will be late leaves by a connection of that wire, which has to be up.
        pair.check_write(OURS, THEIRS, 1)
        initiator_faults(pair, "act=late_write,us=1000000,nth=1")
        assert pair.write(OURS, THEIRS) == -1
        assert pair.prefill.connect(pair.host, pair.port) == 0
        # The same blocks, another request; not again, which would hide what lands.
        wanted = pair.target.copy()
        for name, of in wanted.items():
            of[0][THEIRS] = pair.source.planes[name][0][OURS[::-1]]
        assert pair.write(OURS[::-1], THEIRS) == 0
        # The late bytes have a connection to themselves, and end with it: what stays
        # are the two ends of the new one.
        wait_until(lambda: live_objects()["soft.connections"] == 2)
        assert pair.target.differs(wanted) == []


def test_a_revoked_rkey_is_an_error() -> None:
    """A decode node that has registered anew: the original goes on and reports
    success for bytes that went nowhere."""
    with nodes() as pair:
        pair.check_write(OURS, THEIRS)
        listener = pair.decode._ends._listener
        assert listener is not None
        (adapter,) = listener.server._endpoint._host.adapters
        for region in adapter._regions:
            region.close()
        before = pair.target.copy()
        assert pair.write(OURS, THEIRS) == -1
        assert pair.target.differs(before) == []
        assert not pair.prefill.is_connected(HOST, pair.port)


@pytest.mark.parametrize(
    "bad", [-1, N_BLOCKS, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, 2**64]
)
def test_ids_out_of_range_touch_nothing(bad: int) -> None:
    """The original reads beyond its table of pointers and writes where that leads;
    FastDeploy pads lists with -1."""
    with nodes() as pair:
        before = pair.target.copy()
        assert pair.write([1, bad], [2, 3]) == -1
        assert pair.write([1, 2], [3, bad]) == -1
        assert pair.target.differs(before) == []
        pair.check_write(OURS, THEIRS)


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        # In the words of the decode node, which refuses.
        ({}, {"block_bytes": 512}, "block_bytes is 512 here, 256 at the peer"),
        ({"planes": ("k",)}, {}, "plane is present here, missing at the peer"),
        ({}, {"planes": ("k", "v", "v_scale")}, "v_scale"),
        (
            {"planes": ("k", "v", "k_scale")},
            {"planes": ("k", "v", "k_scale"), "scale_bytes": 8},
            "block_bytes is 8 here, 24 at the peer",
        ),
    ],
)
def test_caches_that_do_not_fit_are_refused_with_figures(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The original compares nothing: garbage, or a wait of 30 seconds."""
    port = free_port()
    with (
        communicator("decode", port, memory(2, **theirs)),
        communicator("prefill", "0", memory(1, **ours)) as prefill,
    ):
        assert prefill.connect(HOST, port) == 2
        assert text in caplog.text
        assert not prefill.is_connected(HOST, port)


def test_a_layer_that_the_decode_node_has_not() -> None:
    with nodes(memory(1, n_layers=3), memory(2, n_layers=2)) as pair:
        assert pair.write([1], [2], 2) == -1
        pair.check_write([1], [2], 1)


def sparse(block_bytes: int, n_blocks: int) -> Memory:
    """Address space that takes memory only where it is touched."""
    plane = np.zeros((n_blocks, block_bytes), np.uint8)
    return Memory({"k": [plane]}, block_bytes, 0)


def test_offsets_beyond_2_gib() -> None:
    """The original multiplies block id and size as 32-bit numbers."""
    block_bytes, n_blocks = 128 << 10, 20_000
    source, target = sparse(block_bytes, n_blocks), sparse(block_bytes, n_blocks)
    ids = np.array([0, 16_383, 16_384, 16_385, n_blocks - 1])
    for i, block in enumerate(ids):
        source.planes["k"][0][block] = i + 1
    with nodes(source, target) as pair:
        assert pair.write(ids, ids[::-1].copy()) == 0
        for i, block in enumerate(ids[::-1]):
            assert (target.planes["k"][0][block] == i + 1).all()
        assert not target.planes["k"][0][[1, 16_382, 16_386]].any()


def test_a_registration_that_fails_is_tried_again() -> None:
    """The original keeps half a list of regions; the first write then follows a null
    pointer."""
    held, port = memory(1), free_port()
    arguments = held.arguments()
    arguments["value_cache_ptrs"] = [1 << 46, 2 << 46, 3 << 46]  # nothing is mapped
    with (
        communicator("decode", port, memory(2)),
        communicator("prefill", "0", held, **arguments) as prefill,
    ):
        for _ in range(2):
            assert prefill.connect(HOST, port) == 2
            assert prefill.write_cache(HOST, port, [1], [2], 0) == -1


# -- crashes, hangs, lifetime ---------------------------------------------------------


def test_connects_at_the_same_time_share_one_connection() -> None:
    """The original makes a QP for each, and forgets all but one."""
    with nodes() as pair, communicator("prefill", "0", memory(3)) as other:
        with ThreadPoolExecutor(16) as pool:
            codes = list(pool.map(lambda _: other.connect(HOST, pair.port), range(64)))
        assert codes == [0] * 64
        assert writers(pair) == 2


@contextmanager
def silent_clients(port: int) -> Iterator[None]:
    """Connect and say nothing, half of a hello, or nonsense; and stay."""
    noise = [b"", b"\xff" * 7, bytes(32), b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000]
    open_sockets = []
    try:
        for i in range(50):
            client = socket.create_connection((HOST, port))
            open_sockets.append(client)
            client.sendall(noise[i % len(noise)])
        yield
    finally:
        for client in open_sockets:
            client.close()


def test_slow_and_wrong_clients_delay_nobody() -> None:
    """The original's one thread serves one client at a time, up to 30 seconds a
    message, and ends for good at the first that fails."""
    with nodes() as pair, silent_clients(int(pair.port)):
        with communicator("prefill", "0", memory(3, block_bytes=8)) as misfit:
            assert misfit.connect(HOST, pair.port) == 2
        with communicator("prefill", "0", memory(4)) as other:
            assert other.connect(HOST, pair.port) == 0
            assert other.write_cache(HOST, pair.port, [1], [2], 0) == 0
        pair.check_write(OURS, THEIRS)


DECODE = """
    import sys
    from tests.communicators import memory
    from rdma_comm import RDMACommunicator
    held = memory(2)
    node = RDMACommunicator("decode", 0, sys.argv[1], **held.arguments())
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_node_that_is_killed_is_not_connected() -> None:
    """Whoever asks is told, without having to write first; and the node that takes
    its place is another one, which takes a new connection."""
    port = free_port()
    with communicator("prefill", "0", memory(1)) as prefill:
        for _ in range(2):
            with program(DECODE, port) as process:
                assert prefill.connect(HOST, port) == 0
                assert prefill.write_cache(HOST, port, OURS, THEIRS, 0) == 0
                process.send_signal(signal.SIGKILL)
                process.wait(SOON)
                wait_until(lambda: not prefill.is_connected(HOST, port))
                assert prefill.write_cache(HOST, port, OURS, THEIRS, 0) == -1


def test_threads_that_write_to_a_node_that_is_killed_get_codes() -> None:
    """The original destroys the QP under threads that use it."""
    port = free_port()
    with (
        program(DECODE, port) as process,
        communicator("prefill", "0", memory(1)) as prefill,
    ):
        assert prefill.connect(HOST, port) == 0
        writing = threading.Barrier(9)

        def work(i: int) -> int:
            writing.wait(SOON)
            while prefill.write_cache(HOST, port, OURS, THEIRS, i % N_LAYERS) == 0:
                continue
            return prefill.write_cache(HOST, port, OURS, THEIRS, 0)

        with ThreadPoolExecutor(8) as pool:
            results = [pool.submit(work, i) for i in range(8)]
            writing.wait(SOON)
            process.kill()
            assert [result.result(SOON) for result in results] == [-1] * 8
        assert not prefill.is_connected(HOST, port)


def test_connections_do_not_grow_with_blocks() -> None:
    """The original makes a region for each block with each connection, flush or not."""
    counts = []
    for n_blocks in (8, 4096):
        held = memory(1, n_blocks=n_blocks), memory(2, n_blocks=n_blocks)
        with nodes(*held) as pair:
            pair.check_write([1], [2])
            counts.append(live_objects()["MemoryRegion"])
    assert counts[0] == counts[1]


def reconnect(pair: Nodes, times: int) -> None:
    """Connect, write, break: by an error here, there, a refusal, or in peace."""
    plans = (
        (initiator_faults, "nth=1,act=status:LOC_PROT_ERR"),
        (target_faults, "nth=1,act=status:REM_ACCESS_ERR"),
        (initiator_faults, "nth=1,act=qp_fatal"),
    )
    for i in range(times):
        set_plan, plan = plans[i % len(plans)]
        set_plan(pair, plan)
        assert pair.write([1, 2], [3, 4]) == -1
        set_plan(pair, "")
        assert pair.prefill.connect(HOST, pair.port) == 0
        assert pair.write([1, 2], [3, 4]) == 0
        if i % 10 == 0:
            # A new one each time: one that is refused again and again has to wait
            # longer each time.
            with communicator("prefill", "0", memory(3, block_bytes=8)) as misfit:
                assert misfit.connect(HOST, pair.port) == 2


def held() -> dict[str, int]:
    """Count what the process has: one connection is as good as another."""
    census = take_census()
    counts = {"fds": len(census.fds), "threads": len(census.threads)}
    return {**counts, **live_objects()}


@pytest.mark.parametrize("times", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_reconnects_leave_nothing(times: int, caplog: pytest.LogCaptureFixture) -> None:
    """The original loses QP, CQ and socket with each failed connect, and regions on
    the decode node with each that does not fail."""
    caplog.set_level(100, "kvxfer")
    with nodes() as pair:
        reconnect(pair, 6)  # whatever is made once
        before = held()
        reconnect(pair, times)
        # The last of the broken ones may be closing still, now as before: more of
        # anything is what a leak is.
        deadline = time.monotonic() + SOON
        while any(n > before.get(what, 0) for what, n in held().items()):
            assert time.monotonic() < deadline, (before, held())


IDLE = """
    import sys, time
    from tests.communicators import nodes
    with nodes() as pair:
        pair.check_write([1, 2], [3, 4])
        used, began = time.process_time(), time.monotonic()
        print("idle", flush=True)
        sys.stdin.readline()
        print((time.process_time() - used) / (time.monotonic() - began), flush=True)
        pair.check_write([5], [6])
"""
# Signs of life go both ways, and each wakes a thread at either end.
WAKES = 40


def wakes(pid: int) -> int:
    """Count how often the threads of a process have gone to sleep so far."""
    return sum(
        int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", text, re.M)[0])
        for text in (p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/status"))
    )


async def test_idle_nodes_take_no_processor_time() -> None:
    """The original's prefill thread spins from its first connection on."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(IDLE)), stdin=PIPE, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), SOON) == b"idle\n"
        before = wakes(process.pid)
        await until(lambda: wakes(process.pid) >= before + WAKES, every=0.1)
        output, _ = await asyncio.wait_for(process.communicate(b"\n"), SOON)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    assert float(output) < 0.02


def test_a_wrong_nic_name_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original divides by the number of NICs found, which is zero."""
    monkeypatch.setenv("KVCACHE_RDMA_NICS", "mlx5_77,mlx5_78")
    for role in ("prefill", "decode"):
        held = memory(1).arguments()
        with pytest.raises(RuntimeError, match="no device 'mlx5_78'"):
            RDMACommunicator(role, 3, free_port(), **held)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(host: str) -> None:
    """The original's listener is one of IPv4, its keys are of one colon."""
    with nodes(host=host) as pair:
        pair.check_write(OURS, THEIRS)
        assert pair.prefill.is_connected("::1", pair.port)
        assert pair.prefill.connect(HOST, pair.port) == 0
        assert pair.prefill.write_cache(HOST, pair.port, [1], [2], 0) == 0


def test_unequal_parallelism_with_a_latent() -> None:
    """The original slices what every rank holds whole: a wrong address."""
    source, target = memory(1, ("k",)), memory(2, ("k",))
    with nodes(
        source, target, dst_tp_size=1, prefill_tp_size=4, prefill_tp_idx=3
    ) as pair:
        pair.check_write(OURS, THEIRS, 2)
        assert len(target.planes["k"][0][0]) == BLOCK_BYTES
