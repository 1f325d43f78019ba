"""The records that announce what has landed: decoding and checking. Pure.

The layout is that of ``native/notify.h``, whose writer is the engine of the other
side. The engine of this side has checked the record's place, length and sequence;
what it says is checked here, before anyone acts on it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvxfer.errors import LayoutError, ProtocolError
from kvxfer.layout import Group
from kvxfer.sharding import Shard

# magic, length, sequence, n_bytes, layer, n_ids, group, n_qps, request_bytes,
# flags, digest, generation, total
_HEADER = struct.Struct("<IIQQIIHHHHQQQ")
_ID = np.dtype("<u4")


# Made for each notification; a frozen dataclass would set each field by a call of its
# own.
class Record(msgspec.Struct, frozen=True, eq=False):
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


class _Place(NamedTuple):
    """What records about one layer of one group are checked against."""

    group: str
    limit: int
    """Block ids in every plane that is written: ``range(limit)``."""
    block_bytes: int
    """Written for one block."""


class RecordReader:
    """Decodes the records of one peer and checks them against the cache here.

    Args:
      groups: Of the cache, in the order that both sides have agreed on.
      shards: The parts of blocks that this peer writes; none: whole blocks.
    """

    def __init__(
        self, groups: tuple[Group, ...], shards: tuple[Shard, ...] = ()
    ) -> None:
        self._groups = groups
        self._shards = shards
        self._places: dict[tuple[int, int], _Place] = {}

    def read(self, record: bytes) -> Record:
        """Decode a record.

        Raises:
          ProtocolError: It names a group, layer or block that is not there, or its
            sizes disagree.
        """
        if len(record) < _HEADER.size:
            raise ProtocolError(f"a notify record of {len(record)} bytes")
        (
            _,
            length,
            sequence,
            n_bytes,
            layer,
            n_ids,
            group_index,
            _,
            n_request,
            _,
            digest,
            generation,
            total,
        ) = _HEADER.unpack_from(record)
        ids_at = _HEADER.size + (n_request + 7) // 8 * 8
        if length != len(record) or ids_at + 4 * n_ids != length:
            raise ProtocolError("the sizes in a notify record disagree")
        place = self._places.get((group_index, layer))
        if place is None:
            place = self._find(group_index, layer)
        ids = np.frombuffer(record, _ID, n_ids, ids_at)
        if n_ids == 0 or int(np.maximum.reduce(ids)) >= place.limit:
            raise ProtocolError(
                f"a notify record names blocks that are not in [0, {place.limit})"
            )
        if n_bytes != n_ids * place.block_bytes:
            raise ProtocolError(
                f"a notify record claims {n_bytes} bytes in {n_ids} blocks"
            )
        return Record(
            place.group,
            layer,
            ids.astype(np.int64),
            _request_of(record, n_request) if n_request else None,
            n_bytes,
            sequence,
            generation,
            total,
            digest,
        )

    def _find(self, group_index: int, layer: int) -> _Place:
        """Look up a place for the first time; the cache does not change."""
        try:
            group = self._groups[group_index]
            rows = dict(group.rows(layer))
        except (IndexError, LayoutError):
            raise ProtocolError(
                f"a notify record names group {group_index}, layer {layer}, which are "
                "not here"
            ) from None
        parts = [s for s in self._shards if s.group == group.name and s.plane in rows]
        written = {s.plane for s in parts} if self._shards else set(rows)
        limit = min((rows[plane].n_blocks for plane in written), default=0)
        block_bytes = sum(s.length for s in parts)
        if not self._shards:
            block_bytes = sum(place.block_bytes for place in rows.values())
        found = _Place(group.name, limit, block_bytes)
        self._places[group_index, layer] = found
        return found


def _request_of(record: bytes, length: int) -> str:
    try:
        return record[_HEADER.size : _HEADER.size + length].decode()
    except UnicodeDecodeError:
        raise ProtocolError("a request id in a notify record is not UTF-8") from None
