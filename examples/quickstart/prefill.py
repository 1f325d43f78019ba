"""The prefill side: fill blocks layer by layer, and write each layer at once."""

import asyncio

import kvxfer


async def main() -> None:
    cache = kvxfer.KVCache.allocate(n_layers=4, n_blocks=128, block_bytes=32768)
    ours, theirs = [100, 3, 57], [8, 9, 31]
    async with kvxfer.Client(cache) as client:
        peer = await client.connect("127.0.0.1", 7777)
        for layer in range(4):
            for plane in ("k", "v"):
                cache.view(layer, plane)[ours] = layer + 1  # the model computes
            done = await client.write_cache(
                peer, ours, theirs, layer_idx=layer, request_id="r1"
            )
            print(layer, done.bytes, "bytes by", done.device)
    cache.close()


asyncio.run(main())
