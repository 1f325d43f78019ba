"""The options that the commands of the bench share, and what is checked of them."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from kvxfer import command
from kvxfer.bench import contenders as who
from kvxfer.bench import nics, plots
from kvxfer.bench.contenders import Contender
from kvxfer.bench.peers import find_mooncake_bench
from kvxfer.bench.presets import PRESETS
from kvxfer.bench.report import Report
from kvxfer.bench.runner import Settings
from kvxfer.bench.workload import Workload, parse_batches
from kvxfer.errors import UsageError
from kvxfer.options import Options
from kvxfer.sizes import format_size, parse_size, parse_sizes

_F = TypeVar("_F", bound=Callable[..., Any])

_MARGIN_BYTES = 512 << 20
_QUICK_POOL, _QUICK_WINDOW = 64 << 20, 0.05
_IMPORT_SECONDS = 60


def names(text: str) -> tuple[str, ...]:
    """Split a list of names."""
    return tuple(name.strip() for name in text.split(","))


def use_preset(
    context: click.Context, parameter: click.Parameter, name: str | None
) -> str | None:
    """Take the defaults of the other options from a preset; for click."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **PRESETS[name].defaults}
    return name


def _add(options: Iterable[Callable[[_F], _F]], function: _F) -> _F:
    for option in reversed(list(options)):
        function = option(function)
    return function


def workload_options(function: _F) -> _F:
    """Add the options that say which blocks are moved, and for how long."""
    positive = click.IntRange(min=1)
    return _add(
        [
            click.option(
                "--sizes",
                metavar="SIZES",
                callback=command.reading(parse_sizes),
                default="1K..256K",
                show_default=True,
                help="Bytes of a block: by commas; A..B is every power of two between.",
            ),
            click.option(
                "--batch",
                "batches",
                metavar="COUNTS",
                callback=command.reading(parse_batches),
                default="1538",
                show_default=True,
                help="Blocks of a batch: by commas; A..B goes up by doubling.",
            ),
            click.option(
                "--planes",
                metavar="NAMES",
                callback=command.reading(names),
                help="Names of the planes, by commas.  [kv; with --target k,v]",
            ),
            click.option(
                "--pattern",
                default="random",
                show_default=True,
                help="How a batch lies: random, contiguous, or runs:N.",
            ),
            click.option(
                "--pool",
                metavar="SIZE",
                callback=command.reading(parse_size),
                default="2G",
                show_default=True,
                help="Memory of each side; larger than the caches, so that it is cold.",
            ),
            click.option(
                "--rounds",
                type=positive,
                default=1,
                show_default=True,
                help="How often each contender is measured; comparisons want 12.",
            ),
            click.option(
                "--window",
                type=click.FloatRange(min=0.001, max=60),
                default=0.3,
                show_default=True,
                help="Seconds of a timed window.",
            ),
            click.option("--quick", is_flag=True, help="A look: less memory and time."),
            click.option(
                "--seed",
                type=click.IntRange(min=0),
                default=1,
                show_default=True,
                help="Which blocks, and in which order contenders run.",
            ),
        ],
        function,
    )


def transfer_options(function: _F) -> _F:
    """Add the options that say how kvxfer itself is run."""
    positive = click.IntRange(min=1)
    return _add(
        [
            click.option(
                "--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]"
            ),
            click.option(
                "--wire", help="Wire of the software device: auto, shm, cma, tcp."
            ),
            click.option(
                "--memory",
                type=click.Choice(["shared", "ordinary"]),
                default="shared",
                show_default=True,
                help="shared: as KVCache.allocate makes it. ordinary: private memory.",
            ),
            click.option("--qps", type=positive, help="QPs of each connection."),
            click.option(
                "--chain", type=positive, help="WRs posted with one doorbell."
            ),
            click.option("--progress", help="How completions are waited for."),
            click.option(
                "--config",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="TOML file with options of kvxfer in [kvxfer].",
            ),
        ],
        function,
    )


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Files that a report is written to."""

    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    html: Path | None = None

    def check(self) -> None:
        """Refuse what cannot be written, before anything is measured.

        Raises:
          UsageError, KVXferError: See :func:`plots.check_plot`.
        """
        for path in (self.json, self.csv, self.plot, self.html):
            if path is not None and not path.parent.is_dir():
                raise UsageError(f"{path}: there is no folder {path.parent}")
        if self.plot is not None:
            plots.check_plot(self.plot)
        if self.html is not None:
            plots.need_matplotlib("--html")

    def write(self, report: Report) -> None:
        """Write all of them.

        Raises:
          KVXferError: One cannot be written.
        """
        if self.json is not None:
            report.write_json(self.json)
        if self.csv is not None:
            report.write_csv(self.csv)
        if self.plot is not None:
            plots.draw(report, self.plot)
        if self.html is not None:
            plots.write_page(report, self.html)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that make an :class:`Outputs`, given as ``outputs``."""
    path = click.Path(dir_okay=False, path_type=Path)

    @functools.wraps(function)
    def wrapper(
        json_path: Path | None,
        csv_path: Path | None,
        plot: Path | None,
        html: Path | None,
        **kwargs: Any,
    ) -> Any:
        return function(outputs=Outputs(json_path, csv_path, plot, html), **kwargs)

    return _add(
        [
            click.option("--json", "json_path", type=path, help="Write all as JSON."),
            click.option("--csv", "csv_path", type=path, help="Write a line a window."),
            click.option("--plot", type=path, help="Draw to a PNG or SVG."),
            click.option("--html", type=path, help="Write a page, all in one file."),
        ],
        wrapper,
    )


# -- what they come to ----------------------------------------------------------------


def collect_options(
    *,
    device: str | None,
    wire: str | None,
    qps: int | None,
    chain: int | None,
    progress: str | None,
    config: Path | None,
) -> dict[str, Any]:
    """Return the options of kvxfer that were given, once they were found good."""
    found = {"device": device, "soft_wire": wire, "qps_per_connection": qps}
    found |= {"chain": chain, "progress": progress}
    given = {name: value for name, value in found.items() if value is not None}
    options = command.load_options(config, **given)
    if config is None:
        return given
    # The processes of a pair read no file.
    values = dataclasses.asdict(options)
    return {name: value for name, value in values.items() if value is not None}


def choose(ours: str, against: Iterable[str], target: str | None) -> list[Contender]:
    """Return the contenders, the one that is compared first.

    Raises:
      UsageError: There is none of a name, or the others cannot reach the target.
    """
    if target is None:
        found = [who.find(name) for name in (ours, *against)]
        twice = {c.name for c in found if found.count(c) > 1}
        if twice:
            raise UsageError(f"{', '.join(twice)} is there twice")
        for contender in found:
            if nics.CHOOSE_DEVICE & set(contender.options):
                # Copies of memory and a NIC do not belong into one table.
                raise UsageError(
                    f"{contender.name}: a run has one device, see --device"
                )
        return found
    if against or ours != who.OURS:
        raise UsageError("--target takes write_cache only: nobody else has an endpoint")
    return [who.REMOTE]


def check(ours: Contender, workload: Workload, settings: Settings) -> None:
    """Refuse what cannot be measured, before anything is started.

    Args:
      ours: The contender that the others are compared with.

    Raises:
      UsageError: With the value, the limit and what to change.
    """
    planes = settings.extra["plane_names"]
    if len(set(planes)) < len(planes) or not all(planes):
        raise UsageError(f"--planes {','.join(planes)}: a name is empty or there twice")
    unheeded = settings.unheeded(ours)
    if unheeded:
        able = ", ".join(
            c.name for c in (who.WRITE_CACHE, *who.OTHERS) if not c.ignores
        )
        raise UsageError(
            f"{ours.name} does one batch at a time, from one thread: "
            f"{unheeded[0]} is for --contender {able}"
        )
    remote = settings.extra.get("target") is not None
    workload.check()
    # For an endpoint elsewhere each size has memory of its own, as it has there.
    check_memory(workload.pool_bytes, len(workload.sizes) if remote else 2)


def check_memory(pool_bytes: int, sides: int) -> None:
    """Refuse pools that this machine has no memory for.

    Raises:
      UsageError: With what there is and what would fit.
    """
    need = sides * pool_bytes + _MARGIN_BYTES
    available = command.available_bytes()
    if need > available:
        raise UsageError(
            f"{sides} pools of {format_size(pool_bytes)} take {need / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are available: a smaller --pool, "
            f"{max(0, available - _MARGIN_BYTES) // sides >> 20}M at most"
        )


def can_live_together(
    contenders: Sequence[Contender], workload: Workload, settings: Settings
) -> bool:
    """Say whether all pairs can live at the same time and each wait for its turn.

    The machine must have memory for them, and none may spin while it waits. Another
    engine that does is stopped meanwhile; kvxfer would take its peer for dead.
    """
    need = 2 * len(contenders) * workload.pool_bytes + _MARGIN_BYTES
    spins = any(
        Options.load(**{**settings.options, **each.options}).progress == "spin"
        for each in contenders
        if each.is_ours
    )
    return not spins and need <= command.available_bytes()


def quick(given: dict[str, Any], n_planes: int) -> None:
    """Where ``--quick`` was given, make small what the command line does not say.

    The pool still holds the largest batches twice, as it must.
    """
    if not given.pop("quick"):
        return
    in_flight = 2 * given["threads"] * given["depth"] * n_planes
    most = max(given["batches"]) * max(given["sizes"])
    least = in_flight * most + (n_planes << 20)
    limits = {"pool": max(_QUICK_POOL, least), "window": _QUICK_WINDOW, "rounds": 2}
    source = click.get_current_context().get_parameter_source
    for name, limit in limits.items():
        if source(name) is not ParameterSource.COMMANDLINE:
            given[name] = min(given[name], limit)


def find_peers(
    contenders: list[Contender], python: str
) -> tuple[list[Contender], dict[str, str]]:
    """Return the contenders that can be run, and of the others why not."""
    present: list[Contender] = []
    absent: dict[str, str] = {}
    for contender in contenders:
        if not contender.is_peer:
            present.append(contender)
            continue
        problem = _import_problem(contender, python)
        if contender.kind == "mooncake-bench":
            path = find_mooncake_bench(python)
            problem = "" if path else "transfer_engine_bench is not on PATH"
            parameters = {**contender.parameters, "bench": path}
            contender = dataclasses.replace(contender, parameters=parameters)
        if problem:
            install = f"{python} -m pip install {contender.packages}"
            absent[contender.name] = f"{problem}; install it with: {install}"
        else:
            present.append(contender)
    return present, absent


def require(ours: Contender, absent: Mapping[str, str]) -> None:
    """Refuse to measure the others alone.

    Raises:
      UsageError: The contender that they are compared with is not there.
    """
    if ours.name in absent:
        raise UsageError(f"{ours.name} cannot be measured: {absent[ours.name]}")


def _import_problem(contender: Contender, python: str) -> str:
    """Say why a Python cannot import an engine; empty if it can."""
    code = f"from kvxfer.bench.peers import load; load({contender.module!r})"
    home = str(Path(__file__).parent.parent.parent)
    try:
        done = subprocess.run(
            [
                python,
                "-c",
                f"import os, sys; sys.path.append({home!r}); {code}; os._exit(0)",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not run: {error}"
    if done.returncode == 0:
        return ""
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return f"not to be had in {python}: {last[0]}"
