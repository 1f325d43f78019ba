"""Loops that are closed and interpreters that exit while writes are in flight."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading

import pytest

from tests.endpoints import SOON, connected


def run(program: str, *arguments: str) -> tuple[str, str]:
    """Run a program that ends by itself and well; what it says on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


LOOP_CLOSED = """
    import asyncio, gc, sys
    from kvxfer import Client, Server
    from kvxfer.testing import set_faults
    from tests.endpoints import QUICK, arena, dial

    async def begin():
        source, target = arena(seed=1), arena(seed=2)
        server = Server(target.cache, port=0, **QUICK)
        client = Client(source.cache, progress=sys.argv[1], **QUICK)
        await server.open()
        await client.open()
        peer = await dial(client, server)
        await client.write_cache(peer, [1], [2])
        set_faults(client, "act=delay,us=300000")
        task = asyncio.ensure_future(client.write_cache(peer, [1], [2]))
        while not client._host.adapters[0].engine.in_flight:
            await asyncio.sleep(0)
        return source, target, server, client, peer, task

    loop = asyncio.new_event_loop()
    kept = loop.run_until_complete(begin())
    loop.close()
    if sys.argv[2] == "dropped":
        del kept
        gc.collect()
    print(sys.argv[2])
"""


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="asyncio of Python 3.10 complains of pending tasks by printing what their "
    "callbacks are called with, and theirs: with pyzmq's futures that takes minutes",
)
@pytest.mark.parametrize(
    ("progress", "what"), [("event", "kept"), ("event", "dropped"), ("spin", "dropped")]
)
def test_a_loop_that_is_closed_under_a_write(progress: str, what: str) -> None:
    """asyncio complains of the tasks; nothing crashes, and nobody waits for ever."""
    out, _ = run(LOOP_CLOSED, progress, what)
    assert out == f"{what}\n"


EXIT = """
    import sys, threading
    from kvxfer.blocking import Client, Server
    from kvxfer.errors import KVXferError
    from kvxfer.testing import set_faults
    from tests.endpoints import QUICK, arena

    source, target = arena(seed=1), arena(seed=2)
    server = Server(target.cache, port=0, **QUICK)
    server.open()
    client = Client(source.cache, progress=sys.argv[1], **QUICK)
    client.open()
    peer = client.connect("127.0.0.1", server.port)
    client.write_cache(peer, [1], [2])
    set_faults(client._endpoint, "act=delay,us=300000")

    def write():
        try:
            client.write_cache(peer, [1], [2])
        except KVXferError:
            pass
        print("over", flush=True)

    for _ in range(3):
        threading.Thread(target=write, daemon=sys.argv[2] == "daemons").start()
    while client._endpoint._host.adapters[0].engine.in_flight < 3 * 3:
        pass
"""


@pytest.mark.parametrize(
    ("progress", "kind"),
    [("event", "threads"), ("event", "daemons"), ("adaptive", "daemons")],
)
def test_an_exit_with_writes_in_flight(progress: str, kind: str) -> None:
    """They end, well or with an exception of ours, and then the interpreter does."""
    out, err = run(EXIT, progress, kind)
    assert "Traceback" not in err
    if kind == "threads":
        assert out.count("over") == 3


def test_two_loops_at_once() -> None:
    """Each with a server and a client, in a thread of its own."""
    failures: list[BaseException] = []
    both = threading.Barrier(2, timeout=SOON)

    async def write() -> None:
        async with connected() as pair:
            both.wait()
            for i in range(20):
                await pair.check_write([i, 2], [3, i + 5])

    def body() -> None:
        try:
            asyncio.run(asyncio.wait_for(write(), SOON))
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=body) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
