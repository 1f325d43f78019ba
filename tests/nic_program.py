"""A client and a server of one process on its NICs, for test_nics.py.

The one argument is JSON: the options of both; what came of it is printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import kvxfer
import kvxfer.link

paths: list[dict[str, Any]] = []
_names = vars(kvxfer.link)
made = _names["QPPath"]


def look_at(**fields: Any) -> Any:
    paths.append({name: fields[name] for name in ("lid", "is_global")})
    return made(**fields)


def cache() -> kvxfer.KVCache:
    return kvxfer.KVCache.allocate(n_layers=2, n_blocks=8, block_bytes=4096)


async def main(options: dict[str, Any]) -> dict[str, Any]:
    say: dict[str, Any] = {}
    with cache() as source, cache() as target:
        source.view(1, "k")[3] = 77
        async with (
            kvxfer.Server(target, port=0, **options["server"]) as server,
            kvxfer.Client(source, **options["client"]) as client,
        ):
            say["before"] = [s.name for s in client.device_states()]
            peer = await client.connect("127.0.0.1", server.port)
            result = await client.write_cache(peer, [3], [5])
            say["device"] = result.device
            say["wire"] = result.wire
            say["after"] = [s.name for s in client.device_states()]
            say["there"] = server.devices
            say["paths"] = paths
            say["layers"] = {s.name: s.link_layer for s in client.device_states()}
        say["bytes"] = int(target.view(1, "k")[5][0])
    return say


if __name__ == "__main__":
    _names["QPPath"] = look_at
    try:
        said = asyncio.run(main(json.loads(sys.argv[1])))
    except kvxfer.KVXferError as error:
        said = {"error": type(error).__name__, "text": str(error)}
    sys.stdout.write(json.dumps(said))
