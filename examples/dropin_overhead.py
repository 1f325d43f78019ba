"""What one RDMACommunicator.write_cache costs beside the native await.

    python -m examples.dropin_overhead [--calls N] [--device NAME]

Both write a block of one layer, again and again, from one process to itself; the
null device moves nothing, so that what is left is the library. The calls go in turns
of a hundred, so that what else the machine does meets both. Prints the medians in
microseconds, their ratio, and what the drop-in adds: two changes of thread, whose own
time is measured beside it, by a thread that does nothing but answer another.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import threading
import time

import numpy as np

TURN = 100


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def changes_of_thread(n: int) -> float:
    """Return the median time in which a loop's thread is woken and answers."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    answered = threading.Lock()
    answered.acquire()
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        loop.call_soon_threadsafe(answered.release)
        answered.acquire()
        seconds.append(time.perf_counter() - start)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    return statistics.median(seconds)


def measure(device: str, calls: int) -> tuple[float, float]:
    """Return the medians of the drop-in's call and of the native await, in seconds."""
    os.environ.update(KVXFER_DEVICE=device, KVXFER_HOST="127.0.0.1")
    # Read by the constructor, so after the environment is set.
    from kvxfer import Client, KVCache
    from rdma_comm import RDMACommunicator

    source, target = (np.zeros((64, 4096), np.uint8) for _ in range(2))
    port = free_port()
    decode = RDMACommunicator("decode", 0, port, [target.ctypes.data], [], 64, 4096)
    prefill = RDMACommunicator("prefill", 0, "0", [source.ctypes.data], [], 64, 4096)
    if not prefill.connect("127.0.0.1", port):
        raise SystemExit("not connected; see the log")
    blocking: list[float] = []
    native: list[float] = []

    async def native_turn(client: Client, n: int) -> None:
        peer = await client.connect("127.0.0.1", port)
        for _ in range(n):
            start = time.perf_counter()
            await client.write_cache(peer, [1], [2], 0)
            native.append(time.perf_counter() - start)

    def blocking_turn() -> None:
        for _ in range(TURN):
            start = time.perf_counter()
            code = prefill.write_cache("127.0.0.1", port, [1], [2], 0)
            blocking.append(time.perf_counter() - start)
            if code != 0:
                raise SystemExit("a write failed; see the log")

    async def both() -> None:
        with KVCache.from_tensors({"k": [source]}, dtype="u8") as cache:
            async with Client(cache) as client:
                for _ in range(max(1, calls // TURN)):
                    await native_turn(client, TURN)
                    await asyncio.to_thread(blocking_turn)

    asyncio.run(both())
    prefill.close()
    decode.close()
    return statistics.median(blocking[TURN:]), statistics.median(native[TURN:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--device", default="null0")
    arguments = parser.parse_args()
    blocking, native = measure(arguments.device, max(3 * TURN, arguments.calls))
    print(
        f"RDMACommunicator.write_cache {blocking * 1e6:.0f} us, "
        f"native await {native * 1e6:.0f} us: {(blocking - native) * 1e6:.0f} us more, "
        f"{blocking / native:.1f} times as much; "
        f"two changes of thread {changes_of_thread(arguments.calls) * 1e6:.0f} us"
    )


if __name__ == "__main__":
    main()
