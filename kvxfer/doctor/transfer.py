"""Bytes that are moved and compared: on each device of this host, and to another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import numpy as np

from kvxfer import Client, KVCache, Options, Peer, Server, pattern
from kvxfer.devices import Verdict
from kvxfer.doctor.report import Finding, note, ok, problem
from kvxfer.errors import (
    GeometryMismatchError,
    KVXferError,
    OptionError,
    RetryExceededError,
    WriteTimeoutError,
)

_LAYERS = 2
_BLOCKS = 64
_BLOCK_BYTES = 65536
_LARGE = "large"
# The MTUs that there are: a write of as many bytes is one packet where that is the MTU.
_PACKETS = (256, 512, 1024, 2048, 4096)
_LATENCY_ROUNDS = 64
_BANDWIDTH_ROUNDS = 8
# A path that works answers in microseconds; this is for one that does not.
_PATIENCE = 15.0
# Reached by this host alone, and not the default, which socket_ifname would replace.
_HERE = "127.0.0.2"
_VERIFY = "kvxfer-doctor/verify/"
_VERDICT = "kvxfer doctor verified "


def make_cache() -> KVCache:
    """Make the cache that both sides of a test have: 8 MiB, and a few small blocks."""
    groups = {
        _LARGE: KVCache.allocate(
            n_layers=_LAYERS, n_blocks=_BLOCKS, block_bytes=_BLOCK_BYTES, planes=("p",)
        )
    }
    for size in _PACKETS:
        groups[_group_of(size)] = KVCache.allocate(
            n_layers=1, n_blocks=1, block_bytes=size, planes=("p",)
        )
    try:
        return KVCache.grouped(groups)
    finally:
        for cache in groups.values():
            cache.close()


def _group_of(packet_bytes: int) -> str:
    return f"packets of {packet_bytes}"


@dataclass(frozen=True)
class Measured:
    """What a path showed.

    Attributes:
      latency_us: Median of a write of one block of one layer.
      bytes_per_s: Of writes of all blocks.
      device: That moved them.
      wire: How they travelled.
    """

    latency_us: float
    bytes_per_s: float
    device: str
    wire: str

    def __str__(self) -> str:
        return (
            f"a block in {self.latency_us:.0f} us, {self.bytes_per_s / 1e9:.2f} GB/s, "
            f"{self.device} by {self.wire}"
        )


async def measure(client: Client, peer: Peer) -> Measured:
    """Write blocks one by one, then many at once."""
    seconds = []
    for i in range(_LATENCY_ROUNDS):
        one = [i % _BLOCKS]
        result = await client.write_cache(peer, one, one, 0, group=_LARGE)
        seconds.append(result.seconds)
    ids = np.arange(_BLOCKS)
    start = time.monotonic()
    moved = 0
    for _ in range(_BANDWIDTH_ROUNDS):
        moved += (await client.write_cache(peer, ids, ids, group=_LARGE)).bytes
    rate = moved / (time.monotonic() - start)
    return Measured(statistics.median(seconds) * 1e6, rate, peer.device, peer.wire)


def fill(cache: KVCache, seed: int) -> None:
    """Fill a cache with blocks that belong where they are, and nowhere else."""
    ids = np.arange(_BLOCKS)
    for layer in range(_LAYERS):
        pattern.fill(cache.view(layer, "p", group=_LARGE), ids, ids, 0, layer, seed)


def wrong_blocks(cache: KVCache, seed: int) -> int:
    """Count the blocks that do not hold what they should."""
    ids = np.arange(_BLOCKS)
    return sum(
        len(pattern.wrong(cache.view(layer, "p", group=_LARGE), ids, 0, layer, seed))
        for layer in range(_LAYERS)
    )


# -- on this host -----------------------------------------------------------------


async def loopback(verdict: Verdict, options: Options) -> list[Finding]:
    """Write from one device to itself, and compare every byte."""
    check = f"write {verdict.spec.label}"
    name = verdict.spec.name
    device = name if verdict.is_software else f"{name}:{verdict.spec.port_num}"
    # As the options have it, but for who may connect and where.
    options = replace(
        options,
        device=device,
        require_rdma=False,
        host=_HERE,
        port=0,
        listen=None,
        secret_key_file=None,
        client_keys_dir=None,
        server_public_key=None,
        write_timeout=_PATIENCE,
    )
    try:
        with make_cache() as source, make_cache() as target:
            seed = secrets.randbelow(1 << 10) + 1
            fill(source, seed)
            async with (
                Server(target, options) as server,
                Client(source, options) as client,
            ):
                peer = await client.connect(_HERE, server.port)
                measured = await measure(client, peer)
                wrong = wrong_blocks(target, seed)
    except KVXferError as error:
        return [
            problem(
                check,
                f"{type(error).__name__}: {error}",
                "The device cannot be used as it is.",
                "kvxfer devices --gids; dmesg | tail",
            )
        ]
    if wrong:
        return [
            problem(
                check,
                f"{wrong} of {_LAYERS * _BLOCKS} blocks are wrong",
                "This device, or the memory of this machine, corrupts data.",
                "do not use it; memtest, the NIC's firmware, dmesg",
            )
        ]
    return [ok(check, f"{_LAYERS * _BLOCKS} blocks written and compared; {measured}")]


# -- to another host --------------------------------------------------------------


class Listener:
    """The other side of :func:`probe`: compares what it is sent, and says so.

    Use as an asynchronous context; it serves until that ends.
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._cache = make_cache()
        self._server = Server(self._cache, options)
        self._say = say
        self._follower: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Listener:
        try:
            await self._server.open()
        except BaseException:
            self._cache.close()
            raise
        self._follower = asyncio.get_running_loop().create_task(self._follow())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self._server.close()
            assert self._follower is not None
            await self._follower
        finally:
            self._cache.close()

    @property
    def endpoint(self) -> str:
        """What the other side dials."""
        return self._server.endpoint

    async def _follow(self) -> None:
        landed: dict[str, int] = {}
        async for arrival in self._server.arrivals():
            request = arrival.request_id or ""
            if not request.startswith(_VERIFY):
                continue
            landed[request] = landed.get(request, 0) + 1
            if landed[request] == _LAYERS:
                del landed[request]
                seed = int(request[len(_VERIFY) :])
                wrong = await asyncio.to_thread(wrong_blocks, self._cache, seed)
                self._say(f"{arrival.peer}: {wrong} of {_LAYERS * _BLOCKS} are wrong")
                await self._server.disconnect(arrival.peer, f"{_VERDICT}{wrong}")


@contextlib.asynccontextmanager
async def _connected(
    cache: KVCache, options: Options, host: str, port: int
) -> AsyncIterator[tuple[Client, Peer]]:
    # The other side ends the connection to say what it found, which is no warning; and
    # an end that is one becomes a finding.
    log = logging.getLogger("kvxfer.peer")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        async with Client(cache, options, write_timeout=_PATIENCE) as client:
            yield client, await client.connect(host, port)
    finally:
        log.setLevel(before)


async def probe(host: str, port: int, options: Options) -> list[Finding]:
    """Try the whole path to ``kvxfer doctor --listen`` on another host."""
    findings = await _control(host, port)
    if findings[-1].remedy:
        return findings
    seed = secrets.randbelow(1 << 10) + 1
    is_connected = False
    with make_cache() as cache:
        fill(cache, seed)
        try:
            async with _connected(cache, options, host, port) as (client, peer):
                is_connected = True
                findings.append(
                    ok("negotiation", f"{peer.device}, from GID {peer.link.gid}")
                )
                await _data(client, peer, seed, findings)
        except GeometryMismatchError:
            findings.append(
                note(
                    "negotiation",
                    "an endpoint answers that has a cache of its own",
                    "It can be reached; nothing is written into it.",
                    "for the rest, run there: kvxfer doctor --listen 0.0.0.0:7778",
                )
            )
        except KVXferError as error:
            findings.append(_failed(error, is_connected))
    return findings


def _failed(error: KVXferError, is_connected: bool) -> Finding:
    """Say what it means that the path failed, before it was one or later."""
    text = f"{type(error).__name__}: {error}"
    if is_connected:
        return problem(
            "data path",
            text,
            "The connection was made, and broke: the other side ended, or a device.",
            "what kvxfer doctor --listen says there; kvxfer doctor and dmesg | tail on "
            "both sides",
        )
    if isinstance(error, OptionError):
        return problem(
            "choice",
            text,
            "Nothing can be transferred with these options.",
            "kvxfer config prints the options in force and where each comes from",
        )
    return problem(
        "negotiation",
        text,
        "The endpoint answers, but no connection can be made.",
        "kvxfer devices, on both sides; kvxfer config",
    )


async def _control(host: str, port: int) -> list[Finding]:
    """Try the plain TCP connection beneath the control connection."""
    where = f"{host} port {port}"
    start = time.monotonic()
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), 5)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{error}"
        return [
            problem(
                "control",
                f"{where}: the name is not known: {why}",
                "Neither /etc/hosts nor a name server has an address for it.",
                f"getent hosts {host}; or give an IP address",
            )
        ]
    except asyncio.TimeoutError:
        return [
            problem(
                "control",
                f"{where}: no answer within 5 s",
                "Packets are dropped: a firewall, or the wrong address.",
                f"open TCP port {port} there; ping {host}",
            )
        ]
    except OSError as error:
        return [
            problem(
                "control",
                f"{where}: {os.strerror(error.errno) if error.errno else error}",
                "Nothing listens there, or it cannot be reached.",
                f"run there: kvxfer doctor --listen 0.0.0.0:{port}",
            )
        ]
    micros = (time.monotonic() - start) * 1e6
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return [ok("control", f"{where} answers in {micros:.0f} us")]


async def _data(client: Client, peer: Peer, seed: int, findings: list[Finding]) -> None:
    """Write small, then large, then all; have it compared there."""
    passed, error = await _largest_packet(client, peer)
    try:
        if error is not None:
            raise error
        measured = await measure(client, peer)
    except (RetryExceededError, WriteTimeoutError) as failure:
        facts = f"{peer.device} by GID {peer.link.gid}"
        findings.append(swallowed(facts, peer.wire, passed, failure))
        return
    sizes = ", ".join(map(str, _PACKETS))
    findings.append(ok("packets", f"of {sizes} bytes come through"))
    findings.append(ok("data path", str(measured)))
    ids = np.arange(_BLOCKS)
    await client.write_cache(
        peer, ids, ids, request_id=f"{_VERIFY}{seed}", group=_LARGE
    )
    try:
        await asyncio.wait_for(_gone(peer), _PATIENCE)
    except asyncio.TimeoutError:
        findings.append(
            note("verified", "the other side did not say: is it kvxfer doctor?")
        )
        return
    _, told, count = str(peer.error).partition(_VERDICT)
    if not told:
        findings.append(
            problem(
                "verified",
                str(peer.error),
                "The connection ended before the other side said what has arrived.",
                "what kvxfer doctor --listen says there; once more",
            )
        )
    elif count.split()[0].rstrip(".") == "0":
        findings.append(
            ok("verified", f"{_LAYERS * _BLOCKS} blocks compared at the other side")
        )
    else:
        findings.append(
            problem(
                "verified",
                str(peer.error),
                "What arrived is not what was sent.",
                "kvxfer doctor on both hosts; do not use this path",
            )
        )


async def _largest_packet(client: Client, peer: Peer) -> tuple[int, KVXferError | None]:
    """Write larger and larger packets; return the last that came through, and why."""
    passed = 0
    for size in _PACKETS:
        try:
            await client.write_cache(peer, [0], [0], 0, group=_group_of(size))
        except (RetryExceededError, WriteTimeoutError) as error:
            return passed, error
        passed = size
    return passed, None


def swallowed(facts: str, wire: str, passed: int, error: KVXferError) -> Finding:
    """Say what it means that nothing longer than ``passed`` bytes comes through.

    Args:
      facts: The device, and by which of its GIDs.
      wire: As :attr:`kvxfer.Peer.wire` has it.
    """
    if passed == 0 and wire != "rdma":
        return problem(
            "data path",
            f"{facts}: {error}",
            "The control connection works and the wire of the software device does "
            "not: it goes to a TCP port of its own, which the kernel chooses there.",
            "let the TCP ports of sysctl net.ipv4.ip_local_port_range through, at the "
            "side that is written to; or narrow the range",
        )
    if passed == 0:
        return problem(
            "data path",
            f"{facts}: {error}",
            "The control connection works and RDMA packets do not come through: a "
            "firewall (UDP port 4791), another VLAN, or an MTU on the way that is "
            "smaller than on both sides and swallows large packets.",
            "ping -M do -s 8972 HOST, then -s 1472: if only the second is "
            "answered, the MTU of the switch; kvxfer devices --gids on both sides",
        )
    longer = next((size for size in _PACKETS if size > passed), _BLOCK_BYTES)
    return problem(
        "packets",
        f"{facts}: of {passed} bytes come through, of {longer} do not: {error}",
        "Something on the way drops packets that are too long for it, and tells "
        "nobody: an MTU black hole.",
        f"export KVXFER_PATH_MTU={passed} on both sides, until the MTU of all switches "
        f"between is larger; ping -M do -s {min(longer, 4096)} HOST shows it as well",
    )


async def _gone(peer: Peer) -> None:
    """Wait until the peer has taken its leave, with its verdict."""
    while peer.connected:  # noqa: ASYNC110 - the peer has no event for it
        await asyncio.sleep(0.01)
