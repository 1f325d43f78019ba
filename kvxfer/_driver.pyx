# cython: language_level=3, cdivision=True
"""The engine's core with its owner, and the thread that drives it.

Three modes. In ``event`` whoever owns the engine drives it, at events of the
completion channel; there is no thread. In ``spin`` a thread does all of it and looks
at the CQ without pause as long as there is a queue. ``adaptive`` has a thread that
sleeps while there is nothing for it: one chain in flight has nothing in between, and
its end is told to an event loop best by the completion channel itself, without a hop
over another thread. With more than that in flight the thread takes over: it posts
what becomes possible, however long Python holds the loop or the GIL, and the loop is
woken for what has ended and not for what was on the way.

The thread never takes the GIL and knows nothing of Python. It holds the core's lock
but while it sleeps or yields. It waits by poll(2): of the completion channel, once
the CQ is armed and was looked at again, and of an eventfd by which it is handed work
or told to end.
"""

import os

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc
from posix.signal cimport sigfillset, sigset_t
from posix.unistd cimport getpid

from kvxfer._core cimport *
from kvxfer._post cimport pump
from kvxfer._progress cimport (
    drain,
    listen,
    take_events,
    wake_thread,
    wants_thread,
    watch_channel,
)
from kvxfer._verbs cimport CompletionQueue, Handle

from kvxfer.errors import UsageError, verbs_error

cdef extern from "pthread.h" nogil:
    int pthread_create(pthread_t *, void *, void *(*)(void *) noexcept nogil, void *)
    int pthread_join(pthread_t, void **)
    int pthread_setname_np(pthread_t, const char *)

cdef extern from "signal.h" nogil:
    enum:
        SIG_SETMASK
    int pthread_sigmask(int, const sigset_t *, sigset_t *)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "poll.h" nogil:
    enum:
        POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)

cdef enum:
    BUDGET = 64         # CQEs while the lock is held
    SPIN_NS = 20000     # that it looks on after the last completion, if it may
    LINGER_NS = 100000  # that whoever submits looks for the end of a small write
    LINGER_BYTES = 128 << 10    # what goes for small

MODES = {"event": EVENT, "adaptive": ADAPTIVE, "spin": SPIN}

# On so few processors a device's own threads need those that we would spin on.
_FEW = 2


cdef bint _sleep(Core *core, bint listening) noexcept nogil:
    """Wait until there is work, or an event if ``listening``. The lock is held.

    It is let go meanwhile, and Python told what there is to tell.
    """
    cdef:
        pollfd fds[2]
        uint64_t count
    fds[0] = pollfd(core.wake_fd, POLLIN, 0)
    fds[1] = pollfd(core.channel.fd, POLLIN, 0)
    core.thread_sleeps = True
    leave(core)
    poll(fds, 2 if listening else 1, -1)
    pthread_mutex_lock(&core.lock)
    core.thread_sleeps = False
    eventfd_read(core.wake_fd, &count)
    if listening and fds[1].revents:
        take_events(core)


cdef void _breathe(Core *core) noexcept nogil:
    """Tell what there is to tell, and let others have lock and processor."""
    leave(core)
    sched_yield()
    pthread_mutex_lock(&core.lock)


cdef void _drive(Core *core) noexcept nogil:
    """Drive until nothing is left that wants a thread. The lock is held."""
    cdef:
        uint64_t before
        uint64_t last = now_ns()
        bint more
    while not core.stopping:
        before = core.n_polled
        pump(core)
        more = drain(core, BUDGET)
        if not more and not wants_thread(core):
            return
        if not more and before == core.n_polled and now_ns() - last >= core.spin_ns:
            more = listen(core, BUDGET)
            if not more and before == core.n_polled:
                _sleep(core, True)
                last = now_ns()
                continue
        if before != core.n_polled:
            last = now_ns()
        _breathe(core)


cdef void _hand_back(Core *core) noexcept nogil:
    """Let Python hear of the next completion. The lock is held."""
    # What this finds has ended, or its queue has more to do.
    cdef bint more = listen(core, BUDGET)
    if core.stopping:
        core.behind = more
    if core.stopping or not (more or wants_thread(core)):
        core.thread_drives = False
        watch_channel(core, True)


cdef void linger(Core *core, Batch *batch) noexcept nogil:
    """Look for the end of a small submission for as long as going to sleep takes.

    A block or two are there before an event could have woken the loop. Only if they
    have nothing else to wait for. The lock is held; it is let go between looks, and the
    processor is left to whoever wants it.
    """
    cdef uint64_t deadline
    if core.mode == EVENT or not core.may_linger:
        return
    deadline = now_ns() + LINGER_NS
    pump(core)
    while (batch.n_open and not core.thread_drives and core.n_ready == 0
            and core.flying_bytes <= LINGER_BYTES and not drain(core, BUDGET)
            and batch.n_open and now_ns() < deadline):
        # Of what ends meanwhile Python need not be told: it is here.
        let_go(core)
        sched_yield()
        pthread_mutex_lock(&core.lock)


cdef void *_adaptive(void *argument) noexcept nogil:
    cdef Core *core = <Core *>argument
    pthread_mutex_lock(&core.lock)
    while not core.stopping:
        if core.thread_drives:
            _drive(core)
            _hand_back(core)
        else:
            _sleep(core, False)
    leave(core)
    return NULL


cdef void *_spin(void *argument) noexcept nogil:
    cdef Core *core = <Core *>argument
    pthread_mutex_lock(&core.lock)
    while not core.stopping:
        if core.n_queues == 0:
            _sleep(core, False)
        pump(core)
        drain(core, BUDGET)
        _breathe(core)
    _hand_back(core)
    leave(core)
    return NULL


cdef class Driver(Handle):
    """The core of an engine over a CQ, and its thread; closed before the CQ.

    Closing ends the thread. The core stays, to be driven by events, until this
    object goes.
    """

    def __init__(self, CompletionQueue cq not None, str progress not None, spin_ns):
        cdef int err
        n_cpus = len(os.sched_getaffinity(0))
        if self.core is not NULL:
            raise UsageError("a Driver is made once")
        if progress not in MODES:
            raise UsageError(f"progress is {progress!r}, not one of {', '.join(MODES)}")
        cq._ensure_open()
        self.core = <Core *>calloc(1, sizeof(Core))
        if self.core is NULL:
            raise MemoryError
        self.core.cq = cq.cq
        self.core.channel = cq.channel
        self.core.table = cq.device.table
        self.core.unacked = &cq.unacked
        self.core.mode = MODES[progress]
        if spin_ns is None:
            spin_ns = SPIN_NS if n_cpus > _FEW else 0
        self.core.spin_ns = spin_ns
        # On one, nothing can end while we look.
        self.core.may_linger = n_cpus > 1
        err = core_init(self.core)
        if err:
            raise verbs_error(err, "eventfd, epoll_create1 or timerfd_create")
        if self.core.mode != EVENT:
            self._start()
        self._opened(cq)

    cdef int _start(self) except -1:
        cdef:
            sigset_t all_signals
            sigset_t before
            int err
        self.core.threaded = True
        self.core.thread_drives = self.core.mode == SPIN
        watch_channel(self.core, not self.core.thread_drives)
        # Signals are for Python's threads.
        sigfillset(&all_signals)
        pthread_sigmask(SIG_SETMASK, &all_signals, &before)
        err = pthread_create(
            &self.core.thread, NULL,
            _spin if self.core.mode == SPIN else _adaptive, self.core)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
        if err:
            self.core.threaded = False
            raise verbs_error(err, "pthread_create")
        pthread_setname_np(self.core.thread, "kvxfer-engine")
        return 0

    cdef void _stop(self) noexcept:
        """End the thread. Twice is fine."""
        # In a forked child there is none.
        if self.core is NULL or not self.core.threaded or self._pid != getpid():
            return
        with nogil:
            pthread_mutex_lock(&self.core.lock)
            self.core.stopping = True
            wake_thread(self.core)
            let_go(self.core)
            pthread_join(self.core.thread, NULL)
            pthread_mutex_lock(&self.core.lock)
            self.core.threaded = False
            let_go(self.core)

    cdef int _destroy(self) except? -1:
        self._stop()
        return 0

    def __dealloc__(self):
        if self.core is not NULL:
            self._stop()
            core_free(self.core)
