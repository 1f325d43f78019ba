"""``kvxfer bench``: the command line of the bench."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvxfer import command
from kvxfer.bench import contenders as who
from kvxfer.bench import runner
from kvxfer.bench.report import Report
from kvxfer.bench.runner import Event, Outcome, Settings
from kvxfer.bench.workload import Workload, format_size, parse_size, parse_sizes
from kvxfer.errors import UsageError

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
_MARGIN_BYTES = 512 << 20


def _reading(
    parse: Callable[[str], _T],
) -> Callable[[click.Context, click.Parameter, str | None], _T | None]:
    """Return a callback for click; what ``parse`` refuses is wrong use."""

    def read(
        context: click.Context, parameter: click.Parameter, text: str | None
    ) -> _T | None:
        try:
            return None if text is None else parse(text)
        except UsageError as error:
            raise click.BadParameter(str(error)) from error

    return read


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _transfer_options(function: _F) -> _F:
    """Add the options that say how kvxfer itself is run."""
    positive = click.IntRange(min=1)
    for option in (
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="TOML file with options of kvxfer in [kvxfer].",
        ),
        click.option(
            "--memory",
            type=click.Choice(["shared", "ordinary"]),
            default="shared",
            show_default=True,
            help="shared: as KVCache.allocate makes it. ordinary: private memory.",
        ),
        click.option("--progress", help="How completions are waited for."),
        click.option("--chain", type=positive, help="WRs posted with one doorbell."),
        click.option("--qps", type=positive, help="QPs of each connection."),
        click.option("--wire", help="Wire of the software device: auto, cma, tcp, ..."),
        click.option("--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]"),
    ):
        function = option(function)
    return function


def _output_options(function: _F) -> _F:
    """Add the options that say where the figures go."""
    path = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option("--csv", "csv_path", type=path, help="Write a line a window."),
        click.option("--json", "json_path", type=path, help="Write all of it as JSON."),
    ):
        function = option(function)
    return function


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
    names = {"device": device, "soft_wire": wire, "qps": qps, "chain": chain}
    names["progress"] = progress
    given = {name: value for name, value in names.items() if value is not None}
    options = command.load_options(config, **given)
    if config is not None:  # the processes of a pair read no file
        return {
            name: value
            for name, value in dataclasses.asdict(options).items()
            if value is not None
        }
    return given


def choose(against: Iterable[str], target: str | None) -> list[who.Contender]:
    """Return the contenders, ours first.

    Raises:
      UsageError: There is none of a name, or the others cannot reach the target.
    """
    if target is None:
        return [who.WRITE_CACHE, *(who.find(name) for name in against)]
    if against:
        raise UsageError("--against and --target: the others have no endpoint there")
    return [who.REMOTE]


def check(workload: Workload, settings: Settings) -> None:
    """Refuse what cannot be measured, before anything is started.

    Raises:
      UsageError: With the value, the limit and what to change.
    """
    names = settings.extra["plane_names"]
    if len(set(names)) < len(names) or not all(names):
        raise UsageError(f"--planes {','.join(names)}: a name is empty or there twice")
    remote = settings.extra["target"] is not None
    if remote and len(workload.sizes) != 1:
        raise UsageError(
            "--target has blocks of one size: say which, for example --sizes 32K"
        )
    workload.check()
    check_memory(workload, 1 if remote else 2)


def check_memory(workload: Workload, sides: int) -> None:
    """Refuse pools that this machine has no memory for.

    Raises:
      UsageError: With what there is and what would fit.
    """
    need = sides * workload.pool_bytes + _MARGIN_BYTES
    available = command.available_bytes()
    if need > available:
        raise UsageError(
            f"{sides} pools of {format_size(workload.pool_bytes)} take "
            f"{need / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available: a "
            f"smaller --pool, {(available - _MARGIN_BYTES) // sides >> 20}M at most"
        )


class Steps:
    """A bar on stderr, where that is a terminal, and notes beside it."""

    def __init__(self, total: int) -> None:
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} windows"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def step(self, number: int, name: str, window: Event | None) -> None:
        """Show a pair that begins, or a window that is done."""
        text = f"round {number + 1}, {name}"
        if window is not None:
            self._progress.advance(self._task)
            size = format_size(window["block_bytes"])
            text += f": {size} {window['gb_per_s']:.2f} GB/s"
        self._progress.update(self._task, description=text)


async def _measure(
    stop: asyncio.Event,
    contenders: list[who.Contender],
    workload: Workload,
    settings: Settings,
) -> Outcome | None:
    """Run the rounds; None if that was interrupted."""
    found: list[Outcome] = []
    total = settings.rounds * len(contenders) * len(workload.sizes)
    with Steps(total) as steps:

        async def work() -> None:
            found.append(await runner.run(contenders, workload, settings, steps.step))

        if not await command.until(stop, work()):
            return None
    return found[0]


def finish(report: Report, *, json_path: Path | None, csv_path: Path | None) -> int:
    """Print and write a report; return the exit code."""
    report.print(Console(width=None if sys.stdout.isatty() else 140))
    for failure in report.outcome.failures:
        click.echo(f"kvxfer: {failure['contender']}: {failure['error']}", err=True)
    for name, why in report.absent.items():
        click.echo(f"kvxfer: {name} was left out: {why}", err=True)
    if json_path is not None:
        report.write_json(json_path)
    if csv_path is not None:
        report.write_csv(csv_path)
    if report.wrong:
        click.echo(f"kvxfer: {report.wrong} blocks hold other bytes", err=True)
    bad = report.wrong or report.outcome.failures
    return command.EXIT_FAILED if bad else 0


@click.command()
@click.option(
    "--sizes",
    metavar="SIZES",
    callback=_reading(parse_sizes),
    default="1K..256K",
    show_default=True,
    help="Bytes of a block: by commas; A..B is every power of two between.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1538,
    show_default=True,
    help="Blocks of a batch.",
)
@click.option(
    "--planes",
    metavar="NAMES",
    callback=_reading(_names),
    help="Names of the planes, by commas.  [kv; with --target k,v]",
)
@click.option("--dtype", help="With --target: tag of its element type.  [bf16]")
@click.option(
    "--target",
    metavar="HOST:PORT",
    callback=command.check_address,
    help="Write into a kvxfer serve that runs there; --sizes is its block size.",
)
@click.option(
    "--pattern",
    default="random",
    show_default=True,
    help="How a batch lies: random, contiguous, or runs:N.",
)
@click.option(
    "--pool",
    metavar="SIZE",
    callback=_reading(parse_size),
    default="2G",
    show_default=True,
    help="Memory of each side; larger than the caches, so that it is cold.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batches in flight for each thread.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads that write, each with its connection.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How often; ratios want 12.",
)
@click.option(
    "--window",
    type=click.FloatRange(min=0.001, max=60),
    default=0.3,
    show_default=True,
    help="Seconds of a timed window.",
)
@click.option(
    "--against",
    metavar="NAMES",
    callback=_reading(_names),
    help="Others, by commas, in the same rounds.",
)
@click.option("--quick", is_flag=True, help="A look: small pools, short windows.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@_transfer_options
@_output_options
def main(
    sizes: tuple[int, ...],
    batch: int,
    planes: tuple[str, ...] | None,
    dtype: str | None,
    target: str | None,
    pattern: str,
    pool: int,
    depth: int,
    threads: int,
    rounds: int,
    window: float,
    against: tuple[str, ...] | None,
    quick: bool,
    seed: int,
    memory: str,
    json_path: Path | None,
    csv_path: Path | None,
    **ours: Any,
) -> None:
    """Measure writes of many small blocks, process to process."""
    if quick:
        pool, window = min(pool, 64 << 20), min(window, 0.05)
    names = planes or (("k", "v") if target else ("kv",))
    lanes = depth * threads
    workload = Workload(sizes, batch, pool, pattern, len(names), lanes, seed)
    settings = Settings(
        rounds=rounds,
        window=window,
        depth=depth,
        threads=threads,
        memory=memory,
        options=collect_options(**ours),
        extra={"plane_names": names, "target": target, "dtype": dtype or "bf16"},
    )

    async def until_stopped(stop: asyncio.Event) -> int:
        contenders = choose(against or (), target)
        check(workload, settings)
        outcome = await _measure(stop, contenders, workload, settings)
        if outcome is None:
            return 130
        report = Report(contenders, workload, settings, outcome, {})
        return finish(report, json_path=json_path, csv_path=csv_path)

    command.run(until_stopped)
