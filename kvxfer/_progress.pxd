"""What takes completions, and what ends operations for other reasons."""

from libc.stdint cimport uint32_t, uint64_t

from kvxfer._core cimport Core, Queue

cdef bint settle(Core *core, uint32_t budget) noexcept nogil
cdef bint settle_all(Core *core, uint32_t budget) noexcept nogil
cdef bint drain(Core *core, uint32_t budget) noexcept nogil
cdef bint listen(Core *core, uint32_t budget) noexcept nogil
cdef void take_events(Core *core) noexcept nogil
cdef bint wants_thread(Core *core) noexcept nogil
cdef void wake_thread(Core *core) noexcept nogil
cdef void watch_channel(Core *core, bint wanted) noexcept nogil
cdef void cancel(Core *core, uint64_t op_id) noexcept nogil
cdef void stop(Core *core, Queue *queue) noexcept nogil
cdef void forget(Core *core, Queue *queue) noexcept nogil
