"""The base of all verbs objects."""


cdef class Handle:
    """One C handle, its creating process and the handles made from it."""
    cdef:
        object __weakref__
        object _children      # WeakSet of Handle: closed before this one
        list _parents         # of Handle: kept, so that they outlive this one
        int _n_children       # open ones; more than are in the set during a collection
        bint _abandoned       # to be closed with the last child
        readonly bint closed
        int _pid              # only this process may touch the C handle

    cdef int _ensure_open(self) except -1
    cdef int _opened(self, Handle parent) except -1
    cdef int _attach(self, Handle parent) except -1
    cdef int _destroy(self) except? -1
