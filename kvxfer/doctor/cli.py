"""The command: runs the checks, prints what they found, exits accordingly."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from kvxfer.doctor import checks, fabric
from kvxfer.doctor.machine import Machine
from kvxfer.doctor.report import Finding, Level, problem, verdict
from kvxfer.errors import OptionError, UsageError
from kvxfer.options import Options

_ROOT = Path("/")


def look(machine: Machine, options: Options) -> list[Finding]:
    """Run all checks that read; one that fails is a finding itself."""
    found: list[Finding] = []
    for check in (*checks.CHECKS, *fabric.CHECKS):
        try:
            found += check(machine, options)
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest is told
            # Several checks stumble over the same.
            _add(found, [_failed(check.__name__.replace("_", " "), error)])
    return found


def _failed(check: str, error: Exception) -> Finding:
    """Say of a check that it could not be made."""
    if isinstance(error, UsageError):
        return problem(
            check,
            f"{error}",
            "Nothing can be transferred with these options.",
            "kvxfer config prints the options in force and where each comes from",
        )
    if isinstance(error, ImportError):
        return problem(
            check,
            f"{error}",
            "It could not be looked at.",
            "see the line kvxfer above",
        )
    return problem(
        check,
        f"{type(error).__name__}: {error}",
        "It could not be looked at; the other lines do not depend on it.",
        "if what it names is as it should be, report it as a mistake of kvxfer",
    )


def _add(found: list[Finding], more: Iterable[Finding]) -> None:
    """Add findings, except problems that have been told."""
    told = {f.found for f in found if f.level is Level.PROBLEM}
    found += [f for f in more if f.found not in told]


async def transfers(machine: Machine, options: Options) -> list[Finding]:
    """Write and compare on each device that may be used."""
    from kvxfer.doctor import transfer

    try:
        verdicts = fabric.judged(machine, options)
    except Exception as error:  # noqa: BLE001 - as for look()
        return [_failed("choice", error)]
    found: list[Finding] = []
    for judged in verdicts:
        if not judged.usable:
            continue
        try:
            found += await transfer.loopback(judged, options)
        except Exception as error:  # noqa: BLE001 - the other devices are tried
            found.append(_failed(f"write {judged.spec.label}", error))
    return found


def show(findings: list[Finding], *, machine: bool, skip_ok: bool) -> None:
    """Print a report: JSON, a table on a terminal, plain text elsewhere."""
    shown = [f for f in findings if not skip_ok or f.level is not Level.OK]
    if machine:
        for finding in shown:
            row = dataclasses.asdict(finding)
            click.echo(json.dumps({**row, "level": finding.level.name.lower()}))
        return
    if sys.stdout.isatty():
        _show_table(shown)
    else:
        _show_text(shown)
    click.echo(verdict(findings))


def _show_text(findings: list[Finding]) -> None:
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        click.echo(
            f"{finding.level.value:<8} {finding.check:<{width}}  {finding.found}"
        )
        indent = " " * (11 + width)
        if finding.meaning:
            click.echo(f"{indent}{finding.meaning}")
        if finding.remedy:
            click.echo(f"{indent}-> {finding.remedy}")


def _show_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {
        Level.OK: "green",
        Level.NOTE: "cyan",
        Level.WARNING: "yellow",
        Level.PROBLEM: "bold red",
    }
    table = Table("", "check", "found, and what to do")
    for finding in findings:
        cell = Text(finding.found)
        if finding.meaning:
            cell.append(f"\n{finding.meaning}", style="dim")
        if finding.remedy:
            cell.append(f"\n-> {finding.remedy}", style="bold")
        level = Text(finding.level.value, style=colours[finding.level])
        table.add_row(level, finding.check, cell)
    Console().print(table)


def _split(address: str, option: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise click.UsageError(f"{option} is {address!r}, not HOST:PORT")
    return host.strip("[]"), int(port)


@click.command()
@click.option("--peer", metavar="HOST:PORT", help="Try the path to doctor --listen.")
@click.option("--listen", metavar="HOST:PORT", help="Be the other side of --peer.")
@click.option("--no-transfer", is_flag=True, help="Only look; write nothing.")
@click.option("--device", help="auto, soft, or a NIC as NAME[:PORT].  [auto]")
@click.option("--gpu-index", type=int, help="GPU that the cache is on.")
@click.option("--require-rdma", is_flag=True, default=None, help="Refuse software.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a table [kvxfer].",
)
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=_ROOT,
    help="Look at a copy of another machine's /sys, /proc, /dev and /etc.",
)
@click.option("--quiet", "skip_ok", is_flag=True, help="Leave out what is well.")
@click.option("--json", "machine", is_flag=True, help="One JSON object a finding.")
def main(
    peer: str | None,
    listen: str | None,
    no_transfer: bool,
    config: Path | None,
    root: Path,
    skip_ok: bool,
    machine: bool,
    **overrides: Any,
) -> None:
    """Check this machine: what was found, what it means, what to type.

    Looks at rdma-core, devices, ports, GIDs, limits, memory and the clock, then
    writes and compares blocks on each device. With --peer it tries the way to
    another host, where kvxfer doctor --listen runs. Exits with 1 if there is a
    problem; warnings are none.
    """
    if peer is not None and listen is not None:
        raise click.UsageError("--peer and --listen are the two sides: one of them")
    there = None if peer is None else _split(peer, "--peer")
    if root != _ROOT:
        overrides["sysfs"] = str(root / "sys")
    if listen is not None:
        overrides["host"], overrides["port"] = _split(listen, "--listen")
    try:
        options = Options.load(config=config, **overrides)
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    if listen is not None or there is not None:
        # Both sides transfer, which nothing of this can do without its compiled part.
        findings = list(checks.extension(Machine(), options))
        if _is_broken(findings):
            show(findings, machine=machine, skip_ok=skip_ok)
            sys.exit(1)
    if listen is not None:
        _listen(options)
        return
    try:
        findings = _examine(Machine(root), options, there, transfer=not no_transfer)
    except KeyboardInterrupt:
        sys.exit(130)
    show(findings, machine=machine, skip_ok=skip_ok)
    sys.exit(any(finding.level is Level.PROBLEM for finding in findings))


def _examine(
    machine: Machine, options: Options, there: tuple[str, int] | None, *, transfer: bool
) -> list[Finding]:
    if there is not None:
        from kvxfer.doctor.transfer import probe

        return asyncio.run(probe(*there, options))
    findings = look(machine, options)
    # Without the compiled part there is nothing to transfer with.
    if transfer and machine.is_this and not _is_broken(findings):
        _add(findings, asyncio.run(transfers(machine, options)))
    return findings


def _is_broken(findings: list[Finding]) -> bool:
    return any(f.check == "kvxfer" and f.level is Level.PROBLEM for f in findings)


def _listen(options: Options) -> None:
    """Be the other side until a signal."""
    from kvxfer import command
    from kvxfer.doctor.transfer import Listener

    async def serve(stop: asyncio.Event) -> int:
        async with Listener(options, lambda line: command.say(False, line)) as listener:
            command.say(False, f"listening: kvxfer doctor --peer {listener.endpoint}")
            await stop.wait()
        return 0

    command.run(serve)


if __name__ == "__main__":
    main(prog_name="kvxfer doctor")
