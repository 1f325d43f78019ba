"""The engine's fields, for what is compiled and begins submissions on its own."""

from libc.stdint cimport uint32_t

from kvxfer._core cimport Core, Queue
from kvxfer._driver cimport Driver
from kvxfer._verbs cimport CompletionQueue

cdef class Engine:
    cdef:
        readonly CompletionQueue cq
        Driver _driver
        dict _qps      # slot -> list of QueuePair, kept alive while in use
        dict _watched  # operation -> who watches it, until it has ended
        Core *core     # the driver's

    cdef Queue *_new_queue(self, qps, uint32_t receives) except NULL
    cdef void _drop_queue(self, Queue *queue) noexcept
    cdef int _ensure_open(self) except -1
    cdef Queue *_queue(self, uint32_t slot) except NULL
