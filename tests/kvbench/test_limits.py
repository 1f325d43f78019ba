"""What nixlbench would refuse is found, and a repaired plan has nothing to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxfer.kvbench.cli import main
from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.errors import PlanError
from kvxfer.kvbench.limits import check, repair
from kvxfer.kvbench.loading import load_model
from kvxfer.kvbench.plan import DEFAULTS, Plan, make_plan
from kvxfer.kvbench.sizing import Sizes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kvbench" / "examples"
MODEL = load_model(str(EXAMPLES / "model_deepseek_r1.yaml"))


def make(io: int = 4096, batch: int = 1, **options: Any) -> Plan:
    return make_plan(MODEL, ModelConfig("config.yaml"), Sizes(io, batch), options)


def problems(plan: Plan) -> str:
    return "\n".join(finding.problem for finding in check(plan))


def test_a_plain_plan_is_fine() -> None:
    assert check(make()) == []


@pytest.mark.parametrize(
    ("plan", "problem", "repaired"),
    [
        (
            make(589824, 5958, backend="GDS", source="gpu"),
            "more than the GDS batch pool holds: 32 batches of 128 are 4096",
            {"gds_batch_pool_size": 47, "initiator_seg_type": "VRAM"},
        ),
        (
            make(294912, 119141, backend="GDS", source="gpu"),
            "35136110592 bytes and does not fit into total_buffer_size 8589934592",
            {"total_buffer_size": 35136110592, "gds_batch_pool_size": 931},
        ),
        (
            make(4096, 100, num_threads=3, total_buffer_size=409600),
            "409600 / num_threads 3",
            {"total_buffer_size": 1228800},
        ),
        (
            make(4096, 100, num_initiator_dev=2, num_target_dev=3),
            "does not divide by threads and devices",
            {"total_buffer_size": 8589934596},
        ),
        (
            make(4096, 70000, backend="POSIX"),
            "more than the 65536",
            {"max_batch_size": 35000, "start_batch_size": 35000},
        ),
        (
            make(256, 40000, backend="POSIX", num_threads=3),
            "40000 requests at once by each of 3 threads are more than the 65536",
            {"max_batch_size": 20000, "start_batch_size": 20000},
        ),
        (
            make(1000, 4, backend="POSIX", storage_enable_direct=True),
            "not a multiple of 512, which every disk needs",
            {"max_block_size": 4096, "start_block_size": 4096},
        ),
        (
            make(1536, 4, backend="HF3FS", storage_enable_direct=True),
            "not a multiple of 4096",
            {"max_block_size": 4096},
        ),
        (
            make(backend="UCX_MO"),
            "UCX_MO is gone",
            {"backend": "UCX"},
        ),
        (
            make(worker_type="nvshmem", num_threads=4, source="gpu"),
            "worker_type nvshmem runs only with",
            {"num_threads": 1, "target_seg_type": "VRAM"},
        ),
        (
            make(device_list="mlx5_0,mlx5_1"),
            "needs as many initiator and target devices",
            {"num_initiator_dev": 2, "num_target_dev": 2},
        ),
        (
            make(backend="POSIX", initiator_seg_type="FILE"),
            "initiator_seg_type FILE",
            {"initiator_seg_type": "DRAM"},
        ),
        (
            make(storage_enable_direct=True),
            "means nothing to backend UCX",
            {"storage_enable_direct": False},
        ),
    ],
)
def test_found_and_mended(plan: Plan, problem: str, repaired: dict[str, Any]) -> None:
    assert problem in problems(plan)
    mended, changes = repair(plan)
    assert check(mended) == []
    assert {name: mended.params[name] for name in repaired} == repaired
    assert any(problem in change for change in changes)
    # What was changed is printed, default or not.
    assert repaired.keys() <= mended.command.keys()


@pytest.mark.parametrize("batch", [0, -5])
def test_nothing_to_transfer_has_no_repair(batch: int) -> None:
    with pytest.raises(PlanError, match=f"max_batch_size is {batch}"):
        repair(make(4096, batch))


counts = st.integers(1, 9)


@settings(max_examples=300, deadline=None)
@given(
    io=st.integers(1, 1 << 34),
    batch=st.integers(1, 1 << 22),
    backend=st.sampled_from(
        ["UCX", "UCX_MO", "GDS", "GDS_MT", "POSIX", "HF3FS", "OBJ"]
    ),
    options=st.fixed_dictionaries(
        {},
        optional={
            "num_threads": counts,
            "num_initiator_dev": counts,
            "num_target_dev": counts,
            "total_buffer_size": st.integers(1, 1 << 45),
            "storage_enable_direct": st.booleans(),
            "worker_type": st.sampled_from(["nixl", "nvshmem"]),
            "device_list": st.sampled_from(["all", "mlx5_0", "mlx5_0,mlx5_1"]),
            "gds_batch_limit": st.integers(1, 200),
            "initiator_seg_type": st.sampled_from(["DRAM", "VRAM", "FILE"]),
        },
    ),
)
def test_a_repaired_plan_passes(
    io: int, batch: int, backend: str, options: dict[str, Any]
) -> None:
    plan = make(io, batch, backend=backend, **options)
    mended, changes = repair(plan)
    assert check(mended) == []
    assert bool(changes) == (mended.params != plan.params)
    p = mended.params
    # nixlbench's own conditions, in its own terms.
    moved = p["max_block_size"] * p["max_batch_size"]
    for share in ("num_initiator_dev", "num_target_dev", "num_threads"):
        assert moved <= p["total_buffer_size"] // p[share]
    for side in ("num_initiator_dev", "num_target_dev"):
        assert p["total_buffer_size"] % (p[side] * p["num_threads"]) == 0


def test_every_shipped_example_can_be_repaired(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model in sorted(EXAMPLES.glob("model_*.yaml")):
        for backend in ("GDS", "POSIX", "UCX"):
            argv = ["plan", "--model", str(model), "--backend", backend, "--repair"]
            argv += ["--model_configs", str(EXAMPLES / "*-tp*.yaml")]
            assert main(argv) == 0
            assert "refuses" not in capsys.readouterr().err


def test_the_default_buffer_is_not_printed() -> None:
    assert "total_buffer_size" not in make().command
    assert make(total_buffer_size=8 << 30).command["total_buffer_size"] == 8 << 30
    assert DEFAULTS["total_buffer_size"] == 8 << 30
