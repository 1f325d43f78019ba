"""Wrong use: an exception that says what is wrong, nothing written, nothing broken.

Every test here compares the target's whole memory with what it was, and then writes
over the same connection.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, KVCache, Server
from kvxfer.errors import (
    AddressInUseError,
    BrokenPeerError,
    ClosedResourceError,
    ConnectTimeoutError,
    ControlError,
    DeviceUnavailableError,
    GeometryMismatchError,
    KVXferError,
    LayoutError,
    OptionError,
    UsageError,
)
from tests.endpoints import QUICK, Pair, arena, connected, dial, take


async def check_refused(
    pair: Pair, error: type[KVXferError], message: str, *args: Any, **kwargs: Any
) -> None:
    """Write wrongly, see that nothing happened, and write rightly."""
    before = pair.target.memory.copy()
    with pytest.raises(error, match=message) as caught:
        await pair.client.write_cache(pair.peer, *args, **kwargs)
    assert type(caught.value) is error
    assert (pair.target.memory == before).all()
    await pair.check_write([1, 2], [3, 4])
    # Nothing of the refused write was announced either.
    for layer in pair.target.cache.layers:
        assert (await take(pair.server, 1))[0].layer == layer
    assert pair.server.n_waiting == 0


@pytest.mark.parametrize(
    ("local_ids", "remote_ids", "message"),
    [
        ([0, 32], [0, 1], r"local_block_ids\[1\] is 32, not in \[0, 32\)"),
        ([0, 1], [0, 40], r"remote_block_ids\[1\] is 40, not in \[0, 40\) of the peer"),
        ([-1, 1], [0, 1], r"local_block_ids\[0\] is -1"),
        ([0, 1], [0, -1], r"remote_block_ids\[1\] is -1"),
        ([2**62], [0], r"local_block_ids\[0\] is 4611686018427387904"),
        ([0], [-(2**63)], r"remote_block_ids\[0\] is -9223372036854775808"),
        ([0, 1, 2], [0, 1], "3 local ids, 2 remote ids"),
        ([], [1], "0 local ids, 1 remote ids"),
        (
            [0, 1, 2],
            [5, 6, 5],
            r"remote_block_ids\[2\] is 5, which the list names twice",
        ),
        (range(32), [*range(31), 0], r"remote_block_ids\[31\] is 0, .* twice"),
        ([0.0, 1.0], [0, 1], "local_block_ids must be integers"),
        ([0, 1], [True, 1], "remote_block_ids: True at position 0 is a bool"),
        (np.array([0.5]), [0], "local_block_ids: expected one dimension of integers"),
        (np.zeros((2, 1), int), [0, 1], "expected one dimension of integers"),
        ([2**63], [0], "local_block_ids must be integers"),
        (np.array([2**63], np.uint64), [0], "is no block id"),
        ("01", [0, 1], "local_block_ids is a str"),
        (None, [0], "local_block_ids"),
        (3, [0], "local_block_ids"),
    ],
)
async def test_block_ids(local_ids: Any, remote_ids: Any, message: str) -> None:
    async with connected(target=arena(n_blocks=40, seed=2)) as pair:
        await check_refused(pair, LayoutError, message, local_ids, remote_ids)


async def test_ids_that_are_right_in_one_plane_only() -> None:
    """The plane with the fewest blocks decides."""
    target = arena(layers=1, seed=2, n_blocks=40)
    place = target.cache.groups[0].planes[1].layers[0]
    target.cache = KVCache.from_pointers(
        {"k": [target.cache.groups[0].planes[0].layers[0].base], "v": [place.base]},
        n_blocks=20,
        block_bytes=256,
        block_stride={"k": 272, "v": 280},
    )
    async with connected(arena(layers=1, seed=1), target) as pair:
        await check_refused(
            pair, LayoutError, r"\[0\] is 20, not in \[0, 20\)", [0], [20]
        )


@pytest.mark.parametrize(
    ("layer_idx", "message"),
    [
        (3, "layer 3 is not held by both sides .* has layers 0-2"),
        (-1, "layer -1 is not held by both sides"),
        ([0, 1, 7], "layer 7 is not held by both sides"),
        ([0, 1, 0], r"layer_idx names a layer twice: \[0, 1, 0\]"),
        (1.0, "layer_idx 1.0 is not one or several integers"),
        ("1", "is not one or several integers"),
        (True, "is not one or several integers"),
        ([None], "is not one or several integers"),
        (2**70, "is not held by both sides"),
    ],
)
async def test_layers(layer_idx: Any, message: str) -> None:
    async with connected() as pair:
        await check_refused(pair, LayoutError, message, [0], [1], layer_idx)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, "5", True, -math.inf, [1]])
async def test_timeouts(timeout: Any) -> None:
    async with connected() as pair:
        await check_refused(
            pair, UsageError, "not a positive number", [0], [1], timeout=timeout
        )
        with pytest.raises(UsageError, match="not a positive number"):
            await pair.client.connect("127.0.0.1", 1, timeout=timeout)


async def test_a_timeout_without_end_is_as_long_as_a_timer_takes() -> None:
    async with connected() as pair:
        await pair.check_write([0], [1], timeout=math.inf)
        await pair.check_write([0], [2], timeout=10**400)


@pytest.mark.parametrize(
    ("request_id", "message"),
    [
        ("r" * 257, "request_id has 257 bytes, more than 256"),
        ("ü" * 129, "request_id has 258 bytes, more than 256"),
        (b"r", "request_id is b'r', not text"),
        (7, "request_id is 7, not text"),
        ("\ud800", "request_id is .*, not text"),
    ],
)
async def test_request_ids(request_id: Any, message: str) -> None:
    async with connected() as pair:
        await check_refused(pair, UsageError, message, [0], [1], request_id=request_id)


async def test_request_ids_that_just_fit() -> None:
    async with connected() as pair:
        for request_id in ("r" * 256, "ü" * 128, "a\0b"):
            await pair.check_write([0], [1], 0, request_id=request_id)
            assert (await take(pair.server, 1))[0].request_id == request_id


async def test_groups() -> None:
    async with connected() as pair:
        await check_refused(
            pair,
            LayoutError,
            "no group 'other'; the cache has main",
            [0],
            [0],
            group="other",
        )


async def test_peers() -> None:
    async with connected() as pair, connected() as other:
        with pytest.raises(UsageError, match="a peer of another client"):
            await pair.client.write_cache(other.peer, [0], [1])
        with pytest.raises(UsageError, match="not what connect"):
            await pair.client.write_cache("127.0.0.1", [0], [1])  # type: ignore[arg-type]
        await pair.check_write([0], [1])
        await other.check_write([0], [1])


# -- connecting ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planes", "layers", "figures"),
    [
        ({"k": 256, "v": 512}, 3, ["block_bytes", "256", "512"]),
        ({"k": 256}, 3, ["plane v", "missing", "present"]),
        ({"k": 256, "v": 256}, range(5, 7), ["no layer in common", "0-2", "5-6"]),
    ],
)
async def test_geometry_mismatch(planes: Any, layers: Any, figures: list[str]) -> None:
    async with connected() as pair:
        with arena(planes=planes, layers=layers, seed=3) as source:
            async with Client(source.cache, **QUICK) as client:
                with pytest.raises(GeometryMismatchError) as caught:
                    await dial(client, pair.server)
                for figure in figures:
                    assert figure in str(caught.value)
                assert not client.is_connected("127.0.0.1", pair.server.port)
        await pair.check_write([0], [1])


async def test_different_element_types() -> None:
    with (
        KVCache.allocate(n_layers=1, n_blocks=4, block_bytes=64, dtype="bf16") as ours,
        KVCache.allocate(n_layers=1, n_blocks=4, block_bytes=64, dtype="fp8") as theirs,
    ):
        async with Server(theirs, port=0) as server, Client(ours) as client:
            with pytest.raises(GeometryMismatchError, match=r"bf16.*fp8|fp8.*bf16"):
                await dial(client, server)


async def test_a_port_in_use() -> None:
    async with connected() as pair:
        with arena(seed=7) as spare:
            server = Server(spare.cache, port=pair.server.port, **QUICK)
            with pytest.raises(AddressInUseError, match=str(pair.server.port)):
                await server.open()
            await server.close()
            assert spare.cache.in_use == 0
        await pair.check_write([0], [1])


async def test_a_server_that_found_its_port_in_use_can_be_opened_later() -> None:
    with arena(seed=1) as first, arena(seed=2) as second, arena(seed=3) as source:
        async with Server(first.cache, port=0, **QUICK) as holder:
            server = Server(second.cache, port=holder.port, **QUICK)
            with pytest.raises(AddressInUseError):
                await server.open()
        async with server, Client(source.cache, **QUICK) as client:
            pair = Pair(source, second, server, client, await dial(client, server))
            await pair.check_write([0], [1])


async def test_nobody_listens() -> None:
    async with connected() as pair:
        port = pair.server.port
        await pair.server.close()
        with arena(seed=7) as source:
            async with Client(source.cache, **QUICK) as client:
                with pytest.raises(ConnectTimeoutError):
                    await client.connect("127.0.0.1", port, timeout=0.2)
                with pytest.raises(ControlError, match="cannot resolve"):
                    await client.connect("no-such-host.invalid", port)


async def test_devices_that_are_not_there() -> None:
    with arena(seed=1) as source:
        for options in (
            {"device": "mlx5_77"},
            {"require_rdma": True, "device": "soft"},
        ):
            client = Client(source.cache, **options)
            with pytest.raises((DeviceUnavailableError, OptionError)):
                await client.open()
            await client.close()
            assert source.cache.in_use == 0


def test_options_are_checked_first() -> None:
    with arena(seed=1) as source:
        with pytest.raises(OptionError, match="Did you mean write_timeout"):
            Client(source.cache, write_timeuot=1)
        with pytest.raises(OptionError, match="sq_depth"):
            Server(source.cache, sq_depth=1)


# -- closed, gone, elsewhere ---------------------------------------------------------


async def test_closed_things() -> None:
    async with connected() as pair:
        before = pair.target.memory.copy()
        await pair.peer.close()
        with pytest.raises(ClosedResourceError, match="is closed"):
            await pair.client.write_cache(pair.peer, [0], [1])
        pair.peer = await dial(pair.client, pair.server)
        await pair.check_write([1], [2])
        before = pair.target.memory.copy()
        await pair.client.close()
        await pair.client.close()
        for call in (
            pair.client.write_cache(pair.peer, [0], [1]),
            dial(pair.client, pair.server),
        ):
            with pytest.raises(ClosedResourceError, match="client is closed"):
                await call
        assert (pair.target.memory == before).all()
        await pair.server.close()
        await pair.server.close()
        assert [a.layer async for a in pair.server.arrivals()] == [0, 1, 2]
        with pytest.raises(UsageError, match="opened once"):
            await pair.server.open()


async def test_never_opened() -> None:
    with arena(seed=1) as source:
        client, server = Client(source.cache), Server(source.cache)
        with pytest.raises(ClosedResourceError, match="client is new, not open"):
            await client.connect("127.0.0.1", 1)
        with pytest.raises(ClosedResourceError, match="server is not open"):
            await anext(server.arrivals())
        with pytest.raises(ClosedResourceError, match="server is not open"):
            _ = server.port
        await client.close()
        await server.close()


async def test_a_server_that_said_goodbye() -> None:
    async with connected() as pair:
        await pair.server.close()
        with pytest.raises(BrokenPeerError, match=r"the server closed|Connect again"):
            await pair.client.write_cache(pair.peer, [0], [1])
        assert not pair.peer.connected


async def test_a_cache_in_use_stays_open() -> None:
    async with connected() as pair:
        for cache in (pair.source.cache, pair.target.cache):
            with pytest.raises(UsageError, match="used by 1 open clients or servers"):
                cache.close()
        await pair.check_write([0], [1])


async def test_a_closed_cache() -> None:
    with arena(seed=1) as source:
        source.cache.close()
        client = Client(source.cache)
        with pytest.raises(ClosedResourceError, match="cache is closed"):
            await client.open()
        await client.close()


async def test_another_event_loop() -> None:
    async with connected() as pair:
        before = pair.target.memory.copy()

        def elsewhere(call: Any) -> None:
            with pytest.raises(UsageError, match="belongs to another event loop"):
                asyncio.run(call)

        write = pair.client.write_cache(pair.peer, [0], [1])
        await asyncio.to_thread(elsewhere, write)
        await asyncio.to_thread(elsewhere, dial(pair.client, pair.server))
        await asyncio.to_thread(elsewhere, take(pair.server, 1))
        await asyncio.to_thread(elsewhere, pair.client.close())
        await asyncio.to_thread(elsewhere, pair.server.close())
        assert (pair.target.memory == before).all()
        await pair.check_write([0], [1])


FORKED = """
    import asyncio, os, sys, warnings
    import numpy as np
    from kvxfer.errors import ClosedResourceError
    from tests.endpoints import connected, dial, take

    warnings.simplefilter("ignore")  # forking with threads is the point

    def child(pair):
        calls = {
            "write": lambda: pair.client.write_cache(pair.peer, [0], [1]),
            "connect": lambda: dial(pair.client, pair.server),
            "arrivals": lambda: take(pair.server, 1),
            "peer": lambda: pair.peer.close(),
            "client": lambda: pair.client.close(),
            "server": lambda: pair.server.close(),
        }
        code = 0
        for name, call in calls.items():
            try:
                asyncio.run(asyncio.wait_for(call(), 5))
                print(name, "did not raise", flush=True)
                code = 1
            except ClosedResourceError as error:
                assert "process" in str(error), error
            except BaseException as error:
                print(name, repr(error), flush=True)
                code = 1
        os._exit(code)

    async def main():
        async with connected() as pair:
            await pair.check_write([0], [1])
            before = pair.target.memory.copy()
            pid = os.fork()
            if pid == 0:
                asyncio.events._set_running_loop(None)
                child(pair)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert (pair.target.memory == before).all()
            await pair.check_write([2], [3])
            assert len(await take(pair.server, 6)) == 6
            return os.waitstatus_to_exitcode(status)

    sys.exit(asyncio.run(main()))
"""


def test_a_forked_child_has_to_make_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
