"""Other engines as contenders, each in its best acknowledged mode.

Mooncake through its Python API with the wheel's defaults; NIXL over UCX with transfer
handles made once, outside of the timed window, and the initiator's progress thread off,
which is more than twice as fast on few cores. They run in the Python that has them.

Which device they use is said by the environment, see ``contenders``. Where that is a
NIC, both sides look whether their engine has it open: some take another way without a
word, and its figures must not stand beside the NIC's name.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import re
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

from kvxfer.bench.side import (
    Control,
    Initiator,
    Job,
    Target,
    address_of,
    die_with_parent,
    map_pool,
    workload_of,
)
from kvxfer.bench.workload import Case, Tables, contents

_LOOPBACK = "127.0.0.1"
#: What transfer_engine_bench may take besides its window.
_BENCH_SECONDS = 60
_STOP_SECONDS = 10
_NIXL = ("nixl", "nixl_cu12", "nixl_cu13")


class _Planes:
    """Where each plane of a pool begins."""

    def __init__(self, job: Job) -> None:
        workload = workload_of(job)
        n_planes = workload.planes
        self.plane_bytes = workload.plane_bytes
        self.words = map_pool(self.plane_bytes * n_planes)
        step = self.plane_bytes // 8
        self.planes = [
            (self.words[i * step : (i + 1) * step], i * step) for i in range(n_planes)
        ]
        self.base = address_of(self.words)
        self.length = self.words.nbytes

    def addresses(self, base: int, ids: Any, size: int) -> list[int]:
        """List the addresses of blocks, plane by plane, in memory at ``base``."""
        return [
            address
            for i in range(len(self.planes))
            for address in (base + i * self.plane_bytes + ids * size).tolist()
        ]


def load(name: str) -> Any:
    """Import an engine by the name of its module, to see whether that is possible.

    Raises:
      ImportError: It is not.
    """
    return nixl_api() if name == "nixl" else importlib.import_module(name)


def check_open(job: Job) -> None:
    """Check that this process has the NIC open that the job names, if it names one.

    Raises:
      RuntimeError: It has not.
    """
    nic = job.get("nic")
    if nic is None:
        return
    described = Path(nic["sysfs"], "class", "infiniband_verbs")
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by now, or no such device
            file = Path(os.readlink(f"/proc/self/fd/{fd}")).name
            if (described / file / "ibdev").read_text().strip() == nic["name"]:
                return
    raise RuntimeError(f"the engine has not opened {nic['name']}: it goes another way")


def _facts(job: Job, wire: str) -> dict[str, Any]:
    nic = job.get("nic")
    return {"wire": wire} if nic is None else {"device": nic["label"], "wire": "rdma"}


# -- Mooncake -------------------------------------------------------------------------


def _mooncake(job: Job, pool: _Planes) -> Any:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", _LOOPBACK)
    nic = job.get("nic")
    protocol, device = ("tcp", "") if nic is None else ("rdma", nic["name"])
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    code = engine.initialize(_LOOPBACK, "P2PHANDSHAKE", protocol, device)
    if code == 0:
        code = engine.register_memory(pool.base, pool.length)
    if code:
        raise RuntimeError(f"Mooncake's engine does not start: {code}")
    check_open(job)
    return engine


class Mooncake(Initiator):
    """``batch_transfer_sync_write`` over TCP, or RDMA where there is a NIC."""

    def open(self) -> None:
        """Fill the source, start the engine, then the target."""
        self.pool = _Planes(self.job)
        contents(self.pool.words)
        self._engine = _mooncake(self.job, self.pool)
        super().open()

    def connect(self, hello: dict[str, Any]) -> None:
        """Keep where the target is."""
        self._hello = hello

    def prepare(self, tables: Tables) -> None:
        """Make the lists that its call takes."""
        size, pool = tables.block_bytes, self.pool
        self._lengths = [size] * tables.source.shape[1] * len(pool.planes)
        self._from = [pool.addresses(pool.base, ids, size) for ids in tables.source]
        theirs = self._hello["base"]
        self._to = [pool.addresses(theirs, ids, size) for ids in tables.target]

    def batch(self, source_set: int, target_set: int) -> None:
        """Write one batch."""
        code = self._engine.batch_transfer_sync_write(
            self._hello["endpoint"],
            self._from[source_set],
            self._to[target_set],
            self._lengths,
        )
        if code:
            raise RuntimeError(f"batch_transfer_sync_write returned {code}")

    def facts(self) -> dict[str, Any]:
        """Say what it is."""
        return _facts(self.job, "tcp")


def serve_mooncake(job: Job, control: Control) -> None:
    """Be the target of :class:`Mooncake`."""
    pool = _Planes(job)
    pool.words[:] = 0
    engine = _mooncake(job, pool)
    control.send(endpoint=f"{_LOOPBACK}:{engine.get_rpc_port()}", base=pool.base)
    Target(job, pool.planes).serve(control)


def find_mooncake_bench(python: str) -> str | None:
    """Find ``transfer_engine_bench``: on PATH, or in the wheel of a Python."""
    name = "transfer_engine_bench"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if os.access(Path(folder, name), os.X_OK):
            return str(Path(folder, name))
    found = subprocess.run(
        [python, "-c", "import mooncake; print(*mooncake.__path__)"],
        capture_output=True,
        text=True,
        check=False,
    )
    for folder in found.stdout.split():
        if Path(folder, name).exists():
            return str(Path(folder, name))
    return None


class MooncakeBench(Initiator):
    """Mooncake's own benchmark, the baseline of the published comparisons.

    It chooses its own addresses, the same contiguous ones for every batch, never writes
    its source buffer and checks nothing: a figure of its own kind, not the same work.
    """

    has_target = False

    def open(self) -> None:
        """Start its target."""
        path = self.job["bench"]
        if not os.access(path, os.X_OK):  # as it comes in the wheel
            Path(path).chmod(0o755)
        os.environ["MC_TCP_BIND_ADDRESS"] = _LOOPBACK
        self._common = [
            *(path, "--metadata_server=P2PHANDSHAKE", "--protocol=tcp"),
            "--logtostderr=1",
        ]
        us = os.getpid()
        self._server = subprocess.Popen(
            [
                *(*self._common, "--mode=target"),
                f"--local_server_name={_free_address()}",
            ],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: die_with_parent(us),
        )
        self._segment = ""
        ready, said = threading.Event(), [""]

        def follow() -> None:
            assert self._server.stderr is not None
            for line in self._server.stderr:
                said[0] = line.strip() or said[0]
                match = re.search(r"listening on (\S+:\d+)", line)
                if match:
                    self._segment = match[1]
                if "listen on port" in line:
                    ready.set()
            ready.set()

        threading.Thread(target=follow, daemon=True).start()
        if not ready.wait(20) or not self._segment or self._server.poll() is not None:
            raise RuntimeError(
                f"transfer_engine_bench does not come up as a target: {said[0]}"
            )

    def measure(self, case: Case) -> dict[str, Any]:
        """Run it for one case; it takes its own window, in whole seconds.

        It tells how many batches it moved in how long, and the time of none of them.
        """
        ours, size = _children_seconds(), case.block_bytes
        took, n_batches = self._run(case, max(1, round(self.job["window"])))
        n_blocks = n_batches * case.batch * self.workload.planes
        gb = n_blocks * size / 1e9
        return {
            "batches": n_batches,
            "seconds": took,
            "bytes": n_blocks * size,
            "gb_per_s": gb / took,
            "blocks_per_s": n_blocks / took,
            "p50_us": None,
            "p99_us": None,
            "cpu_initiator_s_per_gb": (_children_seconds() - ours) / gb,
            "cpu_target_s_per_gb": None,
            "foreign_cores": None,
            "disturbed": False,
            "verified_blocks": None,
            "wrong_blocks": None,
            "unseen_blocks": None,
            "wire": "tcp",
        }

    def _run(self, case: Case, seconds: int) -> tuple[float, int]:
        """Return how long it went on, and how many batches it moved."""
        us = os.getpid()
        patience = seconds + _BENCH_SECONDS
        try:
            done = subprocess.run(
                [
                    *(*self._common, "--mode=initiator", "--operation=write"),
                    f"--local_server_name={_free_address()}",
                    f"--segment_id={self._segment}",
                    f"--batch_size={case.batch * self.workload.planes}",
                    f"--block_size={case.block_bytes}",
                    *("--threads=1", f"--duration={seconds}"),
                    *("--report_unit=GB", "--report_precision=4"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=patience,
                check=False,
                preexec_fn=lambda: die_with_parent(us),
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"transfer_engine_bench is not done after {patience} s"
            ) from None
        found = re.search(r"duration ([\d.]+), batch count (\d+)", done.stderr)
        # What it logs at its end is all that counts: it has none if it fails.
        if found is None or float(found[1]) <= 0 or int(found[2]) < 1:
            raise RuntimeError(f"transfer_engine_bench: {done.stderr[-300:]}")
        return float(found[1]), int(found[2])

    def close(self) -> None:
        """End its target."""
        self._server.terminate()
        try:
            self._server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


def _free_address() -> str:
    """Return an address of this host whose port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return f"{_LOOPBACK}:{probe.getsockname()[1]}"


def _children_seconds() -> float:
    used = os.times()
    return used.children_user + used.children_system


# -- NIXL -----------------------------------------------------------------------------


def nixl_api() -> Any:
    """Import NIXL, under whichever name its wheel has.

    Raises:
      ImportError: It is not installed.
    """
    for name in _NIXL:
        try:
            return importlib.import_module(f"{name}._api")
        except ModuleNotFoundError:
            continue
    raise ImportError("NIXL is not installed")


def _agent(job: Job, name: str, pool: _Planes, progress_thread: bool) -> Any:
    api = nixl_api()
    config = api.nixl_agent_config(enable_prog_thread=progress_thread, backends=[])
    agent = api.nixl_agent(name, config)
    agent.create_backend("UCX", {})
    agent.register_memory([(pool.base, pool.length, 0, "")], "DRAM")
    check_open(job)
    return agent


class Nixl(Initiator):
    """``transfer`` of handles that were made before, then ``check_xfer_state``."""

    def open(self) -> None:
        """Fill the source, make the agent, then the target."""
        self.pool = _Planes(self.job)
        contents(self.pool.words)
        self._agent = _agent(self.job, "initiator", self.pool, False)
        self._handles: dict[tuple[int, int], Any] = {}
        super().open()

    def connect(self, hello: dict[str, Any]) -> None:
        """Take the target's metadata."""
        name = self._agent.add_remote_agent(base64.b64decode(hello["metadata"]))
        self._remote = name.decode() if isinstance(name, bytes) else name
        self._base = hello["base"]

    def prepare(self, tables: Tables) -> None:
        """Make a handle for each pair of sets."""
        for handle in self._handles.values():
            self._agent.release_xfer_handle(handle)
        self._handles.clear()
        size, pool, agent = tables.block_bytes, self.pool, self._agent
        for source, target in tables.pairs():
            ours, theirs = (
                agent.get_xfer_descs(
                    [(at, size, 0) for at in pool.addresses(base, ids, size)], "DRAM"
                )
                for base, ids in (
                    (pool.base, tables.source[source]),
                    (self._base, tables.target[target]),
                )
            )
            self._handles[source, target] = agent.initialize_xfer(
                "WRITE", ours, theirs, self._remote
            )

    def batch(self, source_set: int, target_set: int) -> None:
        """Start one transfer and poll until it is done."""
        agent, handle = self._agent, self._handles[source_set, target_set]
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL's transfer ended as {state}")

    def facts(self) -> dict[str, Any]:
        """Say what it is."""
        return _facts(self.job, "ucx " + os.environ.get("UCX_TLS", "default"))


def serve_nixl(job: Job, control: Control) -> None:
    """Be the target of :class:`Nixl`, with the progress thread that it needs."""
    pool = _Planes(job)
    pool.words[:] = 0
    agent = _agent(job, "target", pool, True)
    metadata = base64.b64encode(agent.get_agent_metadata()).decode()
    control.send(metadata=metadata, base=pool.base)
    Target(job, pool.planes).serve(control)
