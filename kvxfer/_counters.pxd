"""What counts on the path of a write."""

from libc.stdint cimport uint64_t

cdef enum:
    N_BOUNDS = 20

cdef class Histogram:
    cdef:
        uint64_t _counts[N_BOUNDS + 1]
        readonly double seconds

    cpdef void observe(self, double seconds) noexcept

cdef class Traffic:
    cdef:
        readonly dict transfers
        Histogram _writes
        readonly uint64_t written_bytes
        readonly uint64_t written_blocks
        readonly uint64_t work_requests
        readonly uint64_t arrivals
        readonly uint64_t arrived_blocks
        readonly uint64_t arrived_bytes

    cpdef wrote(
        self, uint64_t n_bytes, uint64_t n_blocks, uint64_t n_wrs, double seconds)
