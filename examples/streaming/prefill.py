"""The prefill side: layers leave as they are computed, chunk after chunk."""

import asyncio

import kvxfer


async def main() -> None:
    cache = kvxfer.KVCache.allocate(n_layers=4, n_blocks=128, block_bytes=32768)
    async with kvxfer.Client(cache, listen="127.0.0.1:7778") as client:
        print("listening at", client.listening, flush=True)
        request = client.open("r1")
        for first, blocks in ((0, [100, 3]), (2, [57])):  # two chunks of the prompt
            for layer in range(4):
                for plane in ("k", "v"):
                    cache.view(layer, plane)[blocks] = layer + 1  # the model computes
                request.ready(layer, blocks, first_block=first, final=first == 2)
        request.finish(aux=b"first token: 42")
        await request.sent()
        print(request.state.value, request.metrics.bytes, "bytes")
    cache.close()


asyncio.run(main())
