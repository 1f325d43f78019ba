"""Which wires of the software device suit what a client writes from."""

from __future__ import annotations

from collections.abc import Iterator

from kvxfer.cache import KVCache

__all__ = ["SMALL_BLOCK", "accepted", "suited", "which"]

#: Bytes. The kernel takes about a microsecond for each range that one process reads out
#: of another, whatever its length; in a stream a range costs a fraction of that. Blocks
#: up to this size are through sooner by tcp, or as soon, although two threads read at a
#: time: `kvxfer bench --preset ordinary-small`.
SMALL_BLOCK = 2048

_BOTH = ("auto", "tcp")


def suited(wire: str, cache: KVCache) -> tuple[str, ...]:
    """Choose for a client, where the choice is left to kvxfer.

    Memory that peers can map goes by shm, other memory by cma where its blocks are
    large, and by tcp where they are small. The device itself falls back to tcp.

    Args:
      wire: The option ``soft_wire``.

    Returns:
      What the device is asked for; ``auto`` leaves shm and cma to it. Two where a layer
      of the cache is better off with one and another with the other, that of large
      blocks first: see :func:`which`.
    """
    if wire != "auto" or any(region.fd >= 0 for region in cache.regions):
        return (wire,)
    small = {size <= SMALL_BLOCK for size in _largest_blocks(cache)}
    if len(small) == 2:
        return _BOTH
    return ("tcp",) if True in small else (wire,)


def _largest_blocks(cache: KVCache) -> Iterator[int]:
    """Give the bytes of the largest block of each layer."""
    for group in cache.groups:
        for layer in group.layers:
            yield max(place.block_bytes for _, place in group.rows(layer))


def accepted(wire: str) -> tuple[str, ...]:
    """Return the wires that who is written to takes: both, if it may be any."""
    return _BOTH if wire == "auto" else (wire,)


def which(largest_block: int) -> int:
    """Say by which of two wires a layer with such blocks goes, by its position."""
    return int(largest_block <= SMALL_BLOCK)
