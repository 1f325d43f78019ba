"""A peer with QPs of two wires: private memory with large blocks and small ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvxfer import KVCache
from kvxfer.errors import KVXferError
from tests.endpoints import (
    SOON,
    Arena,
    connected,
    dial,
    expected,
    failure_of,
    noise,
    scattered,
    take,
    until,
)
from tests.streaming import streamed

N = 256
#: Plane and layer of each group to bytes of a block; ``uneven`` has layers of both.
GROUPS: dict[str, dict[str, dict[int, int]]] = {
    "small": {"k": dict.fromkeys(range(3), 1024), "v": dict.fromkeys(range(3), 64)},
    "large": {"k": dict.fromkeys(range(3), 65536), "s": dict.fromkeys(range(3), 64)},
    "uneven": {"k": dict.fromkeys(range(3), 1024), "v": {2: 16384}},
}


def mixed(seed: int, *names: str) -> Arena:
    """Make a cache of the groups that are named, or of all."""
    wanted = {name: GROUPS[name] for name in names or GROUPS}
    length = sum(
        N * (size + 8)
        for planes in wanted.values()
        for sizes in planes.values()
        for size in sizes.values()
    )
    memory = noise(length, seed)
    at = int(memory.__array_interface__["data"][0])
    caches = {}
    for name, planes in wanted.items():
        places: dict[str, dict[int, int]] = {}
        for plane, sizes in planes.items():
            places[plane] = {}
            for layer, size in sizes.items():
                places[plane][layer] = at
                at += N * (size + 8)
        first = {plane: next(iter(sizes.values())) for plane, sizes in planes.items()}
        caches[name] = KVCache.from_pointers(
            places,
            n_blocks=N,
            block_bytes=first,
            block_stride={plane: size + 8 for plane, size in first.items()},
            group=name,
        )
    return Arena(memory, KVCache.grouped(caches))


def ids(n: int, seed: int) -> tuple[list[int], list[int]]:
    return scattered(N, n, seed), scattered(N, n, seed + 1000)


@pytest.mark.parametrize("qps", [1, 2])
async def test_a_device_without_wires_has_as_many_qps_as_ever(qps: int) -> None:
    arenas = mixed(1), mixed(2)
    async with connected(*arenas, device="null0", qps_per_connection=qps) as pair:
        assert pair.peer.link.n_qps == qps
        for group in GROUPS:
            result = await pair.client.write_cache(pair.peer, [1], [2], 2, group=group)
            assert (result.device, result.wire) == ("null0", "null")
            assert pair.peer.n_qps(group, 2) == qps


@pytest.mark.parametrize("qps", [1, 2, 3, 4])
async def test_each_group_goes_by_the_wire_that_suits_it(qps: int) -> None:
    async with connected(mixed(1), mixed(2), qps_per_connection=qps) as pair:
        assert pair.peer.link.n_qps == min(4, 2 * qps)
        for round_, (group, wire) in enumerate(
            [("large", "cma"), ("small", "tcp"), ("uneven", "cma+tcp")] * 3
        ):
            ours, theirs = ids(100, round_)
            wanted = expected(
                pair.source, pair.target, pair.target.memory, ours, theirs, group=group
            )
            result = await pair.client.write_cache(
                pair.peer, ours, theirs, group=group, request_id=str(round_)
            )
            assert result.wire == wire
            assert (pair.target.memory == wanted).all()
            arrivals = await take(pair.server, 3)
            assert [a.layer for a in arrivals] == [0, 1, 2]
            assert {a.request_id for a in arrivals} == {str(round_)}
            if round_ == 0:  # the others have not even said hello
                half = pair.peer.link.n_qps // 2
                assert {qp.wire for qp in pair.peer.link._qps[half:]} == {"none"}
        for layer, wire in ((0, "tcp"), (2, "cma")):
            found = await pair.client.write_cache(
                pair.peer, [1], [2], layer, group="uneven"
            )
            assert found.wire == wire
        assert pair.peer.wire == "cma+tcp"
        kinds = [qp.wire for qp in pair.peer.link._qps]
        half = len(kinds) // 2
        assert set(kinds[:half]) <= {"cma", "none"}
        assert set(kinds[half:]) <= {"tcp", "none"}


@pytest.mark.parametrize(
    ("ours", "theirs", "n_qps"),
    [("auto", "tcp", 1), ("tcp", "auto", 1), ("cma", "auto", 1), ("auto", "cma", 1)],
)
async def test_one_qp_where_a_side_has_chosen_a_wire(
    ours: str, theirs: str, n_qps: int
) -> None:
    async with connected(
        mixed(1), mixed(2), soft_wire=ours, server_options={"soft_wire": theirs}
    ) as pair:
        assert pair.peer.link.n_qps == n_qps
        for group in GROUPS:
            await pair.check_write(*ids(50, 3), group=group)
        assert pair.peer.wire == ({ours, theirs} - {"auto"}).pop()


@pytest.mark.parametrize("names", [("small",), ("large",)])
async def test_one_qp_where_blocks_are_of_one_kind(names: tuple[str]) -> None:
    async with connected(mixed(1, *names), mixed(2, *names)) as pair:
        assert pair.peer.link.n_qps == 1
        await pair.check_write(*ids(50, 3))


async def test_a_server_of_an_older_release_has_one_qp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvxfer.host.accepted", lambda wire: (wire,))
    async with connected(mixed(1), mixed(2)) as pair:
        assert pair.peer.link.n_qps == 1
        for group in GROUPS:
            await pair.check_write(*ids(40, 5), group=group)
            result = await pair.client.write_cache(pair.peer, [1], [2], group=group)
            assert result.wire == "cma"


@pytest.mark.parametrize("options", [{}, {"sq_depth": 16}, {"qps_per_connection": 2}])
async def test_large_and_small_writes_at_the_same_time(options: dict[str, Any]) -> None:
    source, target = mixed(1), mixed(2)
    async with connected(source, target, **options) as pair:
        wanted = target.memory
        writes = []
        for i in range(24):
            group = list(GROUPS)[i % 3]
            # Blocks of each write of a group are its own.
            ours = scattered(N, 30, i)
            theirs = list(range(i // 3 * 30, i // 3 * 30 + 30))
            wanted = expected(source, target, wanted, ours, theirs, group=group)
            writes.append(pair.client.write_cache(pair.peer, ours, theirs, group=group))
        results = await asyncio.gather(*writes)
        assert (target.memory == wanted).all()
        assert [r.wire for r in results] == ["tcp", "cma", "cma+tcp"] * 8
        assert len(await take(pair.server, 72)) == 72


@pytest.mark.parametrize("side", ["client", "server"])
async def test_broken_while_both_have_data_in_flight(side: str) -> None:
    """Whoever ends it: every write ends, and the next connection is whole."""
    async with connected(mixed(1), mixed(2), sq_depth=16) as pair:
        await pair.check_write([1], [2], group="small")
        writes = [
            asyncio.ensure_future(
                failure_of(
                    pair.client.write_cache(
                        pair.peer, range(N), range(N), group=list(GROUPS)[i % 3]
                    )
                )
            )
            for i in range(9)
        ]
        link = pair.peer.link
        engine = link.adapter.engine
        await until(lambda: engine.unretired(link.slot) > 16)
        if side == "client":
            pair.peer.break_("enough of it")
        else:
            (conn_id,) = pair.server._connections.incoming
            pair.server._connections.drop_peer(conn_id, "enough of it")
        found = await asyncio.gather(*writes)
        assert all(isinstance(error, KVXferError) for error in found)
        assert link.slot == -1 or engine.in_flight == 0
        pair.peer = await dial(pair.client, pair.server)
        for group in GROUPS:
            await pair.check_write(*ids(50, 3), group=group)


async def test_a_request_says_by_which_wires_it_went() -> None:
    async with streamed(mixed(1), mixed(2)) as pair:
        for group, wire in (("small", "tcp"), ("large", "cma"), ("uneven", "cma+tcp")):
            ours, theirs = ids(60, 7)
            wanted = expected(
                pair.source, pair.target, pair.target.memory, ours, theirs, group=group
            )
            ticket = pair.server.offer(pair.prefill, f"r-{group}", {group: theirs})
            request = pair.client.open(f"r-{group}")
            for layer in range(3):
                request.ready(layer, ours, final=True, group=group)
            request.finish()
            await asyncio.wait_for(ticket.wait(), SOON)
            await asyncio.wait_for(request.sent(), SOON)
            assert (pair.target.memory == wanted).all()
            assert request.metrics.wire == wire
