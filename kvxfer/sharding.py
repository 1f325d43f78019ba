"""Which bytes of a block go where, if the two sides split a layer differently.

Under tensor parallelism a block of one rank holds some of the KV heads. Where a
prefill rank and a decode rank do not hold the same ones, a write moves a part of each
block: a :class:`Shard` says which bytes of every local block go to which bytes of the
remote one. :func:`plan` works that out for any two numbers of ranks; whoever has a
layout of its own makes its own shards. Pure arithmetic, checked on both sides when
they connect, by :func:`check_shards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from kvxfer.errors import GeometryMismatchError, LayoutError
from kvxfer.layout import Geometry, PlaneGeometry, format_layers

__all__ = ["Shard", "Spread", "check_shards", "held_heads", "plan"]

MAX_SHARDS = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of bytes inside every block of a plane, on both sides.

    Attributes:
      plane: Name of the plane.
      local_offset: Where the run begins in a local block.
      remote_offset: Where it begins in a remote block.
      length: Its bytes.
      local_block_bytes: What a local block must measure for this to be right.
      remote_block_bytes: What a remote block must measure.
      group: Name of the plane's group.

    Raises:
      LayoutError: The run is empty or leaves a block.
    """

    plane: str
    local_offset: int
    remote_offset: int
    length: int
    local_block_bytes: int
    remote_block_bytes: int
    group: str = "main"

    def __post_init__(self) -> None:
        for side in ("local", "remote"):
            offset = getattr(self, f"{side}_offset")
            block_bytes = getattr(self, f"{side}_block_bytes")
            if self.length < 1 or not 0 <= offset <= block_bytes - self.length:
                raise LayoutError(
                    f"shard of plane {self.plane!r}: bytes {offset} to "
                    f"{offset + self.length} are not within a {side} block of "
                    f"{block_bytes} bytes"
                )


@dataclass(frozen=True, slots=True)
class Spread:
    """How the blocks of one plane are spread over the ranks of either side.

    A block of a rank is ``n_runs`` times the rank's heads, each of ``head_bytes``
    contiguous bytes, in the order of the heads. ``[heads, tokens, dim]`` is one run
    of heads with ``tokens * dim * itemsize`` bytes each; ``[tokens, heads, dim]`` is a
    run for every token.

    Attributes:
      n_heads: KV heads of the model; 0 for what every rank holds entirely, such as
        the latent of MLA, whose blocks have ``head_bytes``.
      head_bytes: Bytes of one head in one run.
      n_runs: Runs in a block.

    Raises:
      LayoutError: A number is out of range.
    """

    n_heads: int
    head_bytes: int
    n_runs: int = 1

    def __post_init__(self) -> None:
        if self.n_heads < 0 or self.head_bytes < 1 or self.n_runs < 1:
            raise LayoutError(
                f"{self.n_heads} heads of {self.head_bytes} bytes in {self.n_runs} "
                "runs: expected 0 or more, 1 or more, 1 or more"
            )


def held_heads(n_heads: int, n_ranks: int, rank: int) -> range:
    """Say which KV heads a rank holds.

    Neighbouring heads lie on one rank, as evenly as it goes: if the numbers do not
    divide, the lower ranks hold one more. Where there are more ranks than heads,
    neighbouring ranks hold the same one.

    Raises:
      LayoutError: No such rank, or no heads.
    """
    if n_heads < 1 or not 0 <= rank < n_ranks:
        raise LayoutError(f"{n_heads} heads on rank {rank} of {n_ranks}: not possible")
    if n_heads < n_ranks:
        head = rank * n_heads // n_ranks
        return range(head, head + 1)
    each, more = divmod(n_heads, n_ranks)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def plan(
    planes: Mapping[str, Spread],
    *,
    prefill_ranks: int,
    prefill_rank: int,
    decode_ranks: int,
    group: str = "main",
) -> dict[int, list[Shard]]:
    """Work out what one prefill rank writes, by decode rank.

    Taken together over all prefill ranks, every byte of every decode rank's blocks is
    written exactly once: of several prefill ranks that hold the same head, or the same
    latent, one writes it to any given decode rank, and they share the decode ranks.

    Args:
      planes: Plane name to how it is spread; planes that are not named are not
        written.
      prefill_ranks: Tensor-parallel size of the prefill side.
      prefill_rank: The rank whose plan is wanted.
      decode_ranks: Tensor-parallel size of the decode side.
      group: Name of the planes' group.

    Returns:
      For each decode rank that gets anything from this rank, the shards for
      ``Client.connect``.

    Raises:
      LayoutError: A rank or a number of ranks is out of range.
    """
    if not 0 <= prefill_rank < prefill_ranks or decode_ranks < 1:
        raise LayoutError(
            f"prefill rank {prefill_rank} of {prefill_ranks} and {decode_ranks} "
            "decode ranks: not possible"
        )
    found: dict[int, list[Shard]] = {}
    for decode_rank in range(decode_ranks):
        ranks = _Ranks(prefill_ranks, prefill_rank, decode_ranks, decode_rank)
        shards = [
            shard
            for name, spread in planes.items()
            for shard in _plane_shards(name, spread, group, ranks)
        ]
        if shards:
            found[decode_rank] = shards
    return found


class _Ranks(NamedTuple):
    """A prefill rank and a decode rank, each of how many."""

    prefill_ranks: int
    prefill_rank: int
    decode_ranks: int
    decode_rank: int


def _plane_shards(name: str, spread: Spread, group: str, ranks: _Ranks) -> list[Shard]:
    prefill_ranks, prefill_rank, decode_ranks, decode_rank = ranks
    if spread.n_heads == 0:
        if decode_rank % prefill_ranks != prefill_rank:
            return []
        size = spread.head_bytes * spread.n_runs
        return [Shard(name, 0, 0, size, size, size, group)]
    ours = held_heads(spread.n_heads, prefill_ranks, prefill_rank)
    theirs = held_heads(spread.n_heads, decode_ranks, decode_rank)
    heads = [
        head
        for head in theirs
        if _writer(spread.n_heads, prefill_ranks, head, decode_rank) == prefill_rank
    ]
    if not heads:
        return []
    # Both sides hold neighbours, so what they have in common are neighbours, too.
    size = spread.head_bytes
    return [
        Shard(
            plane=name,
            local_offset=(run * len(ours) + heads[0] - ours[0]) * size,
            remote_offset=(run * len(theirs) + heads[0] - theirs[0]) * size,
            length=len(heads) * size,
            local_block_bytes=spread.n_runs * len(ours) * size,
            remote_block_bytes=spread.n_runs * len(theirs) * size,
            group=group,
        )
        for run in range(spread.n_runs)
    ]


def _writer(n_heads: int, n_ranks: int, head: int, decode_rank: int) -> int:
    """Choose, of the prefill ranks that hold a head, the one that writes it."""
    holders = [r for r in range(n_ranks) if head in held_heads(n_heads, n_ranks, r)]
    return holders[decode_rank % len(holders)]


def check_shards(
    local: Geometry,
    remote: Geometry,
    shards: Sequence[Shard],
    *,
    names: tuple[str, str] = ("here", "at the peer"),
) -> None:
    """Refuse shards that are not what the two caches look like.

    Every plane that is named must be on both sides, in each layer that both hold,
    with blocks as long as its shards say and one dtype. Planes that are not named are
    not compared. Runs of one plane must not overlap in the remote block.

    Args:
      local: The cache of the side that writes.
      remote: The cache that is written.
      names: What to call the two sides in messages.

    Raises:
      GeometryMismatchError: With every mismatch and both sides' figures.
    """
    ours = {(layer, group, p.name): p for layer, group, p in local.entries()}
    theirs = {(layer, group, p.name): p for layer, group, p in remote.entries()}
    common = {key[:2] for key in ours} & {key[:2] for key in theirs}
    problems = _overlaps(shards)
    places = dict.fromkeys((shard.group, shard.plane) for shard in shards)
    found: dict[str, list[int]] = {}
    for group, plane in places:
        layers = sorted(layer for layer, name in common if name == group)
        held = 0
        for layer in layers:
            mine, other = (
                ours.get((layer, group, plane)),
                theirs.get((layer, group, plane)),
            )
            held += mine is not None and other is not None
            sized = next(s for s in shards if (s.group, s.plane) == (group, plane))
            for problem in _differences(mine, other, sized, names):
                text = f"plane {plane} of group {group}: {problem}"
                found.setdefault(text, []).append(layer)
        if not held:
            problems.append(f"no layer in common has plane {plane} of group {group}")
    problems += [f"{text} (layers {format_layers(at)})" for text, at in found.items()]
    if problems:
        raise GeometryMismatchError("the shards do not fit: " + "; ".join(problems))


def _overlaps(shards: Sequence[Shard]) -> list[str]:
    """Name the planes whose shards overlap or disagree about the blocks."""
    problems = []
    ordered = sorted(shards, key=lambda s: (s.group, s.plane, s.remote_offset))
    for before, shard in pairwise(ordered):
        if (before.group, before.plane) != (shard.group, shard.plane):
            continue
        sizes = (shard.local_block_bytes, shard.remote_block_bytes)
        if (before.local_block_bytes, before.remote_block_bytes) != sizes:
            problems.append(
                f"plane {shard.plane}: two shards disagree about its blocks"
            )
        if before.remote_offset + before.length > shard.remote_offset:
            problems.append(
                f"plane {shard.plane}: two shards write byte {shard.remote_offset}"
            )
    return problems


def _differences(
    mine: PlaneGeometry | None,
    other: PlaneGeometry | None,
    shard: Shard,
    names: tuple[str, str],
) -> Iterable[str]:
    if mine is None or other is None:
        if mine is not other:
            yield f"only {names[mine is None]}"
        return
    if mine.block_bytes != shard.local_block_bytes:
        yield (
            f"blocks of {mine.block_bytes} bytes {names[0]}, "
            f"{shard.local_block_bytes} in the plan"
        )
    if other.block_bytes != shard.remote_block_bytes:
        yield (
            f"blocks of {other.block_bytes} bytes {names[1]}, "
            f"{shard.remote_block_bytes} in the plan"
        )
    if mine.dtype != other.dtype:
        yield f"dtype {mine.dtype} {names[0]}, {other.dtype} {names[1]}"
