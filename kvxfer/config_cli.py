"""``kvxfer config``: the options in force, and where each comes from."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvxfer import command
from kvxfer.errors import OptionError
from kvxfer.options import OPTIONS, Options, Setting, Value, remarks


def text(value: Value) -> str:
    """Write a value as the options take it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_json(setting: Setting) -> dict[str, object]:
    """Put a setting into an object of JSON."""
    option = setting.option
    return {
        "name": option.name,
        "value": setting.value,
        "source": setting.source,
        "default": option.default,
        "type": option.kind.__name__,
        "unit": option.unit,
        "low": option.low,
        "high": option.high,
        "choices": list(option.choices),
        "environment": list(option.env),
        "help": option.help,
    }


def markdown() -> str:
    """Describe all options in tables, for docs/options.md."""
    lines = [
        "| option | default | range | environment | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for option in OPTIONS:
        variables = ", ".join(f"`{name}`" for name in option.env)
        lines.append(
            f"| `{option.name}` | {text(option.default)} | {option.describe_range()} "
            f"| {variables} | {option.help} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a table [kvxfer].",
)
@click.option("--changed", is_flag=True, help="Only what is not the default.")
@click.option("--json", "machine", is_flag=True, help="One JSON object an option.")
def main(config: Path | None, changed: bool, machine: bool) -> None:
    """Print the options in force and where each comes from.

    They come from KVXFER_* variables, from the file of --config or KVXFER_CONFIG,
    or are the defaults; what a program is given as an argument goes before all.
    """
    try:
        settings = Options.explain(config=config)
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    if changed:
        settings = [s for s in settings if s.source != "default"]
    if machine:
        for setting in settings:
            click.echo(json.dumps(as_json(setting)))
    else:
        command.show_table(
            ("option", "value", "from", "permitted"),
            [
                [s.option.name, text(s.value), s.source, s.option.describe_range()]
                for s in settings
            ],
        )
    for remark in remarks():
        click.echo(f"kvxfer: {remark}", err=True)


if __name__ == "__main__":
    main(prog_name="kvxfer config")
