"""Endpoints in processes of their own, to be killed, stopped and forked.

A :class:`Nursery` is one process that has imported everything and forks a child for
each :meth:`Nursery.start`: much faster than starting Python. What happens in the
child is a coroutine of this module; it reports events, one JSON object a line, and
ends when the test lets go of it. A child may be told to halt at one step of the
handshake, to be killed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

from kvxfer import Client, Peer, Server, wire
from kvxfer.control_io import in_thread
from kvxfer.control_link import Link
from kvxfer.errors import KVXferError
from tests.endpoints import QUICK, SOON, arena, until
from tests.seccomp import deny

ROOT = Path(__file__).parent.parent


async def freeze(pid: int) -> None:
    """Stop a process; when this returns none of its threads runs any more."""

    def is_stopped() -> bool:
        stats = Path(f"/proc/{pid}/task").glob("*/stat")
        # The thread's name, in parentheses, may hold anything.
        states = [stat.read_text().rpartition(")")[2].split()[0] for stat in stats]
        return set(states) == {"T"}

    os.kill(pid, signal.SIGSTOP)
    await until(is_stopped)


class Child:
    """A running child, as the test sees it."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._socket = connection
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def event(self, seconds: float = SOON) -> dict[str, Any]:
        """Wait for the next event; empty when the child has ended."""
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(
                sock=self._socket
            )
        line = await asyncio.wait_for(self._reader.readline(), seconds)
        found: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        return found

    async def ended(self, seconds: float = SOON) -> None:
        """Wait until the child has ended."""
        while await self.event(seconds):
            continue

    def signal(self, number: int) -> None:
        """Send a signal to the child."""
        os.kill(self.pid, number)

    async def stop(self) -> None:
        """Freeze the child; when this returns none of its threads runs any more."""
        await freeze(self.pid)

    async def close(self) -> None:
        """Kill the child if it lives still."""
        for number in (signal.SIGKILL, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                self.signal(number)
        if self._writer is None:
            self._socket.close()
            return
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class Nursery:
    """The process that children are forked from."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.children", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )

    @contextlib.asynccontextmanager
    async def start(self, role: str, **arguments: Any) -> AsyncIterator[Child]:
        """Run the coroutine function ``role`` of this module in a child.

        Args:
          **arguments: Its arguments; ``environ`` is added to the environment,
            ``nofile`` is how many descriptors it may have, and ``deny`` names system
            calls and the errno that each fails with. At the step ``halt`` of the
            handshake (``received Hello``, ``sending Offer``, ``sent Offer``) it
            reports ``halted`` and stands still.
        """
        ours, theirs = socket.socketpair()
        request = json.dumps({"role": role, **arguments}).encode()
        with theirs:
            socket.send_fds(self._socket, [request], [theirs.fileno()])
            pid = int(await in_thread(self._socket.recv, 64))
        child = Child(pid, ours)
        try:
            yield child
        finally:
            await child.close()

    def close(self) -> None:
        """End the process; its children are the tests' to end."""
        self._socket.close()
        self._process.wait(SOON)


# -- in the children ----------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """The test, as the child sees it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def say(self, **event: Any) -> None:
        """Report an event; a test that does not listen holds nothing up."""
        self.writer.write(json.dumps(event).encode() + b"\n")

    async def lets_go(self) -> None:
        """Wait until the test closes its end."""
        await self.reader.read(1)

    async def is_told(self) -> None:
        """Wait until the test has, or need not have, all events."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def serve(test: Report, path: str, shape: dict[str, Any], **options: Any) -> None:
    """Be a server on the memory in ``path``; report its port, then arrivals."""
    with arena(path=Path(path), **shape) as target:
        async with Server(target.cache, **{**QUICK, "port": 0, **options}) as server:
            test.say(port=server.port)
            async for arrival in server.arrivals():
                test.say(layer=arrival.layer, request_id=arrival.request_id)


async def hoard(test: Report, port: int, shape: dict[str, Any], **options: Any) -> None:
    """Be a client that connects and writes until it cannot connect any more.

    Reports how many peers it had then and why there are no more; that all of them
    can be written to; and, with half of them closed, that it can connect again.
    """
    peers: list[Peer] = []
    async with contextlib.AsyncExitStack() as stack:
        source = stack.enter_context(arena(**shape))

        async def one_more(timeout: float | None = None) -> None:
            peer = await client.connect("127.0.0.1", port, timeout=timeout)
            peers.append(peer)
            await client.write_cache(peer, [0], [0])

        try:
            client = Client(source.cache, **{**QUICK, **options})
            await stack.enter_async_context(client)
            while True:
                await one_more()
                # A client keeps one connection to an address; here it has many.
                name = f"127.0.0.1:{port}"
                client._peers[str(len(peers))] = client._peers.pop(name)
        except KVXferError as error:
            test.say(n=len(peers), error=type(error).__name__, text=str(error))
        for peer in peers:
            await client.write_cache(peer, [0], [0])
        test.say(event="written")
        half = len(peers) // 2
        for peer in peers[half:]:
            await peer.close()
        # Whoever was turned away waits before it tries again.
        await one_more(SOON)
        test.say(event="again")


async def write(
    test: Report,
    port: int,
    shape: dict[str, Any],
    n_tasks: int = 1,
    fork: bool = False,
    **options: Any,
) -> None:
    """Be a client that writes all blocks, again and again, until something breaks.

    Reports once connected and when it writes; with ``fork`` the pid of a child of
    its own, which does nothing.
    """
    with arena(**shape) as source:
        async with Client(source.cache, **{**QUICK, **options}) as client:
            peer = await client.connect("127.0.0.1", port)
            if fork and (pid := os.fork()) == 0:
                signal.pause()
                os._exit(0)
            test.say(event="connected", fork=pid if fork else None)
            ids = range(shape["n_blocks"])
            await client.write_cache(peer, ids, ids)
            test.say(event="writing")

            async def again() -> None:
                while True:
                    await client.write_cache(peer, ids, ids)

            try:
                await asyncio.gather(*(again() for _ in range(n_tasks)))
            except KVXferError as error:
                test.say(event="broken", error=type(error).__name__)


async def write_once(
    test: Report,
    port: int,
    shape: dict[str, Any],
    local_ids: list[int],
    remote_ids: list[int],
    **options: Any,
) -> None:
    """Be a client that writes some blocks; report how they went, or the error."""
    with arena(**shape) as source:
        try:
            async with Client(source.cache, **{**QUICK, **options}) as client:
                peer = await client.connect("127.0.0.1", port)
                result = await client.write_cache(peer, local_ids, remote_ids)
                test.say(device=result.device, wire=result.wire)
        except KVXferError as error:
            test.say(error=type(error).__name__, text=str(error))


async def reconnect(
    test: Report,
    port: int,
    shape: dict[str, Any],
    n_clients: int,
    times: int,
    **options: Any,
) -> None:
    """Be many clients, each of which connects many times, and writes now and then.

    Reports when they have begun, when one is half through, and at the end the longest
    time that a connect has taken.
    """
    loop = asyncio.get_running_loop()
    with arena(**shape) as source:

        async def one(index: int) -> float:
            worst = 0.0
            async with Client(source.cache, **{**QUICK, **options}) as client:
                for i in range(times):
                    began = loop.time()
                    peer = await client.connect("127.0.0.1", port)
                    worst = max(worst, loop.time() - began)
                    if i % 10 == 0:
                        await client.write_cache(peer, [index], [index], 0)
                    await peer.close()
                    if index == 0 and i in (0, times // 2):
                        test.say(event="half" if i else "begun")
            return worst

        worst = await asyncio.gather(*(one(i) for i in range(n_clients)))
        test.say(worst=max(worst), connects=n_clients * times)


async def prefill(
    test: Report,
    shape: dict[str, Any],
    request_ids: list[str],
    n_blocks: int,
    finish: bool = True,
    **options: Any,
) -> None:
    """Be a prefill side: stream the first blocks, layer by layer, for each request.

    Reports where it is invited, then how each request ended. Without ``finish`` the
    last layer never becomes ready.
    """
    with arena(**shape) as source:
        options = {**QUICK, "listen": "127.0.0.1:0", **options}
        async with Client(source.cache, **options) as client:
            test.say(listening=client.listening)
            layers = source.cache.group(None).layers
            requests = [client.open(name) for name in request_ids]
            for request in requests:
                for layer in layers if finish else layers[:-1]:
                    request.ready(layer, range(n_blocks), final=True)
                if finish:
                    request.finish(aux=request.request_id.encode())
            for request in requests:
                with contextlib.suppress(KVXferError):
                    await request.sent()
                error = request.error
                test.say(
                    request_id=request.request_id,
                    state=request.state.value,
                    error=type(error).__name__ if error is not None else None,
                )


def _halt_at(step: str, connection: socket.socket) -> None:
    """Stop this process's loop at a step; the threads of ZMQ and the device go on."""
    when, name = step.split()
    encode, decode, send = wire.encode, wire.decode, Link._send

    def halt() -> NoReturn:
        connection.send(json.dumps({"event": "halted"}).encode() + b"\n")
        while True:
            signal.pause()

    def encoding(message: wire.Message, **arguments: Any) -> bytes:
        if type(message).__name__ == name:
            halt()
        return encode(message, **arguments)

    def decoding(frame: bytes, **arguments: Any) -> wire.Message:
        message = decode(frame, **arguments)
        if type(message).__name__ == name:
            halt()
        return message

    def sending(link: Link, message: wire.Message) -> None:
        send(link, message)
        if type(message).__name__ == name:
            halt()

    place, function = {
        "sending": ((wire, "encode"), encoding),
        "sent": ((Link, "_send"), sending),
        "received": ((wire, "decode"), decoding),
    }[when]
    setattr(*place, function)


def _child(request: dict[str, Any], connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(request.pop("environ", {}))
    if nofile := request.pop("nofile", 0):
        resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
    for call, errno in request.pop("deny", {}).items():
        deny(call, errno)
    if halt := request.pop("halt", ""):
        _halt_at(halt, connection)
    planes = request["shape"]["planes"]  # JSON knows no tuples
    request["shape"]["planes"] = {name: tuple(size) for name, size in planes.items()}
    roles: dict[str, Callable[..., Coroutine[Any, Any, None]]]
    roles = {
        "hoard": hoard,
        "prefill": prefill,
        "reconnect": reconnect,
        "serve": serve,
        "write": write,
        "write_once": write_once,
    }
    role = roles[request.pop("role")]

    async def main() -> None:
        test = Report(*await asyncio.open_connection(sock=connection))
        work = asyncio.ensure_future(role(test, **request))
        gone = asyncio.ensure_future(test.lets_go())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception() is not None:
            traceback.print_exception(work.exception())
        if not gone.done():
            await test.is_told()
        os._exit(0)  # what the role has open goes with the process

    asyncio.run(main())


def _main(fd: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    nursery = socket.socket(fileno=fd)
    while True:
        request, fds, _, _ = socket.recv_fds(nursery, 1 << 16, 1)
        if not request:
            return
        connection = socket.socket(fileno=fds[0])
        pid = os.fork()
        if pid == 0:
            nursery.close()
            try:
                _child(json.loads(request), connection)
            finally:
                os._exit(1)
        connection.close()
        nursery.sendall(str(pid).encode())


if __name__ == "__main__":
    _main(int(sys.argv[1]))
