from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from kvxfer._verbs import CompletionQueue, Device, QueuePair

CANCELLED_STATUS: int

class Finished(NamedTuple):
    op_id: int
    status: int
    culprit: bool
    n_bytes: int
    n_wrs: int
    seconds: float
    wr_id: int
    qp_num: int
    vendor_err: int

class RingArrival(NamedTuple):
    slot: int
    record: bytes
    head: int
    error: str | None

class Watch: ...

class Progress(NamedTuple):
    finished: list[Finished]
    arrivals: list[RingArrival]
    failed: list[int]
    more: bool
    ended: list[Any]

# Of all blocks; or blocks a slice, and a key for each slice.
Key = int | tuple[int, Sequence[int]]
# local_base, local_stride, remote_base, remote_stride, block_bytes, lkey, rkey
Pair = tuple[int, int, int, int, int, Key, Key]
# layer, group, n_local, n_remote, pairs
Row = tuple[int, int, int, int, Sequence[Pair]]
# local_addr, lkey, remote_addr, rkey, length, max_records
Ring = tuple[int, int, int, int, int, int]

_Ids = NDArray[np.int64] | NDArray[np.int32]

@final
class Engine:
    def __init__(
        self,
        device: Device,
        *,
        cq_depth: int,
        chain: int = 64,
        max_sge: int = 8,
        merge_bytes: int = ...,
        max_wr_bytes: int = ...,
        window_bytes: int = ...,
        device_window_bytes: int = ...,
        stripe_bytes: int = ...,
        progress: str = ...,
        spin_ns: int | None = ...,
    ) -> None: ...
    @property
    def cq(self) -> CompletionQueue: ...
    @property
    def fd(self) -> int: ...
    @property
    def spin_ns(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def attention(self) -> bool: ...
    def close(self) -> None: ...
    def add_initiator(
        self,
        qps: QueuePair | Sequence[QueuePair],
        rows: Sequence[Row],
        ring: Ring | None = None,
        flush_to: tuple[int, int] | None = None,
        lanes: Sequence[int] | None = None,
    ) -> int: ...
    def add_target(
        self,
        qps: QueuePair | Sequence[QueuePair],
        ring_addr: int,
        ring_bytes: int,
        receives: int,
    ) -> int: ...
    def remove(self, slot: int) -> None: ...
    def abort(self, slot: int) -> None: ...
    def flush(self, slot: int) -> None: ...
    def forget(self, slot: int) -> None: ...
    def unretired(self, slot: int) -> int: ...
    def grant(self, slot: int, consumed_bytes: int, consumed_records: int) -> None: ...
    def submit(
        self,
        slot: int,
        rows: Sequence[int],
        local_ids: _Ids,
        remote_ids: _Ids,
        request_id: bytes = b"",
        key: int = 0,
        tag: tuple[int, int, int] = (0, 0, 0),
    ) -> list[int]: ...
    def write(
        self,
        slot: int,
        rows: Sequence[int],
        local_ids: _Ids,
        remote_ids: _Ids,
        request_id: bytes = b"",
        key: int = 0,
        tag: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[int, int, float] | list[int]: ...
    def watch(self, watch: Watch, op_ids: list[int]) -> None: ...
    @property
    def watches(self) -> set[Any]: ...
    def cancel(self, op_id: int) -> None: ...
    def progress(self) -> Progress: ...
