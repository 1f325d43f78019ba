"""The decode side: offer blocks, and begin the moment the last layer is in place."""

import asyncio

import kvxfer


async def main() -> None:
    cache = kvxfer.KVCache.allocate(n_layers=4, n_blocks=64, block_bytes=32768)
    async with kvxfer.Server(cache, host="127.0.0.1", port=0) as server:
        ticket = server.offer("127.0.0.1:7778", "r1", {"main": [8, 9, 31]})
        for layer in range(4):
            await ticket.wait_layer(layer)
            print("layer", layer, "holds", cache.view(layer, "k")[31][0])
        await ticket.wait()
        print(ticket.state.value, ticket.aux.decode())
    cache.close()


asyncio.run(main())
