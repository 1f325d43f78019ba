"""What posts: operations into WRs."""

from kvxfer._core cimport Batch, Core, Queue

cdef int post_receive(Core *core, Queue *queue, unsigned int lane) noexcept nogil
cdef void relist(Core *core, Queue *queue) noexcept nogil
cdef void pump(Core *core) noexcept nogil
cdef void flush(Core *core, Queue *queue) noexcept nogil
cdef void settle_batch(Core *core, Batch *batch) noexcept nogil
