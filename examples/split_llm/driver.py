"""The driver: starts both processes, runs the reference, compares the tokens."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from .channel import Worker
from .model import Model, Tokenizer, prepare_checkpoint
from .paged import blocks_for
from .timeline import Timeline

# Both pools have room for more than one run needs, and are of different sizes, so
# that a request's blocks lie scattered, and elsewhere on the other side.
SPARE_BLOCKS = {"prefill": 24, "decode": 56}
SEEDS = {"prefill": 11, "decode": 22}


@dataclass(frozen=True)
class Split:
    """One prompt through both processes: its tokens, and how its cache moved."""

    tokens: list[int]
    local_block_ids: list[int]
    remote_block_ids: list[int]
    bytes: int
    wrs: int
    device: str
    wire: str
    timeline: Timeline


@dataclass(frozen=True)
class Outcome:
    """One prompt: what the split model said, and what the whole one did."""

    prompt: str
    n_prompt_tokens: int
    n_layers: int
    split: Split
    whole_tokens: list[int]
    text: str

    @property
    def equal(self) -> bool:
        return self.split.tokens == self.whole_tokens


@dataclass(frozen=True)
class Settings:
    """How both programs of the example run the model.

    Attributes:
      host: Where the processes listen.
      checkpoints: Where the unpacked model is kept.
      max_new_tokens: Tokens to generate at most.
      chunk_tokens: Tokens of a prompt that are computed at once; 0: all of them.
    """

    host: str
    checkpoints: Path
    max_new_tokens: int
    chunk_tokens: int


async def compare(prompts: Sequence[str], settings: Settings) -> list[Outcome]:
    """Run all prompts split in two processes and whole in this one.

    All prompts are in flight at once.

    Raises:
      WorkerError: One of the processes failed.
    """
    say("loading the model")
    checkpoint = await asyncio.to_thread(prepare_checkpoint, settings.checkpoints, say)
    model = await asyncio.to_thread(Model, checkpoint)
    tokenizer = Tokenizer(checkpoint)
    token_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]

    given_up = threading.Event()

    def run_whole() -> list[list[int]]:
        return [
            model.run_whole(ids, settings.max_new_tokens)
            for ids in token_ids
            if not given_up.is_set()
        ]

    say("starting a prefill and a decode process")
    reference = asyncio.ensure_future(asyncio.to_thread(run_whole))
    n_blocks = sum(blocks_for(len(ids)) for ids in token_ids)
    try:
        async with both_processes(checkpoint, n_blocks, settings.host) as pair:
            say(f"running {len(prompts)} prompts through both")
            splits = await asyncio.gather(
                *(
                    pair.run(f"request-{n}", ids, settings)
                    for n, ids in enumerate(token_ids)
                )
            )
        say("running them whole, for comparison")
        whole = await reference
    finally:
        given_up.set()
    return [
        Outcome(
            prompt=prompt,
            n_prompt_tokens=len(ids),
            n_layers=model.shape.n_layers,
            split=split,
            whole_tokens=expected,
            text=tokenizer.decode(split.tokens),
        )
        for prompt, ids, split, expected in zip(
            prompts, token_ids, splits, whole, strict=True
        )
    ]


@dataclass(frozen=True)
class Pair:
    """Both processes, and where the prefill process takes offers."""

    prefill: Worker
    decode: Worker
    address: str

    async def run(
        self,
        request_id: str,
        token_ids: list[int],
        settings: Settings,
        *,
        streamed: bool = True,
    ) -> Split:
        """Run one prompt the way a router does: it tells both sides, at once.

        Which of them comes first does not matter.
        """
        computed, generated = await asyncio.gather(
            self.prefill.call(
                "prefill",
                request_id=request_id,
                token_ids=token_ids,
                chunk_tokens=settings.chunk_tokens,
                streamed=streamed,
            ),
            self.decode.call(
                "generate",
                request_id=request_id,
                n_tokens=len(token_ids),
                prefill=self.address,
                max_new_tokens=settings.max_new_tokens,
            ),
        )
        return Split(
            tokens=generated["tokens"],
            local_block_ids=computed["local_block_ids"],
            remote_block_ids=generated["remote_block_ids"],
            bytes=computed["bytes"],
            wrs=computed["wrs"],
            device=computed["device"],
            wire=computed["wire"],
            timeline=Timeline(
                computed=[tuple(times) for times in computed["computed"]],
                handed_over=computed["handed_over"],
                acknowledged=computed["acknowledged"],
                arrived=generated["arrived"],
                first_step=generated["first_step"],
            ),
        )


@asynccontextmanager
async def both_processes(
    checkpoint: Path, n_blocks: int, host: str
) -> AsyncIterator[Pair]:
    """Start the prefill and the decode process; end them after."""
    arguments = {
        name: (
            f"--checkpoint={checkpoint}",
            f"--blocks={n_blocks + SPARE_BLOCKS[name]}",
            f"--seed={SEEDS[name]}",
            f"--host={host}",
        )
        for name in ("prefill", "decode")
    }
    async with AsyncExitStack() as stack:
        prefill = await Worker.start("prefill", *arguments["prefill"])
        stack.push_async_callback(prefill.close)
        decode = await Worker.start("decode", *arguments["decode"])
        # Closed first, prefill last: that is the harder order for the library,
        # and in service nobody can choose it.
        stack.push_async_callback(decode.close)
        try:
            where = await prefill.call("where")
            yield Pair(prefill, decode, where["address"])
        except asyncio.CancelledError:
            # Ctrl-C or the timeout: nobody wants to wait for what they still do.
            prefill.kill()
            decode.kill()
            raise


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(f"split_llm: {text}", file=sys.stderr, flush=True)
