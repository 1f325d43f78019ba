"""Stands for Mooncake's program of that name: its options, and what it logs."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from tests.bench.stubs import moving

_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in (
        *("mode", "operation", "protocol", "metadata_server", "local_server_name"),
        *("segment_id", "logtostderr", "report_unit", "report_precision", "threads"),
    ):
        parser.add_argument(f"--{name}")
    for name in ("batch_size", "block_size", "duration"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    moving.log(engine="mooncake-bench", **vars(given))
    if given.mode == "target":
        _target(given.local_server_name)
    else:
        _initiator(given.batch_size * given.block_size, given.block_size)


def _target(name: str) -> None:
    if moving.behaves() == moving.DIES:
        sys.exit("F0000 bind: Address already in use")
    sys.stderr.write(f"I0000 RPC using P2P handshake, listening on {name}\n")
    sys.stderr.write("I0000 TcpTransport: listen on port 15000\n")
    sys.stderr.flush()
    signal.sigwait({signal.SIGTERM})


def _initiator(n_bytes: int, block_bytes: int) -> None:
    if moving.behaves() == moving.FAILS and block_bytes == moving.MIDDLE:
        sys.exit("I0000 FAILED")
    if moving.behaves() == moving.HANGS and block_bytes == moving.MIDDLE:
        signal.pause()
    source, target = memoryview(bytes(n_bytes)), memoryview(bytearray(n_bytes))
    batches, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < _SECONDS:
        target[:] = source
        batches += 1
    sys.stderr.write(
        f"I0000 Test completed: duration {took:.2f}, batch count {batches}, "
        f"throughput {batches * n_bytes / took / 1e9:.4f} GB/s\n"
    )


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
