# cython: language_level=3, embedsignature=True, cdivision=True
"""What every write and every arrival adds to: sums, and how long things took.

Compiled since it is on the path of each of them; what else is counted is in
``counters.py``. The event loop's thread counts, any thread reads.
"""

from libc.stdint cimport uint64_t

#: Upper bounds in seconds: from a block within a host to a cache across a network.
BOUNDS = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4),
    *(1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)

cdef double[N_BOUNDS] _bounds = BOUNDS


cdef class Histogram:
    """How often what took how long."""

    @property
    def counts(self):
        """For each bound, what took longer than the one before and not longer than it.

        At the end what took longer than all.
        """
        return [self._counts[i] for i in range(N_BOUNDS + 1)]

    cpdef void observe(self, double seconds) noexcept:
        """Count one."""
        cdef int i = 0
        while i < N_BOUNDS and _bounds[i] < seconds:
            i += 1
        self._counts[i] += 1
        self.seconds += seconds


cdef class Traffic:
    """Sums of what was written and of what has arrived.

    Args:
      transfers: Calls by how they ended; ``done`` is counted here.
      writes: How long writes took.
    """

    def __init__(self, dict transfers not None, Histogram writes not None):
        self.transfers = transfers
        self._writes = writes

    cpdef wrote(
        self, uint64_t n_bytes, uint64_t n_blocks, uint64_t n_wrs, double seconds
    ):
        """Count a write that has ended well."""
        self.written_bytes += n_bytes
        self.written_blocks += n_blocks
        self.work_requests += n_wrs
        self.transfers["done"] += 1
        self._writes.observe(seconds)

    def arrived(self, uint64_t n_blocks, uint64_t n_bytes):
        """Count a layer that has landed."""
        self.arrivals += 1
        self.arrived_blocks += n_blocks
        self.arrived_bytes += n_bytes
