"""Which wire a client asks the software device for, where it may choose."""

from __future__ import annotations

import pytest

from kvxfer import Client, KVCache
from tests.endpoints import QUICK, arena, connected, dial

SMALL, LARGE = {"k": 2048, "v": 1024}, {"k": 2056, "scales": 64}


@pytest.mark.parametrize(
    ("planes", "asked", "wire"),
    [
        (SMALL, "auto", "tcp"),
        (LARGE, "auto", "cma"),
        (SMALL, "cma", "cma"),
        (LARGE, "tcp", "tcp"),
    ],
)
async def test_small_blocks_of_private_memory_go_by_tcp(
    planes: dict[str, int], asked: str, wire: str
) -> None:
    """Even towards a server that would rather have something else."""
    async with connected(
        arena(n_blocks=512, planes=planes, seed=1),
        arena(n_blocks=512, planes=planes, seed=2),
        soft_wire=asked,
        server_options={"soft_wire": "auto"},
    ) as pair:
        await pair.check_write([1, 2, 60], [3, 4, 5])
        assert pair.peer.wire == wire


async def test_small_blocks_that_peers_can_map_go_by_shm() -> None:
    cache = KVCache.allocate(n_blocks=64, n_layers=3, planes=["k"], block_bytes=1024)
    private, target = (arena(n_blocks=64, planes={"k": 1024}, seed=i) for i in (1, 2))
    with cache:
        async with (
            connected(private, target) as pair,
            Client(cache, **QUICK) as client,
        ):
            peer = await dial(client, pair.server)
            assert (await client.write_cache(peer, [1], [2])).wire == "shm"
