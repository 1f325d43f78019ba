"""Block ids, and the byte ranges that they stand for. Pure arithmetic.

:func:`extents` is written to be read. The compiled engine does the same work
without a table of extents, and is tested against this.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvxfer.errors import LayoutError

__all__ = [
    "AnyIds",
    "Extent",
    "Ids",
    "PlanePair",
    "as_ids",
    "check_ids",
    "engine_ids",
    "extents",
]

Ids = npt.NDArray[np.int64]
#: What the engine takes.
AnyIds = npt.NDArray[np.int64] | npt.NDArray[np.int32]

_INT64 = np.dtype(np.int64)
_INT32 = np.dtype(np.int32)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LayoutError(message)


def as_ids(ids: object, name: str = "block ids") -> Ids:
    """Give block ids as a contiguous int64 array.

    Takes a list, tuple or range of integers, and one-dimensional integer
    arrays: numpy, the buffer protocol, torch and others on the CPU. An int64
    array that is contiguous is handed through, not copied, so it must not
    change while it is in use.

    Args:
      ids: The ids. Their range is not checked here; see :func:`check_ids`.
      name: What to call them in messages.

    Raises:
      LayoutError: Not one-dimensional, or not integers. Floats and booleans
        are refused even where their value is whole.
    """
    if isinstance(ids, list | tuple):
        return _ids_of_sequence(ids, name)
    if isinstance(ids, range):
        limit = 1 << 63
        _require(
            not ids or (-limit <= min(ids) and max(ids) < limit),
            f"{name}: {ids!r} goes beyond 64 bits",
        )
        return np.arange(ids.start, ids.stop, ids.step, dtype=np.int64)
    if isinstance(ids, str | bytes | bytearray | set | frozenset | dict):
        raise LayoutError(f"{name} is a {type(ids).__name__}, expected integers")
    try:
        found = np.asarray(ids)
    except Exception as exc:  # any library may raise its own, for device memory
        raise LayoutError(
            f"{name}: cannot read a {type(ids).__name__} as an array: {exc}",
            hint="Block ids must be in host memory.",
        ) from exc
    _require(
        found.dtype.kind in "iu" and found.ndim == 1,
        f"{name}: expected one dimension of integers, got a {type(ids).__name__} "
        f"with shape {found.shape} and dtype {found.dtype}",
    )
    if found.dtype == np.uint64 and found.size and int(found.max()) >= 1 << 63:
        raise LayoutError(f"{name}: {int(found.max())} is no block id")
    return np.ascontiguousarray(found, dtype=np.int64)


def engine_ids(ids: object, name: str = "block ids") -> AnyIds:
    """Give block ids as the engine takes them: int64, or int32 as it is.

    As :func:`as_ids`, which it does without where nothing is to be converted: that
    is on the path of every write.
    """
    if (
        type(ids) is np.ndarray
        and (ids.dtype is _INT64 or ids.dtype is _INT32)
        and ids.ndim == 1
        and ids.flags.c_contiguous
    ):
        return ids
    return as_ids(ids, name)


def _ids_of_sequence(ids: Sequence[Any], name: str) -> Ids:
    # A bool is an int to array(), so look for it first.
    if bool in set(map(type, ids)):
        position = next(i for i, item in enumerate(ids) if type(item) is bool)
        raise LayoutError(f"{name}: {ids[position]} at position {position} is a bool")
    try:
        return np.frombuffer(array.array("q", ids), dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as exc:
        raise LayoutError(f"{name} must be integers: {exc}") from exc


def check_ids(
    local_ids: object, remote_ids: object, n_local: int, n_remote: int
) -> tuple[Ids, Ids]:
    """Check pairs of block ids and give them as arrays.

    Local ids may repeat, since one block may be sent to several places.

    Args:
      local_ids: Source blocks; see :func:`as_ids`.
      remote_ids: Destination blocks, one for each source block.
      n_local: Blocks on this side: ids must be in ``range(n_local)``.
      n_remote: Blocks on the other side.

    Raises:
      LayoutError: Lengths differ, an id is out of range, or a destination
        occurs twice; the message has the position, the id and the limit.
    """
    ours = as_ids(local_ids, "local block ids")
    theirs = as_ids(remote_ids, "remote block ids")
    if ours.size != theirs.size:
        raise LayoutError(
            f"{ours.size} local block ids but {theirs.size} remote block ids"
        )
    _check_range(ours, n_local, "local")
    _check_range(theirs, n_remote, "remote")
    ordered = np.sort(theirs)
    if (ordered[1:] == ordered[:-1]).any():
        first: dict[int, int] = {}
        for position, block_id in enumerate(theirs.tolist()):
            if block_id in first:
                raise LayoutError(
                    f"remote block id {block_id} occurs twice, at positions "
                    f"{first[block_id]} and {position}"
                )
            first[block_id] = position
    return ours, theirs


def _check_range(ids: Ids, n_blocks: int, side: str) -> None:
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= n_blocks):
        position = int(np.flatnonzero((ids < 0) | (ids >= n_blocks))[0])
        raise LayoutError(
            f"{side} block id {int(ids[position])} at position {position} is out of "
            f"range: there are {n_blocks} blocks, 0 to {n_blocks - 1}"
        )


@dataclass(frozen=True, slots=True)
class PlanePair:
    """One plane of one layer on both sides: all that the arithmetic needs.

    Attributes:
      local_base: Address of the local block 0.
      local_stride: Bytes between local blocks.
      remote_base: Address of the remote block 0.
      remote_stride: Bytes between remote blocks.
      block_bytes: Bytes of a block, the same on both sides.
      n_local: Local blocks.
      n_remote: Remote blocks.
    """

    local_base: int
    local_stride: int
    remote_base: int
    remote_stride: int
    block_bytes: int
    n_local: int
    n_remote: int


class Extent(NamedTuple):
    """A run of bytes, contiguous on both sides."""

    local_addr: int
    remote_addr: int
    length: int


def extents(
    pairs: Iterable[PlanePair],
    local_ids: object,
    remote_ids: object,
    *,
    merge_bytes: int = 1 << 20,
) -> list[Extent]:
    """Turn block ids into byte ranges, in the order in which they are posted.

    All blocks of the first pair come first, then those of the second, and so
    on; within a pair in the order of the ids, which are not sorted. A block
    joins the extent before it if it follows that one's last byte on both sides,
    belongs to the same pair, and the result is at most ``merge_bytes``. A block
    is never split.

    Raises:
      LayoutError: As :func:`check_ids`, for the pair with the fewest blocks.
    """
    pairs = list(pairs)
    n_local = min((pair.n_local for pair in pairs), default=0)
    n_remote = min((pair.n_remote for pair in pairs), default=0)
    ours, theirs = check_ids(local_ids, remote_ids, n_local, n_remote)
    # Python integers, so that nothing can overflow.
    ids = list(zip(ours.tolist(), theirs.tolist(), strict=True))
    result: list[Extent] = []
    for pair in pairs:
        run: Extent | None = None
        for local_id, remote_id in ids:
            local = pair.local_base + local_id * pair.local_stride
            remote = pair.remote_base + remote_id * pair.remote_stride
            if (
                run is not None
                and run.local_addr + run.length == local
                and run.remote_addr + run.length == remote
                and run.length + pair.block_bytes <= merge_bytes
            ):
                run = run._replace(length=run.length + pair.block_bytes)
                result[-1] = run
            else:
                run = Extent(local, remote, pair.block_bytes)
                result.append(run)
    return result
