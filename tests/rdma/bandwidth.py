"""kvxfer beside perftest's ib_write_bw on the same device, as a ratio.

    python -m tests.rdma.bandwidth DEVICE [--gid-index N] [--megabytes N]

Both move blocks of one size between two processes with send queues of one depth,
as many WRs a doorbell and one completion for each doorbell. ib_write_bw writes one
block from one place to one place over and over; kvxfer writes scattered blocks to
scattered blocks, none merged, and announces them. It goes between two runs of
ib_write_bw, so what else the machine does meets both.

The ratio is that of the medians, above 1 where kvxfer is the faster one. Under
emulation neither figure means anything by itself, so none is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from subprocess import PIPE, Popen

import numpy as np
import psutil

from kvxfer import Client, KVCache, Options, devices, ports
from kvxfer._verbs import Device

BLOCK_SIZES = (4096, 65536)
DEPTH = 512
CHAIN = 64
ROUNDS = 4
PATIENCE = 60.0


def perftest(device: str, gid_index: int, size: int, n: int) -> float:
    """Write ``n`` blocks with ib_write_bw; return bytes a second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("ib_write_bw", "-F", "-d", device, "-x", str(gid_index), "-p", str(port)),
        *("-s", str(size), "-n", str(n), "-t", str(DEPTH)),
        *("-l", str(CHAIN), "-Q", str(CHAIN)),
    ]
    with Popen(command, stdout=PIPE, stderr=subprocess.STDOUT) as server:
        try:
            wait_for_listener(server.pid, port)
            done = subprocess.run(
                [*command, "127.0.0.1"],
                stdout=PIPE,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
                text=True,
                check=False,
            )
        finally:
            server.kill()
    for line in done.stdout.splitlines():
        words = line.split()
        if words and words[0] == str(size) and len(words) >= 4:
            # Columns: bytes, iterations, peak, average; its MB are 2^20 bytes.
            return float(words[3]) * 2**20
    raise SystemExit(f"ib_write_bw gave no result:\n{done.stdout}")


def wait_for_listener(pid: int, port: int) -> None:
    """Wait until a process listens; to try a connection would be taken as one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for connection in psutil.net_connections("tcp"):
            if connection.pid == pid and connection.status == psutil.CONN_LISTEN:
                return
        time.sleep(0.05)
    raise SystemExit(f"ib_write_bw does not listen on port {port}")


def kvxfer(options: Options, size: int, n: int) -> list[float]:
    """Write ``n`` blocks several times; return bytes a second of each but the first."""
    command = [
        *(sys.executable, "-m", "kvxfer.serve", "--port", "0", "--json"),
        *("--layers", "1", "--blocks", str(n), "--planes", "k"),
        *("--block-bytes", str(size), "--dtype", "bf16"),
        *("--device", options.device),
    ]
    with Popen(command, stdout=PIPE) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            return asyncio.run(write(options, ready["port"], size, n))
        finally:
            server.send_signal(signal.SIGINT)


async def write(options: Options, port: int, size: int, n: int) -> list[float]:
    """Write to an endpoint on this host; see :func:`kvxfer`."""
    rng = np.random.default_rng(1)
    found: list[float] = []
    with KVCache.allocate(
        n_layers=1, n_blocks=n, block_bytes=size, planes=("k",), dtype="bf16"
    ) as cache:
        cache.view(0, "k")[:] = 1
        async with Client(cache, options) as client:
            peer = await client.connect("127.0.0.1", port)
            for _ in range(ROUNDS + 1):
                ours, theirs = rng.permutation(n), rng.permutation(n)
                result = await client.write_cache(peer, ours, theirs)
                found.append(result.bytes / result.seconds)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device")
    parser.add_argument("--gid-index", type=int)
    parser.add_argument("--megabytes", type=int, default=8)
    arguments = parser.parse_args()
    if shutil.which("ib_write_bw") is None:
        raise SystemExit("ib_write_bw is not installed (Debian: perftest)")
    name, _, port = arguments.device.partition(":")
    with Device(name, provider="libibverbs") as device:
        spec = devices.DeviceSpec(name, "libibverbs", int(port or 1))
        gid_index = ports.choose_gid(device, spec, arguments.gid_index).index
    for size in BLOCK_SIZES:
        options = Options.load(
            device=arguments.device,
            gid_index=gid_index,
            sq_depth=DEPTH,
            chain=CHAIN,
            max_sge=1,
            merge_bytes=size,
        )
        # Of one or two chains perftest makes no average.
        n = max(4 * CHAIN, arguments.megabytes * 10**6 // size // CHAIN * CHAIN)
        print(compare(name, gid_index, options, size, n), flush=True)  # noqa: T201


def compare(name: str, gid_index: int, options: Options, size: int, n: int) -> str:
    """Measure both in turns; return the sentence about it."""
    theirs = [perftest(name, gid_index, size, n) for _ in range(2)]
    ours = kvxfer(options, size, n)
    theirs += [perftest(name, gid_index, size, n) for _ in range(2)]
    ratio = statistics.median(ours) / statistics.median(theirs)
    spread = (min(ours) / max(theirs), max(ours) / min(theirs))
    return (
        f"kvxfer / ib_write_bw: {ratio:.2f} at {size}-byte blocks, {DEPTH} WRs deep "
        f"(from {spread[0]:.2f} to {spread[1]:.2f})"
    )


if __name__ == "__main__":
    main()
