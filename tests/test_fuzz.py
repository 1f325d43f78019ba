"""What takes minutes to try of bytes that strangers send; bounded by the clock.

A seed that finds something is in the failure's message: ``KVXFER_FUZZ_SEED`` runs it
again, ``KVXFER_FUZZ_SECONDS`` says for how long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import sys
import time

import pytest
import zmq
import zmq.asyncio

from kvxfer import wire
from kvxfer.errors import ProtocolError, VersionMismatchError
from tests import control_messages as make
from tests.endpoints import SOON, until
from tests.test_control import Listener, dialed, make_server

SEED = int(os.environ.get("KVXFER_FUZZ_SEED", secrets.randbits(32)))
SECONDS = float(os.environ.get("KVXFER_FUZZ_SECONDS", "30"))
HEAD = len(wire.MAGIC) + 2


def mutant(rng: random.Random, frames: list[bytes]) -> bytes:
    """Change a message as a stranger, a bug or another version would."""
    frame = bytearray(rng.choice(frames))
    for _ in range(rng.randrange(1, 9)):
        at = rng.randrange(HEAD if rng.random() < 0.95 else 0, len(frame))
        what = rng.randrange(6)
        if what == 0:
            frame[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            frame[at] = rng.choice(b"\x00\x7f\x80\x90\xa0\xc0\xc1\xdd\xdf\xff")
        elif what == 2 and len(frame) > HEAD + 1:
            del frame[at : at + rng.randrange(1, 16)]
        elif what == 3:
            frame[at:at] = rng.randbytes(rng.randrange(1, 16))
        elif what == 4:
            frame[at : at + 8] = b"\xcf" + rng.randbytes(rng.randrange(7, 9))
        else:  # a piece of another message
            other = rng.choice(frames)
            start = rng.randrange(len(other))
            frame[at:at] = other[start : start + rng.randrange(1, 200)]
        if len(frame) <= HEAD:
            break
    return bytes(frame)


@pytest.mark.slow
def test_control_messages_are_messages_or_refused() -> None:
    """And what is taken can be sent again, and is then the same."""
    rng = random.Random(SEED)
    frames = [wire.encode(message) for message in make.one_of_each()]
    end = time.monotonic() + SECONDS
    n = taken = 0
    while time.monotonic() < end:
        n += 1
        frame = mutant(rng, frames)
        try:
            with contextlib.suppress(ProtocolError, VersionMismatchError):
                message = wire.decode(frame)
                taken += 1
                assert wire.decode(wire.encode(message)) == message
        except BaseException as error:
            raise AssertionError(f"seed {SEED}, mutant {n}: {frame!r}") from error
    assert 0 < taken < n
    sys.stdout.write(f"seed {SEED}: {n} mutants, {taken} of them messages still\n")


@pytest.mark.slow
async def test_a_listener_takes_whatever_strangers_send() -> None:
    """It counts, answers or hangs up; then a peer comes, and nothing else is left."""
    rng = random.Random(SEED)
    frames = [wire.encode(message) for message in make.one_of_each()]
    listener = Listener()
    end = time.monotonic() + SECONDS / 2
    sent = 0
    async with make_server(listener, connect_timeout=0.2) as server:
        while time.monotonic() < end:
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as raw:
                raw.linger = 0
                raw.connect(f"tcp://{server.endpoint}")
                for _ in range(500):
                    frame = mutant(rng, frames)
                    await asyncio.wait_for(raw.send(frame), SOON)
                    sent += 1
        async with dialed(server):
            counts = server.statistics()
            assert 0 < counts.garbage < sent, f"seed {SEED}"
            assert counts.connections == 1
        # Hellos that happened to be valid were peers, and have been released.
        await until(lambda: not server._identities)
        assert listener.calls.count("offer") == listener.calls.count("closed")
