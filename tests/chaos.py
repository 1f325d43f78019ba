"""Many requests, everything that may go wrong, and not one foreign byte.

    python -m tests.chaos --seconds 3600 --seed 7

Two decode sides and two prefill sides stream requests to each other. Requests are
aborted from both sides, cancelled, fenced and left to expire; connections are
broken, endpoints are closed and made anew, and the device loses answers, drops and
delays writes and has them arrive after their queue pair has failed. Blocks are given
to the next request at once.

What must hold: a layer that is reported holds exactly the bytes of its request; once
it is reported nobody touches it; a block that no request has keeps what the test put
there; every request ends, on both sides; nothing is left. The seed decides
everything but the timing.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import io
import os
import pprint
import random
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvxfer import Client, KVXferError, Request, Server, Ticket
from kvxfer.errors import AddressInUseError
from kvxfer.requests import RequestState, TicketState
from kvxfer.testing import live_objects, set_faults
from tests.endpoints import Arena, arena

LAYERS = 3
N_BLOCKS = 64
PLANES = {"k": (192, 192 + 64), "v": (128, 128 + 64)}
OPTIONS: dict[str, Any] = {
    "device": "soft0",
    "ib_timeout": 14,
    "retry_cnt": 3,
    "drain_timeout": 1.0,
    "fence_timeout": 1.0,
    "ping_interval": 0.3,
    "ping_timeout": 3.0,
    "connect_timeout": 10.0,
    "request_lease": 8.0,
    "stall_timeout": 3.0,
    "stream_chunk_bytes": 1024,
    "peer_window_bytes": 16384,
}
#: Every request is over so long after it was begun, or something hangs.
PATIENCE = 90.0

CLIENT_FAULTS: tuple[str, ...] = (
    "act=ack_lost,nth={n}",
    "act=drop,nth={n}",
    "act=late_write,nth={n},us={us}",
    "act=delay,rate=0.05,us=1000..{us},times=20",
    "act=status:GENERAL,nth={n}",
    "act=qp_fatal,nth={n}",
)
SERVER_FAULTS: tuple[str, ...] = (
    "act=status:REM_ACCESS_ERR,nth={n}",
    "act=posted_write_delay,rate=0.1,us=1000..{us},times=20",
    "act=reorder_bytes,rate=0.2,times=50",
    "act=qp_fatal,nth={n}",
)


class Foreign(AssertionError):
    """Bytes are where they must not be, or are not where they must be."""


class Hangs(AssertionError):
    """A request is not over long after everything that may end it should have."""


class Pool:
    """The blocks of one cache: who has them, and what is in those that nobody has."""

    def __init__(self, place: Arena, rng: random.Random) -> None:
        self.arena = place
        self._rng = rng
        self._free = list(range(N_BLOCKS))
        self._stamps: dict[int, int] = {}
        self._serial = 0
        for block in self._free:
            self._stamp(block)
        self._gaps = self._gap_bytes()

    def take(self, n: int) -> list[int]:
        """Hand out blocks, after a look at what is in them."""
        if len(self._free) < n:
            return []
        self._rng.shuffle(self._free)
        taken, self._free = self._free[:n], self._free[n:]
        for block in taken:
            self.check(block)
        return taken

    def give(self, blocks: list[int]) -> None:
        """Take blocks back: from now on nothing may be written to them."""
        for block in blocks:
            self._stamp(block)
        self._free += blocks

    def check(self, block: int) -> None:
        """Raise if somebody has written to a block that nobody has."""
        for layer in range(LAYERS):
            for name, place in self.arena.cache.group(None).rows(layer):
                row = self.arena.blocks(place)[block]
                wrong = np.flatnonzero(row != self._stamps[block] % 251)
                if wrong.size:
                    raise Foreign(
                        f"block {block}, layer {layer}, plane {name}: byte "
                        f"{int(wrong[0])} was written while nobody had the block"
                    )

    def check_all(self) -> None:
        """Look at every block that nobody has, and between the blocks."""
        for block in self._free:
            self.check(block)
        if not np.array_equal(self._gap_bytes(), self._gaps):
            raise Foreign("bytes between the blocks were written")

    @property
    def complete(self) -> bool:
        """Whether nobody has any."""
        return len(self._free) == N_BLOCKS

    def _stamp(self, block: int) -> None:
        self._serial += 1
        self._stamps[block] = self._serial
        for layer in range(LAYERS):
            for _, place in self.arena.cache.group(None).rows(layer):
                self.arena.blocks(place)[block] = self._serial % 251

    def _gap_bytes(self) -> NDArray[np.uint8]:
        """Return a copy of all that is in no block."""
        inside = np.zeros(self.arena.memory.size, bool)
        for layer in range(LAYERS):
            for _, place in self.arena.cache.group(None).rows(layer):
                start = place.base - self.arena.base
                for block in range(N_BLOCKS):
                    at = start + block * place.block_stride
                    inside[at : at + place.block_bytes] = True
        found: NDArray[np.uint8] = self.arena.memory[~inside].copy()
        return found


def fill(pool: Pool, layer: int, block: int, serial: int, position: int) -> None:
    """Write what a request has at a position into a block."""
    for plane, (_, place) in enumerate(pool.arena.cache.group(None).rows(layer)):
        row = pool.arena.blocks(place)[block]
        row[:] = pattern(place.block_bytes, layer, plane, serial, position)


def pattern(
    n: int, layer: int, plane: int, serial: int, position: int
) -> NDArray[np.uint8]:
    """The bytes of a request at a position: no other has them."""
    seed = (serial * 1009 + position) * 31 + layer * 7 + plane
    ramp = np.arange(n, dtype=np.uint64) * np.uint64(2654435761)
    found: NDArray[np.uint8] = ((ramp + np.uint64(seed * 97)) >> np.uint64(7)).astype(
        np.uint8
    )
    found[:8] = np.frombuffer(seed.to_bytes(8, "little"), np.uint8)
    return found


@dataclass
class Counts:
    """What a run has seen."""

    requests: int = 0
    faults: int = 0
    restarts: int = 0
    layers: int = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)


def _arena(seed: int) -> Arena:
    return arena(n_blocks=N_BLOCKS, layers=LAYERS, planes=PLANES, seed=seed)


class Prefill:
    """A prefill side that can be closed and made anew at the same address."""

    def __init__(
        self, seed: int, rng: random.Random, options: Mapping[str, Any]
    ) -> None:
        self.options = options
        self.pool = Pool(
            arena(n_blocks=N_BLOCKS, layers=LAYERS, planes=PLANES, seed=seed), rng
        )
        self.listen = "127.0.0.1:0"
        self.client: Client | None = None

    async def open(self) -> None:
        """Open a client, at the address of the one before."""
        client = Client(self.pool.arena.cache, listen=self.listen, **self.options)
        try:
            await client.open()
        except AddressInUseError:  # somebody was quicker
            client = Client(self.pool.arena.cache, listen="127.0.0.1:0", **self.options)
            await client.open()
        assert client.listening is not None
        self.listen = client.listening
        self.client = client

    async def close(self) -> None:
        """Close it."""
        client, self.client = self.client, None
        if client is not None:
            await client.close()


class Decode:
    """A decode side that can be closed and made anew at the same address."""

    def __init__(
        self, seed: int, rng: random.Random, options: Mapping[str, Any]
    ) -> None:
        self.options = options
        self.pool = Pool(
            arena(n_blocks=N_BLOCKS, layers=LAYERS, planes=PLANES, seed=seed), rng
        )
        self.port = 0
        self.server: Server | None = None

    async def open(self) -> None:
        """Open a server, at the address of the one before."""
        options = {"host": "127.0.0.1", **self.options}
        server = Server(self.pool.arena.cache, port=self.port, **options)
        try:
            await server.open()
        except AddressInUseError:  # somebody was quicker
            server = Server(self.pool.arena.cache, port=0, **options)
            await server.open()
        self.port = server.port
        self.server = server

    async def close(self) -> None:
        """Close it."""
        server, self.server = self.server, None
        if server is not None:
            await server.close()


class Chaos:
    """One run.

    Args:
      tasks: Requests at a time.
      faults: Whether devices are given fault plans; only the software device takes
        them.
      **options: For all endpoints, instead of those of :data:`OPTIONS`.
    """

    def __init__(
        self, seed: int, *, tasks: int = 16, faults: bool = True, **options: Any
    ) -> None:
        options = {**OPTIONS, **options}
        self.seed = seed
        self.rng = random.Random(seed)
        self.counts = Counts()
        self.tasks = tasks
        self.prefills = [Prefill(10 + i, self.rng, options) for i in range(2)]
        self.decodes = [Decode(20 + i, self.rng, options) for i in range(2)]
        self.sides: list[Prefill | Decode] = [*self.prefills, *self.decodes]
        self.faults = faults
        self.serial = 0
        self.stop_at = 0.0

    async def run(self, seconds: float) -> Counts:
        """Go on for so long, then let everything end and look at everything."""
        before = live_objects()
        for side in self.sides:
            await side.open()
        self.stop_at = time.monotonic() + seconds
        try:
            await self._all_of(
                self.trouble(), *(self.requests() for _ in range(self.tasks))
            )
            for side in self.sides:
                side.pool.check_all()
                if not side.pool.complete:
                    raise Foreign("a request has kept its blocks")
        finally:
            for end in self.sides:
                await end.close()
                end.pool.arena.cache.close()
        left = {k: n - before.get(k, 0) for k, n in live_objects().items()}
        if any(n > 0 for n in left.values()):
            raise Foreign(f"left alive: {left}")
        return self.counts

    async def _all_of(self, *parts: Coroutine[Any, Any, None]) -> None:
        """Run all; when one fails end the others, which would hide why by theirs."""
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    # -- trouble -----------------------------------------------------------------

    async def trouble(self) -> None:
        """Break something every now and then; heal all at the end."""
        while time.monotonic() < self.stop_at:
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))
            await self.rng.choices(
                [self.fault, self.heal, self.drop, self.restart], [6, 3, 2, 0.5]
            )[0]()
        await self.heal()

    async def fault(self) -> None:
        """Give a device a plan."""
        values = {
            "n": self.rng.randrange(1, 60),
            "us": self.rng.randrange(2000, 300000),
        }
        if self.rng.random() < 0.6:
            endpoint: Any = self.rng.choice(self.prefills).client
            plans = CLIENT_FAULTS
        else:
            endpoint = self.rng.choice(self.decodes).server
            plans = SERVER_FAULTS
        if endpoint is not None and self.faults:
            plan = self.rng.choice(plans).format(**values)
            set_faults(endpoint, f"seed={self.rng.randrange(1_000_000)};{plan}")
            self.counts.faults += 1

    async def heal(self) -> None:
        """Take all plans back."""
        if not self.faults:
            return
        for endpoint in (
            *(p.client for p in self.prefills),
            *(d.server for d in self.decodes),
        ):
            if endpoint is not None:
                set_faults(endpoint, "")

    async def drop(self) -> None:
        """Break a connection."""
        server = self.rng.choice(self.decodes).server
        if server is not None:
            for conn_id in list(server._connections.incoming):
                if self.rng.random() < 0.5:
                    server._connections.drop_peer(conn_id, "chaos")

    async def restart(self) -> None:
        """Close an endpoint and make another at its address."""
        side = self.rng.choice(self.sides)
        await side.close()
        await side.open()
        self.counts.restarts += 1

    # -- requests ----------------------------------------------------------------

    async def requests(self) -> None:
        """One request after the other."""
        while time.monotonic() < self.stop_at:
            prefill = self.rng.choice(self.prefills)
            decode = self.rng.choice(self.decodes)
            if prefill.client is None or decode.server is None:
                await asyncio.sleep(0.01)
                continue
            n = self.rng.randrange(1, 9)
            ours, theirs = prefill.pool.take(n), decode.pool.take(n)
            if not ours or not theirs:
                for pool, blocks in ((prefill.pool, ours), (decode.pool, theirs)):
                    pool.give(blocks)
                await asyncio.sleep(0.005)
                continue
            self.serial += 1
            one = One(self, self.serial, prefill, decode, ours, theirs)
            running = asyncio.ensure_future(one.run())
            try:
                done, _ = await asyncio.wait({running}, timeout=PATIENCE)
                if not done:
                    raise Hangs(one.describe())
                running.result()
            finally:
                running.cancel()
            self.counts.requests += 1


class One:
    """One request, both ends of it."""

    def __init__(
        self,
        chaos: Chaos,
        serial: int,
        prefill: Prefill,
        decode: Decode,
        ours: list[int],
        theirs: list[int],
    ) -> None:
        assert prefill.client is not None and decode.server is not None
        self.chaos = chaos
        self.rng = random.Random(chaos.rng.random())
        self.serial = serial
        self.name = f"r{serial}"
        self.prefill, self.decode = prefill, decode
        self.client, self.server = prefill.client, decode.server
        self.listen = prefill.listen
        self.ours, self.theirs = ours, theirs
        # A prefix that the decode side has already, by its own account.
        self.skip = self.rng.choice([0, 0, 0, 1]) if len(ours) > 1 else 0
        self.appended: dict[int, NDArray[np.uint8]] = {}
        self.ticket: Ticket | None = None
        self.request: Request | None = None

    def describe(self) -> str:
        """Say where it is and what every task of the process waits for."""
        text = io.StringIO()
        text.write(f"{self.name} is not over after {PATIENCE:.0f} s\n")
        core = self.request._core if self.request is not None else None
        for thing in (self.ticket, self.request, core):
            if thing is not None:
                state = {
                    name: repr(value)[:2000] for name, value in vars(thing).items()
                }
                text.write(f"{thing!r}\n{pprint.pformat(state)}\n")
        for prefill in self.chaos.prefills:
            if prefill.client is not None:
                text.write(f"{pprint.pformat(prefill.client.statistics())}\n")
        for task in asyncio.all_tasks():
            task.print_stack(file=text)
        return text.getvalue()

    async def run(self) -> None:
        """Stream it, perhaps end it, look at every byte, give the blocks back."""
        ticket = request = None
        try:
            for step in self.rng.sample(["offer", "open"], 2):
                if step == "offer":
                    self.ticket = ticket = self.offer()
                else:
                    self.request = request = self.open()
                await self.pause()
        except KVXferError:
            self.chaos.counts.ends["refused"] += 1  # its endpoint was just closed
        else:
            assert ticket is not None and request is not None
            await asyncio.gather(
                self.compute(request), self.watch(ticket), self.meddle(request, ticket)
            )
        if ticket is not None:
            if request is None:
                await ticket.abort()
            await ticket._over.wait()
            self.check_reported(ticket)
            self.chaos.counts.ends[ticket.state.value] += 1
            if ticket.state is not TicketState.DONE:
                code = getattr(ticket.error, "code", type(ticket.error).__name__)
                self.chaos.counts.ends[f"  {code}"] += 1
        # The moment it is over the blocks are others': on each side by its own word.
        self.decode.pool.give(self.theirs)
        if request is not None:
            if ticket is None:
                await request.abort()
            await request._over.wait()
            if ticket is not None and request.state is RequestState.DONE:
                assert ticket.state is TicketState.DONE
        self.prefill.pool.give(self.ours)

    async def pause(self) -> None:
        """Let others run, for a moment or none."""
        await asyncio.sleep(self.rng.choice([0, 0, 0.001, 0.01]))

    def offer(self) -> Ticket:
        """Say where it may go."""
        lease = self.rng.choice([None, None, None, 0.05])
        return self.server.offer(
            self.listen,
            self.name,
            {"main": self.theirs[self.skip :]},
            first_block=self.skip,
            lease=lease,
            checksum=self.rng.random() < 0.3,
        )

    def open(self) -> Request:
        """Say that it will come."""
        return self.client.open(
            self.name,
            deadline=self.rng.choice([None, None, None, 5.0, 0.1]),
            priority=self.rng.randrange(3),
        )

    async def compute(self, request: Request) -> None:
        """Chunk by chunk and layer by layer, the last block twice."""
        n = len(self.ours)
        cuts = sorted({n, *(self.rng.randrange(1, n + 1) for _ in range(2))})
        start = 0
        with contextlib.suppress(KVXferError):  # the client was closed
            for stop in cuts:
                for layer in range(LAYERS):
                    await self.pause()
                    if request._over.is_set:
                        return
                    for position in range(start, stop):
                        fill(
                            self.prefill.pool,
                            layer,
                            self.ours[position],
                            self.serial,
                            position,
                        )
                    self.mark(request, layer, start, stop, stop == n)
                start = max(0, stop - self.rng.randrange(2))
            request.finish(self.name.encode())

    def mark(
        self, request: Request, layer: int, start: int, stop: int, final: bool
    ) -> None:
        event: Any = None
        if self.rng.random() < 0.1:
            event = asyncio.Event()
            asyncio.get_running_loop().call_later(0.002, event.set)
        request.ready(
            layer, self.ours[start:stop], first_block=start, final=final, event=event
        )

    async def watch(self, ticket: Ticket) -> None:
        """Look at each layer when it is reported, then append tokens of our own."""
        with contextlib.suppress(KVXferError):
            for layer in range(LAYERS):
                await ticket.wait_layer(layer)
                self.check_layer(layer)
                self.append(layer)
                self.chaos.counts.layers += 1

    def append(self, layer: int) -> None:
        """Write where the decode side's own tokens go: the end of the last block."""
        if len(self.theirs) == self.skip:
            return
        _, place = self.decode.pool.arena.cache.group(None).rows(layer)[0]
        row = self.decode.pool.arena.blocks(place)[self.theirs[-1]]
        row[-16:] = 250
        self.appended[layer] = row.copy()

    def check_layer(self, layer: int) -> None:
        rows = self.decode.pool.arena.cache.group(None).rows(layer)
        for plane, (_, place) in enumerate(rows):
            blocks = self.decode.pool.arena.blocks(place)
            for position in range(self.skip, len(self.theirs)):
                wanted = pattern(place.block_bytes, layer, plane, self.serial, position)
                found = blocks[self.theirs[position]]
                if not np.array_equal(found, wanted):
                    raise Foreign(
                        f"{self.name}: layer {layer}, position {position} was reported "
                        "and holds other bytes"
                    )

    def check_reported(self, ticket: Ticket) -> None:
        """What was reported has not been touched since."""
        if ticket.state is TicketState.DONE:
            assert ticket.layers_done == tuple(range(LAYERS))
            assert ticket.aux == self.name.encode()
        for layer, wanted in self.appended.items():
            _, place = self.decode.pool.arena.cache.group(None).rows(layer)[0]
            row = self.decode.pool.arena.blocks(place)[self.theirs[-1]]
            if not np.array_equal(row, wanted):
                raise Foreign(
                    f"{self.name}: layer {layer} was written after it was reported"
                )

    async def meddle(self, request: Request, ticket: Ticket) -> None:
        """Perhaps end it before its time."""
        what = self.rng.random()
        if what > 0.4:
            return
        await asyncio.sleep(self.rng.choice([0, 0.002, 0.01, 0.05]))
        with contextlib.suppress(KVXferError):
            if what < 0.1:
                await request.abort("chaos")
            elif what < 0.2:
                await ticket.abort("chaos")
            elif what < 0.3:
                await self.server.fence(self.name)
                assert ticket._over.is_set
            else:
                wait = self.rng.choice([request.sent, ticket.wait])
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(wait(), 0.01)


async def chaos(seconds: float, seed: int, **arguments: Any) -> Counts:
    """Run for so long; see :class:`Chaos`."""
    return await Chaos(seed, **arguments).run(seconds)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Run by hand."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--tasks", type=int, default=16)
    arguments = parser.parse_args()
    seed = arguments.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    say(f"seed {seed}")
    start = time.monotonic()
    try:
        counts = asyncio.run(chaos(arguments.seconds, seed, tasks=arguments.tasks))
    except (AssertionError, asyncio.TimeoutError) as error:
        seconds = time.monotonic() - start
        say(f"failed after {seconds:.0f} s: {type(error).__name__}: {error}")
        sys.exit(1)
    say(
        f"{counts.requests} requests, {counts.layers} layers, {counts.faults} faults, "
        f"{counts.restarts} restarts in {time.monotonic() - start:.0f} s: no foreign "
        "byte, nothing hangs, nothing is left"
    )
    for end, n in counts.ends.items():
        say(f"  {n:6d} {end}")


if __name__ == "__main__":
    main()
