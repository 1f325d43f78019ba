from typing import final

from kvxfer.layout import Group
from kvxfer.notify import Record
from kvxfer.sharding import Shard

def max_ids(ring_bytes: int, request_bytes: int) -> int: ...

@final
class RecordReader:
    def __init__(
        self, groups: tuple[Group, ...], shards: tuple[Shard, ...] = ()
    ) -> None: ...
    def read(self, record: bytes) -> Record: ...
