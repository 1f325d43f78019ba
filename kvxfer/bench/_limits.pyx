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
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.types cimport pid_t
from posix.unistd cimport read, write

from kvxfer._ibverbs cimport *
from kvxfer._verbs cimport QueuePair

from kvxfer.errors import completion_error, verbs_error

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

cdef enum:
    AT_ONCE = 1024    # iovecs a call takes, IOV_MAX
    CHAIN = 64        # WRs posted with one doorbell


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


cdef struct Table:
    uint64_t local_base
    uint64_t remote_base
    const int64_t *local_ids
    const int64_t *remote_ids
    Py_ssize_t n
    uint32_t block_bytes
    uint32_t lkey
    uint32_t rkey
    int opcode


cdef int reap(
    ibv_cq *cq, Py_ssize_t *retired, ibv_wc *bad
) noexcept nogil:
    """Poll once; ``wr_id`` of a WC is how many WRs it retires. Return 0, -1 or errno.

    -1 says that a WR failed; ``bad`` is its completion.
    """
    cdef:
        ibv_wc wcs[32]
        int i
        int n = ibv_poll_cq(cq, 32, wcs)
    if n < 0:
        return -n
    for i in range(n):
        if wcs[i].status != IBV_WC_SUCCESS:
            bad[0] = wcs[i]
            return -1
        retired[0] += wcs[i].wr_id
    return 0


cdef int post_table(
    ibv_qp *qp, ibv_cq *cq, Table *table, Py_ssize_t depth, ibv_wc *bad
) noexcept nogil:
    """Post a WR a block, the last of each chain signaled, and see all of them done."""
    cdef:
        ibv_send_wr wrs[CHAIN]
        ibv_sge sges[CHAIN]
        ibv_send_wr *refused = NULL
        Py_ssize_t posted = 0
        Py_ssize_t retired = 0
        Py_ssize_t i
        Py_ssize_t n
        int err = 0
    memset(wrs, 0, sizeof(wrs))
    for i in range(CHAIN):
        sges[i].length = table.block_bytes
        sges[i].lkey = table.lkey
        wrs[i].sg_list = &sges[i]
        wrs[i].num_sge = 1
        wrs[i].opcode = table.opcode
        wrs[i].wr.rdma.rkey = table.rkey
    while retired < table.n and not err:
        n = min(<Py_ssize_t>CHAIN, table.n - posted, depth - (posted - retired))
        if n and (n == CHAIN or posted + n == table.n):
            for i in range(n):
                sges[i].addr = (
                    table.local_base
                    + table.local_ids[posted + i] * table.block_bytes)
                wrs[i].wr.rdma.remote_addr = (
                    table.remote_base
                    + table.remote_ids[posted + i] * table.block_bytes)
                wrs[i].next = &wrs[i + 1]
                wrs[i].send_flags = 0
            wrs[n - 1].next = NULL
            wrs[n - 1].send_flags = IBV_SEND_SIGNALED
            wrs[n - 1].wr_id = n
            err = ibv_post_send(qp, wrs, &refused)
            posted += n
        else:
            err = reap(cq, &retired, bad)
    return err


def post_blocks(QueuePair qp not None, uintptr_t local_base,
                uint32_t lkey, uint64_t remote_base, uint32_t rkey,
                uint32_t block_bytes, const int64_t[::1] local_ids not None,
                const int64_t[::1] remote_ids not None, bint reading=False):
    """Write a batch into a peer's blocks, or read it from there, by a bare loop.

    One WR a block, chains of 64, one signaled WR a chain, the CQ polled until the last
    has completed. Nobody else may use the QP or its CQ meanwhile.

    Raises:
      VerbsError: A WR was not taken. The QP is of no further use.
      CompletionError: A WR failed.
    """
    cdef:
        Table table
        ibv_wc bad
        Py_ssize_t depth = qp.max_send_wr
        int err
    if depth < CHAIN:
        raise ValueError(f"a send queue of {depth} slots holds no chain of {CHAIN}")
    qp._ensure_open()
    table.local_base = local_base
    table.remote_base = remote_base
    table.local_ids = &local_ids[0]
    table.remote_ids = &remote_ids[0]
    table.n = local_ids.shape[0]
    table.block_bytes = block_bytes
    table.lkey = lkey
    table.rkey = rkey
    table.opcode = IBV_WR_RDMA_READ if reading else IBV_WR_RDMA_WRITE
    memset(&bad, 0, sizeof(bad))
    with nogil:
        err = post_table(qp.qp, qp.cq.cq, &table, depth, &bad)
    if err > 0:
        raise verbs_error(err, "ibv_post_send or ibv_poll_cq")
    if err < 0:
        raise completion_error(
            bad.status, wr_id=bad.wr_id, qp_num=bad.qp_num, vendor_err=bad.vendor_err)


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
