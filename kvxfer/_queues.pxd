"""What makes queues of Python's objects, and takes them out."""

from libc.stdint cimport uint32_t, uint64_t

from kvxfer._core cimport Core, Queue
from kvxfer._verbs cimport CompletionQueue

cdef Queue *new_queue(
    Core *core, CompletionQueue cq, list qps, uint32_t receives) except NULL
cdef void drop_queue(Core *core, Queue *queue) noexcept
cdef int fill_route(Queue *queue, rows, ring, flush_to, lanes) except -1
cdef int fill_ring(Queue *queue, address, length) except -1
cdef int post_receives(Core *core, Queue *queue, uint32_t n) noexcept nogil
cdef uint64_t unretired(Queue *queue) noexcept nogil
cdef list take_failed(Core *core)
