"""Writes that are begun by one call, and what is left to the steps with the words."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvxfer import WriteResult
from kvxfer._quick import QuickWrites
from kvxfer.errors import ClosedResourceError, KVXferError, UsageError
from tests.endpoints import QUICK, Pair, arena, connected, dial, take


async def quick_of(pair: Pair) -> QuickWrites:
    """Write once, so that the next is quick; return what begins it."""
    await pair.check_write([0], [1])
    await pair.check_write([0], [1], 1)
    quick = pair.peer.quick
    assert quick is not None
    return quick


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1],
        (3, 1),
        range(3, 1, -1),
        np.array([3, 1]),
        np.array([3, 1], np.int32),
        np.array([3, 1], np.uint8),
        np.array([3, 0, 1])[::2],
    ],
    ids=str,
)
@pytest.mark.parametrize("request_id", [None, "é-7"])
async def test_it_writes_as_the_steps_do(ids: Any, request_id: str | None) -> None:
    async with connected() as pair:
        quick = await quick_of(pair)
        before = pair.client.counters.written_blocks
        wanted = pair.target.memory.copy()
        await take(pair.server, 4)
        for layer, group in ((None, None), (1, None), (1, "main")):
            pair.target.memory[:] = wanted
            await pair.check_write(
                ids, [5, 6], layer, group=group, request_id=request_id
            )
        layers = [0, 1, 2, 1, 1]
        found = await take(pair.server, 5)
        assert [arrival.layer for arrival in found] == layers
        assert {arrival.request_id for arrival in found} == {request_id}
        assert pair.client.counters.written_blocks == before + 2 * len(layers)
        assert pair.client.counters.transfers["done"] == 5
        assert pair.peer.quick is quick


class Ids:
    """An array to numpy, and nothing else to anybody."""

    def __init__(self, ids: Any) -> None:
        self._ids = ids

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """Give the ids."""
        return np.asarray(self._ids, dtype)


@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist, Ids])
async def test_what_does_not_end_at_once_is_awaited(kind: Callable[..., Any]) -> None:
    """More than one send queue of single blocks: it cannot have ended."""
    n = 4096
    sizes: dict[str, Any] = {"layers": 1, "n_blocks": n}
    async with connected(
        arena(seed=1, **sizes), arena(seed=2, **sizes), progress="event"
    ) as pair:
        await pair.check_write([0], [1], 0)
        assert pair.peer.quick is not None
        ids = np.random.default_rng(1).permutation(n)
        local, remote = kind(ids), kind(ids[::-1].copy())
        begun = pair.client._begin_write(
            pair.peer, local, remote, 0, request_id="r", group=None, timeout=None
        )
        assert not isinstance(begun, WriteResult)
        result = await pair.peer.finish(begun)
        rows = pair.source.cache.group(None).rows(0)
        assert result.bytes == n * sum(place.block_bytes for _, place in rows)
        assert [len(a.block_ids) for a in await take(pair.server, 2)] == [1, n]


@pytest.mark.parametrize(
    ("ids", "arguments"),
    [
        ([32], {}),
        ([-1], {}),
        ([0, 1], {}),
        ([0.5], {}),
        ([True], {}),
        ("0", {}),
        (None, {}),
        (np.zeros((1, 1), np.int64), {}),
        (np.array([0.5]), {}),
        ([0], {"layer_idx": 3}),
        ([0], {"layer_idx": True}),
        ([0], {"layer_idx": 1.0}),
        ([0], {"group": "other"}),
        ([0], {"group": 1}),
        ([0], {"group": ["main"]}),
        ([0], {"request_id": "r" * 257}),
        ([0], {"request_id": "\ud800"}),
        ([0], {"request_id": b"r"}),
        ([0], {"request_id": 7}),
        ([0], {"timeout": 0}),
    ],
    ids=str,
)
async def test_what_is_wrong_is_said_in_the_same_words(
    ids: Any, arguments: dict[str, Any]
) -> None:
    async with connected() as pair:

        async def refused() -> KVXferError:
            before = pair.target.memory.copy()
            with pytest.raises(KVXferError) as caught:
                await pair.client.write_cache(pair.peer, ids, [1], **arguments)
            assert (pair.target.memory == before).all()
            return caught.value

        first = await refused()
        await quick_of(pair)
        second = await refused()
        assert (type(first), str(first)) == (type(second), str(second))
        await pair.check_write([2], [3], 1)


async def test_who_is_closed_broken_or_leaving_is_not_quick() -> None:
    async with connected() as pair:
        await quick_of(pair)
        pair.peer.drain(0, "for a test")
        for _ in range(2):
            assert pair.peer.quick is None
            with pytest.raises(KVXferError, match="about to leave"):
                await pair.client.write_cache(pair.peer, [0], [1])
    async with connected() as pair:
        await quick_of(pair)
        pair.peer.break_("for a test")
        assert pair.peer.quick is None
        with pytest.raises(KVXferError, match="Connect again"):
            await pair.client.write_cache(pair.peer, [0], [1])
    async with connected() as pair:
        quick = await quick_of(pair)
        await pair.peer.close()
        # Whoever kept it does nothing with it.
        assert quick.write([0], [1], 1, None, None) is None
        with pytest.raises(ClosedResourceError):
            await pair.client.write_cache(pair.peer, [0], [1])


async def test_the_queue_of_another_is_not_written_to() -> None:
    """The next connection has the slot; what was kept of the old one knows it."""
    async with connected() as pair:
        quick = await quick_of(pair)
        slot = pair.peer.link.slot
        await pair.peer.close()
        peer = await dial(pair.client, pair.server)
        assert peer.link.slot == slot
        assert quick.write([0], [1], 1, None, None) is None
        await pair.client.write_cache(peer, [0], [1])
    assert quick.write([0], [1], 1, None, None) is None


async def test_a_peer_of_another_client_or_another_loop_is_refused() -> None:
    async with connected() as pair, connected() as other:
        quick = await quick_of(pair)
        with pytest.raises(UsageError, match="peer of another client"):
            await other.client.write_cache(pair.peer, [0], [1], 1)
        errors: list[BaseException] = []

        def elsewhere() -> None:
            assert quick.write([0], [1], 1, None, None) is None  # no loop at all
            try:
                asyncio.run(_write(pair))
            except UsageError as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert "another event loop" in str(errors[0])


async def _write(pair: Pair) -> None:
    await pair.client.write_cache(pair.peer, [0], [1], 1)


async def test_a_queue_that_has_failed_is_left_to_the_words() -> None:
    async with connected(**QUICK) as pair:
        quick = await quick_of(pair)
        link = pair.peer.link
        link.adapter.engine.abort(link.slot)
        assert quick.write([0], [1], 1, None, None) is None
        with pytest.raises(KVXferError, match="a WR failed"):
            await pair.client.write_cache(pair.peer, [0], [1], 1)
