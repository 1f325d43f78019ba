"""The four commands: from parsed options to output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from kvxfer.kvbench import sweep as sweeping
from kvxfer.kvbench.config import OVERRIDES, ModelConfig, find_configs, load_config
from kvxfer.kvbench.errors import KVBenchError, WrongUseError
from kvxfer.kvbench.exact import ExactSizes, exact_io_bytes, exact_sizes
from kvxfer.kvbench.explain import explain
from kvxfer.kvbench.formats import plans_csv, plans_json, plans_shell, plans_text
from kvxfer.kvbench.limits import check, repair
from kvxfer.kvbench.loading import load_model
from kvxfer.kvbench.models import Model
from kvxfer.kvbench.plan import DEFAULTS, Plan, make_plan
from kvxfer.kvbench.sizing import Sizes, reference_io_bytes, reference_sizes

__all__ = ["Sized", "iosize", "kvcache", "make_plans", "plan", "profile", "say"]

T = TypeVar("T")


@dataclass(slots=True)
class Sized:
    """One config with the sizings that were asked for."""

    model: Model
    config: ModelConfig
    reference: Sizes | None = None
    exact: ExactSizes | None = None
    why: list[str] = field(default_factory=list)


def say(kind: str, text: str) -> None:
    """Put one line of ``kind`` (warning, note, repaired, error) on stderr."""
    print(f"kvbench: {kind}: {text}", file=sys.stderr)


def plan(given: argparse.Namespace) -> int:
    """Print the plans, all or, if one fails, none."""
    sized = _sized(given)
    plans, explanations = make_plans(given, sized)
    if given.format == "json":
        text = plans_json(
            plans, explanations=explanations, show_secrets=given.show_secrets
        )
    elif given.format == "csv":
        text = plans_csv(plans, show_secrets=given.show_secrets)
    elif given.format == "shell":
        text = plans_shell(plans)
    else:
        text = plans_text(plans, show_secrets=given.show_secrets)
        text += "".join(_reasons(one) for one in sized)
    sys.stdout.write(text)
    if given.format in ("csv", "shell"):
        sys.stderr.write("".join(_reasons(one) for one in sized))
    return 0


def profile(given: argparse.Namespace) -> int:
    """Run the plans and write down the results."""
    from kvxfer.kvbench.profile import run

    return run(given, make_plans(given, _sized(given))[0])


def kvcache(given: argparse.Namespace) -> int:
    """Print what the caches weigh."""
    from kvxfer.kvbench import report

    if wants_sweep(given):
        sys.stdout.write(sweep(given, []))
        return 0
    sized = _sized(given)
    rows = []
    for one in sized:
        if one.reference is not None:
            rows.append(report.reference_row(one.model, one.config, one.reference))
        if one.exact is not None:
            rows.extend(report.exact_rows(one.model, one.config, one.exact))
    writers: dict[str, Callable[[list[report.CacheRow]], str]] = {
        "lines": report.lines,
        "table": report.rows_table,
        "json": report.rows_json,
        "csv": report.rows_csv,
    }
    text = writers[given.format](rows)
    reasons = "".join(_reasons(one) for one in sized)
    if given.format in ("lines", "table"):
        text += reasons
    else:
        sys.stderr.write(reasons)
    sys.stdout.write(text)
    return 0


def wants_sweep(given: argparse.Namespace) -> bool:
    """Does the command line ask how long a transfer takes?"""
    return bool(given.sweep or given.plot or given.bandwidth)


def sweep(
    given: argparse.Namespace, measured: list[float], *, only_check: bool = False
) -> str:
    """Compute the sweep, draw it if asked for, and return it as text.

    ``measured`` are bandwidths in bytes a second, beside those that were given.
    ``only_check`` finds what is wrong with it, and draws and says nothing else.
    """
    from kvxfer.kvbench import plot

    if given.plot:
        plot.check_target(given.plot)
    if not 0 < given.mfu <= 1:
        raise WrongUseError(f"--mfu {given.mfu}: expected a share above 0, up to 1")
    rates = [*map(sweeping.bandwidth, given.bandwidth), *measured]
    # Without an axis there is one point, at the config's own isl; drawn, a line.
    axis = sweeping.parse_axis(given.sweep) if given.sweep or given.plot else None
    model = load_model(given.model)
    found = _points(given, model, axis, rates)
    if only_check:
        return ""
    if any(point.prefill_seconds is None for point in found):
        say(
            "note",
            "the time of prefill needs the parameters that a token meets "
            "(--active_params) and a GPU that is known (system.hardware)",
        )
    if given.plot:
        plot.draw(found, f"KV cache of {model.name}", given.plot)
    return sweeping.render(found, getattr(given, "format", "table"))


def _points(
    given: argparse.Namespace,
    model: Model,
    axis: sweeping.Axis | None,
    rates: list[float],
) -> list[sweeping.Point]:
    overrides = {name: getattr(given, name) for name in OVERRIDES}

    def one(path: str) -> list[sweeping.Point]:
        config = load_config(path, overrides)
        if given.command != "profile":  # which has told of them with its plans
            _warn(config.warnings)
        return sweeping.points(
            model,
            config,
            axis or sweeping.Axis("isl", (float(config.isl),)),
            rates,
            active_params=given.active_params,
            mfu=given.mfu,
        )

    paths = find_configs(given.model_config, given.model_configs)
    return [point for points in _each(paths, one) for point in points]


def iosize(given: argparse.Namespace) -> int:
    """Print the bytes of one token as one transfer."""
    model = load_model(given.model)
    paths = find_configs(given.model_config, given.model_configs)
    size = exact_io_bytes if given.sizing == "exact" else _reference_token

    def one(path: str) -> int:
        config = load_config(path, {})
        _warn(config.warnings)
        return size(model, config)

    sizes = _each(paths, one)
    for path, found in zip(paths, sizes, strict=True):
        if len(paths) > 1:
            print(f"Model Config: {path}")
        print(f"IO Size per GPU: {found}")
    return 0


def _reference_token(model: Model, config: ModelConfig) -> int:
    return reference_io_bytes(model, config, 1)


def make_plans(
    given: argparse.Namespace, sized: Iterable[Sized]
) -> tuple[list[Plan], list[list[str]]]:
    """Return the plans, repaired if asked for, and to each why it is as it is."""
    chosen = {name: getattr(given, name) for name in DEFAULTS}
    chosen.update(source=given.source, destination=given.destination)
    plans: list[Plan] = []
    reasons: list[list[str]] = []
    for one in sized:
        made = []
        if one.reference is not None:
            made.append(make_plan(one.model, one.config, one.reference, chosen))
        for part in one.exact.parts if one.exact is not None else ():
            made.append(
                make_plan(
                    one.model,
                    one.config,
                    part.sizes,
                    chosen,
                    sizing="exact",
                    part=part.name,
                )
            )
        for plan in made:
            _warn(plan.notes)
            plans.append(_checked(plan, given.repair))
            reasons.append(one.why)
    return plans, reasons if any(reasons) else []


def _checked(plan: Plan, mend: bool) -> Plan:
    where = plan.config.path
    if mend:
        plan, changes = repair(plan)
        for change in changes:
            say("repaired", f"{where}: {change}")
        return plan
    findings = check(plan)
    for finding in findings:
        verdict = "nixlbench refuses this" if finding.refused else "not what it seems"
        say("warning", f"{where}: {verdict}: {finding.problem}")
    if any(finding.change for finding in findings):
        say("note", f"{where}: --repair changes the plan so that it runs")
    return plan


def _sized(given: argparse.Namespace) -> list[Sized]:
    """Load and size every config; if one fails, say which and compute none."""
    model = load_model(given.model)
    paths = find_configs(given.model_config, given.model_configs)
    overrides = {name: getattr(given, name) for name in OVERRIDES}
    wants_reference = given.sizing != "exact"
    wants_exact = given.sizing != "reference"
    wants_reasons = given.sizing == "both" or getattr(given, "explain", False)

    def one(path: str) -> Sized:
        config = load_config(path, overrides)
        _warn(config.warnings)
        sized = Sized(model, config)
        if wants_reference or wants_reasons:
            reference = reference_sizes(model, config)
            sized.reference = reference if wants_reference else None
        if wants_exact or wants_reasons:
            exact = exact_sizes(model, config)
            sized.exact = exact if wants_exact else None
        if wants_reasons:
            sized.why = explain(model, config, reference, exact)
        return sized

    return _each(paths, one)


def _each(paths: Iterable[str], compute: Callable[[str], T]) -> list[T]:
    """Compute all; tell of every failure before the first one is raised."""
    results: list[T] = []
    failures: list[KVBenchError] = []
    for path in paths:
        try:
            results.append(compute(path))
        except KVBenchError as error:
            text = str(error)
            failures.append(error)
            say("error", text if path in text else f"{path}: {text}")
    if failures:
        raise SystemExit(max(error.exit_code for error in failures))
    return results


def _reasons(sized: Sized) -> str:
    if not sized.why:
        return ""
    head = f"\nWhy the sizings differ for {sized.config.path}:\n"
    return head + "".join(f"  - {sentence}\n" for sentence in sized.why)


def _warn(texts: Iterable[str]) -> None:
    for text in texts:
        say("warning", text)
