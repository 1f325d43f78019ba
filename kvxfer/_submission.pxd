"""What is between Python's arguments and a batch, and between that and records."""

from libc.stdint cimport uint64_t

from kvxfer._core cimport Arrival, Batch, Core, Op, Queue

cdef enum:
    BUDGET = 512    # CQEs that one call takes; then others get their turn

cdef class Watch:
    """Is told of the ends of operations, each once, with the GIL.

    Both answer whether all that it watches has ended and somebody has to tell it so
    from outside: see ``Progress``.
    """

    cdef bint done(self, uint64_t op_id, uint64_t n_bytes, uint64_t n_wrs) except -1
    cdef bint failed(self, uint64_t op_id, object finished) except -1

cdef Batch *prepare(
    Core *core, Queue *queue, rows, local_ids, remote_ids, bytes request_id,
    uint64_t key, tuple tag) except? NULL
cdef bint start(Core *core, Batch *batch, bint later) noexcept
cdef void release(Core *core, Batch *batch) noexcept
cdef tuple summary(Batch *batch)
cdef list take_finished(Core *core, Op *first, dict watched, list ended)
cdef list take_arrivals(Arrival *arrival)
