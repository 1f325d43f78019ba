"""Memory, and communicators of FastDeploy's interface on it, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvxfer.testing import set_faults
from rdma_comm import RDMACommunicator
from tests.endpoints import SOON

Bytes = NDArray[np.uint8]

HOST = "127.0.0.1"
N_LAYERS, N_BLOCKS, BLOCK_BYTES, SCALE_BYTES = 3, 32, 256, 24


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass(eq=False)
class Memory:
    """What one side's GPU would hold: planes x layers x blocks x bytes."""

    planes: dict[str, list[Bytes]]
    block_bytes: int
    scale_bytes: int

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments for it."""
        pointers = {
            name: [x.ctypes.data for x in of] for name, of in self.planes.items()
        }
        return {
            "key_cache_ptrs": pointers["k"],
            "value_cache_ptrs": pointers.get("v", []),
            "block_number": len(self.planes["k"][0]),
            "block_bytes": self.block_bytes,
            "key_scale_ptrs": pointers.get("k_scale", []),
            "value_scale_ptrs": pointers.get("v_scale", []),
            "scale_block_bytes": self.scale_bytes,
        }

    def copy(self) -> dict[str, list[Bytes]]:
        """Copy the contents."""
        return {name: [x.copy() for x in of] for name, of in self.planes.items()}

    def differs(self, wanted: Mapping[str, list[Bytes]]) -> list[str]:
        """Name what is not as wanted."""
        return [
            f"{name} layer {layer}"
            for name, of in self.planes.items()
            for layer, found in enumerate(of)
            if not (found == wanted[name][layer]).all()
        ]


def memory(
    seed: int,
    planes: tuple[str, ...] = ("k", "v"),
    *,
    block_bytes: int = BLOCK_BYTES,
    scale_bytes: int = SCALE_BYTES,
    n_blocks: int = N_BLOCKS,
    n_layers: int = N_LAYERS,
) -> Memory:
    """Make memory full of noise."""
    rng = np.random.default_rng(seed)

    def plane(name: str) -> list[Bytes]:
        size = scale_bytes if name.endswith("scale") else block_bytes
        shape = (n_blocks, size)
        return [rng.integers(0, 256, shape, np.uint8) for _ in range(n_layers)]

    return Memory({name: plane(name) for name in planes}, block_bytes, scale_bytes)


@dataclass(eq=False)
class Nodes:
    """A prefill and a decode communicator, connected."""

    source: Memory
    target: Memory
    prefill: RDMACommunicator
    decode: RDMACommunicator
    port: str
    host: str = HOST
    before: dict[str, list[Bytes]] = field(default_factory=dict)

    def write(self, ours: Any, theirs: Any, layer: int = 0) -> int:
        """Write; the code."""
        return self.prefill.write_cache(self.host, self.port, ours, theirs, layer)

    def check_write(self, ours: list[int], theirs: list[int], layer: int = 0) -> None:
        """Write, and compare every byte of the target."""
        wanted = self.target.copy()
        for name, of in wanted.items():
            of[layer][theirs] = self.source.planes[name][layer][ours]
        assert self.write(ours, theirs, layer) == 0
        assert self.target.differs(wanted) == []


@contextlib.contextmanager
def communicator(
    role: str, port: int | str, held: Memory, **arguments: Any
) -> Iterator[RDMACommunicator]:
    """Make a communicator and close it."""
    arguments = {**held.arguments(), **arguments}
    made = RDMACommunicator(splitwise_role=role, gpu_idx=0, port=str(port), **arguments)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def nodes(
    source: Memory | None = None,
    target: Memory | None = None,
    *,
    host: str = HOST,
    dst_tp_size: int = 0,
    **prefill: Any,
) -> Iterator[Nodes]:
    """Give two nodes of this process, connected.

    Args:
      **prefill: More arguments of the prefill side's constructor.
    """
    source = source or memory(1)
    target = target or memory(2)
    port = free_port()
    with (
        communicator("decode", port, target) as decode,
        communicator("prefill", "0", source, **prefill) as ours,
    ):
        assert ours.connect(host, str(port), dst_tp_size) == 0
        yield Nodes(source, target, ours, decode, str(port), host)


def initiator_faults(pair: Nodes, plan: str) -> None:
    """Give the prefill node's device a fault plan; it counts from now."""
    set_faults(pair.prefill._ends.client()._endpoint, plan)


def target_faults(pair: Nodes, plan: str) -> None:
    """Likewise the decode node's."""
    listener = pair.decode._ends._listener
    assert listener is not None
    set_faults(listener.server._endpoint, plan)


def writers(pair: Nodes) -> int:
    """Count the writers that the decode node knows."""
    listener = pair.decode._ends._listener
    assert listener is not None
    return len(listener.server.peers)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines for tests that meet one of them; to be imported by their modules."""
    for name, value in (
        ("CONNECT_TIMEOUT", "10"),
        ("DRAIN_TIMEOUT", "1"),
        ("FENCE_TIMEOUT", "1"),
        ("PING_INTERVAL", "0.2"),
        ("PING_TIMEOUT", "2"),
        ("IB_TIMEOUT", "14"),
    ):
        monkeypatch.setenv(f"KVXFER_{name}", value)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads and the device do by themselves."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def program(text: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a process of its own, from its line "ready" on.

    It is killed in the end.
    """
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def run_program(text: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own to its end; a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
        # On all addresses it warns, rightly, that anybody may write.
        env={**os.environ, "KVXFER_HOST": HOST, **environ},
    )
