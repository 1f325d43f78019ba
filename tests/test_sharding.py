"""Plans for different tensor parallelism, against numpy and over the device."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvxfer import Client, KVCache, Server
from kvxfer.errors import GeometryMismatchError, LayoutError, UsageError
from kvxfer.sharding import Shard, Spread, check_shards, held_heads, plan
from tests.endpoints import QUICK, dial, take

SIZES = (1, 2, 4, 8)
TOKENS, DIM, BLOCKS = 3, 2, 4

Bytes = NDArray[np.uint8]


def model(n_heads: int, seed: int, *, head_major: bool = True) -> NDArray[np.uint16]:
    """The whole cache of one layer, as one rank would hold it."""
    inner = (n_heads, TOKENS) if head_major else (TOKENS, n_heads)
    shape = (BLOCKS, *inner, DIM)
    rng = np.random.default_rng(seed)
    found: NDArray[np.uint16] = rng.integers(1, 2**16, shape, np.uint16)
    return found


def on_rank(
    whole: NDArray[np.uint16], n_ranks: int, rank: int, axis: int
) -> NDArray[np.uint16]:
    """The part of the cache that a rank holds, by numpy alone."""
    n_heads = whole.shape[axis]
    if n_heads >= n_ranks:
        held: NDArray[np.uint16] = np.array_split(whole, n_ranks, axis)[rank].copy()
        return held
    # Where ranks do not divide either, as held_heads says, which has its own test.
    spread = [held_heads(n_heads, n_ranks, r)[0] for r in range(n_ranks)]
    if n_ranks % n_heads == 0:
        assert spread == list(np.repeat(np.arange(n_heads), n_ranks // n_heads))
    part: NDArray[np.uint16] = whole.take([spread[rank]], axis)
    return part


def as_blocks(cache: NDArray[Any]) -> Bytes:
    """Bytes of each block; the same memory."""
    found: Bytes = cache.reshape(BLOCKS, -1).view(np.uint8)
    return found


def write(shards: list[Shard], source: Bytes, target: Bytes, times: Bytes) -> None:
    """Do what a transfer with these shards does."""
    for shard in shards:
        assert source.shape[1] == shard.local_block_bytes
        assert target.shape[1] == shard.remote_block_bytes
        from_ = slice(shard.local_offset, shard.local_offset + shard.length)
        to = slice(shard.remote_offset, shard.remote_offset + shard.length)
        target[:, to] = source[:, from_]
        times[:, to] += 1


@pytest.mark.parametrize("head_major", [True, False], ids=["heads", "tokens"])
@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 8, 12])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("p", SIZES)
def test_every_byte_of_every_decode_rank_is_written_once(
    p: int, d: int, n_heads: int, head_major: bool
) -> None:
    whole = model(n_heads, seed=n_heads, head_major=head_major)
    axis = 1 if head_major else 2
    spread = Spread(n_heads, TOKENS * DIM * 2)
    if not head_major:
        spread = Spread(n_heads, DIM * 2, n_runs=TOKENS)
    wanted = [on_rank(whole, d, j, axis) for j in range(d)]
    got = [np.zeros_like(part) for part in wanted]
    times = [np.zeros_like(as_blocks(part)) for part in wanted]
    for i in range(p):
        source = as_blocks(on_rank(whole, p, i, axis))
        shards = plan({"k": spread}, prefill_ranks=p, prefill_rank=i, decode_ranks=d)
        for j, parts in shards.items():
            write(parts, source, as_blocks(got[j]), times[j])
    for j in range(d):
        assert (got[j] == wanted[j]).all()
        assert (times[j] == 1).all()


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("p", SIZES)
def test_a_latent_goes_whole_to_each_decode_rank_once(p: int, d: int) -> None:
    writers: list[int] = []
    for i in range(p):
        shards = plan(
            {"kv": Spread(0, 1152)}, prefill_ranks=p, prefill_rank=i, decode_ranks=d
        )
        for parts in shards.values():
            assert parts == [Shard("kv", 0, 0, 1152, 1152, 1152)]
        writers += list(shards)
    assert sorted(writers) == list(range(d))


def test_replicas_share_the_decode_ranks() -> None:
    """Eight ranks hold two heads; none of them writes to all of eight."""
    spread = {"k": Spread(2, 64)}
    targets = [
        list(plan(spread, prefill_ranks=8, prefill_rank=i, decode_ranks=8))
        for i in range(8)
    ]
    assert [len(found) for found in targets] == [1] * 8


def test_heads_of_ranks() -> None:
    assert [list(held_heads(5, 2, r)) for r in range(2)] == [[0, 1, 2], [3, 4]]
    assert [held_heads(2, 4, r)[0] for r in range(4)] == [0, 0, 1, 1]
    assert [held_heads(3, 4, r)[0] for r in range(4)] == [0, 0, 1, 2]
    for n_heads, n_ranks, rank in ((0, 1, 0), (1, 1, 1), (1, 1, -1)):
        with pytest.raises(LayoutError):
            held_heads(n_heads, n_ranks, rank)


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(LayoutError, match="not within a local block of 8 bytes"):
        Shard("k", 4, 0, 5, 8, 16)
    with pytest.raises(LayoutError, match="not within a remote block of 4 bytes"):
        Shard("k", 0, -1, 1, 8, 4)
    with pytest.raises(LayoutError, match="expected 0 or more"):
        Spread(1, 0)
    with pytest.raises(LayoutError, match="prefill rank 2 of 2"):
        plan({}, prefill_ranks=2, prefill_rank=2, decode_ranks=1)


# -- what is checked when two sides connect -----------------------------------------


def cache_of(
    block_bytes: int, layers: int = 2, planes: tuple[str, ...] = ("k",), **more: Any
) -> KVCache:
    return KVCache.allocate(
        n_blocks=BLOCKS,
        block_bytes=block_bytes,
        n_layers=layers,
        planes=planes,
        **more,
    )


@pytest.mark.parametrize(
    ("shards", "text"),
    [
        (
            [Shard("k", 0, 0, 8, 8, 32)],
            "blocks of 16 bytes at the peer, 32 in the plan",
        ),
        ([Shard("k", 0, 0, 8, 4 + 8, 16)], "blocks of 8 bytes here, 12 in the plan"),
        ([Shard("v", 0, 0, 8, 8, 16)], "plane v of group main: only at the peer"),
        ([Shard("x", 0, 0, 8, 8, 16)], "no layer in common has plane x"),
        (
            [Shard("k", 0, 0, 8, 8, 16), Shard("k", 0, 4, 8, 8, 16)],
            "two shards write byte 4",
        ),
        (
            [Shard("k", 0, 0, 8, 8, 16), Shard("k", 0, 8, 8, 8, 32)],
            "two shards disagree",
        ),
        ([Shard("k", 0, 0, 8, 8, 16, "other")], "of group other"),
    ],
)
def test_shards_that_do_not_fit_are_refused_with_text(
    shards: list[Shard], text: str
) -> None:
    with cache_of(8) as ours, cache_of(16, planes=("k", "v")) as theirs:
        with pytest.raises(GeometryMismatchError, match=text):
            check_shards(ours.describe(), theirs.describe(), shards)
        check_shards(ours.describe(), theirs.describe(), [Shard("k", 0, 8, 8, 8, 16)])


def test_dtypes_must_agree() -> None:
    shards = [Shard("k", 0, 0, 8, 8, 16)]
    with (
        cache_of(8, dtype="bf16") as ours,
        cache_of(16, dtype="f16") as theirs,
        pytest.raises(GeometryMismatchError, match="dtype bf16 here, f16 at the"),
    ):
        check_shards(ours.describe(), theirs.describe(), shards)


# -- over the device ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "d", "n_heads"), [(4, 1, 8), (1, 4, 8), (2, 4, 5), (4, 2, 2), (4, 2, 6)]
)
async def test_ranks_write_to_ranks(p: int, d: int, n_heads: int) -> None:
    """Sharded K, replicated latent: each rank an endpoint, every block compared."""
    k, latent = model(n_heads, 1), model(1, 2)
    planes = {
        "k": Spread(n_heads, DIM * TOKENS * 2),
        "latent": Spread(0, DIM * TOKENS * 2),
    }
    async with contextlib.AsyncExitStack() as stack:
        targets = [on_rank(k, d, j, 1) * 0 for j in range(d)]
        latents = [latent * 0 for _ in range(d)]
        servers = [
            await _server(stack, {"k": [targets[j]], "latent": [latents[j]]})
            for j in range(d)
        ]
        ids = np.arange(BLOCKS)
        for i in range(p):
            cache = stack.enter_context(
                KVCache.from_tensors({"k": [on_rank(k, p, i, 1)], "latent": [latent]})
            )
            client = await stack.enter_async_context(Client(cache, **QUICK))
            steps = plan(planes, prefill_ranks=p, prefill_rank=i, decode_ranks=d)
            for j, shards in steps.items():
                peer = await client.connect("127.0.0.1", servers[j].port, shards=shards)
                result = await client.write_cache(peer, ids, ids[::-1], 0)
                (arrival,) = await take(servers[j], 1)
                moved = BLOCKS * sum(shard.length for shard in shards)
                assert result.bytes == arrival.bytes == moved
        for j in range(d):
            assert (targets[j] == on_rank(k, d, j, 1)[::-1]).all()
            assert (latents[j] == latent[::-1]).all()


async def _server(
    stack: contextlib.AsyncExitStack, tensors: dict[str, list[NDArray[Any]]]
) -> Server:
    cache = stack.enter_context(KVCache.from_tensors(tensors))
    return await stack.enter_async_context(Server(cache, port=0, **QUICK))


async def test_a_server_refuses_shards_that_do_not_fit() -> None:
    """It checks for itself, whatever the client has found out about it."""
    with cache_of(8) as ours, cache_of(16) as theirs:
        async with Server(theirs, port=0) as server, Client(ours) as client:
            with pytest.raises(GeometryMismatchError, match="16 bytes here, 32 in the"):
                await client.connect(
                    "127.0.0.1", server.port, shards=[Shard("k", 0, 0, 8, 8, 32)]
                )
            with pytest.raises(GeometryMismatchError, match="block_bytes"):
                await dial(client, server)
            assert server.peers == []


async def test_one_connection_has_one_set_of_shards() -> None:
    shards = [Shard("k", 0, 8, 8, 8, 16)]
    with cache_of(8) as ours, cache_of(16) as theirs:
        async with Server(theirs, port=0) as server, Client(ours) as client:
            peer = await client.connect("127.0.0.1", server.port, shards=shards)
            again = await client.connect("127.0.0.1", server.port, shards=list(shards))
            assert again is peer
            with pytest.raises(UsageError, match="other shards"):
                await client.connect("127.0.0.1", server.port)
            await client.write_cache(peer, [0], [1])
