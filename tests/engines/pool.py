"""The memory of an engine: blocks that requests take, fill, look at and give back.

What a token's KV is follows from request, layer, plane and position, so either side
knows what the other one should have written. A shadow holds what every byte of the
memory has to be, those between the blocks and those of other requests included.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import numpy as np

from kvxfer.layout import PlaneLayer
from tests.endpoints import Arena, Bytes, arena

__all__ = ["BLOCK_TOKENS", "Pool", "blocks_for"]

BLOCK_TOKENS = 4
TOKEN_BYTES = 32
N_LAYERS = 4


def blocks_for(n_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-n_tokens // BLOCK_TOKENS)


def _token(name: str, layer: int, plane: str, position: int) -> Bytes:
    """The KV of one token, as whoever computes it computes it."""
    seed = zlib.crc32(f"{name} {layer} {plane} {position}".encode())
    found: Bytes = np.random.default_rng(seed).integers(0, 256, TOKEN_BYTES, np.uint8)
    return found


class Pool:
    """An arena, its free blocks and its shadow. One thread uses it."""

    def __init__(self, n_blocks: int, seed: int, *, gaps: bool = True) -> None:
        size = BLOCK_TOKENS * TOKEN_BYTES
        self.arena: Arena = arena(
            n_blocks=n_blocks,
            layers=N_LAYERS,
            planes=dict.fromkeys(("k", "v"), (size, size + 24 * gaps)),
            seed=seed,
        )
        self.layers = range(N_LAYERS)
        self.n_blocks = n_blocks
        self._shadow = self.arena.memory.copy()
        self._free = list(range(n_blocks))
        self._random = random.Random(seed)

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return sum(place.block_bytes for place in self._places())

    def take(self, n: int) -> list[int]:
        """Take blocks in any order. Nobody has written to them meanwhile."""
        assert n <= len(self._free)
        taken = self._random.sample(self._free, n)
        self._free = [block for block in self._free if block not in taken]
        assert self._equal(taken), "a write into blocks that were free"
        return taken

    def give(self, block_ids: Sequence[int]) -> None:
        """Give blocks back: somebody else has them, and fills them, at once."""
        assert not set(block_ids) & set(self._free)
        self._free += block_ids
        for place in self._places():
            for memory in (self.arena.memory, self._shadow):
                self.arena.blocks(place, memory)[list(block_ids)] = 0xEE

    def compute(
        self, name: str, layer: int, block_ids: Sequence[int], first: int, stop: int
    ) -> None:
        """Write the KV of some positions of a request into its blocks."""
        self._write(self.arena.memory, name, layer, block_ids, first, stop)
        self._write(self._shadow, name, layer, block_ids, first, stop)

    def settle(self, block_ids: Sequence[int]) -> None:
        """Take blocks that were written to from elsewhere as they are: so they stay."""
        for place in self._places():
            actual = self.arena.blocks(place)[list(block_ids)]
            self.arena.blocks(place, self._shadow)[list(block_ids)] = actual

    def received(
        self, name: str, block_ids: Sequence[int], first: int, stop: int
    ) -> None:
        """These positions have come from elsewhere: look at every byte of them.

        What lies behind the last token of the last block is the sender's to choose.
        """
        came = block_ids[first // BLOCK_TOKENS : blocks_for(stop)]
        self.settle(came)
        for layer in self.layers:
            self._write(self._shadow, name, layer, block_ids, first, stop)
        assert self._equal(block_ids), f"{name}: other bytes than were computed"

    def check(self) -> None:
        """Compare every byte of the memory, with nothing under way."""
        wrong = np.flatnonzero(self.arena.memory != self._shadow)
        assert not wrong.size, f"{wrong.size} foreign bytes, the first at {wrong[0]}"

    def _write(
        self,
        memory: Bytes,
        name: str,
        layer: int,
        block_ids: Sequence[int],
        first: int,
        stop: int,
    ) -> None:
        for plane, place in self.arena.cache.group("main").rows(layer):
            blocks = self.arena.blocks(place, memory)
            for position in range(first, stop):
                at = position % BLOCK_TOKENS * TOKEN_BYTES
                row = blocks[block_ids[position // BLOCK_TOKENS]]
                row[at : at + TOKEN_BYTES] = _token(name, layer, plane, position)

    def _equal(self, block_ids: Sequence[int]) -> bool:
        ids = list(block_ids)
        return all(
            bool((self.arena.blocks(place)[ids] == shadow[ids]).all())
            for place in self._places()
            for shadow in [self.arena.blocks(place, self._shadow)]
        )

    def _places(self) -> list[PlaneLayer]:
        group = self.arena.cache.group("main")
        return [place for layer in self.layers for _, place in group.rows(layer)]
