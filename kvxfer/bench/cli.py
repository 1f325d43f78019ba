"""``kvxfer bench``: the command line of the bench."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvxfer import command
from kvxfer.bench import contenders as who
from kvxfer.bench import flags, nics, runner, scale
from kvxfer.bench.contenders import Contender
from kvxfer.bench.flags import Outputs
from kvxfer.bench.presets import PRESETS
from kvxfer.bench.report import Report
from kvxfer.bench.runner import Event, Outcome, Settings
from kvxfer.bench.workload import Workload
from kvxfer.sizes import format_size

_WIDTH = 150


class Steps:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} windows"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
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
            text += f": {window['batch']} x {size}, {window['gb_per_s']:.2f} GB/s"
        self._progress.update(self._task, description=text)


async def measure(
    stop: asyncio.Event,
    contenders: list[Contender],
    workload: Workload,
    settings: Settings,
) -> Outcome | None:
    """Run the rounds; None if that was interrupted."""
    found: list[Outcome] = []
    seconds = runner.seconds_for(len(contenders), workload, settings)
    if seconds > 90:
        click.echo(f"kvxfer: this takes about {seconds / 60:.0f} minutes", err=True)
    total = settings.rounds * len(contenders) * len(workload.cases)
    with Steps(total) as steps:

        async def work() -> None:
            found.append(await runner.run(contenders, workload, settings, steps.step))

        if not await command.until(stop, work()):
            return None
    return found[0]


def finish(report: Report, outputs: Outputs) -> int:
    """Print and write a report; return the exit code."""
    report.print(Console(width=None if sys.stdout.isatty() else _WIDTH))
    for failure in report.outcome.failures:
        click.echo(f"kvxfer: {failure['contender']}: {failure['error']}", err=True)
    for name, why in report.absent.items():
        click.echo(f"kvxfer: {name} was left out: {why}", err=True)
    if report.wrong:
        click.echo(f"kvxfer: {report.wrong} blocks hold other bytes", err=True)
    outputs.write(report)
    bad = report.wrong or report.outcome.failures
    return command.EXIT_FAILED if bad else 0


def _plan(
    given: dict[str, Any], *, null: bool, remote: bool
) -> tuple[Workload, Settings]:
    """Make workload and settings of the options that a sweep was given."""
    planes = given.pop("planes") or (("k", "v") if remote else ("kv",))
    flags.quick(given, len(planes))
    threads, depth = given.pop("threads"), given.pop("depth")
    workload = Workload(
        given.pop("sizes"),
        given.pop("batches"),
        given.pop("pool"),
        given.pop("pattern"),
        len(planes),
        threads * depth,
        given.pop("seed"),
    )
    if null:
        given["device"] = "null0"
    settings = Settings(
        rounds=given.pop("rounds"),
        window=given.pop("window"),
        depth=depth,
        threads=threads,
        memory=given.pop("memory"),
        options=flags.collect_options(**given),
        extra={
            "plane_names": planes,
            "verify": not null,
            "by_time": null or workload.batches == (1,),
        },
    )
    return workload, settings


@click.command("sweep")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    is_eager=True,
    expose_value=False,
    callback=flags.use_preset,
    help="Defaults for the other options: one figure of the documentation.",
)
@flags.workload_options
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads that write, each with its connection.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Batches in flight for each thread.",
)
@click.option(
    "--op",
    type=click.Choice(["write", "read"]),
    default="write",
    show_default=True,
    help="read has no asyncio layer: a bare loop posts it.",
)
@click.option("--no-asyncio", is_flag=True, help="Use the engine without asyncio.")
@click.option("--null", is_flag=True, help="A device that does nothing: our own cost.")
@click.option("--contender", metavar="NAME", help="Whom to measure.  [kvxfer]")
@click.option(
    "--against",
    metavar="NAMES",
    callback=command.reading(flags.names),
    help="Whom to compare with, by commas, in the same rounds.",
)
@click.option(
    "--peer-python",
    metavar="PATH",
    envvar="KVXFER_BENCH_PEER_PYTHON",
    show_envvar=True,
    help="A Python that has the other engines.  [this one]",
)
@click.option(
    "--target",
    metavar="HOST:PORT",
    callback=command.check_address,
    help="Write into a kvxfer serve that runs there. One of --sizes is its block size; "
    "several are those of its own --sizes.",
)
@click.option("--dtype", help="With --target: tag of its element type.  [bf16]")
@flags.transfer_options
@flags.output_options
def sweep(
    *,
    op: str,
    no_asyncio: bool,
    null: bool,
    contender: str | None,
    against: tuple[str, ...] | None,
    peer_python: str | None,
    target: str | None,
    dtype: str | None,
    outputs: Outputs,
    **given: Any,
) -> None:
    """Measure writes of many small blocks, process to process.

    Every contender moves the same blocks, in pairs of processes that take turns, and
    what was moved is checked. GB is 1e9 bytes.
    """
    workload, asked = _plan(given, null=null, remote=target is not None)
    asked = dataclasses.replace(
        asked,
        peer_python=peer_python or sys.executable,
        extra={**asked.extra, "target": target, "dtype": dtype or "bf16"},
    )
    ours = contender or ("read" if op == "read" else "")
    ours = ours or ("no-asyncio" if no_asyncio else who.OURS)

    async def until_stopped(stop: asyncio.Event) -> int:
        outputs.check()
        chosen, with_device = flags.choose(ours, against or (), target), asked
        flags.check(chosen[0], workload, asked)
        if target is None:
            chosen, with_device = await asyncio.to_thread(
                nics.on_one_device, chosen, asked
            )
        present, absent = await asyncio.to_thread(
            flags.find_peers, chosen, asked.peer_python
        )
        flags.require(chosen[0], absent)
        settings = dataclasses.replace(
            with_device,
            together=flags.can_live_together(present, workload, with_device),
        )
        outcome = await measure(stop, present, workload, settings)
        if outcome is None:
            return 130
        return finish(Report(present, workload, settings, outcome, absent), outputs)

    command.run(until_stopped)


# -- the group ------------------------------------------------------------------------


class _Bench(click.Group):
    """Without a command it sweeps, and its help is that of the sweep."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in _HELP):
            args = [sweep.name or "", *args]
        return super().parse_args(ctx, args)

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        sweep.format_options(click.Context(sweep, parent=ctx), formatter)
        with formatter.section("Presets"):
            formatter.write_dl([(name, p.what) for name, p in PRESETS.items()])
        with formatter.section("Contenders"):
            formatter.write_dl(
                [
                    *((c.name, c.what) for c in (who.WRITE_CACHE, *who.OTHERS)),
                    ("kvxfer:OPTION=VALUE+...", "write_cache by other options"),
                    ("writes:COUNTxSIZE", "so many awaits of write_cache at once"),
                ]
            )
        self.format_commands(ctx, formatter)


_HELP = ("-h", "--help")


@click.group(
    cls=_Bench,
    context_settings={"help_option_names": list(_HELP)},
    subcommand_metavar="[sweep] [OPTIONS] | scale [OPTIONS]",
)
def main() -> None:
    """Measure writes of many small blocks, process to process.

    Every contender moves the same blocks, in pairs of processes that take turns, and
    what was moved is checked. GB is 1e9 bytes. Without a command it sweeps over block
    sizes and numbers of blocks.
    """


main.add_command(sweep)
main.add_command(scale.main, "scale")
