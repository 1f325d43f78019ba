"""The operations of one call, for what is compiled and begins or ends them."""

from libc.stdint cimport uint32_t, uint64_t

from kvxfer._submission cimport Watch
from kvxfer._waiter cimport Waiter

cdef class Transfer(Watch):
    cdef:
        readonly uint64_t slot
        readonly tuple layers
        readonly list failures
        readonly uint64_t n_bytes
        readonly uint64_t n_wrs
        public uint64_t n_blocks
        public uint32_t wires
        public bint expired
        public bint abandoned
        public double due
        public double timeout
        public object request
        public object undrained
        public object drain
        public object on_end
        readonly double began
        Waiter _waiter
        list _op_ids
        uint64_t _open
        set _ended

    cdef bint _end(self, uint64_t op_id) except -1
    cpdef wake(self)
