"""The blocking face: threads that write, an exit, a fork, and nothing left."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from kvxfer.blocking import Arrival, Client, Peer, Server
from kvxfer.errors import (
    BrokenPeerError,
    ClosedResourceError,
    ConnectTimeoutError,
    LayoutError,
    UsageError,
    WriteTimeoutError,
)
from kvxfer.testing import set_faults
from tests.endpoints import QUICK, SOON, Arena, arena, expected, scattered

# Many WRs and few slots: past its deadline a write has something left to post.
SHALLOW: dict[str, Any] = {"sq_depth": 16, "max_sge": 1}
OURS, THEIRS = scattered(32, 24, 1), scattered(32, 24, 2)


@dataclass(eq=False)
class Pair:
    """A client connected to a server, both blocking."""

    source: Arena
    target: Arena
    server: Server
    client: Client
    peer: Peer


@contextmanager
def connected(**options: Any) -> Iterator[Pair]:
    options = {**QUICK, **options}
    with arena(seed=1) as source, arena(seed=2) as target:
        server = Server(target.cache, port=0, **options)
        with server, Client(source.cache, **options) as client:
            peer = client.connect("127.0.0.1", server.port)
            yield Pair(source, target, server, client, peer)


def run_program(text: str, *, returncode: int = 0) -> str:
    """Run a program; what it prints, and nothing on stderr."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(text)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=SOON)
        finally:
            process.kill()
    assert (process.returncode, err) == (returncode, "")
    return out


def test_a_write_lands_and_is_told() -> None:
    with connected() as pair:
        before = pair.target.memory.copy()
        result = pair.client.write_cache(
            pair.peer, OURS, THEIRS, layer_idx=1, request_id="r"
        )
        wanted = expected(pair.source, pair.target, before, OURS, THEIRS, [1])
        assert (pair.target.memory == wanted).all()
        assert result.layers == (1,) and result.bytes == 24 * 512
        (arrival,) = pair.server.arrivals(timeout=1.0)
        assert (arrival.request_id, arrival.layer) == ("r", 1)
        assert arrival.block_ids.tolist() == THEIRS
        assert list(pair.server.arrivals(timeout=0)) == []


def test_what_peers_and_servers_say_of_themselves() -> None:
    with connected() as pair:
        pair.client.write_cache(pair.peer, [1], [2], 0)
        assert pair.peer.connected and pair.peer.device == "soft0"
        assert pair.peer.wire in ("shm", "cma", "tcp")
        assert pair.peer.layers() == [0, 1, 2] and pair.peer.n_blocks() == 32
        assert pair.server.endpoint == f"127.0.0.1:{pair.server.port}"
        assert pair.server.devices == ["soft0"] and len(pair.server.peers) == 1
        assert pair.client.is_connected("127.0.0.1", pair.server.port)
        again = pair.client.connect("127.0.0.1", pair.server.port)
        assert again == pair.peer and hash(again) == hash(pair.peer)


def test_32_threads_write_to_one_peer() -> None:
    """Each its own block, again and again; the threads connect for themselves."""
    with arena(n_blocks=64, seed=1) as source, arena(n_blocks=64, seed=2) as target:
        before = target.memory.copy()
        server = Server(target.cache, port=0, on_arrival=lambda _: None, **QUICK)
        with server, Client(source.cache, **QUICK) as client:

            def work(i: int) -> None:
                peer = client.connect("127.0.0.1", server.port)
                for layer in range(3):
                    client.write_cache(peer, [i, 63 - i], [63 - i, i], layer)

            with ThreadPoolExecutor(32) as pool:
                list(pool.map(work, range(32)))
            assert len(server.peers) == 1
        ids = [*range(32), *range(63, 31, -1)]
        back = [63 - i for i in ids]
        wanted = expected(source, target, before, ids, back)
        assert (target.memory == wanted).all()


def test_other_threads_run_while_one_waits() -> None:
    """The GIL is free: Python runs while a write is held up in the device."""
    with connected() as pair:
        set_faults(pair.client._endpoint, "act=delay,us=200000,times=1")
        steps = 0
        with ThreadPoolExecutor(1) as pool:
            write = pool.submit(pair.client.write_cache, pair.peer, [1], [2], 0)
            while not write.done():
                steps += 1
            write.result()
        assert steps > 1000


def test_wrong_use_raises_what_the_asynchronous_face_raises() -> None:
    with connected() as pair:
        with pytest.raises(LayoutError, match="not in"):
            pair.client.write_cache(pair.peer, [99], [1], 0)
        with pytest.raises(UsageError, match="not what connect"):
            pair.client.write_cache("peer", [1], [1], 0)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="opened once"):
            pair.client.open()
        pair.client.write_cache(pair.peer, [1], [1], 0)


def test_a_connect_that_nobody_answers() -> None:
    with arena() as source, Client(source.cache, **QUICK) as client:
        with pytest.raises(ConnectTimeoutError):
            client.connect("127.0.0.1", 1, timeout=0.1)
        assert not client.is_connected("127.0.0.1", 1)


def test_a_timeout_leaves_the_connection_usable() -> None:
    with connected(**SHALLOW) as pair:
        set_faults(pair.client._endpoint, "act=delay,us=300000,times=1")
        with pytest.raises(WriteTimeoutError):
            pair.client.write_cache(pair.peer, OURS, THEIRS, timeout=0.01)
        pair.client.write_cache(pair.peer, [1], [2])


def test_a_peer_that_is_closed_is_connected_again() -> None:
    with connected() as pair:
        pair.peer.close()
        pair.peer.close()
        assert not pair.client.is_connected("127.0.0.1", pair.server.port)
        with pytest.raises(ClosedResourceError):
            pair.client.write_cache(pair.peer, [1], [2])
        peer = pair.client.connect("127.0.0.1", pair.server.port)
        pair.client.write_cache(peer, [1], [2])


def wait_in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Call in a thread of its own; the list has what came of it."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(call())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


def test_close_ends_what_other_threads_wait_for() -> None:
    with connected() as pair:
        set_faults(pair.client._endpoint, "act=delay,us=60000000")
        started = threading.Event()

        def write() -> Any:
            started.set()
            return pair.client.write_cache(pair.peer, [1], [2])

        writer, written = wait_in_thread(write)
        reader, read = wait_in_thread(lambda: list(pair.server.arrivals()))
        started.wait(SOON)
        pair.client.close()
        pair.client.close()
        pair.server.close()
        writer.join(SOON)
        reader.join(SOON)
        assert isinstance(written[0], BrokenPeerError | ClosedResourceError)
        assert read == [[]]
        with pytest.raises(ClosedResourceError, match="the client is closed"):
            pair.client.connect("127.0.0.1", 1)


def test_what_was_never_opened_can_be_closed() -> None:
    with arena() as source:
        client = Client(source.cache)
        with pytest.raises(ClosedResourceError, match="the client is new"):
            client.connect("127.0.0.1", 1)
        client.close()
        with pytest.raises(UsageError, match="opened once"):
            client.open()


def test_an_open_that_fails_leaves_nothing() -> None:
    with arena() as target, Server(target.cache, port=0) as server:
        with pytest.raises(OSError, match="in use"):
            Server(target.cache, port=server.port).open()
        assert target.cache.in_use == 1
    assert target.cache.in_use == 0


def test_one_thread_serves_all_and_ends_with_the_last() -> None:
    def loops() -> int:
        return sum(t.name == "kvxfer-loop" for t in threading.enumerate())

    assert loops() == 0
    with connected():
        with connected():
            assert loops() == 1
        assert loops() == 1
    assert loops() == 0


def test_on_arrival_is_told_and_must_not_wait() -> None:
    told: list[Arrival | Exception] = []
    enough = threading.Event()

    with arena(seed=1) as source, arena(seed=2) as target:
        client = Client(source.cache, **QUICK)

        def on_arrival(arrival: Arrival) -> None:
            told.append(arrival)
            try:
                client.connect("127.0.0.1", 1)
            except UsageError as error:
                told.append(error)
            if len(told) == 4:
                enough.set()
            raise RuntimeError("an engine's mistake")

        server = Server(target.cache, port=0, on_arrival=on_arrival, **QUICK)
        with server, client:
            peer = client.connect("127.0.0.1", server.port)
            client.write_cache(peer, [1], [2], [0, 2])
            assert enough.wait(SOON)
    assert isinstance(told[0], Arrival) and isinstance(told[1], UsageError)
    assert isinstance(told[2], Arrival) and told[2].layer == 2


def test_failures_are_told() -> None:
    with connected(**SHALLOW) as pair:
        set_faults(pair.client._endpoint, "act=delay,us=300000,times=1")
        with pytest.raises(WriteTimeoutError):
            pair.client.write_cache(
                pair.peer, OURS, THEIRS, request_id="r", timeout=0.01
            )
        (failure,) = pair.server.failures(timeout=1.0)
        assert failure.request_id == "r"


def test_what_nobody_refers_to_is_closed() -> None:
    with arena() as source:
        client = Client(source.cache)
        client.open()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del client
            gc.collect()
        assert [w.category for w in caught] == [ResourceWarning]
        while source.cache.in_use:
            gc.collect()


def test_ctrl_c_ends_a_write_and_leaves_the_blocks_free() -> None:
    """The signal's exception comes once the device is done with the blocks."""

    class Interrupt(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with connected() as pair:
            set_faults(pair.client._endpoint, "act=delay,us=300000,times=1")
            main = threading.main_thread().ident
            assert main is not None

            def strike() -> None:
                while not pair.client._endpoint._host.adapters[0].engine.in_flight:
                    pass
                signal.pthread_kill(main, signal.SIGUSR1)

            striker, _ = wait_in_thread(strike)
            with pytest.raises(Interrupt):
                pair.client.write_cache(pair.peer, [1], [2])
            assert pair.client._endpoint._host.adapters[0].engine.in_flight == 0
            striker.join(SOON)
            pair.client.write_cache(pair.peer, [1], [2])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_interpreter_may_exit_with_everything_open() -> None:
    """Threads wait, nobody has closed anything, and nothing is said on stderr."""
    out = run_program("""
        import threading
        from kvxfer.blocking import Client, Server
        from tests.endpoints import QUICK, arena
        source, target = arena(seed=1), arena(seed=2)
        server = Server(target.cache, port=0, **QUICK)
        server.open()
        client = Client(source.cache, **QUICK)
        client.open()
        peer = client.connect("127.0.0.1", server.port)
        client.write_cache(peer, [1], [2])
        def follow():
            for arrival in server.arrivals():
                if arrival.layer == 2:
                    print("followed", flush=True)
                    done.set()
            print("ended", flush=True)
        done = threading.Event()
        threading.Thread(target=follow).start()
        done.wait()
    """)
    assert out.split() == ["followed", "ended"]


def test_a_forked_child_makes_its_own() -> None:
    """And it may exit without touching what its parent goes on with."""
    out = run_program("""
        import os
        from kvxfer.blocking import Client, Server
        from kvxfer.errors import ClosedResourceError
        from tests.endpoints import QUICK, arena
        source, target = arena(seed=1), arena(seed=2)
        with Server(target.cache, port=0, **QUICK) as server:
            with Client(source.cache, **QUICK) as client:
                peer = client.connect("127.0.0.1", server.port)
                pid = os.fork()
                if pid == 0:
                    for call in (
                        lambda: client.write_cache(peer, [1], [2]),
                        lambda: client.connect("127.0.0.1", server.port),
                        client.close,
                    ):
                        try:
                            call()
                        except ClosedResourceError as error:
                            assert "forked child" in str(error), error
                        else:
                            raise SystemExit(1)
                    with arena(seed=3) as own, Client(own.cache, **QUICK) as fresh:
                        there = fresh.connect("127.0.0.1", server.port)
                        fresh.write_cache(there, [3], [4])
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
                client.write_cache(peer, [5], [6])
                print("both")
    """)
    assert out == "both\n"


async def test_it_may_be_used_beside_a_loop() -> None:
    """From a worker thread of an asyncio program, as from any other thread."""

    def work() -> int:
        with connected() as pair:
            return pair.client.write_cache(pair.peer, [1], [2]).bytes

    assert await asyncio.to_thread(work) == 3 * 512
