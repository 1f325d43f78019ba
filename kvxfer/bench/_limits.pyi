import numpy as np
from numpy.typing import NDArray

from kvxfer._verbs import QueuePair

Ids = NDArray[np.int64]

def copy_blocks(
    target_base: int,
    target_ids: Ids,
    source_base: int,
    source_ids: Ids,
    block_bytes: int,
) -> None: ...
def serve_reads(
    fd: int,
    pid: int,
    target_base: int,
    source_base: int,
    block_bytes: int,
    target_ids: Ids,
    source_ids: Ids,
) -> None: ...
def serve_stream(
    fd: int, target_base: int, block_bytes: int, target_ids: Ids
) -> None: ...
def ask(fd: int, source_set: int, target_set: int) -> None: ...
def send_batch(
    fd: int,
    source_base: int,
    block_bytes: int,
    source_ids: Ids,
    source_set: int,
    target_set: int,
) -> None: ...
def answer_words(words: NDArray[np.uint64]) -> None: ...
def ask_words(words: NDArray[np.uint64], most_ns: int) -> float: ...

class Poster:
    def __init__(
        self,
        qps: list[QueuePair],
        planes: list[tuple[int, int, int, int]],
        *,
        chain: int,
        depth: int,
        reading: bool = False,
    ) -> None: ...
    @property
    def qps(self) -> list[QueuePair]: ...
    @property
    def n_batches(self) -> int: ...
    @property
    def n_wrs(self) -> int: ...
    def use(self, block_bytes: int, source_ids: Ids, target_ids: Ids) -> None: ...
    def begin(self, flight: int, source_set: int, target_set: int) -> None: ...
    def wait(self) -> list[int]: ...
