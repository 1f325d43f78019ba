"""``profile``: run the plans on an engine and hand on what it measured."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from kvxfer.kvbench.commands import sweep, wants_sweep
from kvxfer.kvbench.errors import RunError, WrongUseError
from kvxfer.kvbench.formats import heading, masked_command
from kvxfer.kvbench.plan import STORAGE, Plan
from kvxfer.kvbench.results import (
    Result,
    results_csv,
    results_json,
    results_table,
    write_file,
)

__all__ = ["run"]

_RULE = "=" * 80


def run(given: argparse.Namespace, plans: Sequence[Plan]) -> int:
    """Measure every plan, one after the other; return the exit code.

    Results so far are written out even if a later plan fails.

    Raises:
      RunError: An engine could not run or failed; its exit code goes along.
      WrongUseError: The plan is not one for the engine that was asked for.
    """
    if wants_sweep(given):
        sweep(given, [], only_check=True)
    engine = given.engine or ("nixlbench" if shutil.which("nixlbench") else "kvxfer")
    _check(engine, plans, given)
    results: list[Result] = []
    try:
        for plan in plans:
            print(f"{heading(plan)}\n{_RULE}", flush=True)
            if given.dry_run:
                print(_dry(engine, plan))
                continue
            results.extend(_measure(engine, plan, given))
    finally:
        if results:
            _hand_on(results, engine, given)
    if wants_sweep(given):
        rates = [row.bandwidth_gb_s * 1e9 for row in results]
        sys.stdout.write(f"\n{sweep(given, rates)}")
    return 0


def _check(engine: str, plans: Sequence[Plan], given: argparse.Namespace) -> None:
    if given.target is not None and engine != "kvxfer":
        raise WrongUseError(f"--target is for --engine kvxfer, not {engine}")
    if engine == "file":
        for plan in plans:
            backend = plan.params["backend"]
            if backend not in STORAGE or backend == "OBJ":
                raise WrongUseError(
                    f"--engine file measures storage plans, not backend {backend} "
                    "(give --backend POSIX, HF3FS, GDS or GDS_MT)"
                )
    if engine == "nixlbench" and not given.dry_run and not shutil.which("nixlbench"):
        raise RunError("nixlbench is not on PATH", exit_code=127)
    if engine == "kvxfer" and not given.dry_run:
        raise RunError(
            "engine kvxfer is not there yet: put nixlbench on PATH, or give "
            "--engine file with a storage backend"
        )


def _dry(engine: str, plan: Plan) -> str:
    if engine == "nixlbench":
        return masked_command(plan)
    params = plan.params
    return (
        f"engine {engine}: {params['op_type']} {params['max_batch_size']} x "
        f"{params['max_block_size']} bytes, {params['num_iter']} times after "
        f"{params['warmup_iter']}, {params['num_threads']} threads"
    )


def _measure(engine: str, plan: Plan, given: argparse.Namespace) -> list[Result]:
    if engine == "nixlbench":
        from kvxfer.kvbench.nixlbench import run_nixlbench

        return run_nixlbench(plan, timeout=given.timeout, here=given.processes)
    from kvxfer.kvbench.fileengine import run_file

    progress = sys.stderr.isatty() and not given.no_progress
    return [run_file(plan, timeout=given.timeout, progress=progress)]


def _hand_on(results: Sequence[Result], engine: str, given: argparse.Namespace) -> None:
    if engine != "nixlbench":  # it has printed its own
        sys.stdout.write(results_table(results))
    if given.output_json:
        write_file(given.output_json, results_json(results))
    if given.output_csv:
        write_file(given.output_csv, results_csv(results))
