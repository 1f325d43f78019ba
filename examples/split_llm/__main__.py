"""Command line of the example: ``python -m examples.split_llm``.

Exit code 0 when every prompt gave the same tokens split and whole, 1 when one did
not or a process failed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .driver import Outcome, Settings

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "A train leaves at nine in the morning and arrives at a quarter past eleven. "
    "It stops twice on the way, for five minutes each time. How long is the train "
    "in motion? Explain the steps one after the other before you give the answer.",
    "Name three colours.",
)

# Not a multiple of a block's tokens: the last block of a chunk is sent twice.
CHUNK_TOKENS = 40

# The two processes inherit this. Everything the example needs is installed, so a
# look at the network could only delay it or change what it runs.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    # Imported only now: they read the environment when they are imported.
    try:
        from .channel import WorkerError
        from .driver import Settings
        from .model import gguf_path

        gguf_path()
    except ModuleNotFoundError as error:
        print(f"split_llm: {error}; scripts/demo-llm installs it", file=sys.stderr)
        return 1
    if options.timeline and importlib.util.find_spec("matplotlib") is None:
        print(
            "split_llm: --timeline needs matplotlib: pip install 'kvxfer[bench]'",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory(prefix="split-llm-") as scratch:
        settings = Settings(
            host=options.host,
            checkpoints=options.checkpoints or Path(scratch),
            max_new_tokens=options.max_new_tokens,
            chunk_tokens=options.chunk_tokens,
        )
        running = (_measure if options.measure else _compare)(options, settings)
        try:
            return asyncio.run(_within(running, options.timeout))
        except (WorkerError, OSError) as error:
            print(f"split_llm: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


async def _within(running: Coroutine[Any, Any, int], seconds: float) -> int:
    try:
        return await asyncio.wait_for(running, seconds)
    except asyncio.TimeoutError:
        print(f"split_llm: not done within {seconds:g} s", file=sys.stderr)
        return 1


async def _compare(options: argparse.Namespace, settings: Settings) -> int:
    from .driver import compare
    from .timeline import draw

    outcomes = await compare(options.prompt or PROMPTS, settings)
    if options.timeline:
        titled = [(outcome.prompt[:40], outcome.split.timeline) for outcome in outcomes]
        draw(titled, options.timeline)
    (_print_json if options.json else _print_table)(outcomes)
    return 0 if all(outcome.equal for outcome in outcomes) else 1


async def _measure(options: argparse.Namespace, settings: Settings) -> int:
    from .measure import as_json, measure
    from .timeline import draw

    measured = await measure(options.measure, options.prompt_tokens, settings)
    if options.timeline:
        draw(
            [(form, measured.typical(form)) for form in measured.splits],
            options.timeline,
        )
    if options.json:
        print(json.dumps(as_json(measured)))
    else:
        rows = measured.rows()
        table = Table(*rows[0], title=f"{measured.n_prompt_tokens} tokens")
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    if not measured.equal:
        print("split_llm: a run gave DIFFERENT tokens", file=sys.stderr)
    return 0 if measured.equal else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.split_llm",
        description="Split a language model into a prefill and a decode process, "
        "move the KV cache between them with kvxfer, and compare every token with "
        "the same model run whole.",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt; may be given several times (default: four of our own)",
    )
    parser.add_argument(
        "--max-new-tokens", type=_natural, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument(
        "--chunk-tokens",
        type=_natural,
        default=CHUNK_TOKENS,
        metavar="N",
        help="tokens of a prompt that are computed at once; 0: all of them "
        f"(default: {CHUNK_TOKENS})",
    )
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="PNG",
        help="draw when each layer was computed, sent and in place",
    )
    parser.add_argument(
        "--measure",
        type=_natural,
        default=0,
        metavar="ROUNDS",
        help="measure what streaming hides instead: one prompt, so many times "
        "streamed and sent in one piece at the end",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_natural,
        default=512,
        metavar="N",
        help="how long the prompt of --measure is, default: 512",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where the decode process listens"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="keep the unpacked model (540 MB) here and start faster next time",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="give up after this long, default: 300",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line a prompt, no table"
    )
    return parser


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(f"{value} is negative")
    return value


def _print_table(outcomes: Sequence[Outcome]) -> None:
    table = Table(show_lines=True)
    table.add_column("prompt, answer, blocks here>there", overflow="fold")
    for heading in ("tokens", "moved", "WRs"):
        table.add_column(heading, justify="right")
    table.add_column("device, wire")
    table.add_column("same")
    for outcome in outcomes:
        split = outcome.split
        pairs = zip(split.local_block_ids, split.remote_block_ids, strict=True)
        blocks = " ".join(f"{local}>{remote}" for local, remote in pairs)
        table.add_row(
            f"[dim]{escape(outcome.prompt)}[/dim]\n"
            f"{escape(outcome.text.strip())}\n[dim]{blocks}[/dim]",
            f"{outcome.n_prompt_tokens}+{len(split.tokens)}",
            f"{split.bytes / 1e6:.2f} MB",
            str(split.wrs),
            escape(f"{split.device}\n{split.wire}"),
            "[green]yes[/green]" if outcome.equal else "[red]NO[/red]",
        )
    console = Console()
    console.print(table)
    for outcome in outcomes:
        if not outcome.equal:
            console.print("split:", outcome.split.tokens)
            console.print("whole:", outcome.whole_tokens)
    console.print(_summary(outcomes))


def _summary(outcomes: Sequence[Outcome]) -> str:
    n_prompts = len(outcomes)
    n_different = sum(not outcome.equal for outcome in outcomes)
    if n_different:
        return f"{n_different} of {n_prompts} prompts gave DIFFERENT tokens."
    n_tokens = sum(len(outcome.split.tokens) for outcome in outcomes)
    n_layers = sum(outcome.n_layers for outcome in outcomes)
    n_hidden = sum(outcome.split.timeline.n_hidden for outcome in outcomes)
    prompts = "1 prompt" if n_prompts == 1 else f"{n_prompts} prompts at once"
    return (
        f"{prompts}, {n_tokens} tokens: all as the whole model gives them. {n_hidden} "
        f"of {n_layers} layers were in place before the last one of their prompt was "
        "computed."
    )


def _print_json(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        print(json.dumps({**dataclasses.asdict(outcome), "equal": outcome.equal}))


if __name__ == "__main__":
    sys.exit(main())
