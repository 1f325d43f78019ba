"""Commands in processes of their own, forked from one that has imported them.

To start Python and import kvxfer takes longer than most commands run, and the tests
run many. What is forked is a process like any other from there on: it has its own
arguments, environment, output, signals and end of the interpreter, and runs its
module as ``python -m`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from tests.patience import patient

ROOT = Path(__file__).parent.parent

#: Every command that has a start of some length; ``kvxfer`` itself runs the others.
MODULES = [
    *("kvxfer.bench.cli", "kvxfer.config_cli", "kvxfer.demo", "kvxfer.devices_cli"),
    *("kvxfer.doctor.cli", "kvxfer.keys", "kvxfer.push", "kvxfer.serve"),
]


class Process:
    """A command that runs; as ``asyncio.subprocess.Process`` is."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
        self.stdout = asyncio.StreamReader()
        self.stderr = asyncio.StreamReader()
        self._status = status
        self._code: int | None = None

    @property
    def returncode(self) -> int | None:
        """What it exited with, minus the signal that killed it; None as it runs."""
        if self._code is None:
            with contextlib.suppress(BlockingIOError):
                self._code = int(self._status.recv(64))
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Have it killed."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait until it has ended; return what it exited with."""
        while (code := self.returncode) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return code

    async def communicate(self) -> tuple[bytes, bytes]:
        """Read all that it prints and wait until it has ended."""
        out, err = await asyncio.gather(self.stdout.read(), self.stderr.read())
        await self.wait()
        return out, err


class Commands:
    """The process that commands are forked from."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.commands", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # What is forked has this for its own until it gets another: no
                # terminal, whatever the tests run on.
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
            )

    @contextlib.asynccontextmanager
    async def start(
        self, module: str, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> AsyncIterator[Process]:
        """Run ``python -m module`` with these arguments, here; in the end kill it.

        Args:
          environ: All of its environment; None: as ours is now.
        """
        request = {
            "argv": [module, *arguments],
            "cwd": os.getcwd(),
            "environ": dict(os.environ if environ is None else environ),
        }
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            status, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            stack.enter_context(status)
            outputs = []
            with theirs, contextlib.ExitStack() as given:
                fds = [theirs.fileno()]
                for _ in ("stdout", "stderr"):
                    read_fd, write_fd = os.pipe()
                    outputs.append(stack.enter_context(os.fdopen(read_fd, "rb")))
                    given.callback(os.close, write_fd)
                    fds.append(write_fd)
                socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
            status.setblocking(False)
            pid = int(await asyncio.wait_for(loop.sock_recv(status, 64), patient(60.0)))
            process = Process(pid, status)
            transports = []
            for pipe, reader in zip(
                outputs, (process.stdout, process.stderr), strict=True
            ):
                transport, _ = await loop.connect_read_pipe(
                    lambda reader=reader: asyncio.StreamReaderProtocol(reader),  # type: ignore[misc]
                    pipe,
                )
                transports.append(transport)
            try:
                yield process
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                for transport in transports:
                    transport.close()
                await asyncio.sleep(0)  # then they are closed

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self._process.wait()


_shared: list[Commands] = []


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Have :func:`start` work: for the fixture ``commands`` of a session."""
    with contextlib.closing(Commands()) as commands:
        _shared.append(commands)
        yield
        _shared.remove(commands)


def start(
    module: str, *arguments: str, environ: Mapping[str, str] | None = None
) -> AbstractAsyncContextManager[Process]:
    """Run a command by the process that the fixture ``commands`` has started."""
    assert _shared, "the test does not use the fixture commands"
    return _shared[0].start(module, *arguments, environ=environ)


# -- in the process that is forked ----------------------------------------------------


def _forked(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; return it in the child, and None when there are no more.

    A child's pid, then what it exited with go to the first of the descriptors that
    came with the request; the others become its stdout and stderr.
    """
    running: dict[int, socket.socket] = {}
    ended, wake = socket.socketpair()
    ended.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready = select.select([requests, ended], [], [])[0]
        if ended in ready:
            ended.recv(4096)
            while running:
                pid, code = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                with running.pop(pid) as status, contextlib.suppress(OSError):
                    status.send(str(os.waitstatus_to_exitcode(code)).encode())
        if requests not in ready:
            continue
        request, fds, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not request:
            return None
        status = socket.socket(fileno=fds[0])
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for ours in (requests, ended, wake, status, *running.values()):
                ours.close()
            for fd, name in enumerate(fds[1:], 1):
                os.dup2(name, fd)
                os.close(name)
            found: dict[str, Any] = json.loads(request)
            return found
        for fd in fds[1:]:
            os.close(fd)
        status.send(str(pid).encode())
        running[pid] = status


def _main(fd: int) -> None:
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or the first collection of each child copies all of it
    with socket.socket(fileno=fd) as requests:
        request = _forked(requests)
    if request is None:
        return
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.argv = request["argv"]
    # A module becomes __main__; who asks for it by its name gets another, as ever.
    if not hasattr(sys.modules.get(sys.argv[0]), "__path__"):
        sys.modules.pop(sys.argv[0], None)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
