"""Streamed requests between processes that are killed, frozen and started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from typing import Any

import pytest

from kvxfer import Server
from kvxfer.errors import BrokenPeerError
from kvxfer.requests import TicketState
from tests.children import ROOT, Nursery
from tests.endpoints import QUICK, SOON, arena, expected
from tests.fixed_port import fixed_port

SHAPE: dict[str, Any] = {
    "n_blocks": 16,
    "layers": 4,
    "planes": {"k": (4096, 4096 + 64), "v": (4096, 4096 + 64)},
    "seed": 1,
}


EXAMPLES = ROOT / "examples" / "streaming"


@pytest.mark.parametrize("first", ["decode", "prefill"])
def test_the_programs_of_the_docs_print_what_they_say(first: str) -> None:
    """Whichever is started first."""
    said = (ROOT / "docs" / "streaming.md").read_text()
    names = [first, "prefill" if first == "decode" else "decode"]
    with fixed_port(7778), contextlib.ExitStack() as stack:
        running = []
        for name in names:
            program = subprocess.Popen(
                [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            stack.enter_context(program)
            stack.callback(program.kill)
            running.append(program)
        for name, program in zip(names, running, strict=True):
            printed, _ = program.communicate(timeout=60)
            assert program.returncode == 0
            assert f"streaming/{name}.py\n{printed}" in said


async def test_a_request_between_two_processes(nursery: Nursery) -> None:
    with arena(**SHAPE) as source, arena(**{**SHAPE, "seed": 2}) as target:
        wanted = expected(source, target, target.memory, range(8), range(8, 16))
        async with (
            Server(target.cache, port=0, **QUICK) as server,
            nursery.start(
                "prefill", shape=SHAPE, request_ids=["r"], n_blocks=8
            ) as child,
        ):
            where = (await child.event())["listening"]
            ticket = server.offer(where, "r", {"main": range(8, 16)})
            for layer in range(4):
                await asyncio.wait_for(ticket.wait_layer(layer), SOON)
            await asyncio.wait_for(ticket.wait(), SOON)
            assert (target.memory == wanted).all()
            assert ticket.aux == b"r"
            event = await child.event()
            assert (event["state"], event["error"]) == ("done", None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_blocks_of_a_prefill_that_died_are_never_reported(
    nursery: Nursery, number: signal.Signals
) -> None:
    with arena(**SHAPE) as target:
        async with (
            Server(target.cache, port=0, **QUICK) as server,
            nursery.start(
                "prefill", shape=SHAPE, request_ids=["r"], n_blocks=8, finish=False
            ) as child,
        ):
            where = (await child.event())["listening"]
            ticket = server.offer(where, "r", {"main": range(8)})
            await asyncio.wait_for(ticket.wait_layer(2), SOON)
            child.signal(number)
            with pytest.raises(BrokenPeerError):
                await asyncio.wait_for(ticket.wait(), SOON)
            assert ticket.state is TicketState.FAILED
            assert ticket.layers_done == (0, 1, 2)
            assert ticket.error is not None and ticket.error.fenced


async def test_a_fence_needs_no_word_of_a_writer_that_stands_still(
    nursery: Nursery,
) -> None:
    """The offer and the end of it wait for a frozen process; then it wakes up."""
    with arena(**SHAPE) as source, arena(**{**SHAPE, "seed": 2}) as target:
        options = {**QUICK, "ping_timeout": SOON}
        async with (
            Server(target.cache, port=0, **options) as server,
            nursery.start(
                "prefill",
                shape=SHAPE,
                request_ids=["first", "fenced", "other"],
                n_blocks=4,
                **options,
            ) as child,
        ):
            where = (await child.event())["listening"]
            await asyncio.wait_for(
                server.offer(where, "first", {"main": range(4)}).wait(), SOON
            )
            await child.stop()
            fenced = server.offer(where, "fenced", {"main": range(4, 8)})
            other = server.offer(where, "other", {"main": range(8, 12)})
            await asyncio.wait_for(server.fence("fenced"), SOON)
            assert fenced.state is TicketState.ABORTED
            before = target.memory.copy()
            child.signal(signal.SIGCONT)
            # It wakes up to an offer that it begins to fulfil, and to a connection
            # that is gone; what else it had to write comes by the next one.
            await asyncio.wait_for(other.wait(), SOON)
            after = expected(source, target, before, range(4), range(8, 12))
            assert (target.memory == after).all()
            ends = {}
            for _ in range(3):
                event = await child.event()
                ends[event["request_id"]] = (event["state"], event["error"])
            assert ends == {
                "first": ("done", None),
                "fenced": ("aborted", "RequestAbortedError"),
                "other": ("done", None),
            }
