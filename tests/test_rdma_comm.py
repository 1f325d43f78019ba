"""FastDeploy's module: arguments, codes, and what FastDeploy itself does with it."""

from __future__ import annotations

import array
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rdma_comm
from kvxfer.fastdeploy.arguments import bind
from rdma_comm import ConnectStatus, RDMACommunicator
from tests.communicators import (
    BLOCK_BYTES,
    HOST,
    N_BLOCKS,
    N_LAYERS,
    communicator,
    free_port,
    memory,
    nodes,
    run_program,
)
from tests.endpoints import SOON

SEVEN: tuple[Any, ...] = ("prefill", 1, "0", [64, 128], [192, 256], 8, 16)
SCALES: tuple[Any, ...] = ([320, 384], [448, 512], 4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines for tests that meet one of them."""
    for name, value in (
        ("CONNECT_TIMEOUT", "5"),
        ("DRAIN_TIMEOUT", "1"),
        ("FENCE_TIMEOUT", "1"),
        ("PING_INTERVAL", "0.2"),
        ("PING_TIMEOUT", "2"),
    ):
        monkeypatch.setenv(f"KVXFER_{name}", value)


# -- arguments ----------------------------------------------------------------------


def test_the_seven_nine_and_twelve_argument_forms() -> None:
    seven = bind(SEVEN, {})
    assert (seven.role, seven.gpu_idx, seven.port) == ("prefill", 1, "0")
    assert seven.planes == {"k": [64, 128], "v": [192, 256]}
    assert (seven.block_number, seven.block_bytes) == (8, 16)
    assert (seven.prefill_tp_size, seven.prefill_tp_idx) == (1, 0)
    nine = bind((*SEVEN, 4, 3), {})
    assert (nine.prefill_tp_size, nine.prefill_tp_idx) == (4, 3)
    assert nine.planes == seven.planes
    twelve = bind((*SEVEN, *SCALES, 4, 3), {})
    assert twelve.planes == {
        **seven.planes,
        "k_scale": [320, 384],
        "v_scale": [448, 512],
    }
    assert twelve.sizes == {"k": 16, "v": 16, "k_scale": 4, "v_scale": 4}
    assert (twelve.prefill_tp_size, twelve.prefill_tp_idx) == (4, 3)
    assert bind((*SEVEN, *SCALES), {}).prefill_tp_size == 1
    assert bind((*SEVEN, 4), {"prefill_tp_idx": 3}) == nine


def test_the_names_of_the_code_and_of_its_documentation() -> None:
    names = ["splitwise_role", "gpu_idx", "port", "key_cache_ptrs", "value_cache_ptrs"]
    names += ["block_number", "block_bytes"]
    named = dict(zip(names, SEVEN, strict=True))
    assert bind((), named) == bind(SEVEN, {})
    documented = ["role", "gpu_idx", "port", "local_key_cache", "local_value_cache"]
    documented += ["block_number", "block_bytes"]
    assert bind((), dict(zip(documented, SEVEN, strict=True))) == bind(SEVEN, {})


def test_pointers_come_as_lists_or_arrays() -> None:
    arrays = (*SEVEN[:3], np.array([64, 128]), np.array([192, 256]), *SEVEN[5:])
    assert bind(arrays, {}) == bind(SEVEN, {})
    high = bind((*SEVEN[:3], np.array([-4096]), [], 1, 1), {})
    assert high.planes == {"k": [(1 << 64) - 4096]}
    assert high.is_key_only


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (SEVEN[:6], {}, "missing arguments: block_bytes"),
        ((*SEVEN, *SCALES, 1, 0, 0), {}, "13 arguments"),
        (SEVEN, {"role": "decode"}, "'role' is given twice"),
        (SEVEN, {"nic": "mlx5_0"}, "unexpected argument 'nic'"),
        ((0, *SEVEN[1:]), {}, "splitwise_role is 0"),
        ((*SEVEN[:6], "16"), {}, "block_bytes is '16'"),
        ((*SEVEN[:3], [1.5], *SEVEN[4:]), {}, "key_cache_ptrs must be a list"),
    ],
)
def test_arguments_of_another_kind(args: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        RDMACommunicator(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"key_cache_ptrs": []}, "there are no layers"),
        ({"value_cache_ptrs": [64]}, "value_cache_ptrs has 1 layers, key_cache_ptrs"),
        ({"key_scale_ptrs": [64]}, "key_scale_ptrs has 1 layers"),
        ({"value_scale_ptrs": [64]}, "value_scale_ptrs has 1 layers"),
        ({"key_cache_ptrs": [64, 0, 64]}, r"key_cache_ptrs\[1\] is a null pointer"),
        ({"block_number": 0}, "block_number is 0"),
        ({"block_bytes": -1}, "block_bytes is -1"),
        ({"scale_block_bytes": 0}, "scale_block_bytes is 0"),
    ],
)
def test_what_the_constructor_refuses(change: dict[str, Any], text: str) -> None:
    held = memory(1, ("k", "v", "k_scale", "v_scale"))
    with (
        pytest.raises(RuntimeError, match=text),
        communicator("prefill", 0, held, **change),
    ):
        pass


def test_a_port_that_is_taken_and_one_that_is_none() -> None:
    port, other = free_port(), memory(2)
    with communicator("decode", port, memory(1)):
        for bad, text in ((port, "in use"), ("http", "no port"), (70000, "no port")):
            with (
                pytest.raises(RuntimeError, match=text),
                communicator("decode", bad, other),
            ):
                pass


# -- codes --------------------------------------------------------------------------


def test_a_status_is_its_code_and_true_only_for_success() -> None:
    assert ConnectStatus(0) == 0 and ConnectStatus(0)
    assert ConnectStatus(2) == 2 and not ConnectStatus(2)
    assert isinstance(ConnectStatus(4), int) and f"{ConnectStatus(4)}" == "4"


def test_codes_of_connect() -> None:
    with nodes() as pair:
        for arguments in (
            (HOST, pair.port),
            (HOST, int(pair.port)),
            (HOST, pair.port, 0),
            (HOST, pair.port, 1),
            ("localhost", pair.port),
        ):
            assert pair.prefill.connect(*arguments) == 0
        assert type(pair.prefill.connect(HOST, pair.port)) is ConnectStatus
        for bad in (
            ("", pair.port),
            (HOST, "http"),
            (HOST, -1),
            (HOST, 65536),
            (None, pair.port),
            (HOST, pair.port, -1),
            (HOST, pair.port, "two"),
        ):
            assert pair.prefill.connect(*bad) == 4
        assert pair.prefill.is_connected(HOST, pair.port) is True
        assert pair.prefill.is_connected(HOST, "1") is False
        assert pair.prefill.is_connected("", None) is False  # type: ignore[arg-type]


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_CONNECT_TIMEOUT", "0.2")
    with communicator("prefill", "0", memory(1)) as prefill:
        code = prefill.connect(HOST, free_port())
        assert code == 2 and not code
        assert not prefill.is_connected(HOST, 1)
        assert prefill.write_cache(HOST, 1, [1], [2], 0) == -1


def test_codes_of_write_cache(caplog: pytest.LogCaptureFixture) -> None:
    """Never an exception; the log has the reason."""
    with nodes() as pair:
        pair.check_write([1, 2, 3], [7, 5, 9], 1)
        before = pair.target.copy()
        for ours, theirs, layer, text in (
            ([1], [1, 2], 0, "1 local"),
            ([1], [-1], 0, r"-1"),
            ([-1], [1], 0, r"-1"),
            ([N_BLOCKS], [1], 0, str(N_BLOCKS)),
            ([1], [N_BLOCKS], 0, str(N_BLOCKS)),
            ([1, 2], [3, 3], 0, "twice"),
            ([1], [1], N_LAYERS, "layer 3"),
            ([1], [1], -1, "layer -1"),
            ([1.5], [1], 0, "integer"),
            ("ab", "cd", 0, "str"),
            (None, [1], 0, "local_block_ids is a NoneType, not a list"),
            ([1], iter([1]), 0, "remote_block_ids is a list_iterator, not a list"),
            ([1], [1], None, "layer_idx"),
        ):
            caplog.clear()
            assert pair.write(ours, theirs, layer) == -1  # type: ignore[arg-type]
            assert text in caplog.text
        assert pair.write([], []) == 0
        assert pair.prefill.write_cache(HOST, free_port(), [], [], 0) == 0
        assert pair.prefill.write_cache(HOST, free_port(), [1], [1], 0) == -1
        assert pair.target.differs(before) == []
        assert pair.prefill.is_connected(HOST, pair.port)
        pair.check_write([4], [4])


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, np.int64)[::1],
        lambda ids: np.repeat(np.array(ids, np.uint16), 2)[::2],
        lambda ids: array.array("i", ids),
        lambda ids: memoryview(array.array("q", ids)),
        lambda ids: [np.int64(i) for i in ids],
    ],
    ids=["list", "tuple", "int32", "int64", "strided", "array", "view", "scalars"],
)
def test_block_ids_of_any_kind(kind: Any) -> None:
    with nodes() as pair:
        wanted = pair.target.copy()
        for name, of in wanted.items():
            of[2][[5, 6, 8]] = pair.source.planes[name][2][[1, 3, 0]]
        assert pair.write(kind([1, 3, 0]), kind([5, 6, 8]), 2) == 0
        assert pair.target.differs(wanted) == []


def test_keywords_of_the_methods() -> None:
    with nodes() as pair:
        ids = {"local_block_ids": [0, 1], "remote_block_ids": [3, 4], "layer_idx": 0}
        write = pair.prefill.write_cache
        assert write(dst_ip=HOST, dst_port=pair.port, **ids) == 0  # type: ignore[arg-type]
        assert write(ip=HOST, port=pair.port, **ids) == 0  # type: ignore[arg-type]
        connect = pair.prefill.connect
        assert connect(dst_ip=HOST, dst_port=pair.port, dst_tp_size=0) == 0
        assert pair.prefill.is_connected(dst_ip=HOST, dst_port=pair.port)


@pytest.mark.parametrize(
    "planes",
    [
        ("k",),
        ("k", "v"),
        ("k", "k_scale"),
        ("k", "v", "k_scale"),
        ("k", "v", "v_scale"),
        ("k", "v", "k_scale", "v_scale"),
    ],
    ids="+".join,
)
def test_any_mix_of_planes(planes: tuple[str, ...]) -> None:
    with nodes(memory(1, planes), memory(2, planes)) as pair:
        pair.check_write([1, 2, 9], [30, 2, 4], 1)
        pair.check_write([0], [31], 2)


# -- different tensor parallelism ----------------------------------------------------


@pytest.mark.parametrize("planes", [("k", "v"), ("k", "v", "k_scale", "v_scale")])
def test_ranks_write_their_part_of_one_decode_rank(planes: tuple[str, ...]) -> None:
    """Stride and offset by size and index, as the original has it."""
    tp_size = 4
    target = memory(
        9, planes, block_bytes=BLOCK_BYTES * tp_size, scale_bytes=24 * tp_size
    )
    wanted, port = target.copy(), free_port()
    ours, theirs = [3, 1, 8], [0, 31, 7]
    with communicator("decode", port, target):
        for index in range(tp_size):
            source = memory(index, planes)
            with communicator(
                "prefill", "0", source, prefill_tp_size=tp_size, prefill_tp_idx=index
            ) as prefill:
                assert prefill.connect(HOST, str(port), 1) == 0
                assert prefill.write_cache(HOST, port, ours, theirs, 2) == 0
            for name, of in wanted.items():
                part = source.planes[name][2][ours]
                at = slice(index * part.shape[1], (index + 1) * part.shape[1])
                of[2][theirs, at] = part
    assert target.differs(wanted) == []


def test_a_latent_is_not_sliced() -> None:
    """The original would write every rank but the first to a wrong address."""
    target, port = memory(9, ("k",)), free_port()
    with communicator("decode", port, target):
        for index in range(2):
            source = memory(index, ("k",))
            with communicator(
                "prefill", "0", source, prefill_tp_size=2, prefill_tp_idx=index
            ) as prefill:
                assert prefill.connect(HOST, port, 1) == 0
                assert prefill.connect(HOST, port, 1) == 0
                wanted = target.copy()
                wanted["k"][1][[4, 5]] = source.planes["k"][1][[2, 3]]
                assert prefill.write_cache(HOST, port, [2, 3], [4, 5], 1) == 0
                assert target.differs(wanted) == []


def test_a_latent_that_is_sliced_all_the_same() -> None:
    target = memory(9, ("k",), block_bytes=2 * BLOCK_BYTES)
    with nodes(
        memory(1, ("k",)), target, dst_tp_size=1, prefill_tp_size=2, prefill_tp_idx=1
    ) as pair:
        wanted = target.copy()
        wanted["k"][0][7, BLOCK_BYTES:] = pair.source.planes["k"][0][2]
        assert pair.write([2], [7]) == 0
        assert target.differs(wanted) == []


@pytest.mark.parametrize(
    ("tp_size", "index", "dst_tp_size", "block_bytes", "code"),
    [
        (2, 0, 1, BLOCK_BYTES, 2),
        (4, 0, 2, BLOCK_BYTES * 2, 2),
        (1, 0, 2, BLOCK_BYTES // 2, 2),
        (2, 2, 1, BLOCK_BYTES * 2, 4),
        (0, 0, 1, BLOCK_BYTES, 4),
    ],
)
def test_parallelism_that_does_not_fit_is_refused(
    tp_size: int, index: int, dst_tp_size: int, block_bytes: int, code: int
) -> None:
    """Where the original goes on with addresses that are wrong."""
    port = free_port()
    with (
        communicator("decode", port, memory(2, block_bytes=block_bytes)),
        communicator(
            "prefill", 0, memory(1), prefill_tp_size=tp_size, prefill_tp_idx=index
        ) as prefill,
    ):
        assert prefill.connect(HOST, port, dst_tp_size) == code
        assert not prefill.is_connected(HOST, port)


# -- the environment ------------------------------------------------------------------


def test_one_variable_sets_the_port_of_both_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    monkeypatch.setenv("SET_RDMA_DEST_PORT", str(port))
    with (
        communicator("decode", "1", memory(2)),
        communicator("prefill", "0", memory(1)) as prefill,
    ):
        assert prefill.connect(HOST, "2") == 0
        monkeypatch.delenv("SET_RDMA_DEST_PORT")  # read once, by the constructor
        assert prefill.is_connected(HOST, "3")
        assert prefill.write_cache(HOST, 4, [1], [1], 0) == 0


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("KVCACHE_RDMA_NICS", "mlx5_9", "no device 'mlx5_9'"),
        ("KVCACHE_IB_TIMEOUT", "13", "14 to 31"),
        ("KVCACHE_IB_TIMEOUT", "32", "14 to 31"),
        ("KVCACHE_RELAX_ORDERING", "maybe", "true or false"),
        ("KVCACHE_RDMA_GID_INDEX", "three", "an integer"),
        ("KVCACHE_SOCKET_IFNAME", "no0", "no such interface; there are .*lo"),
        ("KVCACHE_ERROR_FILE", "/no/such/dir/log", "cannot write"),
    ],
)
def test_values_that_cannot_be(
    name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong NIC name divides by zero in the original."""
    monkeypatch.setenv(name, value)
    with (
        pytest.raises(RuntimeError, match=text),
        communicator("prefill", "0", memory(1)),
    ):
        pass


def test_options_reach_the_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("KVCACHE_IB_TIMEOUT", "20"),
        ("KVCACHE_RELAX_ORDERING", "1"),
        ("KVCACHE_RDMA_GID_INDEX", "3"),  # as everybody is told to
        ("KVXFER_TC", "106"),
    ):
        monkeypatch.setenv(name, value)
    with nodes() as pair:
        options = pair.prefill._ends.client().options
        assert (options.ib_timeout, options.relaxed_ordering) == (20, True)
        assert (options.gid_index, options.traffic_class) == (3, 106)
        assert options.gpu_index == 0
        pair.check_write([1], [2])
    monkeypatch.setenv("KVCACHE_RDMA_GID_INDEX", "-1")
    with nodes() as pair:
        pair.check_write([1], [2])


def test_a_decode_node_listens_on_one_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVCACHE_SOCKET_IFNAME", "lo")
    with nodes() as pair:
        listener = pair.decode._ends._listener
        assert listener is not None
        assert listener.server.endpoint == f"127.0.0.1:{pair.port}"


def test_log_files(tmp_path: Path) -> None:
    run = run_program(
        """
        import os
        from tests.communicators import communicator, memory, nodes
        with nodes() as pair:
            assert pair.write([99], [1]) == -1
        print(os.getpid())
        """,
        KVCACHE_DEBUG="on",
        KVCACHE_DEBUG_FILE=str(tmp_path / "debug.%p"),
        KVCACHE_ERROR_FILE=str(tmp_path / "error"),
    )
    assert run.returncode == 0 and "99" in run.stderr
    debug = (tmp_path / f"debug.{run.stdout.strip()}").read_text()
    error = (tmp_path / "error").read_text()
    assert "connected by soft0" in debug and "connected by" not in error
    assert "99" in error and "99" in debug
    run = run_program("from tests.communicators import nodes\nwith nodes(): pass")
    assert (run.returncode, run.stderr) == (0, "")


# -- life -----------------------------------------------------------------------------


def test_it_is_closed_when_it_is_collected() -> None:
    held, port = memory(1), free_port()
    made = RDMACommunicator("decode", 0, port, *_four(held))
    del made
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "kvxfer-close":
            thread.join(SOON)
    with communicator("decode", port, held):
        pass


def _four(held: Any) -> tuple[Any, ...]:
    arguments = held.arguments()
    names = ("key_cache_ptrs", "value_cache_ptrs", "block_number", "block_bytes")
    return tuple(arguments[name] for name in names)


def test_after_a_close_there_are_codes_as_well() -> None:
    with nodes() as pair:
        pair.prefill.close()
        pair.prefill.close()
        assert not pair.prefill.is_connected(HOST, pair.port)
        assert pair.write([1], [1]) == -1
        assert pair.prefill.connect(HOST, pair.port) == 2


def test_a_process_may_exit_without_a_close() -> None:
    run = run_program(
        """
        from rdma_comm import RDMACommunicator
        from tests.communicators import free_port, memory
        source, target, port = memory(1), memory(2), free_port()
        decode = RDMACommunicator("decode", 0, port, **target.arguments())
        prefill = RDMACommunicator("prefill", 0, "0", **source.arguments())
        assert prefill.connect("127.0.0.1", port) == 0
        assert prefill.write_cache("127.0.0.1", port, [1], [2], 0) == 0
        """
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_module_is_what_fastdeploy_imports() -> None:
    assert rdma_comm.RDMACommunicator is RDMACommunicator
    assert isinstance(rdma_comm.__version__, str)
