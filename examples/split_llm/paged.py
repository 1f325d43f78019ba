"""Paged KV blocks: pools of blocks, who holds which, and the way in and out.

An inference server does not keep a request's K and V in one piece. It keeps a
pool of blocks of a few tokens for each layer, and a request owns some of them in
any order. That is what kvxfer moves, so the example has it too.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class KVShape:
    """What one token of KV cache looks like: layers, heads, elements a head."""

    n_layers: int
    n_kv_heads: int
    head_dim: int


def blocks_for(n_tokens: int) -> int:
    """Return how many blocks hold ``n_tokens``; the last may be partly filled."""
    return -(-n_tokens // BLOCK_TOKENS)


class BlockAllocator:
    """Hands out block ids in an order that looks like a long-running server's.

    Which ids a request gets depends on ``seed``, so two processes with different
    seeds give the same request different blocks. All calls are the event loop's.
    """

    def __init__(self, n_blocks: int, *, seed: int) -> None:
        self._n_blocks = n_blocks
        self._free = list(range(n_blocks))
        random.Random(seed).shuffle(self._free)
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, n_blocks: int) -> list[int]:
        """Take ``n_blocks`` ids; they are the caller's until ``give``.

        Raises:
          MemoryError: Fewer are free. None was taken.
        """
        if n_blocks > len(self._free):
            raise MemoryError(
                f"{n_blocks} blocks wanted, {len(self._free)} free: "
                "start the process with more"
            )
        taken, self._free = self._free[:n_blocks], self._free[n_blocks:]
        return taken

    async def take_later(self, n_blocks: int) -> list[int]:
        """Take ``n_blocks`` ids as soon as so many are free; first come, first served.

        Raises:
          MemoryError: There are fewer, free or not.

        Cancellation:
          None was taken.
        """
        if n_blocks > self._n_blocks:
            raise MemoryError(f"{n_blocks} blocks wanted, there are {self._n_blocks}")
        async with self._turn:
            while n_blocks > len(self._free):
                self._given.clear()
                await self._given.wait()
            return self.take(n_blocks)

    def give(self, block_ids: Sequence[int]) -> None:
        """Return ids that ``take`` gave; they are handed out again last."""
        self._free.extend(block_ids)
        self._given.set()


class BlockPool:
    """K and V of all layers, in blocks: one tensor a layer and plane.

    Each tensor is ``[n_blocks, BLOCK_TOKENS, n_kv_heads, head_dim]``. They start
    as NaN: a block that was never written, or written at the wrong place, then
    spoils every later token instead of passing as a plausible zero.
    """

    def __init__(
        self, shape: KVShape, n_blocks: int, *, dtype: torch.dtype = torch.float32
    ) -> None:
        size = (n_blocks, BLOCK_TOKENS, shape.n_kv_heads, shape.head_dim)
        nan = float("nan")
        self.shape = shape
        self.n_blocks = n_blocks
        self.k = [torch.full(size, nan, dtype=dtype) for _ in range(shape.n_layers)]
        self.v = [torch.full(size, nan, dtype=dtype) for _ in range(shape.n_layers)]

    @property
    def planes(self) -> dict[str, list[torch.Tensor]]:
        """The tensors as ``kvxfer.KVCache.from_tensors`` takes them."""
        return {"k": self.k, "v": self.v}

    def write(
        self,
        layer: int,
        block_ids: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        first_token: int = 0,
    ) -> None:
        """Scatter one layer's ``[1, heads, tokens, dim]`` K and V into blocks.

        The tokens are those of the request from ``first_token`` on, and ``block_ids``
        all of its blocks. Every other place is left as it is.
        """
        _scatter(self.k[layer], block_ids, keys, first_token)
        _scatter(self.v[layer], block_ids, values, first_token)

    def read(
        self, layer: int, block_ids: Sequence[int], n_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the first ``n_tokens`` of some blocks as ``[1, heads, tokens, dim]``.

        The tensors are copies: the blocks may be reused at once.
        """
        return (
            _gather(self.k[layer], block_ids, n_tokens),
            _gather(self.v[layer], block_ids, n_tokens),
        )


def _scatter(
    pool: torch.Tensor,
    block_ids: Sequence[int],
    states: torch.Tensor,
    first_token: int,
) -> None:
    tokens = states[0].transpose(0, 1)
    stop = first_token + tokens.shape[0]
    if blocks_for(stop) > len(block_ids):
        raise ValueError(
            f"{stop} tokens fill {blocks_for(stop)} blocks of {BLOCK_TOKENS}, not "
            f"{len(block_ids)}"
        )
    positions = torch.arange(first_token, stop)
    blocks = torch.tensor(block_ids)[positions // BLOCK_TOKENS]
    pool[blocks, positions % BLOCK_TOKENS] = tokens


def _gather(
    pool: torch.Tensor, block_ids: Sequence[int], n_tokens: int
) -> torch.Tensor:
    if blocks_for(n_tokens) != len(block_ids):
        raise ValueError(f"{len(block_ids)} blocks do not hold {n_tokens} tokens")
    tokens = pool[list(block_ids)].reshape(-1, *pool.shape[2:])[:n_tokens]
    return tokens.transpose(0, 1).unsqueeze(0).contiguous()
