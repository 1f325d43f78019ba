"""Writes over a network that delays, loses or reorders packets.

    unshare --net python -m tests.lossy "delay 10ms" "loss 1%"

In a network namespace of its own, of which it has the loopback for itself: all of
kvxfer's packets, those of the control connection and of the software device's TCP
wire, are treated as tc-netem(8) is told, in one way after another. For each it says
a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from kvxfer.errors import KVXferError
from tests.endpoints import SOON, Pair, arena, connected, dial, scattered, until
from tests.patience import patient

BLOCKS, WRITES = 64, 4
OPTIONS: dict[str, Any] = {
    "device": "soft",
    "soft_wire": "tcp",
    "connect_timeout": SOON,
    "write_timeout": SOON,
    "ping_interval": patient(0.5),
    "ping_timeout": patient(1.5),
    "ib_timeout": 18,
}


def netem(verb: str, *how: str) -> str:
    """Have the loopback treat packets so; return what ``tc`` complains of."""
    command = ["tc", "qdisc", verb, "dev", "lo", "root", "netem", *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


async def check_writes(pair: Pair) -> None:
    """Write scattered blocks several times; each of them and nothing else lands."""
    for seed in range(WRITES):
        ours = scattered(BLOCKS, BLOCKS // 2, seed)
        theirs = scattered(BLOCKS, BLOCKS // 2, seed + 100)
        await asyncio.wait_for(pair.check_write(ours, theirs), SOON)


async def write(how: str, *, lose: bool) -> dict[str, Any]:
    """Write; if wanted lose all packets, and write again when that is over."""
    planes = {"k": (16384, 16448)}
    source = arena(n_blocks=BLOCKS, layers=2, planes=planes, seed=1)
    target = arena(n_blocks=BLOCKS, layers=2, planes=planes, seed=2)
    found = ""
    async with connected(source, target, **OPTIONS) as pair:
        await check_writes(pair)
        assert pair.peer.wire == "tcp"
        if lose:
            found = await lose_all(pair)
            netem("change", *how.split())
            pair.peer = await dial(pair.client, pair.server)
            await check_writes(pair)
            await until(lambda: len(pair.server.peers) == 1)
    return {"how": how, "error": found}


async def lose_all(pair: Pair) -> str:
    """Write while nothing arrives; return the name of the error."""
    netem("change", "loss", "100%")
    ids = range(BLOCKS)
    try:
        await asyncio.wait_for(pair.client.write_cache(pair.peer, ids, ids), SOON)
    except KVXferError as error:
        await until(lambda: not pair.server.peers)
        return type(error).__name__
    return ""


def main() -> None:
    """Run in this network namespace; the last way is that in which all is lost too."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for how in sys.argv[1:]:
        problem = netem("replace", *how.split())
        if problem:
            found = {"no netem": problem}
        else:
            found = asyncio.run(write(how, lose=how == sys.argv[-1]))
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
