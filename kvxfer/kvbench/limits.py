"""What nixlbench and its backends would refuse in a plan, and the way round it.

Each rule looks at a plan's parameters, says what is wrong, and knows the change
that puts it right, where there is one. The rules are those of nixlbench's own
checks and of the fixed pools of its GDS and POSIX plugins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvxfer.kvbench.errors import PlanError
from kvxfer.kvbench.plan import NETWORK, STORAGE, Plan

__all__ = ["Finding", "POSIX_POOL", "check", "repair"]

POSIX_POOL = 65536
_SECTOR = 512
_PAGE = 4096
_SIZE_MAX = (1 << 64) - 1

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a plan.

    ``refused`` is False where it runs and measures something else than meant.
    ``change`` are the parameters that mend it; empty where nothing does.
    """

    problem: str
    refused: bool = True
    change: Params = field(default_factory=dict)
    how: str = ""


def check(plan: Plan) -> list[Finding]:
    """Return what is wrong with ``plan``, in a fixed order; empty if nothing."""
    return [finding for rule in _RULES for finding in rule(plan.params)]


def repair(plan: Plan) -> tuple[Plan, list[str]]:
    """Change ``plan`` until it runs; also say what was changed and why.

    The plan returned passes :func:`check`.

    Raises:
      PlanError: Something is wrong that no change of parameters mends.
    """
    changes: list[str] = []
    for _ in range(2 * len(_RULES)):
        findings = check(plan)
        if not findings:
            return plan, changes
        finding = next((one for one in findings if one.change), None)
        if finding is None:
            raise PlanError(f"no repair for this: {findings[0].problem}")
        plan = plan.changed(**finding.change)
        changes.append(f"{finding.how} ({finding.problem})")
    raise PlanError("the repairs do not come to an end; this is a bug in kvbench")


def _counts(p: Params) -> Iterator[Finding]:
    for name in ("max_batch_size", "max_block_size"):
        if p[name] < 1:
            yield Finding(f"{name} is {p[name]}: there is nothing to transfer")


def _backend(p: Params) -> Iterator[Finding]:
    if p["backend"] == "UCX_MO":
        yield Finding(
            "backend UCX_MO is gone from NIXL, and today's nixlbench refuses it",
            change={"backend": "UCX"},
            how="backend is now UCX",
        )


def _segments(p: Params) -> Iterator[Finding]:
    for name in ("initiator_seg_type", "target_seg_type"):
        if p[name] not in ("DRAM", "VRAM"):
            yield Finding(
                f"{name} {p[name]}: nixlbench takes DRAM or VRAM",
                change={name: "DRAM"},
                how=f"{name} is now DRAM",
            )
    if p["backend"] in ("GDS", "GDS_MT") and p["initiator_seg_type"] != "VRAM":
        yield Finding(
            f"backend {p['backend']} with initiator_seg_type "
            f"{p['initiator_seg_type']} moves host memory, not the GPU's",
            refused=False,
            change={"initiator_seg_type": "VRAM"},
            how="initiator_seg_type is now VRAM",
        )


def _worker(p: Params) -> Iterator[Finding]:
    if p["worker_type"] != "nvshmem":
        return
    wanted: Params = {
        "initiator_seg_type": "VRAM",
        "target_seg_type": "VRAM",
        "num_threads": 1,
        "num_initiator_dev": 1,
        "num_target_dev": 1,
        "scheme": "pairwise",
    }
    change = {name: value for name, value in wanted.items() if p[name] != value}
    if change:
        as_text = ", ".join(f"{name} {value}" for name, value in change.items())
        yield Finding(
            f"worker_type nvshmem runs only with {as_text}",
            change=change,
            how=f"now {as_text}",
        )


def _devices(p: Params) -> Iterator[Finding]:
    devices = p["device_list"].split(",")
    sides = (p["num_initiator_dev"], p["num_target_dev"])
    unused = p["backend"] in STORAGE or p["worker_type"] == "nvshmem"
    if p["scheme"] != "pairwise" or devices == ["all"] or unused:
        return
    if sides != (len(devices), len(devices)):
        yield Finding(
            f"scheme pairwise with {len(devices)} in device_list needs as many "
            f"initiator and target devices, not {sides[0]} and {sides[1]}",
            change={"num_initiator_dev": len(devices), "num_target_dev": len(devices)},
            how=f"num_initiator_dev and num_target_dev are now {len(devices)}",
        )


def _direct(p: Params) -> Iterator[Finding]:
    block = p["max_block_size"]
    if not p["storage_enable_direct"] or p["backend"] not in STORAGE:
        return
    if block % _PAGE and p["backend"] != "OBJ":
        rounded = -(-block // _PAGE) * _PAGE
        must = block % _SECTOR != 0
        yield Finding(
            f"direct I/O of {block} bytes: not a multiple of "
            f"{_SECTOR if must else _PAGE}, which "
            f"{'every disk' if must else 'a disk of 4096-byte sectors'} needs",
            refused=must,
            change={"start_block_size": rounded, "max_block_size": rounded},
            how=f"blocks are rounded up to {rounded} bytes",
        )


def _gds_pool(p: Params) -> Iterator[Finding]:
    if p["backend"] != "GDS":
        return
    pool, limit = p["gds_batch_pool_size"], p["gds_batch_limit"]
    needed = -(-p["max_batch_size"] // limit) * p["num_threads"]
    if needed > pool:
        yield Finding(
            f"{p['max_batch_size']} requests at once are more than the GDS batch "
            f"pool holds: {pool} batches of {limit} are {pool * limit}",
            change={"gds_batch_pool_size": needed},
            how=f"gds_batch_pool_size is now {needed}",
        )


def _posix_pool(p: Params) -> Iterator[Finding]:
    batch, threads = p["max_batch_size"], p["num_threads"]
    room = POSIX_POOL // threads  # they share one pool
    if p["backend"] != "POSIX" or batch <= room:
        return
    each = f" by each of {threads} threads" if threads > 1 else ""
    problem = (
        f"{batch} requests at once{each} are more than the {POSIX_POOL} that the "
        "POSIX backend can hold"
    )
    if room == 0:
        yield Finding(problem)
        return
    parts = -(-batch // room)
    even = -(-batch // parts)
    yield Finding(
        problem,
        change={"start_batch_size": even, "max_batch_size": even},
        how=f"a batch is now {even}: {parts} of them move the whole",
    )


def _buffer(p: Params) -> Iterator[Finding]:
    threads, total = p["num_threads"], p["total_buffer_size"]
    devices = {side: p[f"num_{side}_dev"] for side in ("initiator", "target")}
    moved = p["max_block_size"] * p["max_batch_size"]
    if moved < 1:
        return
    step = math.lcm(*(count * threads for count in devices.values()))
    # Threads and devices each have their own part, so all of them multiply.
    needed = -(-moved * threads * max(devices.values()) // step) * step
    if needed > _SIZE_MAX:
        yield Finding(f"a batch of {moved} bytes is more than can be addressed")
        return
    change: Params = {"total_buffer_size": needed}
    how = f"total_buffer_size is now {needed}"
    for name, count in (
        ("num_initiator_dev", devices["initiator"]),
        ("num_target_dev", devices["target"]),
        ("num_threads", threads),
    ):
        if moved > total // count:
            share = f" / {name} {count}" if count > 1 else ""
            yield Finding(
                f"one batch is {moved} bytes and does not fit into "
                f"total_buffer_size {total}{share}; give --total_buffer_size {needed}",
                change=change,
                how=how,
            )
            return
    if any(total % (count * threads) for count in devices.values()):
        rounded = max(needed, -(-total // step) * step)
        yield Finding(
            f"total_buffer_size {total} does not divide by threads and devices",
            change={"total_buffer_size": rounded},
            how=f"total_buffer_size is now {rounded}",
        )


def _network_direct(p: Params) -> Iterator[Finding]:
    if p["backend"] in NETWORK and p["storage_enable_direct"]:
        yield Finding(
            f"storage_enable_direct means nothing to backend {p['backend']}",
            refused=False,
            change={"storage_enable_direct": False},
            how="storage_enable_direct is off",
        )


_RULES: tuple[Callable[[Params], Iterator[Finding]], ...] = (
    _counts,
    _backend,
    _segments,
    _worker,
    _devices,
    _direct,
    _network_direct,
    _gds_pool,
    _posix_pool,
    _buffer,
)
