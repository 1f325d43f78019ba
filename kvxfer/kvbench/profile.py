"""``profile``: run the plans on an engine and hand on what it measured."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence

from kvxfer.kvbench.commands import say, sweep, wants_sweep
from kvxfer.kvbench.endpoint import MAX_BYTES, parse_target, pool_for, serve_line
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
            for remark in _remarks(plan, given) if engine == "kvxfer" else ():
                say("note", remark)
            if given.dry_run:
                print(_dry(engine, plan, given))
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
    if engine == "kvxfer":
        _check_kvxfer(plans, given)


def _check_kvxfer(plans: Sequence[Plan], given: argparse.Namespace) -> None:
    if given.target is not None:
        parse_target(given.target)
    for plan in plans:
        pool_for(plan.params)
        backend = plan.params["backend"]
        if backend in STORAGE:
            other = "" if backend == "OBJ" else "; --engine file measures it"
            raise WrongUseError(
                f"--engine kvxfer moves memory to memory, and backend {backend} is "
                f"for storage{other}"
            )
        if plan.params["op_type"] == "READ":
            raise WrongUseError(
                "--engine kvxfer writes and never reads: who has the blocks pushes "
                "them (--op_type WRITE measures that)"
            )


def _remarks(plan: Plan, given: argparse.Namespace) -> Iterator[str]:
    """Yield in what kvxfer's own engine measures another thing than the plan."""
    params = plan.params
    if "VRAM" in (params["initiator_seg_type"], params["target_seg_type"]):
        yield "kvxfer measures host memory, not VRAM"
    if max(params["num_initiator_dev"], params["num_target_dev"]) > 1:
        yield "kvxfer measures one device on each side"
    if params["scheme"] != "pairwise":
        yield f"kvxfer measures pairwise transfers, not scheme {params['scheme']}"
    if pool_for(params).places < params["max_batch_size"]:
        yield (
            f"a batch has more than the {MAX_BYTES} bytes that kvxfer measures with: "
            "it uses blocks again"
        )
    if params["check_consistency"]:
        yield (
            "the endpoint checks blocks while others arrive, which costs bandwidth"
            if given.target is None
            else "the target does the checking, if it was started with --verify"
        )


def _dry(engine: str, plan: Plan, given: argparse.Namespace) -> str:
    if engine == "nixlbench":
        return masked_command(plan)
    params = plan.params
    text = (
        f"engine {engine}: {params['op_type']} {params['max_batch_size']} x "
        f"{params['max_block_size']} bytes, {params['num_iter']} times after "
        f"{params['warmup_iter']}, {params['num_threads']} threads"
    )
    if engine == "kvxfer":
        host, port = parse_target(given.target) if given.target else ("127.0.0.1", 0)
        verify = params["check_consistency"]
        line = serve_line(pool_for(params), host, port, verify=verify)
        text += f"\nendpoint: {line}"
    return text


def _measure(engine: str, plan: Plan, given: argparse.Namespace) -> list[Result]:
    if engine == "nixlbench":
        from kvxfer.kvbench.nixlbench import run_nixlbench

        return run_nixlbench(plan, timeout=given.timeout, here=given.processes)
    progress = sys.stderr.isatty() and not given.no_progress
    if engine == "kvxfer":
        return [_measure_kvxfer(plan, given, progress)]
    from kvxfer.kvbench.fileengine import run_file

    return [run_file(plan, timeout=given.timeout, progress=progress)]


def _measure_kvxfer(plan: Plan, given: argparse.Namespace, progress: bool) -> Result:
    try:
        from kvxfer.kvbench.transferengine import run_transfer
    except ImportError as error:
        raise RunError(
            f"engine kvxfer needs the rest of kvxfer, built and installed: {error}"
        ) from error
    return run_transfer(
        plan, target=given.target, timeout=given.timeout, progress=progress
    )


def _hand_on(results: Sequence[Result], engine: str, given: argparse.Namespace) -> None:
    if engine != "nixlbench":  # it has printed its own
        sys.stdout.write(results_table(results))
    if given.output_json:
        write_file(given.output_json, results_json(results))
    if given.output_csv:
        write_file(given.output_csv, results_csv(results))
