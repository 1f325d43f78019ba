"""Plans as text, JSON, CSV and shell script."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from typing import Any

from kvxfer.kvbench.options import SECRETS
from kvxfer.kvbench.plan import NETWORK, Plan

__all__ = [
    "MASK",
    "heading",
    "masked_command",
    "plan_argv",
    "plans_csv",
    "plans_json",
    "plans_shell",
    "plans_text",
    "processes",
]

MASK = "********"
_RULE = "=" * 80
# The columns of a config, by section, as the reference names them.
_CONFIG_COLUMNS = {
    "strategy": ("tp_size", "pp_size", "model_quant_mode", "kvcache_quant_mode"),
    "runtime": ("num_requests", "isl", "osl"),
    "system": (
        "hardware",
        "backend",
        "page_size",
        "access_pattern",
        "source",
        "destination",
    ),
}


def plan_argv(plan: Plan) -> list[str]:
    """Return the command as a list of arguments, to run it. Holds the secrets.

    Truth values are written with ``=``: given apart, nixlbench takes the name
    for true and leaves the word after it over.
    """
    argv = ["nixlbench"]
    for name, value in plan.command.items():
        if isinstance(value, bool):
            argv.append(f"--{name}={str(value).lower()}")
        else:
            argv.extend((f"--{name}", str(value)))
    return argv


def heading(plan: Plan) -> str:
    """Return the lines that say what a plan is for."""
    config = plan.config
    lines = [
        f"Model Config: {config.path}",
        f"ISL: {config.isl} tokens",
        f"Page Size: {config.page_size}",
        f"Requests: {config.num_requests}",
        f"TP: {config.tp_size}",
        f"PP: {config.pp_size}",
    ]
    if plan.sizing != "reference":
        layers = f", {plan.part}" if plan.part else ""
        lines.append(f"Sizing: {plan.sizing}{layers}")
    return "\n".join(lines)


def plans_text(plans: Sequence[Plan], *, show_secrets: bool = False) -> str:
    """Return the plans as the reference prints them, a blank line between two."""
    texts = (
        f"{_RULE}\n{heading(plan)}\n{_RULE}\n{masked_command(plan, show_secrets)}\n"
        for plan in plans
    )
    return "\n".join(texts)


def masked_command(plan: Plan, show_secrets: bool = False) -> str:
    """Return the command, an option a line, its arguments quoted for a shell."""
    options = (
        f"    --{name} {shlex.quote(str(_shown(name, value, show_secrets)))}"
        for name, value in plan.command.items()
    )
    return " \\\n".join(["nixlbench", *options])


def plans_json(
    plans: Sequence[Plan],
    *,
    explanations: Sequence[Sequence[str]] = (),
    show_secrets: bool = False,
) -> str:
    """Return one JSON array, an object a plan, every option in it."""
    rows = []
    for i, plan in enumerate(plans):
        row = _row(plan, show_secrets)
        if explanations:
            row["explanation"] = list(explanations[i])
        rows.append(row)
    return json.dumps(rows, indent=2) + "\n"


def plans_csv(plans: Sequence[Plan], *, show_secrets: bool = False) -> str:
    """Return a header and a row a plan, the columns always in the same order."""
    rows = [_row(plan, show_secrets) for plan in plans]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def plans_shell(plans: Sequence[Plan]) -> str:
    """Return a script that runs the plans one after the other.

    Secrets are left to the environment. A network backend needs processes on both
    sides; ``KVBENCH_PROCESSES`` says how many of them to start on this host.
    """
    parts = ["#!/bin/sh", "set -eu", f"{_SHELL_RUN}"]
    for plan in plans:
        parts.append("\n".join(f"# {line}" for line in heading(plan).splitlines()))
        words = [
            f"    {_shell_option(name, value)}" for name, value in plan.command.items()
        ]
        parts.append(" \\\n".join([f"run {processes(plan)} nixlbench", *words]))
    return "\n".join(parts) + "\n"


# A process that fails is the script's failure, once all of them have ended.
_SHELL_RUN = """
run() {
    n=${KVBENCH_PROCESSES:-$1}; shift
    pids=; status=0
    while [ "$n" -gt 1 ]; do "$@" & pids="$pids $!"; n=$((n - 1)); done
    "$@" || status=$?
    for pid in $pids; do wait "$pid" || status=$?; done
    return "$status"
}
"""


def processes(plan: Plan) -> int:
    """How many nixlbench processes a run takes, on all hosts together."""
    if plan.params["backend"] not in NETWORK and plan.params["worker_type"] == "nixl":
        return 1
    if plan.params["mode"] == "MG":
        return 2
    sides = plan.params["num_initiator_dev"] + plan.params["num_target_dev"]
    return int(sides)


def _shell_option(name: str, value: object) -> str:
    if name in SECRETS and value:
        return f'--{name}="${{KVBENCH_{name.upper()}:?}}"'
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"--{name}={shlex.quote(text)}"


def _shown(name: str, value: object, show_secrets: bool) -> object:
    return MASK if name in SECRETS and value and not show_secrets else value


def _row(plan: Plan, show_secrets: bool) -> dict[str, Any]:
    row = {
        name: _shown(name, value, show_secrets) for name, value in plan.params.items()
    }
    # The reference's JSON has the group after the worker, not in front.
    group = row.pop("benchmark_group")
    ordered: dict[str, Any] = {}
    for name, value in row.items():
        ordered[name] = value
        if name == "worker_type":
            ordered["benchmark_group"] = group
    config = plan.config
    ordered["config_file"] = config.path
    ordered["model"] = plan.model.name
    for section, keys in _CONFIG_COLUMNS.items():
        for key in keys:
            ordered[f"model_{section}_{key}"] = getattr(config, key)
    ordered["sizing"] = plan.sizing
    ordered["layer_kind"] = plan.part
    return ordered
