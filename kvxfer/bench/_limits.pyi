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
def post_blocks(
    qp: QueuePair,
    local_base: int,
    lkey: int,
    remote_base: int,
    rkey: int,
    block_bytes: int,
    local_ids: Ids,
    remote_ids: Ids,
    reading: bool = False,
) -> None: ...
def answer_words(words: NDArray[np.uint64]) -> None: ...
def ask_words(words: NDArray[np.uint64], most_ns: int) -> float: ...
