# cython: language_level=3, embedsignature=True
"""One owner per C handle: guarded, counted, closed in order.

Nothing here knows what a handle is of: whoever derives from :class:`Handle` says how
it is given back. Every handle belongs to the process that made it: in a forked child
each call raises and nothing native is touched or freed.
"""

import warnings
import weakref

from libc.errno cimport EBUSY
from posix.unistd cimport getpid

from kvxfer.errors import ClosedResourceError, verbs_error

_alive = {}               # class name -> number of open handles


def open_handles():
    """Return how many handles of each class are open in this process."""
    return {name: number for name, number in _alive.items() if number}


cdef class Handle:
    """Base of all verbs objects: open until closed, in the process that made it."""

    def __cinit__(self, *args, **kwargs):
        self.closed = True
        self._pid = getpid()
        self._children = weakref.WeakSet()
        self._parents = []

    cdef int _ensure_open(self) except -1:
        """Raise unless this object is open and belongs to this process."""
        if self._pid != getpid():
            raise ClosedResourceError(
                f"this {type(self).__name__} belongs to process {self._pid}; "
                "a forked child must open its own"
            )
        if self.closed:
            raise ClosedResourceError(f"this {type(self).__name__} is closed")
        return 0

    cdef int _opened(self, Handle parent) except -1:
        """Count this handle as open and let ``parent`` close it with itself."""
        self.closed = False
        name = type(self).__name__
        _alive[name] = _alive.get(name, 0) + 1
        if parent is not None:
            self._attach(parent)
        return 0

    cdef int _attach(self, Handle parent) except -1:
        """Let ``parent`` close this handle before itself."""
        parent._children.add(self)
        parent._n_children += 1
        self._parents.append(parent)
        return 0

    cdef int _destroy(self) except? -1:
        """Give the C handle back; return 0 or an errno."""
        raise NotImplementedError

    def close(self):
        """Close the children and then this object; a second call does nothing.

        In a forked child it does nothing at all. If the device refuses
        (VerbsError, for instance EBUSY), the object stays open.
        """
        if self.closed or self._pid != getpid():
            return
        cdef int err
        cdef Handle parent
        for child in list(self._children):
            child.close()
        if self._n_children:
            # Unreachable, and not finalized yet. Some devices would be closed
            # under them.
            raise verbs_error(EBUSY, f"destroy {type(self).__name__}")
        err = self._destroy()
        if err:
            raise verbs_error(err, f"destroy {type(self).__name__}")
        self.closed = True
        _alive[type(self).__name__] -= 1
        for parent in self._parents:
            parent._n_children -= 1
            if parent._abandoned and parent._n_children == 0:
                parent.close()
        self._parents.clear()

    def __enter__(self):
        self._ensure_open()
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __del__(self):
        if self.closed or self._pid != getpid():
            return
        try:
            warnings.warn(
                f"unclosed {type(self).__name__}", ResourceWarning, source=self
            )
        finally:
            # Also where warnings are errors: the parent no longer knows of this
            # object, and could not be closed itself. Of a tree that is collected
            # as a whole the parts are finalized in any order.
            if self._n_children:
                self._abandoned = True
            else:
                self.close()
