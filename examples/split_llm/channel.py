"""Calls from the driver to its two processes: JSON lines over their pipes.

This is the part that a serving stack's router plays: prompts, token ids and block
ids, plain data and little of it. The KV cache itself never comes this way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

Json = dict[str, Any]
Handler = Callable[..., Awaitable[Json]]

LINE_BYTES = 1 << 20
CLOSE_SECONDS = 20.0


class WorkerError(Exception):
    """A process of the example failed a call, or ended before it answered."""


class Worker:
    """The driver's end: one process, and calls to it that may overlap."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self._reader = asyncio.create_task(self._read_answers())

    @classmethod
    async def start(cls, name: str, *arguments: str) -> Worker:
        """Start ``python -m examples.split_llm.<name>`` with these arguments."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{__package__}.{name}",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        return cls(name, process)

    async def call(self, operation: str, **arguments: object) -> Json:
        """Ask for one operation and wait for its answer.

        Raises:
          WorkerError: The process failed it, or ended. What went wrong is on the
            process's standard error.
        """
        if self._reader.done():
            raise self._ended()
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        call = {"call": number, "operation": operation, "arguments": arguments}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(call).encode() + b"\n")
            result: Json = await answer
        finally:
            self._waiting.pop(number, None)
        return result

    def kill(self) -> None:
        """End the process now; ``close`` has to follow."""
        if self._process.returncode is None:
            self._process.kill()

    async def close(self) -> None:
        """Let the process end by itself; kill it if it does not within 20 s."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), CLOSE_SECONDS)
        except asyncio.TimeoutError:
            self.kill()
            await self._process.wait()
        await self._reader

    async def _read_answers(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = json.loads(line)
            answer = self._waiting.get(message["call"])
            if answer is None or answer.done():
                continue  # the call was cancelled meanwhile
            if "error" in message:
                answer.set_exception(WorkerError(f"{self.name}: {message['error']}"))
            else:
                answer.set_result(message["result"])
        await self._process.wait()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._ended())

    def _ended(self) -> WorkerError:
        code = self._process.returncode
        return WorkerError(f"the {self.name} process ended with code {code}")


class Calls:
    """The process's end: answers calls from standard input until that ends.

    Made first of all in a process: it takes standard output for the answers and
    points the descriptor at standard error, so that a library that prints cannot
    come in between.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        # Ctrl-C reaches the whole process group. The driver decides what it means
        # and closes our input.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def serve(self, handlers: Mapping[str, Handler]) -> None:
        """Run each call as a task of its own; return when the input has ended.

        A call that fails is answered with its error, and then raised here: the
        example has nothing to go on with.
        """
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=LINE_BYTES)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        next_line = asyncio.ensure_future(reader.readline())
        tasks: set[asyncio.Future[Any]] = {next_line}
        try:
            while True:
                done, tasks = await asyncio.wait(
                    tasks, return_when=asyncio.FIRST_COMPLETED
                )
                for finished in done - {next_line}:
                    finished.result()
                if next_line not in done:
                    continue
                line = next_line.result()
                if not line:
                    return
                tasks.add(asyncio.ensure_future(self._answer(handlers, line)))
                next_line = asyncio.ensure_future(reader.readline())
                tasks.add(next_line)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            transport.close()

    async def _answer(self, handlers: Mapping[str, Handler], line: bytes) -> None:
        call = json.loads(line)
        answer: Json = {"call": call["call"]}
        try:
            answer["result"] = await handlers[call["operation"]](**call["arguments"])
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
            self._write(answer)
            raise
        self._write(answer)

    def _write(self, answer: Json) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()
