"""Command line of the example: ``python -m examples.split_llm``.

Exit code 0 when every prompt gave the same tokens split and whole, 1 when one did
not or a process failed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .driver import Outcome

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "A train leaves at nine in the morning and arrives at a quarter past eleven. "
    "It stops twice on the way, for five minutes each time. How long is the train "
    "in motion? Explain the steps one after the other before you give the answer.",
    "Name three colours.",
)

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
        from .driver import compare
        from .model import gguf_path

        gguf_path()
    except ModuleNotFoundError as error:
        print(f"split_llm: {error}; scripts/demo-llm installs it", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="split-llm-") as scratch:

        async def run() -> list[Outcome]:
            comparing = compare(
                options.prompt or PROMPTS,
                max_new_tokens=options.max_new_tokens,
                host=options.host,
                checkpoints=options.checkpoints or Path(scratch),
            )
            return await asyncio.wait_for(comparing, options.timeout)

        try:
            outcomes = asyncio.run(run())
        except (WorkerError, asyncio.TimeoutError) as error:
            reason = str(error) or f"not done within {options.timeout:g} s"
            print(f"split_llm: {reason}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    (_print_json if options.json else _print_table)(outcomes)
    return 0 if all(outcome.equal for outcome in outcomes) else 1


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
        "--max-new-tokens", type=int, default=32, metavar="N", help="default: 32"
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
    n_early = sum(outcome.split.early_layers for outcome in outcomes)
    prompts = "1 prompt" if n_prompts == 1 else f"{n_prompts} prompts at once"
    return (
        f"{prompts}, {n_tokens} tokens: all as the whole model gives them. {n_early} "
        f"of {n_layers} layers were in place before their prompt was computed to its "
        "end."
    )


def _print_json(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        print(json.dumps({**dataclasses.asdict(outcome), "equal": outcome.equal}))


if __name__ == "__main__":
    sys.exit(main())
