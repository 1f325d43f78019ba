"""Many writes at once: narrow queues, little credit, many peers, several loops."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvxfer import Client, Server
from kvxfer import inbox as inbox_module
from kvxfer.errors import UsageError
from tests.endpoints import (
    QUICK,
    SOON,
    arena,
    connected,
    dial,
    expected,
    scattered,
    take,
    until,
)
from tests.patience import fewer


@pytest.fixture(params=["tcp", "cma", "shm"], autouse=True)
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel in this run of the test."""
    monkeypatch.setenv("KVXFER_SOFT_WIRE", request.param)
    return str(request.param)


# -- narrow queues ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sq_depth": 16, "chain": 1, "notify_ring_bytes": 4096, "notify_receives": 1},
        {"sq_depth": 16, "chain": 64, "notify_ring_bytes": 4096, "notify_receives": 2},
        {"sq_depth": 64, "chain": 7, "notify_ring_bytes": 5000, "notify_receives": 5},
        {"sq_depth": 32768, "chain": 64, "max_sge": 16, "notify_receives": 4096},
    ],
)
async def test_narrow_queues(options: dict[str, Any]) -> None:
    async with connected(**options) as pair:
        receiving = asyncio.ensure_future(take(pair.server, 60 * 3))
        for i in range(20):
            await pair.check_write(scattered(32, 32, i), scattered(32, 32, i + 1))
        ids = scattered(32, 32, 50)
        before = pair.target.memory.copy()
        await asyncio.gather(
            *(pair.client.write_cache(pair.peer, ids, ids) for _ in range(40))
        )
        wanted = expected(pair.source, pair.target, before, ids, ids)
        assert (pair.target.memory == wanted).all()
        assert len(await receiving) == 60 * 3


async def test_records_of_every_size_pass_a_small_ring() -> None:
    """The gap at the ring's end and the credit on its way must never add up."""
    rng = random.Random(5)
    planes = {"k": 8}
    async with connected(
        arena(planes=planes, layers=1, n_blocks=600, seed=1),
        arena(planes=planes, layers=1, n_blocks=600, seed=2),
        notify_ring_bytes=4096,
        write_timeout=5.0,
    ) as pair:
        # 240 ids are the most: a record of a quarter of the ring.
        sizes = [rng.choice([1, 17, 240, rng.randrange(1, 240)]) for _ in range(300)]
        for n in sizes:
            await pair.client.write_cache(pair.peer, range(n), range(n))
        arrivals = await take(pair.server, len(sizes))
        assert [len(a.block_ids) for a in arrivals] == sizes
        with pytest.raises(UsageError, match="split the list"):
            await pair.client.write_cache(pair.peer, range(241), range(241))


async def test_an_absent_consumer_holds_writers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only when the server keeps all it may keep; then all flows again."""
    monkeypatch.setattr(inbox_module, "_MAX_WAITING", 10)
    async with connected(
        arena(layers=1, seed=1), arena(layers=1, seed=2), notify_receives=8
    ) as pair:
        writes = [
            asyncio.ensure_future(
                pair.client.write_cache(pair.peer, [i], [i], request_id=str(i))
            )
            for i in range(32)
        ]
        done, _ = await asyncio.wait(
            writes, timeout=SOON, return_when=asyncio.FIRST_COMPLETED
        )
        assert done and pair.peer.connected
        for i in range(32):
            (arrival,) = await take(pair.server, 1)
            assert arrival.request_id == str(i)
            # Slowly: what this one made room for comes before the next is taken.
            for _ in range(50):
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*writes), SOON)
        assert pair.peer.connected


# -- many at once -------------------------------------------------------------------


async def test_a_hundred_writers() -> None:
    async with connected(
        arena(n_blocks=400, seed=1), arena(n_blocks=500, seed=2), sq_depth=128
    ) as pair:
        ours, theirs = scattered(400, 400, 1), scattered(500, 400, 2)
        wanted = expected(pair.source, pair.target, pair.target.memory, ours, theirs)

        async def write(i: int) -> None:
            for layer in (2, 0, 1):
                part = slice(4 * i, 4 * i + 4)
                await pair.client.write_cache(
                    pair.peer, ours[part], theirs[part], layer, request_id=f"r{i}"
                )

        await asyncio.gather(*map(write, range(100)))
        assert (pair.target.memory == wanted).all()
        arrivals = await take(pair.server, 300)
        for i in range(100):
            mine = [a for a in arrivals if a.request_id == f"r{i}"]
            assert [a.layer for a in mine] == [2, 0, 1]
            for arrival in mine:
                assert arrival.block_ids.tolist() == theirs[4 * i : 4 * i + 4]
                assert arrival.bytes == 4 * 2 * 256


async def test_several_clients_write_to_one_server() -> None:
    sources = [arena(seed=i) for i in range(5)]
    async with (
        connected(target=arena(seed=9, n_blocks=200)) as pair,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [
            await stack.enter_async_context(Client(s.cache, **QUICK)) for s in sources
        ]
        peers = await asyncio.gather(*(dial(c, pair.server) for c in clients))
        places = [range(40 * i, 40 * i + 32) for i in range(5)]
        wanted = pair.target.memory
        for source, ids in zip(sources, places, strict=True):
            wanted = expected(source, pair.target, wanted, range(32), ids)
        await asyncio.gather(
            *(
                client.write_cache(peer, range(32), ids, request_id=str(ids.start))
                for client, peer, ids in zip(clients, peers, places, strict=True)
            )
        )
        assert (pair.target.memory == wanted).all()
        assert len(pair.server.peers) == 6
        by_request: dict[str | None, list[int]] = {}
        for arrival in await take(pair.server, 15):
            by_request.setdefault(arrival.request_id, []).append(arrival.layer)
        assert by_request == {str(40 * i): [0, 1, 2] for i in range(5)}


async def test_one_client_writes_to_several_servers() -> None:
    targets = [arena(seed=i + 5, n_blocks=40 + i) for i in range(4)]
    with arena(seed=1) as source:
        async with contextlib.AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(Server(t.cache, port=0, **QUICK))
                for t in targets
            ]
            client = await stack.enter_async_context(Client(source.cache, **QUICK))
            peers = await asyncio.gather(*(dial(client, s) for s in servers))
            ids = [scattered(40, 32, i) for i in range(4)]
            wanted = [
                expected(source, t, t.memory, range(32), ids[i])
                for i, t in enumerate(targets)
            ]
            await asyncio.gather(
                *(
                    client.write_cache(peer, range(32), ids[i])
                    for i, peer in enumerate(peers)
                )
            )
            for target, memory in zip(targets, wanted, strict=True):
                assert (target.memory == memory).all()
            # One that goes away takes nobody along.
            await servers[0].close()
            await client.write_cache(peers[3], [1], [2])
            assert client.is_connected("127.0.0.1", servers[3].port)


async def test_connecting_twice_is_one_connection() -> None:
    async with connected() as pair:
        peers = await asyncio.gather(
            *(dial(pair.client, pair.server) for _ in range(5))
        )
        assert {id(peer) for peer in peers} == {id(pair.peer)}
        assert len(pair.server.peers) == 1


# -- other loops --------------------------------------------------------------------

# libuv opens a pipe for the process with its first loop, and keeps it.
with contextlib.suppress(ImportError):
    import uvloop

    uvloop.new_event_loop().close()

Main = Callable[[], Coroutine[Any, Any, None]]


def _run_default(main: Main) -> None:
    asyncio.run(main())


def _run_uvloop(main: Main) -> None:
    pytest.importorskip("uvloop")
    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


@pytest.mark.parametrize("run", [_run_default, _run_uvloop])
def test_client_and_server_in_loops_of_their_own(run: Callable[[Main], None]) -> None:
    source, target = arena(seed=1), arena(seed=2)
    wanted = expected(source, target, target.memory, range(32), range(31, -1, -1))
    endpoint: list[Server] = []
    ready, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    async def serve() -> None:
        async with Server(target.cache, port=0, **QUICK) as server:
            endpoint.append(server)
            ready.set()
            arrivals = await take(server, 30)
            assert [a.layer for a in arrivals] == [0, 1, 2] * 10
            done.set()

    async def write() -> None:
        async with Client(source.cache, **QUICK) as client:
            peer = await dial(client, endpoint[0])
            for _ in range(10):
                await client.write_cache(peer, range(32), range(31, -1, -1))

    def thread() -> None:
        try:
            run(serve)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)
            ready.set()

    server_thread = threading.Thread(target=thread)
    server_thread.start()
    try:
        assert ready.wait(SOON) and not failures
        run(write)
        assert done.wait(SOON)
    finally:
        server_thread.join(SOON)
    assert not failures
    assert (target.memory == wanted).all()
    source.cache.close()
    target.cache.close()


def test_what_has_landed_is_told_though_its_writer_is_gone(wire: str) -> None:
    """A server that is busy elsewhere finds records and the goodbye at once."""
    n_records = fewer(5000)
    source, target = arena(seed=1, layers=1), arena(seed=2, layers=1)
    # The server stands still for as long as the writes take: not a sign of death.
    options = {
        **QUICK,
        "notify_receives": 8192,
        "fence_timeout": 0.1,
        "ping_timeout": SOON,
        "loop_timeout": 3 * SOON,
    }
    servers: list[Server] = []
    found: list[str | None] = []
    ready, connected_, busy = threading.Event(), threading.Event(), threading.Event()

    async def serve() -> None:
        async with Server(target.cache, port=0, **options) as server:
            servers.append(server)
            ready.set()
            await until(lambda: server.peers)
            await asyncio.to_thread(connected_.wait, SOON)
            assert busy.wait(SOON)  # the loop stands still
            found.extend([a.request_id for a in await take(server, n_records)])

    async def write() -> None:
        client = Client(source.cache, **options)
        await client.open()
        try:
            peer = await dial(client, servers[0])
            connected_.set()
            for i in range(n_records):
                await client.write_cache(peer, [1], [2], request_id=str(i))
            if wire == "tcp":  # without a goodbye of the QP, too
                await peer.link.fail()
        finally:
            await client.close()
            busy.set()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    try:
        assert ready.wait(SOON)
        asyncio.run(write())
    finally:
        busy.set()
        thread.join(SOON)
    assert found == [str(i) for i in range(n_records)]
    source.cache.close()
    target.cache.close()
