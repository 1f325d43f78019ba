"""The decode side: wait for the four layers of one request."""

import asyncio

import kvxfer


async def main() -> None:
    cache = kvxfer.KVCache.allocate(n_layers=4, n_blocks=64, block_bytes=32768)
    async with kvxfer.Server(cache, host="127.0.0.1", port=7777) as server:
        print("ready", flush=True)
        layers = set()
        async for arrival in server.arrivals():
            block = cache.view(arrival.layer, "k")[arrival.block_ids[0]]
            print(
                arrival.request_id, arrival.layer, arrival.block_ids.tolist(), block[0]
            )
            layers.add(arrival.layer)
            if len(layers) == 4:
                break
    cache.close()


asyncio.run(main())
