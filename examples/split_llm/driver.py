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

# Both pools have room for more than one run needs, and are of different sizes, so
# that a request's blocks lie scattered, and elsewhere on the other side.
SPARE_BLOCKS = {"prefill": 24, "decode": 56}
SEEDS = {"prefill": 11, "decode": 22}


@dataclass(frozen=True)
class Split:
    """One prompt through both processes: its tokens, and how its cache moved.

    ``early_layers`` were in the other process's blocks before the prompt was
    computed to its end.
    """

    tokens: list[int]
    local_block_ids: list[int]
    remote_block_ids: list[int]
    early_layers: int
    bytes: int
    wrs: int
    device: str
    wire: str


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


async def compare(
    prompts: Sequence[str], *, max_new_tokens: int, host: str, checkpoints: Path
) -> list[Outcome]:
    """Run all prompts split in two processes and whole in this one.

    All prompts are in flight at once. ``checkpoints`` is where the unpacked model
    is kept.

    Raises:
      WorkerError: One of the processes failed.
    """
    _say("loading the model")
    checkpoint = await asyncio.to_thread(prepare_checkpoint, checkpoints, _say)
    model = await asyncio.to_thread(Model, checkpoint)
    tokenizer = Tokenizer(checkpoint)
    token_ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]

    given_up = threading.Event()

    def run_whole() -> list[list[int]]:
        return [
            model.run_whole(ids, max_new_tokens)
            for ids in token_ids
            if not given_up.is_set()
        ]

    _say("starting a prefill and a decode process")
    reference = asyncio.ensure_future(asyncio.to_thread(run_whole))
    try:
        async with _both_processes(checkpoint, token_ids, host) as (prefill, decode):
            _say(f"running {len(prompts)} prompts through both")
            splits = await asyncio.gather(
                *(
                    _run_split(prefill, decode, f"request-{n}", ids, max_new_tokens)
                    for n, ids in enumerate(token_ids)
                )
            )
        _say("running them whole, for comparison")
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


@asynccontextmanager
async def _both_processes(
    checkpoint: Path, token_ids: list[list[int]], host: str
) -> AsyncIterator[tuple[Worker, Worker]]:
    """Start the prefill and the decode process and connect them; end them after."""
    n_blocks = sum(blocks_for(len(ids)) for ids in token_ids)
    arguments = {
        name: (
            f"--checkpoint={checkpoint}",
            f"--blocks={n_blocks + SPARE_BLOCKS[name]}",
            f"--seed={SEEDS[name]}",
        )
        for name in ("prefill", "decode")
    }
    async with AsyncExitStack() as stack:
        prefill = await Worker.start("prefill", *arguments["prefill"])
        stack.push_async_callback(prefill.close)
        decode = await Worker.start("decode", *arguments["decode"], f"--host={host}")
        # Closed first, prefill last: that is the harder order for the library,
        # and in service nobody can choose it.
        stack.push_async_callback(decode.close)
        try:
            port = (await decode.call("where"))["port"]
            await prefill.call("connect", host=host, port=port)
            yield prefill, decode
        except asyncio.CancelledError:
            # Ctrl-C or the timeout: nobody wants to wait for what they still do.
            prefill.kill()
            decode.kill()
            raise


async def _run_split(
    prefill: Worker,
    decode: Worker,
    request_id: str,
    token_ids: list[int],
    max_new_tokens: int,
) -> Split:
    """Run one prompt the way a router does: reserve, prefill there, decode here."""
    reserved = await decode.call(
        "reserve", request_id=request_id, n_tokens=len(token_ids)
    )
    remote_block_ids = reserved["block_ids"]
    computed = await prefill.call(
        "prefill",
        request_id=request_id,
        token_ids=token_ids,
        remote_block_ids=remote_block_ids,
    )
    first_token = computed.pop("first_token")
    generated = await decode.call(
        "generate",
        request_id=request_id,
        first_token=first_token,
        max_new_tokens=max_new_tokens,
    )
    return Split(
        tokens=generated["tokens"], remote_block_ids=remote_block_ids, **computed
    )


def _say(text: str) -> None:
    print(f"split_llm: {text}", file=sys.stderr, flush=True)
