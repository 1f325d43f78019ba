# cython: language_level=3, embedsignature=True, cdivision=True
# cython: boundscheck=False, wraparound=False
"""The machine's own limits: the same tables of blocks, with no library in between.

Copying, reading another process's memory, a TCP stream, and work requests posted by a
bare loop. Each function moves a batch, or serves batches until its peer lets go, in
one release of the GIL. Ids and addresses are the caller's to have right: nothing is
checked here.
"""

from libc.errno cimport EINTR, EPIPE, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.types cimport pid_t
from posix.unistd cimport read, write

from kvxfer._ibverbs cimport *
from kvxfer._verbs cimport QueuePair

from kvxfer.errors import UsageError, completion_error, verbs_error

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec *iov, int count)
    ssize_t process_vm_readv(
        pid_t pid, const iovec *local, unsigned long n_local,
        const iovec *remote, unsigned long n_remote, unsigned long flags)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_NOSIGNAL
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "fill.h" nogil:
    enum:
        KVX_MAX_CHAIN

cdef enum:
    AT_ONCE = 1024    # iovecs a call takes, IOV_MAX
    # wr_id of a chain's last: flight (32 bits) | queue (16) | WRs of the chain (16)
    FLIGHT_SHIFT = 32
    QUEUE_SHIFT = 16
    FIELD_MASK = 0xffff


cdef struct Request:
    int64_t source_set    # negative: no more
    int64_t target_set


def copy_blocks(uintptr_t target_base, const int64_t[::1] target_ids not None,
                uintptr_t source_base, const int64_t[::1] source_ids not None,
                size_t block_bytes):
    """Copy a batch inside this process, block by block, with memcpy."""
    cdef:
        Py_ssize_t i
        Py_ssize_t n = source_ids.shape[0]
    with nogil:
        for i in range(n):
            memcpy(
                <void *>(target_base + target_ids[i] * block_bytes),
                <const void *>(source_base + source_ids[i] * block_bytes),
                block_bytes,
            )


# -- one process asks, the other moves ------------------------------------------------


cdef int whole(int fd, void *buffer, size_t length, bint writing) noexcept nogil:
    """Read or write all of a few bytes; return 0 or an errno, EPIPE at the end."""
    cdef:
        char *at = <char *>buffer
        ssize_t n
    while length:
        n = write(fd, at, length) if writing else read(fd, at, length)
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            return errno if n < 0 else EPIPE
        at += n
        length -= n
    return 0


cdef void fill_iovecs(
    iovec *iov, uintptr_t base, const int64_t *ids, Py_ssize_t n, size_t block_bytes
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        iov[i].iov_base = <void *>(base + ids[i] * block_bytes)
        iov[i].iov_len = block_bytes


cdef int read_memory(
    pid_t pid, iovec *ours, iovec *theirs, Py_ssize_t n, size_t block_bytes
) noexcept nogil:
    """Have the kernel copy blocks out of another process; return 0 or an errno."""
    cdef:
        Py_ssize_t at = 0
        Py_ssize_t count
        ssize_t moved
    while at < n:
        count = min(<Py_ssize_t>AT_ONCE, n - at)
        moved = process_vm_readv(pid, ours + at, count, theirs + at, count, 0)
        if moved < 0:
            return errno
        if <size_t>moved != count * block_bytes:
            return EPIPE    # a page is gone: so is the process, or about to be
        at += count
    return 0


cdef int stream(int fd, iovec *iov, Py_ssize_t n, bint sending) noexcept nogil:
    """Send or receive all of ``iov``, which is used up; return 0 or an errno."""
    cdef:
        Py_ssize_t at = 0
        size_t count
        ssize_t moved
        msghdr message
    memset(&message, 0, sizeof(message))
    while at < n:
        count = min(<size_t>AT_ONCE, <size_t>(n - at))
        if sending:
            message.msg_iov = iov + at
            message.msg_iovlen = count
            moved = sendmsg(fd, &message, MSG_NOSIGNAL)
        else:
            moved = readv(fd, iov + at, count)
        if moved < 0 and errno == EINTR:
            continue
        if moved <= 0:
            return errno if moved < 0 else EPIPE
        while moved > 0:
            if <size_t>moved >= iov[at].iov_len:
                moved -= iov[at].iov_len
                at += 1
            else:
                iov[at].iov_base = <char *>iov[at].iov_base + moved
                iov[at].iov_len -= moved
                moved = 0
    return 0


def _raise(int err):
    raise OSError(err, "a batch was not moved")


def serve_reads(int fd, pid_t pid, uintptr_t target_base, uintptr_t source_base,
                size_t block_bytes, const int64_t[:, ::1] target_ids not None,
                const int64_t[:, ::1] source_ids not None):
    """Take batches out of process ``pid`` as they are asked for on ``fd``.

    Returns when the asking process says so.

    Raises:
      OSError: It is gone, or its memory may not be read.
    """
    cdef:
        Py_ssize_t n = target_ids.shape[1]
        iovec *iov = <iovec *>malloc(2 * n * sizeof(iovec))
        Request request
        char done = 1
        int err = 0
    if iov is NULL:
        raise MemoryError
    with nogil:
        while True:
            err = whole(fd, &request, sizeof(request), False)
            if err or request.source_set < 0:
                break
            fill_iovecs(
                iov, target_base, &target_ids[request.target_set, 0], n, block_bytes)
            fill_iovecs(
                iov + n, source_base, &source_ids[request.source_set, 0], n,
                block_bytes)
            err = read_memory(pid, iov, iov + n, n, block_bytes)
            if not err:
                err = whole(fd, &done, 1, True)
            if err:
                break
    free(iov)
    if err:
        _raise(err)


def serve_stream(int fd, uintptr_t target_base, size_t block_bytes,
                 const int64_t[:, ::1] target_ids not None):
    """Take batches from a stream straight into their blocks; say when each is there.

    Returns when the sender says so.

    Raises:
      OSError: The stream broke.
    """
    cdef:
        Py_ssize_t n = target_ids.shape[1]
        iovec *iov = <iovec *>malloc(n * sizeof(iovec))
        Request request
        char done = 1
        int err = 0
    if iov is NULL:
        raise MemoryError
    with nogil:
        while True:
            err = whole(fd, &request, sizeof(request), False)
            if err or request.source_set < 0:
                break
            fill_iovecs(
                iov, target_base, &target_ids[request.target_set, 0], n, block_bytes)
            err = stream(fd, iov, n, False)
            if not err:
                err = whole(fd, &done, 1, True)
            if err:
                break
    free(iov)
    if err:
        _raise(err)


def ask(int fd, int64_t source_set, int64_t target_set):
    """Ask :func:`serve_reads` for a batch and wait until it is there.

    A negative set ends it; nothing is waited for then.

    Raises:
      OSError: The other process is gone.
    """
    cdef:
        Request request = Request(source_set, target_set)
        char done = 0
        int err
    with nogil:
        err = whole(fd, &request, sizeof(request), True)
        if not err and source_set >= 0:
            err = whole(fd, &done, 1, False)
    if err:
        _raise(err)


def send_batch(int fd, uintptr_t source_base, size_t block_bytes,
               const int64_t[:, ::1] source_ids not None, int64_t source_set,
               int64_t target_set):
    """Send a batch to :func:`serve_stream` and wait until it is there.

    Raises:
      OSError: The stream broke.
    """
    cdef:
        Py_ssize_t n = source_ids.shape[1]
        iovec *iov = <iovec *>malloc((n + 1) * sizeof(iovec))
        Request request = Request(source_set, target_set)
        char done = 0
        int err
    if iov is NULL:
        raise MemoryError
    with nogil:
        iov[0].iov_base = &request
        iov[0].iov_len = sizeof(request)
        fill_iovecs(iov + 1, source_base, &source_ids[source_set, 0], n, block_bytes)
        err = stream(fd, iov, n + 1, True)
        if not err:
            err = whole(fd, &done, 1, False)
    free(iov)
    if err:
        _raise(err)


# -- work requests --------------------------------------------------------------------


cdef struct SendQueue:
    ibv_qp *qp
    Py_ssize_t credits       # free slots

cdef struct Plane:
    uint64_t local_base
    uint64_t remote_base
    ibv_send_wr *wrs         # a chain, filled in but for addresses and links; owned
    ibv_sge *sges            # one for each of them; owned

cdef struct Flight:          # a batch that is being moved
    const int64_t *local_ids
    const int64_t *remote_ids
    Py_ssize_t left          # WRs that have not completed yet


cdef class Poster:
    """Moves batches by a bare loop over the QPs of one thread.

    A WR a block, nothing merged, nobody told. The WRs of a batch go plane by plane, in
    chains; the QPs take turns with the chains. The last WR of each chain is signaled.
    Whoever waits polls the CQ, and only leaves the processor to others that want it.

    Args:
      qps: In RTS, all with the same CQ. Nobody else may use them or the CQ.
      planes: A ``(local_base, lkey, remote_base, rkey)`` each.
      chain: WRs posted with one doorbell, 1 to 64.
      depth: Batches that may be in flight.
      reading: By RDMA READ: the source is the remote side then, and the target ours.

    Attributes:
      n_batches: Batches begun since :meth:`use`.
      n_wrs: WRs posted since then.
    """

    cdef:
        readonly list qps
        readonly Py_ssize_t n_batches
        readonly Py_ssize_t n_wrs
        bint _reading
        const int64_t[:, ::1] _local_ids
        const int64_t[:, ::1] _remote_ids
        ibv_cq *cq
        SendQueue *queues        # owned
        Py_ssize_t n_queues
        Py_ssize_t turn          # the queue that takes the next chain
        Plane *planes            # owned
        Py_ssize_t n_planes
        Flight *flights          # owned
        Py_ssize_t depth
        Py_ssize_t n_flying
        uint32_t *waiting        # owned; flights not wholly posted, a ring
        Py_ssize_t first         # of them: where the one is that is being posted
        Py_ssize_t n_waiting
        Py_ssize_t plane         # what of it is next
        Py_ssize_t at
        uint32_t *ended          # owned; flights that are done
        Py_ssize_t n_ended
        Py_ssize_t chain
        Py_ssize_t n_blocks
        uint64_t block_bytes
        ibv_wc bad

    def __init__(self, list qps not None, list planes not None, *, Py_ssize_t chain,
                 Py_ssize_t depth, bint reading=False):
        if self.queues is not NULL:
            raise UsageError("a Poster is made once")
        if not 1 <= chain <= KVX_MAX_CHAIN:
            raise UsageError(f"chain is {chain}, not 1 to {KVX_MAX_CHAIN}")
        if depth < 1 or not qps or not planes:
            raise UsageError("a Poster has a QP, a plane and a flight at least")
        self.qps = qps
        self.chain = chain
        self.depth = depth
        self._reading = reading
        self.queues = <SendQueue *>calloc(len(qps), sizeof(SendQueue))
        self.planes = <Plane *>calloc(len(planes), sizeof(Plane))
        self.flights = <Flight *>calloc(depth, sizeof(Flight))
        self.waiting = <uint32_t *>calloc(depth, sizeof(uint32_t))
        self.ended = <uint32_t *>calloc(depth, sizeof(uint32_t))
        if (self.queues is NULL or self.planes is NULL or self.flights is NULL
                or self.waiting is NULL or self.ended is NULL):
            raise MemoryError
        self._take_qps()
        for plane in planes:
            self._add_plane(plane)

    cdef int _take_qps(self) except -1:
        cdef:
            QueuePair qp
            QueuePair first = self.qps[0]
            # Each WR may be signaled, and the CQ must hold them all.
            Py_ssize_t share = first.cq.depth // len(self.qps)
        self.cq = first.cq.cq
        for qp in self.qps:
            qp._ensure_open()
            if qp.cq is not first.cq:
                raise UsageError("the QPs of a Poster have one CQ")
            self.queues[self.n_queues] = SendQueue(qp.qp, min(qp.max_send_wr, share))
            if self.queues[self.n_queues].credits < self.chain:
                raise UsageError(
                    f"a send queue of {self.queues[self.n_queues].credits} slots holds "
                    f"no chain of {self.chain}: a shorter chain, or a larger sq_depth"
                )
            self.n_queues += 1
        return 0

    cdef int _add_plane(self, tuple keys) except -1:
        cdef:
            Plane *plane = &self.planes[self.n_planes]
            Py_ssize_t i
        self.n_planes += 1
        plane.wrs = <ibv_send_wr *>calloc(self.chain, sizeof(ibv_send_wr))
        plane.sges = <ibv_sge *>calloc(self.chain, sizeof(ibv_sge))
        if plane.wrs is NULL or plane.sges is NULL:
            raise MemoryError
        plane.local_base, lkey, plane.remote_base, rkey = keys
        for i in range(self.chain):
            plane.sges[i].lkey = lkey
            plane.wrs[i].sg_list = &plane.sges[i]
            plane.wrs[i].num_sge = 1
            plane.wrs[i].opcode = (
                IBV_WR_RDMA_READ if self._reading else IBV_WR_RDMA_WRITE)
            plane.wrs[i].wr.rdma.rkey = rkey
        return 0

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.n_planes):
            free(self.planes[i].wrs)
            free(self.planes[i].sges)
        free(self.planes)
        free(self.queues)
        free(self.flights)
        free(self.waiting)
        free(self.ended)

    def use(self, uint32_t block_bytes, source_ids not None, target_ids not None):
        """Take the tables of the next batches; none may be in flight."""
        cdef:
            Py_ssize_t i
            Py_ssize_t k
        self._local_ids = target_ids if self._reading else source_ids
        self._remote_ids = source_ids if self._reading else target_ids
        self.n_blocks = self._local_ids.shape[1]
        self.block_bytes = block_bytes
        for i in range(self.n_planes):
            for k in range(self.chain):
                self.planes[i].sges[k].length = block_bytes
        self.n_batches = 0
        self.n_wrs = 0

    def begin(self, uint32_t flight, Py_ssize_t source_set, Py_ssize_t target_set):
        """Have :meth:`wait` move a batch as ``flight``, which must not be in flight."""
        cdef:
            Flight *begun = &self.flights[flight]
            Py_ssize_t local_set = target_set if self._reading else source_set
            Py_ssize_t remote_set = source_set if self._reading else target_set
        begun.local_ids = &self._local_ids[local_set, 0]
        begun.remote_ids = &self._remote_ids[remote_set, 0]
        begun.left = self.n_blocks * self.n_planes
        self.waiting[(self.first + self.n_waiting) % self.depth] = flight
        self.n_waiting += 1
        self.n_flying += 1
        self.n_batches += 1

    def wait(self):
        """Post, and poll until a batch has ended; return which, none of none in flight.

        Raises:
          VerbsError: A WR was not taken. The QPs are of no further use.
          CompletionError: A WR failed. Likewise.
        """
        cdef:
            int err
            list ended
        if self.n_flying == 0:
            return []
        with nogil:
            err = drive(self)
        if err > 0:
            raise verbs_error(err, "ibv_post_send or ibv_poll_cq")
        if err < 0:
            raise completion_error(
                self.bad.status, wr_id=self.bad.wr_id, qp_num=self.bad.qp_num,
                vendor_err=self.bad.vendor_err)
        ended = [self.ended[i] for i in range(self.n_ended)]
        self.n_flying -= self.n_ended
        self.n_ended = 0
        return ended


cdef int drive(Poster self) noexcept nogil:
    """Post what there is room for, and reap, until a batch has ended.

    Returns 0, an errno, or -1: a WR failed.
    """
    cdef:
        Py_ssize_t n
        int err = 0
    while self.n_ended == 0 and err == 0:
        n = min(self.chain, self.n_blocks - self.at)
        if self.n_waiting and self.queues[self.turn].credits >= n:
            err = post_chain(self, n)
        else:
            err = reap(self)
    return err


cdef int post_chain(Poster self, Py_ssize_t n) noexcept nogil:
    """Post the next ``n`` WRs, of one plane, where it is a chain's turn."""
    cdef:
        SendQueue *queue = &self.queues[self.turn]
        Plane *plane = &self.planes[self.plane]
        uint64_t flight = self.waiting[self.first]
        const int64_t *local_ids = self.flights[flight].local_ids + self.at
        const int64_t *remote_ids = self.flights[flight].remote_ids + self.at
        uint64_t local_base = plane.local_base
        uint64_t remote_base = plane.remote_base
        uint64_t block_bytes = self.block_bytes
        ibv_send_wr *wrs = plane.wrs
        ibv_sge *sges = plane.sges
        ibv_send_wr *refused = NULL
        Py_ssize_t i
        int err
    for i in range(n):
        sges[i].addr = local_base + local_ids[i] * block_bytes
        wrs[i].wr.rdma.remote_addr = remote_base + remote_ids[i] * block_bytes
        wrs[i].next = &wrs[i + 1]
        wrs[i].send_flags = 0
    wrs[n - 1].next = NULL
    wrs[n - 1].send_flags = IBV_SEND_SIGNALED
    wrs[n - 1].wr_id = (
        flight << FLIGHT_SHIFT | <uint64_t>self.turn << QUEUE_SHIFT | <uint64_t>n)
    err = ibv_post_send(queue.qp, wrs, &refused)
    if err:
        return err
    self.n_wrs += n
    queue.credits -= n
    self.turn += 1
    if self.turn == self.n_queues:
        self.turn = 0
    self.at += n
    if self.at == self.n_blocks:
        self.at = 0
        self.plane += 1
        if self.plane == self.n_planes:
            self.plane = 0
            self.n_waiting -= 1
            self.first += 1
            if self.first == self.depth:
                self.first = 0
    return 0


cdef int reap(Poster self) noexcept nogil:
    """Poll once; return 0, an errno, or -1: a WR failed, ``bad`` is its completion."""
    cdef:
        ibv_wc wcs[32]
        int i
        int n = ibv_poll_cq(self.cq, 32, wcs)
        uint64_t wr_id
        uint32_t flight
        Py_ssize_t n_wrs
    if n < 0:
        return -n
    if n == 0:
        # With more threads than processors, those of a software device want one.
        sched_yield()
    for i in range(n):
        if wcs[i].status != IBV_WC_SUCCESS:
            self.bad = wcs[i]
            return -1
        wr_id = wcs[i].wr_id
        n_wrs = wr_id & FIELD_MASK
        flight = wr_id >> FLIGHT_SHIFT
        self.queues[wr_id >> QUEUE_SHIFT & FIELD_MASK].credits += n_wrs
        self.flights[flight].left -= n_wrs
        if self.flights[flight].left == 0:
            self.ended[self.n_ended] = flight
            self.n_ended += 1
    return 0


# -- how near the processors are ------------------------------------------------------

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    /* One word goes there and one comes back; each has a cache line of its own. */
    static inline uint64_t word_of(const void *at)
    {
        return __atomic_load_n((const uint64_t *)at, __ATOMIC_ACQUIRE);
    }
    static inline void set_word(void *at, uint64_t value)
    {
        __atomic_store_n((uint64_t *)at, value, __ATOMIC_RELEASE);
    }
    static inline uint64_t clock_ns(void)
    {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    """
    uint64_t word_of(const void *at) nogil
    void set_word(void *at, uint64_t value) nogil
    uint64_t clock_ns() nogil

cdef enum:
    TRIPS = 64            # there and back, between two looks at the clock
    BACK = 16             # where the word that comes back lies

cdef uint64_t NO_MORE = <uint64_t>-1


def answer_words(uint64_t[::1] words not None):
    """Send each word back that comes, until :func:`ask_words` lets go."""
    cdef:
        uint64_t seen = 0
        uint64_t word = 0
    with nogil:
        while word != NO_MORE:
            word = word_of(&words[0])
            if word != seen:
                set_word(&words[BACK], word)
                seen = word


def ask_words(uint64_t[::1] words not None, uint64_t most_ns):
    """Have words sent back by :func:`answer_words`, which runs in another thread.

    Args:
      words: 32 zeros, shared by the two.
      most_ns: How long.

    Returns:
      Nanoseconds of a word there and back, in the fastest 64 of them that followed each
      other; 0 where there were no 64.
    """
    cdef:
        uint64_t end = clock_ns() + most_ns
        uint64_t best = 0
        uint64_t start
        uint64_t took
        uint64_t word = 0
        int spins
        int _i
        bint late = False
    with nogil:
        while not late:
            start = clock_ns()
            for _i in range(TRIPS):
                word += 1
                spins = 0
                set_word(&words[0], word)
                while word_of(&words[BACK]) != word and not late:
                    spins += 1
                    late = spins % 1024 == 0 and clock_ns() >= end
                if late:
                    break
            took = clock_ns() - start
            if not late and (best == 0 or took < best):
                best = took
            late = late or clock_ns() >= end
        set_word(&words[0], NO_MORE)
    return best / <double>TRIPS
