"""The example of FastDeploy's documentation, and what it takes that it runs."""

from __future__ import annotations

import subprocess
import sys

from tests.communicators import (  # noqa: F401
    HOST,
    communicator,
    free_port,
    memory,
    quick,
    run_program,
)
from tests.endpoints import SOON

# The example of the original's documentation, as printed there. It describes 1024
# blocks of 4096 bytes in arrays of 8192 that nobody holds, and has no decode node.
EXAMPLE = """\
import numpy as np
from rdma_comm import RDMACommunicator

# Initialize
local_keys = [np.array([0]*1024, dtype=np.int64).ctypes.data]  # Example key pointer
local_values = [np.array([0]*1024, dtype=np.int64).ctypes.data] # Example value pointer

comm = RDMACommunicator(
    role="prefill",
    gpu_idx=0,
    port="12345",
    local_key_cache=local_keys,
    local_value_cache=local_values,
    block_number=1024,
    block_bytes=4096
)

# Client connection
comm = RDMACommunicator(
    role="prefill",
    gpu_idx=0,
    port="12345",
    local_key_cache=local_keys,
    local_value_cache=local_values,
    block_number=1024,
    block_bytes=4096
)

if comm.connect("192.168.1.100", "12345"):
    print("Connection established")

    # Write cache
    comm.write_cache(
        ip="192.168.1.100",       # Target server IP
        port="12345",             # Target server port
        local_block_ids=[0,1,2],  # Local block IDs to transfer
        remote_block_ids=[3,4,5], # Remote block IDs to write
        layer_idx=0               # Model layer index (0 for first layer)
    )
"""
ARRAYS = """\
import numpy as np
keys, values = (np.arange(1024*512) * {sign} for _ in range(2))
"""
# Run behind the constructors of the decode node.
CHECK = """
print("ready", flush=True)
input()
for plane in (keys, values):
    blocks = plane.reshape(1024, 512)
    assert (blocks[3:6].ravel() == np.arange(3*512)).all()
    assert (blocks[6:].ravel() == -np.arange(6*512, 1024*512)).all()
    assert (blocks[:3].ravel() == -np.arange(3*512)).all()
"""


def example(role: str, port: int) -> str:
    """Give the example with memory of the size that it names, and where it runs."""
    text, small = EXAMPLE, "np.array([0]*1024, dtype=np.int64)"
    for printed, n, here in (
        (f"local_keys = [{small}", 1, "local_keys = [keys"),
        (f"local_values = [{small}", 1, "local_values = [values"),
        ('"192.168.1.100"', 2, f'"{HOST}"'),
        ('"12345"', 4, f'"{port}"'),
        ('role="prefill"', 2, f'role="{role}"'),
    ):
        assert text.count(printed) == n
        text = text.replace(printed, here)
    return ARRAYS.format(sign=1 if role == "prefill" else -1) + text


def test_the_documented_example_runs_as_printed() -> None:
    """Both roles are made twice, as there; "if comm.connect" means success."""
    port = free_port()
    decode = example("decode", port)
    decode = decode[: decode.index("if comm.connect")] + CHECK
    with subprocess.Popen(
        [sys.executable, "-c", decode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as node:
        assert node.stdout is not None
        try:
            assert node.stdout.readline() == "ready\n"
            run = run_program(example("prefill", port))
            assert (run.stdout, run.stderr) == ("Connection established\n", "")
            out, _ = node.communicate("\n", timeout=SOON)
        finally:
            node.kill()
    assert (node.returncode, out) == (0, "")


def test_decode_nodes_of_one_port_and_memory_have_one_listener() -> None:
    """It goes on as long as one of them does, and not beyond."""
    source, target, port = memory(1), memory(2), free_port()
    with communicator("prefill", "0", source) as prefill:
        with communicator("decode", port, target) as second:
            with communicator("decode", port, target) as first:
                assert first._ends._listener is second._ends._listener
                assert prefill.connect(HOST, port) == 0
            first.close()
            wanted = target.copy()
            for name, of in wanted.items():
                of[1][[4, 5]] = source.planes[name][1][[2, 3]]
            assert prefill.write_cache(HOST, port, [2, 3], [4, 5], 1) == 0
            assert target.differs(wanted) == []
        assert prefill.write_cache(HOST, port, [2, 3], [4, 5], 1) == -1
        with communicator("decode", port, memory(3)):
            pass
