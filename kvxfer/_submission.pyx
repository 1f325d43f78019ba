# cython: language_level=3, cdivision=True
"""Submissions: Python's block ids into a batch, what came of it into Python's records.

On its way in a submission is copied once, by the buffer protocol, and what is checked
are the copies. On the way out operations and arrivals become named tuples, and the
structs are freed.

With the GIL, and raising Python's errors; the loops over block ids and the engine's
own work are without it. The core's lock is taken here where it is needed, so the
caller must not hold it, unless something else is said.
"""

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from kvxfer._core cimport *
from kvxfer._driver cimport linger
from kvxfer._post cimport relist
from kvxfer._progress cimport settle

from typing import NamedTuple

from kvxfer.errors import ClosedResourceError, LayoutError, UsageError


class Finished(NamedTuple):
    """One finished operation.

    ``status`` is 0, :data:`CANCELLED_STATUS`, a WC status, or the negative errno
    that posting gave. On failure ``culprit`` says whether one of this operation's
    own WRs failed first; the other operations of the queue went down with it.
    """

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
    """One notification: the record as the peer wrote it, already copied.

    With ``error`` set the peer broke the rules of the ring and there is no record.
    ``head`` is the ring position that may be given back as credit.
    """

    slot: int
    record: bytes
    head: int
    error: str | None


class Progress(NamedTuple):
    """What one call of :meth:`Engine.progress` found.

    ``finished`` are the operations that nobody watches; ``ended`` is who has to be told
    that all he watches has ended. ``failed`` has the slots of queues that failed since
    the last call: their QPs want to be moved to ERR. With ``more`` the budget was used
    up: call again soon, no event may come.
    """

    finished: list
    arrivals: list
    failed: list
    more: bool
    ended: list


cdef class Watch:
    """What is told of the ends of operations; to be derived from."""

    cdef bint done(self, uint64_t op_id, uint64_t n_bytes, uint64_t n_wrs) except -1:
        """One has ended well."""
        return False

    cdef bint failed(self, uint64_t op_id, object finished) except -1:
        """One has not: its record says why."""
        return False


_RING_ERRORS = {
    1: "an immediate points outside the ring or not at the next record",
    2: "a record's header is not valid",
    3: "a receive completed that carries no immediate",
    4: "more immediates came than QPs carried data",
}


cdef int _open_ids(object ids, Py_buffer *view, str name) except -1:
    """Get at the memory of an array of int64 or int32; to be released."""
    PyObject_GetBuffer(ids, view, PyBUF_ND | PyBUF_FORMAT)
    # One letter of struct's: q and l have 8 bytes, i and l may have 4.
    if (view.ndim == 1 and view.format is not NULL and view.format[1] == 0
            and view.format[0] in (b"l", b"q", b"i")
            and view.itemsize in (4, 8)):
        return 0
    shape = f"{view.ndim} dimensions of format {view.format.decode()!r}"
    PyBuffer_Release(view)
    raise LayoutError(f"{name}: {shape}, not one of int64 or int32")


cdef uint32_t _take_ids(
    uint32_t *to, const Py_buffer *view, uint32_t n, uint64_t limit
) noexcept nogil:
    """Copy and check; return ``n`` or the position of the first id out of range."""
    if view.itemsize == 4:
        return kvx_take_ids32(to, <const int32_t *>view.buf, n, limit)
    return kvx_take_ids64(to, <const int64_t *>view.buf, n, limit)


cdef object _bad_id(
    str name, const Py_buffer *view, uint32_t position, uint64_t limit, str whose
):
    cdef int64_t value
    if view.itemsize == 4:
        value = (<const int32_t *>view.buf)[position]
    else:
        value = (<const int64_t *>view.buf)[position]
    return LayoutError(
        f"{name}[{position}] is {value}, not in [0, {limit}){whose}")


cdef int _copy_ids(
    Batch *batch, const Py_buffer *ours, const Py_buffer *theirs,
    uint64_t n_local, uint64_t n_remote,
) except -1:
    """Copy the ids and check the copies; raise LayoutError for the first bad one."""
    cdef:
        uint32_t n = batch.n_ids
        uint32_t local
        uint32_t remote = n
        uint32_t twice = n
    with nogil:
        local = _take_ids(batch.local, ours, n, n_local)
        if local == n:
            remote = _take_ids(batch.remote, theirs, n, n_remote)
            if remote == n:
                twice = kvx_find_duplicate(batch.queue.seen, batch.remote, n)
    if local < n:
        raise _bad_id("local_block_ids", ours, local, n_local, "")
    if remote < n:
        raise _bad_id("remote_block_ids", theirs, remote, n_remote, " of the peer")
    if twice < n:
        raise LayoutError(
            f"remote_block_ids[{twice}] is {batch.remote[twice]}, which "
            "the list names twice; each remote block is written once"
        )
    return 0


cdef int _check_sizes(Queue *queue, uint64_t n, uint32_t request_bytes) except -1:
    if request_bytes > KVX_NOTIFY_MAX_REQUEST:
        raise UsageError(
            f"a request id of {request_bytes} bytes is longer than "
            f"{KVX_NOTIFY_MAX_REQUEST}"
        )
    if queue.ring is not NULL and (
            kvx_notify_length(request_bytes, n)
            > kvx_notify_limit(queue.ring_bytes)):
        raise UsageError(
            f"{n} blocks in one operation do not fit the notify ring of "
            f"{queue.ring_bytes} bytes; split the list"
        )
    if n >= <uint64_t>1 << 31:
        raise UsageError(f"{n} blocks in one operation; split the list")
    return 0


cdef Batch *_fill_batch(
    Queue *queue, rows, const Py_buffer *ours, const Py_buffer *theirs,
    bytes request_id,
) except? NULL:
    cdef:
        uint64_t n = ours.shape[0]
        uint32_t n_rows = len(rows)
        uint64_t n_local = <uint64_t>1 << 32
        uint64_t n_remote = n_local
        uint32_t i
        Batch *batch
        Row *row
    if ours.shape[0] != theirs.shape[0]:
        raise LayoutError(
            f"{ours.shape[0]} local ids, {theirs.shape[0]} remote ids"
        )
    if n == 0 or n_rows == 0:
        return NULL
    _check_sizes(queue, n, len(request_id))
    if queue.failed:
        raise ClosedResourceError(f"queue {queue.slot} has failed")
    batch = new_batch(n_rows, n)
    if batch is NULL:
        raise MemoryError
    try:
        batch.queue = queue
        batch.request_bytes = len(request_id)
        memcpy(batch.request, PyBytes_AS_STRING(request_id), len(request_id))
        for i in range(n_rows):
            index = rows[i]
            if not 0 <= index < queue.n_rows:
                raise LayoutError(f"row {index} is not in [0, {queue.n_rows})")
            row = &queue.rows[<uint32_t>index]
            batch.ops[i].row = row
            n_local = min(n_local, row.n_local)
            n_remote = min(n_remote, row.n_remote)
        _copy_ids(batch, ours, theirs, n_local, n_remote)
    except BaseException:
        free(batch)
        raise
    return batch


cdef bint _reserve_ops(Core *core, Queue *queue, uint32_t n) noexcept:
    """Have room for ``n`` more operations; True without memory."""
    cdef bint failed
    with nogil:
        pthread_mutex_lock(&core.lock)
        failed = reserve(core, queue, n)
        let_go(core)
    return failed


cdef Batch *prepare(
    Core *core, Queue *queue, rows, local_ids, remote_ids, bytes request_id,
    uint64_t key, tuple tag,
) except? NULL:
    """Copy and check all that a submission needs; NULL if it is of nothing."""
    cdef:
        Py_buffer ours
        Py_buffer theirs
        Batch *batch = NULL
    _open_ids(local_ids, &ours, "local_block_ids")
    try:
        _open_ids(remote_ids, &theirs, "remote_block_ids")
        try:
            batch = _fill_batch(queue, rows, &ours, &theirs, request_id)
        finally:
            PyBuffer_Release(&theirs)
    finally:
        PyBuffer_Release(&ours)
    if batch is not NULL:
        batch.key = key
        batch.generation, batch.total, batch.digest = tag
        if _reserve_ops(core, queue, batch.n_ops):
            free(batch)
            raise MemoryError
    return batch


cdef bint start(Core *core, Batch *batch, bint later) noexcept:
    """Admit a submission; return whether it has ended well and was taken back.

    With ``later`` it is left to be told of like all others. In any case the caller
    may read it until ``release``.
    """
    cdef bint done = False
    with nogil:
        pthread_mutex_lock(&core.lock)
        admit(core, batch)
        batch.refs += 1    # the caller's
        relist(core, batch.queue)
        if not later:
            linger(core, batch)
        settle(core, BUDGET)
        if not later and batch.n_open == 0:
            done = _take_back(core, batch)
        leave(core)
    return done


cdef bint _take_back(Core *core, Batch *batch) noexcept nogil:
    """Take a submission's operations, all ended, off the finished ones.

    False, and nothing is taken, if one of them did not end well.
    """
    cdef:
        uint32_t i
        Op **place = &core.finished
    for i in range(batch.n_ops):
        if batch.ops[i].status:
            return False
    while place[0] is not NULL:
        if place[0].batch is batch:
            place[0] = place[0].next
            release_batch(batch)
        else:
            place = &place[0].next
    core.finished_tail = place
    return True


cdef void release(Core *core, Batch *batch) noexcept:
    """Let go of a submission that ``start`` was called with."""
    with nogil:
        pthread_mutex_lock(&core.lock)
        release_batch(batch)
        let_go(core)


cdef tuple summary(Batch *batch):
    """Bytes, WRs and seconds of a submission that has ended."""
    cdef:
        uint64_t n_bytes = 0
        uint64_t n_wrs = 0
        uint64_t died_ns = 0
        uint32_t i
    for i in range(batch.n_ops):
        n_bytes += batch.ops[i].cursor.n_bytes
        n_wrs += batch.ops[i].n_wrs
        died_ns = max(died_ns, batch.ops[i].died_ns)
    return (n_bytes, n_wrs, (died_ns - batch.born_ns) * 1e-9)


cdef object _record(Op *op):
    return Finished(
        op.id,
        op.status,
        bool(op.culprit),
        op.cursor.n_bytes,
        op.n_wrs,
        (op.died_ns - op.batch.born_ns) * 1e-9,
        op.wr_id,
        op.qp_num,
        op.vendor_err,
    )


cdef list take_finished(Core *core, Op *first, dict watched, list ended):
    """Tell of finished operations those who watch them, and free them.

    Of those that nobody watches the records are returned. To ``ended`` is added who
    has to be told from outside.
    """
    cdef:
        list result = []
        Op *op = first
        Op *following
        Watch watch
        bint tell
    while op is not NULL:
        watch = watched.pop(op.id, None) if watched else None
        if watch is None:
            result.append(_record(op))
        else:
            if op.status == 0:
                tell = watch.done(op.id, op.cursor.n_bytes, op.n_wrs)
            else:
                tell = watch.failed(op.id, _record(op))
            if tell:
                ended.append(watch)
        op = op.next
    with nogil:
        pthread_mutex_lock(&core.lock)
        op = first
        while op is not NULL:
            following = op.next
            release_batch(op.batch)
            op = following
        let_go(core)
    return result


cdef list take_arrivals(Arrival *arrival):
    """Turn arrivals into Python records and free them."""
    cdef:
        list result = []
        Arrival *following
    while arrival is not NULL:
        following = arrival.next
        result.append(RingArrival(
            arrival.slot,
            PyBytes_FromStringAndSize(arrival.record, arrival.length)
            if arrival.record is not NULL else b"",
            arrival.head,
            _RING_ERRORS.get(arrival.error),
        ))
        free(arrival.record)
        free(arrival)
        arrival = following
    return result
