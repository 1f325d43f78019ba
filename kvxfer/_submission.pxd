"""What is between Python's arguments and a batch, and between that and records."""

from libc.stdint cimport uint64_t

from kvxfer._core cimport Arrival, Batch, Core, Op, Queue

cdef enum:
    BUDGET = 512    # CQEs that one call takes; then others get their turn

cdef Batch *prepare(
    Core *core, Queue *queue, rows, local_ids, remote_ids, bytes request_id,
    uint64_t key, tuple tag) except? NULL
cdef bint start(Core *core, Batch *batch, bint later) noexcept
cdef void release(Core *core, Batch *batch) noexcept
cdef tuple summary(Batch *batch)
cdef list take_finished(Core *core, Op *first)
cdef list take_arrivals(Arrival *arrival)
