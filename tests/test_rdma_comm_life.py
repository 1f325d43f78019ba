"""Defects known of the original in what begins and ends; see the docstrings."""

from __future__ import annotations

import gc
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvxfer import curve
from kvxfer._verbs import QueuePair
from kvxfer.testing import live_objects
from rdma_comm import RDMACommunicator
from tests.communicators import (  # noqa: F401
    HOST,
    communicator,
    free_port,
    initiator_faults,
    memory,
    nodes,
    program,
    quick,
    target_faults,
    wait_until,
)
from tests.endpoints import SOON

PLANES = ("k", "v", "k_scale", "v_scale")


def n_writers(decode: RDMACommunicator) -> int:
    listener = decode._ends._listener
    assert listener is not None
    return len(listener.server.peers)


@contextmanager
def relay(
    port: int, *, budget: int | None = None, piece: int = 1 << 16
) -> Iterator[int]:
    """Forward connections to a port; give the port to dial instead.

    Args:
      budget: Bytes from the client after which the first connection is cut.
      piece: Bytes that go on at a time, either way.
    """
    listener = socket.create_server((HOST, 0))
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def forward(source: socket.socket, target: socket.socket, left: int | None) -> None:
        try:
            while data := source.recv(piece if left is None else min(piece, left)):
                target.sendall(data)
                if left is not None:
                    left -= len(data)
                    if left == 0:
                        break
        except OSError:
            left = None  # the other direction has ended both
        for end in (source, target):
            _shut(end)

    def accept() -> None:
        left = budget
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((HOST, port))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ends.extend((client, server))
            for pair in ((client, server, left), (server, client, None)):
                threads.append(threading.Thread(target=forward, args=pair))
                threads[-1].start()
            left = None

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(SOON)
        listener.close()
        for end in ends:
            _shut(end)
        for thread in threads:
            thread.join(SOON)
        for end in ends:
            end.close()


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was over


@pytest.mark.parametrize("budget", [1, 40, 100, 300])
def test_after_a_handshake_that_broke_in_its_middle_connect_works(budget: int) -> None:
    """The original ignores that the addresses were not exchanged: it counts as
    connected with lists that are empty, and the first write reads beyond them."""
    source, target, port = memory(1), memory(2), free_port()
    with (
        communicator("decode", port, target) as decode,
        relay(port, budget=budget) as between,
        communicator("prefill", "0", source) as prefill,
    ):
        # Once more within connect, or by who calls it: in the end it stands.
        wait_until(lambda: prefill.connect(HOST, between) == 0)
        wanted = target.copy()
        for name, of in wanted.items():
            of[1][[4, 5]] = source.planes[name][1][[2, 3]]
        assert prefill.write_cache(HOST, between, [2, 3], [4, 5], 1) == 0
        assert target.differs(wanted) == []
        wait_until(lambda: n_writers(decode) == 1)


def test_messages_may_come_in_pieces() -> None:
    """The original reads once, from a socket that does not wait: what is not there
    yet is a failed handshake."""
    port = free_port()
    with (
        communicator("decode", port, memory(2)),
        relay(port, piece=1) as between,
        communicator("prefill", "0", memory(1)) as prefill,
    ):
        assert prefill.connect(HOST, between) == 0
        assert prefill.write_cache(HOST, between, [1], [2], 0) == 0


def test_communicators_made_and_dropped_in_a_loop() -> None:
    """The original's detached thread outlives the object that it works on, and may
    end at once since its flag is set after its start."""
    held, port = memory(1), free_port()
    before = live_objects()
    for _ in range(20):
        with communicator("prefill", "0", memory(2)) as prefill:
            # Nothing calls its close, as nothing of FastDeploy's does.
            decode = RDMACommunicator("decode", 0, port, **held.arguments())
            assert prefill.connect(HOST, port) == 0
            assert prefill.write_cache(HOST, port, [1], [2], 0) == 0
            del decode
            gc.collect()
            for thread in threading.enumerate():
                if thread.name == "kvxfer-close":
                    thread.join(SOON)
            wait_until(lambda: not prefill.is_connected(HOST, port))
    wait_until(lambda: all(n <= before.get(x, 0) for x, n in live_objects().items()))


PREFILL = """
    import sys
    from tests.communicators import HOST, memory
    from rdma_comm import RDMACommunicator
    held = memory(1)
    node = RDMACommunicator("prefill", 0, "0", **held.arguments())
    assert node.connect(HOST, sys.argv[1]) == 0
    assert node.write_cache(HOST, sys.argv[1], [1, 2], [3, 4], 0) == 0
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_prefill_node_that_is_killed_leaves_nothing() -> None:
    """The original's decode node keeps QP and regions of hosts that died for as long
    as TCP does, two hours; a large cluster ran out of them."""
    port = free_port()
    with communicator("decode", port, memory(2)) as decode:
        before: dict[str, int] = {}
        for _ in range(2):
            with program(PREFILL, port) as process:
                assert n_writers(decode) == 1
                process.send_signal(signal.SIGKILL)
                process.wait(SOON)
                wait_until(lambda: n_writers(decode) == 0)
            # What the first of all leaves is made once; the second adds nothing.
            before = before or live_objects()
        wait_until(
            lambda: all(n <= before.get(x, 0) for x, n in live_objects().items())
        )


@pytest.mark.parametrize("faults", [initiator_faults, target_faults])
def test_a_device_that_fails(faults: Any) -> None:
    """The original watches for no event: the connection stays, and nothing says so."""
    with nodes() as pair:
        pair.check_write([1], [2])
        faults(pair, "act=device_fatal@t=0us")
        wait_until(lambda: not pair.prefill.is_connected(HOST, pair.port))
        # The device is opened anew meanwhile.
        wait_until(lambda: pair.prefill.connect(HOST, pair.port) == 0)
        pair.check_write([3, 4], [5, 6], 1)


# -- what a write posts -------------------------------------------------------------


def test_all_planes_are_posted_before_the_first_is_acknowledged() -> None:
    """The original waits for keys before values, and for values before scales: up to
    four round trips of a call. Here no WR is ever acknowledged, and all are there."""
    with nodes(memory(1, PLANES), memory(2, PLANES)) as pair:
        wanted = pair.target.copy()
        for name, of in wanted.items():
            of[1][[7, 5, 9]] = pair.source.planes[name][1][[1, 2, 3]]
        initiator_faults(pair, "act=ack_lost,nth=1")
        assert pair.write([1, 2, 3], [7, 5, 9], 1) == -1
        assert pair.target.differs(wanted) == []


@pytest.mark.parametrize("flush", [False, True])
def test_wrs_of_a_call(flush: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original posts one WR a block, and reads a whole block back behind keys and
    another behind values."""
    monkeypatch.setenv("KVCACHE_GDRCOPY_FLUSH_ENABLE", str(int(flush)))
    run = list(range(8))
    with nodes(memory(1, PLANES), memory(2, PLANES)) as pair:
        counters = pair.prefill._ends.client()._endpoint._host.counters
        counts = []
        for theirs in (run, run[::-1]):
            before = counters.work_requests
            pair.check_write(run, theirs)
            counts.append(counters.work_requests - before)
        # With each call a record and the immediate that tell the decode side.
        assert counts == [4 + 2 + flush, 4 * len(run) + 2 + flush]


# -- who may write, and how ---------------------------------------------------------


def test_with_keys_who_has_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The original gives its rkeys to anybody who reaches the port."""
    server_public, server_secret = curve.generate("server", tmp_path)
    client_public, client_secret = curve.generate("client", tmp_path)
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / client_public.name).write_bytes(client_public.read_bytes())
    port = free_port()
    monkeypatch.setenv("KVXFER_SECRET_KEY_FILE", str(server_secret))
    monkeypatch.setenv("KVXFER_CLIENT_KEYS_DIR", str(allowed))
    with communicator("decode", port, memory(2)) as decode:
        monkeypatch.delenv("KVXFER_CLIENT_KEYS_DIR")
        monkeypatch.setenv("KVXFER_SECRET_KEY_FILE", str(client_secret))
        monkeypatch.setenv("KVXFER_SERVER_PUBLIC_KEY", str(server_public))
        with communicator("prefill", "0", memory(1)) as known:
            assert known.connect(HOST, port) == 0
            assert known.write_cache(HOST, port, [1], [2], 0) == 0
        wait_until(lambda: n_writers(decode) == 0)
        monkeypatch.delenv("KVXFER_SECRET_KEY_FILE")
        monkeypatch.delenv("KVXFER_SERVER_PUBLIC_KEY")
        monkeypatch.setenv("KVXFER_CONNECT_TIMEOUT", "1")
        with communicator("prefill", "0", memory(1)) as stranger:
            assert stranger.connect(HOST, port) == 2
            assert not stranger.is_connected(HOST, port)
            assert stranger.write_cache(HOST, port, [1], [2], 0) == -1
        assert n_writers(decode) == 0


def test_options_reach_the_queue_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the original all but the timeout are fixed, traffic class 0 among them."""
    for name, value in (
        ("KVXFER_SL", "3"),
        ("KVXFER_TC", "106"),
        ("KVXFER_PKEY_INDEX", "7"),
        ("KVXFER_RETRY_CNT", "5"),
        ("KVXFER_RNR_RETRY", "6"),
        ("KVCACHE_IB_TIMEOUT", "15"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KVXFER_IB_TIMEOUT")
    found: list[tuple[str, Any]] = []

    class Recording(QueuePair):  # type: ignore[misc]  # final in the stub
        def to_init(self, **given: Any) -> None:
            found.append(("init", given["pkey_index"]))
            # The software device has one partition key.
            super().to_init(**{**given, "pkey_index": 0})

        def to_rtr(self, path: Any) -> None:
            found.append(("rtr", path))
            super().to_rtr(path)

        def to_rts(self, path: Any) -> None:
            found.append(("rts", path))
            super().to_rts(path)

    monkeypatch.setattr("kvxfer.link.QueuePair", Recording)
    with nodes() as pair:
        pair.check_write([1], [2])
    # Of both ends, which have the same environment here.
    assert [what for what, _ in found].count("rts") == 2
    for what, given in found:
        if what == "init":
            assert given == 7
            continue
        assert (given.service_level, given.traffic_class) == (3, 106)
        assert (given.retry_cnt, given.rnr_retry, given.timeout) == (5, 6, 15)
