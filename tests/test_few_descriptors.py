"""Processes that may have few descriptors: RLIMIT_NOFILE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvxfer import Server
from tests.children import Nursery
from tests.endpoints import QUICK, arena
from tests.patience import patient

FEW = 64
SHAPE: dict[str, Any] = {"n_blocks": 4, "layers": 1, "planes": {"k": (256, 288)}}
#: A listener that is full is asked again until then.
ASKED = {"connect_timeout": patient(2.0)}


def check(full: dict[str, Any], error: str) -> None:
    """Check why there are no more connections than there are."""
    assert full["error"] == error
    assert 2 <= full["n"] < FEW / 4
    assert f"of {FEW} file descriptors (ulimit -n)" in full["text"]


async def test_a_client_with_few_descriptors(nursery: Nursery) -> None:
    """It is told at once; what it has goes on, and what it closes is free again."""
    with arena(**SHAPE, seed=2) as target:
        async with Server(target.cache, port=0, **QUICK) as server:
            hoarding = nursery.start(
                "hoard", port=server.port, shape={**SHAPE, "seed": 1}, nofile=FEW
            )
            async with hoarding as child:
                full = await child.event()
                check(full, "ControlError")
                assert "Raise `ulimit -n`" in full["text"]
                assert len(server.peers) == full["n"]
                assert await child.event() == {"event": "written"}
                assert await child.event() == {"event": "again"}


async def test_a_server_with_few_descriptors(nursery: Nursery, tmp_path: Path) -> None:
    """It says so to whoever comes; its peers go on, and room is given again."""
    serving = nursery.start(
        "serve",
        path=str(tmp_path / "memory"),
        shape={**SHAPE, "seed": 2},
        nofile=FEW,
    )
    async with serving as server:
        port = (await server.event())["port"]
        hoarding = nursery.start(
            "hoard", port=port, shape={**SHAPE, "seed": 1}, **ASKED
        )
        async with hoarding as child:
            full = await child.event()
            check(full, "RefusedError")
            assert "the listener has no room" in full["text"]
            assert await child.event() == {"event": "written"}
            assert await child.event() == {"event": "again"}


@pytest.mark.parametrize("nofile", range(10, 50, 4))
async def test_too_few_to_begin_with(nursery: Nursery, nofile: int) -> None:
    """Wherever it runs out, it is an error and not the end of the process."""
    with arena(**SHAPE, seed=2) as target:
        async with Server(target.cache, port=0, **QUICK) as server:
            hoarding = nursery.start(
                "hoard", port=server.port, shape={**SHAPE, "seed": 1}, nofile=nofile
            )
            async with hoarding as child:
                full = await child.event()
                assert full.get("n") in (0, 1, 2), full
                assert "ulimit -n" in full["text"]
