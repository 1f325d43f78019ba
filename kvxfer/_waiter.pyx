# cython: language_level=3, embedsignature=True
"""What a task awaits, and by which it goes on without another turn of the loop.

A future of asyncio lets its task go on in the loop's next turn, which costs as much as
to take a completion does. Whoever takes completions has just been called by the loop;
with all of them taken, the tasks that wait for them may as well go on right there.

A task may await any object that has ``_asyncio_future_blocking`` and those methods of
a future that a task calls: see ``asyncio.isfuture``, and ``Task.__step`` in CPython's
``asyncio/tasks.py``.
"""

from asyncio import CancelledError, get_running_loop

# The turn that is under way. Loops in other threads have theirs: who finds that of
# another loop here goes on in the next turn of its own, as with a future.
cdef Turn _current = None


cdef class Turn:
    """A call that a loop makes, with those who go on at its end.

    Args:
      loop: Calls what begins and ends the turn, from no task.
    """

    def __init__(self, loop not None):
        self._loop = loop

    cpdef begin(self):
        """Who is woken from here on waits for :meth:`end`."""
        global _current
        self._waiters = []
        _current = self

    cpdef end(self):
        """Let all go on that were woken meanwhile.

        The caller has to be done with its own work: who goes on may call anything.
        """
        global _current
        cdef list waiters = self._waiters
        cdef Waiter waiter
        cdef Py_ssize_t i = 0
        if _current is self:
            _current = None
        try:
            while i < len(waiters):
                waiter = waiters[i]
                i += 1
                waiter._go_on()
        finally:
            # One of them has ended the loop; the others go on if it runs again.
            for waiter in waiters[i:]:
                self._loop.call_soon(waiter._go_on)


cdef class Waiter:
    """Awaited by one task at a time, until it is woken; from then on by none.

    Cancellation:
      Ends the await and nothing else: it may be awaited again.
    """

    def __cinit__(self):
        self._loop = get_running_loop()

    cpdef wake(self):
        """Let the task go on. Twice is fine."""
        if self._over:
            return
        self._over = True
        if self._callback is None:
            return
        if _current is not None and _current._loop is self._loop:
            _current._waiters.append(self)
        else:
            self._loop.call_soon(self._go_on)

    def _go_on(self):
        callback, self._callback = self._callback, None
        if callback is not None:
            context, self._context = self._context, None
            context.run(callback, self)

    # -- what a task calls -----------------------------------------------------

    def __await__(self):
        return self

    def __next__(self):
        if self._over:
            raise StopIteration
        self._asyncio_future_blocking = True
        return self

    def get_loop(self):
        return self._loop

    def add_done_callback(self, callback, *, context):
        self._callback = callback
        self._context = context

    def cancel(self, msg=None):
        if self._over or self._cancelled or self._callback is None:
            return False
        self._cancelled = True
        self._message = msg
        self._loop.call_soon(self._go_on)
        return True

    def result(self):
        if not self._cancelled:
            return
        self._cancelled = False
        message, self._message = self._message, None
        raise CancelledError() if message is None else CancelledError(message)
