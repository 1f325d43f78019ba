"""The records that announce what has landed: decoding and checking. Pure.

The layout is that of ``native/notify.h``, whose writer is the engine of the other
side. The engine of this side has checked the record's place, length and sequence;
what it says is checked here, before anyone acts on it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvxfer.errors import LayoutError, ProtocolError
from kvxfer.layout import Group
from kvxfer.sharding import Shard

# magic, length, sequence, n_bytes, layer, n_ids, group, n_qps, request_bytes,
# flags, digest, generation, total
_HEADER = struct.Struct("<IIQQIIHHHHQQQ")


@dataclass(frozen=True, eq=False)
class Record:
    """What one operation of a peer has put into this side's blocks.

    Attributes:
      group: Name of the group.
      layer: Model layer.
      block_ids: The blocks written, in the writer's order.
      request_id: As the writer gave it, or None.
      n_bytes: Bytes written, all planes together.
      sequence: Number of the operation on its connection, from 0.
      generation: Of the offer that it fulfils; 0 if it fulfils none.
      total: Once a layer is complete, how many records it had under that offer on
        this connection, this one included; 0 before.
      digest: Of the complete layer, where one was asked for; 0 otherwise.
    """

    group: str
    layer: int
    block_ids: NDArray[np.int64]
    request_id: str | None
    n_bytes: int
    sequence: int
    generation: int = 0
    total: int = 0
    digest: int = 0


def max_ids(ring_bytes: int, request_bytes: int) -> int:
    """Return how many block ids a record holds that a ring of this length takes."""
    # kvx_notify_limit() of native/notify.h.
    return (ring_bytes // 4 - _HEADER.size - (request_bytes + 7) // 8 * 8) // 4


def decode(
    record: bytes, groups: tuple[Group, ...], shards: tuple[Shard, ...] = ()
) -> Record:
    """Decode a record and check it against the cache that it speaks of.

    Args:
      shards: The parts of blocks that this peer writes; none: whole blocks.

    Raises:
      ProtocolError: It names a group, layer or block that is not there, or its
        sizes disagree.
    """
    if len(record) < _HEADER.size:
        raise ProtocolError(f"a notify record of {len(record)} bytes")
    fields = _HEADER.unpack_from(record)
    _, length, sequence, n_bytes, layer, n_ids, group_index, _, n_request, _ = fields[
        :10
    ]
    digest, generation, total = fields[10:]
    ids_at = _HEADER.size + (n_request + 7) // 8 * 8
    if length != len(record) or ids_at + 4 * n_ids != length:
        raise ProtocolError("the sizes in a notify record disagree")
    try:
        group = groups[group_index]
        rows = dict(group.rows(layer))
    except (IndexError, LayoutError):
        raise ProtocolError(
            f"a notify record names group {group_index}, layer {layer}, which are "
            "not here"
        ) from None
    ids = np.frombuffer(record, np.dtype("<u4"), n_ids, ids_at).astype(np.int64)
    parts = [s for s in shards if s.group == group.name and s.plane in rows]
    written = {s.plane for s in parts} if shards else set(rows)
    limit = min((rows[plane].n_blocks for plane in written), default=0)
    if n_ids == 0 or int(ids.max()) >= limit:
        raise ProtocolError(
            f"a notify record names blocks that are not in [0, {limit})"
        )
    block_bytes = sum(s.length for s in parts)
    if not shards:
        block_bytes = sum(place.block_bytes for place in rows.values())
    if n_bytes != n_ids * block_bytes:
        raise ProtocolError(f"a notify record claims {n_bytes} bytes in {n_ids} blocks")
    try:
        request = record[_HEADER.size : _HEADER.size + n_request].decode()
    except UnicodeDecodeError:
        raise ProtocolError("a request id in a notify record is not UTF-8") from None
    return Record(
        group=group.name,
        layer=layer,
        block_ids=ids,
        request_id=request or None,
        n_bytes=n_bytes,
        sequence=sequence,
        generation=generation,
        total=total,
        digest=digest,
    )
