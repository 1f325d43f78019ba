"""The records that announce what has landed, once they are read and checked.

They are written by the engine of the other side as ``native/notify.h`` lays them out,
and read by ``_records.pyx``.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray


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
