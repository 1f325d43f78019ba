"""A host that does not let one process read another's memory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvxfer import Client, KVCache, Peer
from kvxfer.doctor import cma
from kvxfer.errors import RetryExceededError
from tests.children import Nursery
from tests.endpoints import QUICK, arena, expected
from tests.seccomp import can_deny

pytestmark = pytest.mark.skipif(
    not can_deny(), reason="the numbers of this machine's system calls are not known"
)

#: More than the ring for notifications, which is a file that peers can map.
SHAPE: dict[str, Any] = {"n_blocks": 64, "layers": 2, "planes": {"k": (32768, 33024)}}
ALL = range(64)


@contextlib.asynccontextmanager
async def dialed(
    nursery: Nursery, client: Client, path: Path, error: int | None
) -> AsyncIterator[Peer]:
    """Connect to a server whose process_vm_readv fails with an errno, or works."""
    async with nursery.start(
        "serve",
        path=str(path),
        shape={**SHAPE, "seed": 2},
        deny={} if error is None else {"process_vm_readv": error},
    ) as child:
        yield await client.connect("127.0.0.1", (await child.event())["port"])


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.ENOSYS])
async def test_bytes_go_by_tcp_where_they_cannot_be_fetched(
    nursery: Nursery, error: int | None, tmp_path: Path, caplog: Any
) -> None:
    if error is None and cma.attempt():
        pytest.skip("this machine permits no copies")
    with (
        arena(**SHAPE, seed=1) as source,
        arena(**SHAPE, seed=2, path=tmp_path / "memory") as target,
    ):
        before = target.memory.copy()
        async with (
            Client(source.cache, **QUICK) as client,
            dialed(nursery, client, tmp_path / "memory", error) as peer,
        ):
            result = await client.write_cache(peer, ALL, ALL)
            assert (target.memory == expected(source, target, before, ALL, ALL)).all()
    said = [r.message for r in caplog.records if "process_vm_readv" in r.message]
    if error is None:
        assert (result.wire, said) == ("cma", [])
    else:
        assert result.wire == "tcp"
        (line,) = said
        assert os.strerror(error) in line and "bytes travel by tcp" in line


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
async def test_a_wire_that_is_insisted_on(
    nursery: Nursery, error: int, tmp_path: Path
) -> None:
    """It is not replaced; the error says what stands in its way, and what to do."""
    with arena(**SHAPE, seed=1) as source:
        async with Client(source.cache, soft_wire="cma", **QUICK) as client:
            async with dialed(nursery, client, tmp_path / "one", error) as peer:
                with pytest.raises(RetryExceededError) as caught:
                    await client.write_cache(peer, ALL, ALL)
            text = str(caught.value)
            assert f"process_vm_readv: {os.strerror(error)}" in text
            assert "soft_wire" in text and "auto" in text
            assert "cable" not in text


async def test_memory_that_peers_map_needs_no_such_call(
    nursery: Nursery, tmp_path: Path
) -> None:
    with KVCache.allocate(
        n_blocks=64, n_layers=2, planes=["k"], block_bytes=32768
    ) as cache:
        async with (
            Client(cache, **QUICK) as client,
            dialed(nursery, client, tmp_path / "memory", errno.EPERM) as peer,
        ):
            assert (await client.write_cache(peer, ALL, ALL)).wire == "shm"
