"""The command line: options, and which command they go to."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial

from kvxfer.kvbench import options
from kvxfer.kvbench.errors import KVBenchError, WrongUseError

__all__ = ["main"]

_PROG = "kvxfer kvbench"
_FORMATS = ("text", "json", "csv", "shell")
_CACHE_FORMATS = ("lines", "table", "json", "csv")
_SIZINGS = ("reference", "exact", "both")
_ENGINES = ("nixlbench", "kvxfer", "file")
_PLACES = ("file", "memory", "gpu", "obj")
_COMMANDS = {
    "plan": "Display the recommended configuration for nixlbench",
    "profile": "Run nixlbench",
    "kvcache": "Display kvcache information",
    "iosize": "Display io size information",
}
# What the reference had at first and later; prefixes that were unambiguous then
# still mean the same, whatever options have come since.
_FIRST = [
    "model",
    "model_config",
    "model_configs",
    "pp",
    "tp",
    "isl",
    "osl",
    "num_requests",
    "page_size",
    "access_pattern",
    "format",
    "source",
    "destination",
]
_LATER: list[str] = []
for _option in options.OPTIONS:
    (_FIRST if _option.from_seed else _LATER).extend(
        _option.spellings or (_option.name,)
    )


def main(argv: Sequence[str] | None = None, prog: str = _PROG) -> int:
    """Run one command and return the process's exit code.

    0 is success, 1 a failed file, plan or run, 2 wrong use; a benchmark that ran
    and failed gives its own. Results go to stdout, everything else to stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments, prog)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2
    except KVBenchError as error:
        print(f"kvbench: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output is gone; so is the point of any more of it.
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("kvbench: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str], prog: str) -> int:
    first = next((i for i, a in enumerate(arguments) if not a.startswith("-")), None)
    name = None
    if first is not None:
        if arguments[first] == "io-size":  # its name for a week
            arguments[first] = "iosize"
        name = arguments[first]
    parser, command = _parsers(prog, name)
    if first is not None and command is not None:
        rest = arguments[first + 1 :]
        arguments[first + 1 :] = [_full_name(word, command) for word in rest]
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    if given.debug:
        logging.basicConfig(level=logging.DEBUG)
    if not given.model:
        raise WrongUseError("--model is required")
    # Imported late: what another command needs, this one does not wait for.
    from kvxfer.kvbench import commands as run

    return {
        "plan": run.plan,
        "profile": run.profile,
        "kvcache": run.kvcache,
        "iosize": run.iosize,
    }[given.command](given)


def _parsers(
    prog: str, name: str | None
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """Make the parser, and in it that of the command ``name``, if there is one.

    The other commands have no options: to make all of them takes longer than most
    commands run.
    """
    parser = argparse.ArgumentParser(prog=prog, description="KVBench")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--no-debug", dest="debug", action="store_false", help=argparse.SUPPRESS
    )
    sub = parser.add_subparsers(dest="command", help="Available commands")
    commands = {
        name: sub.add_parser(name, help=text) for name, text in _COMMANDS.items()
    }
    command = commands.get(name or "")
    if name is None or command is None:
        return parser, None
    command.description = f"{_COMMANDS[name]}."
    _add_model(command)
    if name != "iosize":
        _add_overrides(command)
    if name in ("plan", "profile"):
        _add_benchmark(command)
    if name == "plan":
        _add_plan(command)
    elif name == "kvcache":
        _add_kvcache(command)
    elif name == "profile":
        _add_profile(command)
    else:
        command.add_argument(
            "--sizing",
            type=_choice(_SIZINGS[:2]),
            default="reference",
            help=_SIZING_HELP,
        )
    return parser, command


_SIZING_HELP = (
    "The reference's figures, or what a GPU really holds (default: reference)"
)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="Model: a YAML file, a HuggingFace config.json or its folder, "
        "or the name of a shipped model",
    )
    group.add_argument("--model_config", help="Model config YAML file")
    group.add_argument(
        "--model_configs",
        nargs="+",
        action="extend",
        default=[],
        help="Several model config YAML files, or glob patterns",
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("in place of the model config's values")
    for name, text in (
        ("pp", "Pipeline parallelism size"),
        ("tp", "Tensor parallelism size"),
        ("isl", "Input sequence length"),
        ("osl", "Output sequence length"),
        ("num_requests", "Number of requests"),
        ("page_size", "Page size, tokens"),
    ):
        group.add_argument(f"--{name}", type=_integer, help=text)
    group.add_argument("--access_pattern", help="Access pattern [block, layer]")
    group.add_argument(
        "--source",
        type=_choice(_PLACES),
        help="Source of the nixl descriptors [file, memory, gpu, obj] "
        "(default: memory for network backends, else file)",
    )
    group.add_argument(
        "--destination",
        type=_choice(_PLACES),
        help="Destination of the nixl descriptors [file, memory, gpu, obj] "
        "(default: memory)",
    )


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark (dashes and underscores are the same)")
    for option in options.OPTIONS:
        names = [f"--{name}" for name in (option.name, *option.spellings)]
        choices = f" [{', '.join(option.choices)}]" if option.choices else ""
        default = "none" if option.default == "" else option.default
        text = f"{option.help}{choices} (default: {default})"
        if option.kind == "count":
            group.add_argument(
                *names, type=partial(_count, least=option.least), help=text
            )
        elif option.kind == "truth":
            group.add_argument(
                *names, nargs="?", const=True, type=_truth, metavar="BOOL", help=text
            )
        elif option.choices:
            group.add_argument(*names, type=_choice(option.choices), help=text)
        else:
            group.add_argument(*names, help=text)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        type=_format,
        default="text",
        help="Output format of the nixl command [text, json, csv, shell] "
        "(default: text)",
    )
    _add_sizing(parser)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="Change what nixlbench would refuse, and say what",
    )
    parser.add_argument(
        "--show_secrets", action="store_true", help="Print S3 keys as they are"
    )


def _add_sizing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizing",
        type=_choice(_SIZINGS),
        default="reference",
        help=f"{_SIZING_HELP}; both shows them side by side",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="Say why the two sizings differ (always with --sizing both)",
    )


def _add_kvcache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        type=_choice(_CACHE_FORMATS),
        default="lines",
        help="Output format [lines, table, json, csv] (default: lines)",
    )
    _add_sizing(parser)
    _add_sweep(parser)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how long a transfer takes")
    group.add_argument(
        "--bandwidth",
        action="append",
        default=[],
        metavar="RATE",
        help="Bandwidth of a NIC: 400G is bits a second, 50GB/s bytes; several may "
        "be given",
    )
    group.add_argument(
        "--sweep",
        metavar="AXIS=VALUES",
        help="Vary isl, tp, pp, page_size or bandwidth: isl=1000,10000,100000",
    )
    group.add_argument("--plot", metavar="FILE", help="Draw the sweep as .png or .svg")
    group.add_argument(
        "--active_params",
        type=float,
        help="Parameters that a token meets, for the time of prefill",
    )
    group.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="Share of the GPUs' peak that prefill reaches (default: 0.4)",
    )


def _add_profile(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--engine",
        type=_choice(_ENGINES),
        help="What measures [nixlbench, kvxfer, file] "
        "(default: nixlbench where it is on PATH, else kvxfer)",
    )
    group.add_argument(
        "--target",
        metavar="HOST:PORT",
        help="kvxfer endpoint to write to (default: one on this machine)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        help="Seconds that one run may take (default: 3600)",
    )
    group.add_argument(
        "--processes",
        type=partial(_count, least=1),
        help="nixlbench processes to start here (default: as many as the plan needs)",
    )
    group.add_argument("--output_json", metavar="FILE", help="Write the results here")
    group.add_argument("--output_csv", metavar="FILE", help="Write the results here")
    group.add_argument(
        "--dry_run", action="store_true", help="Print what would be run, and stop"
    )
    group.add_argument(
        "--repair",
        action="store_true",
        help="Change what nixlbench would refuse, and say what",
    )
    group.add_argument("--no_progress", action="store_true", help="No progress bar")
    group.add_argument(
        "--sizing", type=_choice(_SIZINGS[:2]), default="reference", help=_SIZING_HELP
    )
    _add_sweep(parser)


def _full_name(word: str, parser: argparse.ArgumentParser) -> str:
    """Spell out an option: dashes to underscores, a prefix to the whole name."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    known = [
        option[2:] for option in parser._option_string_actions if option[:2] == "--"
    ]
    if name not in known:
        for names in (_FIRST, [*_FIRST, *_LATER], known):
            matches = [one for one in names if one.startswith(name) and one in known]
            if len(matches) == 1:
                name = matches[0]
                break
    return f"--{name}{equals}{value}"


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _count(text: str, least: int) -> int:
    number = _integer(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is less than {least}")
    return number


def _truth(text: str) -> bool:
    try:
        return options.truth(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _choice(choices: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            return options.choice(text, choices)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def _format(text: str) -> str:
    """Check a plan's format; the reference takes no other case, and prints text."""
    if text in _FORMATS:
        return text
    if not text or text.lower() in _FORMATS:
        print(
            f"kvbench: warning: --format {text!r} is printed as text "
            f"(one of {', '.join(_FORMATS)})",
            file=sys.stderr,
        )
        return "text"
    return _choice(_FORMATS)(text)
