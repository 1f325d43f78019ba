"""The ``kvxfer`` command. Each subcommand is loaded when it is asked for."""

from __future__ import annotations

import importlib
import sys

import click

from kvxfer._version import __version__

_COMMANDS = {
    "bench": "kvxfer.bench.cli",
    "config": "kvxfer.config_cli",
    "demo": "kvxfer.demo",
    "devices": "kvxfer.devices_cli",
    "doctor": "kvxfer.doctor.cli",
    "keys": "kvxfer.keys",
    "push": "kvxfer.push",
    "serve": "kvxfer.serve",
}
_HELP = {
    "bench": "Measure transfers, beside the machine's limits and other engines.",
    "config": "Print the options in force and where each comes from.",
    "demo": "Move and verify a request's KV cache between two processes.",
    "devices": "List the RDMA devices, which one is chosen, and why.",
    "doctor": "Check this machine, or the way to another, and say what to type.",
    "keys": "Make the keys by which endpoints know each other.",
    "kvbench": "Plan, size and measure the transfers that a model needs.",
    "push": "Write a request's KV cache into an endpoint.",
    "serve": "Run a decode endpoint.",
}


class _LazyGroup(click.Group):
    """Knows its subcommands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name]).main
        assert isinstance(command, click.Command)
        return command

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_HELP.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvxfer")
def _group() -> None:
    """Move the KV cache of language models between nodes over RDMA."""


def main() -> None:
    """Run the command line."""
    # kvbench has a parser of its own: it takes the reference's options as they are.
    if sys.argv[1:2] == ["kvbench"]:
        kvbench = importlib.import_module("kvxfer.kvbench.cli")
        sys.exit(kvbench.main(sys.argv[2:]))
    _group(prog_name="kvxfer")


if __name__ == "__main__":
    main()
