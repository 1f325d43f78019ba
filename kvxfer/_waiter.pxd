"""What a task awaits, for what is compiled and ends it."""

cdef class Turn:
    cdef:
        object _loop
        list _waiters

    cpdef begin(self)
    cpdef end(self)

cdef class Waiter:
    cdef:
        public bint _asyncio_future_blocking
        object _loop
        object _callback
        object _context
        object _message
        bint _over
        bint _cancelled

    cpdef wake(self)
