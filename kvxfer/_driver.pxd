"""What owns an engine's core, and the thread that drives it."""

from kvxfer._core cimport Batch, Core
from kvxfer._verbs cimport Handle


cdef class Driver(Handle):
    cdef Core *core    # owned; lives as long as this object

    cdef int _start(self) except -1
    cdef void _stop(self) noexcept


cdef void linger(Core *core, Batch *batch) noexcept nogil
