"""Which wire of the software device suits what a client writes from."""

from __future__ import annotations

from kvxfer.cache import KVCache

__all__ = ["SMALL_BLOCK", "suited"]

#: Bytes. The kernel takes about a microsecond for each range that one process reads out
#: of another, whatever its length; in a stream a range costs a fraction of that. Blocks
#: up to this size are through sooner by tcp, or as soon, although two threads read at a
#: time: `kvxfer bench --preset ordinary-small`.
SMALL_BLOCK = 2048


def suited(wire: str, cache: KVCache) -> str:
    """Choose for a client, where the choice is left to kvxfer.

    Memory that peers can map goes by shm, other memory by cma where its blocks are
    large, and by tcp where all are small. The device itself falls back to tcp.

    Args:
      wire: The option ``soft_wire``.

    Returns:
      What the device is asked for; ``auto`` leaves shm and cma to it.
    """
    if wire != "auto" or any(region.fd >= 0 for region in cache.regions):
        return wire
    sizes = (
        place.block_bytes
        for group in cache.groups
        for layer in group.layers
        for _, place in group.rows(layer)
    )
    largest = max(sizes, default=0)
    return "tcp" if 0 < largest <= SMALL_BLOCK else wire
