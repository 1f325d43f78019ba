# cython: language_level=3, cdivision=True
"""The core of the engine: operations, how they end, and what is counted for it.

Nothing of Python in here. All functions run without the GIL and, unless they say
otherwise, with the core's lock held; they return codes and never raise. The
structs are in ``_core.pxd``; what posts is in ``_post.pyx``, what takes completions
in ``_progress.pyx``.

Send-queue accounting. A slot of a send queue is free again only when a CQE at
or after it has been polled. Per lane, which is one QP, in WRs since the beginning::

    posted  accepted by ibv_post_send
    retired known to be complete
    free    = depth - (posted - retired)

The last WR of every chain is signaled and a chain is at most 64 long, so each
posted WR has a signaled one close behind it and the queue cannot fill up with WRs
of which nothing will ever be heard. RC completes in order: a CQE retires all WRs
up to its own. The sum of unretired WRs and posted receives of all lanes never
exceeds the CQ, since each of them may end in a CQE.

Failure. The first failed WR of a queue stops all posting on it; its operations
end when every posted WR on every lane has been flushed, and not before: then the
device is done with their blocks. An operation that is cancelled posts nothing
further and ends when what it had posted is retired.
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvxfer._ibverbs cimport *

cdef uint64_t SEQUENCE_MASK = (<uint64_t>1 << 37) - 1


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return <uint64_t>ts.tv_sec * 1000000000 + ts.tv_nsec


cdef uint64_t make_wr_id(
    Queue *queue, uint32_t lane, uint64_t sequence
) noexcept nogil:
    return (
        (<uint64_t>queue.slot << SLOT_SHIFT)
        | (<uint64_t>lane << LANE_SHIFT)
        | (<uint64_t>queue.generation << GENERATION_SHIFT)
        | (sequence & SEQUENCE_MASK)
    )


cdef void release_batch(Batch *batch) noexcept nogil:
    batch.refs -= 1
    if batch.refs == 0:
        free(batch)


cdef void free_queue(Queue *queue) noexcept nogil:
    """Free a queue that is in no slot any more. No lock."""
    cdef:
        uint32_t i
        Arrival *arrival
        kvx_heap *ready
    for i in range(queue.n_lanes):
        free(queue.lanes[i].chains)
    while queue.first_partial is not NULL:
        arrival = queue.first_partial
        queue.first_partial = arrival.next
        free(arrival.record)
        free(arrival)
    for i in range(queue.n_roads):
        ready = &queue.roads[i].ready
        while ready.n:
            release_batch(<Batch *>kvx_heap_top(ready))
            kvx_heap_pop(ready)
        kvx_heap_free(ready)
    free(queue.rows)
    free(queue.planes)
    free(queue.keys)
    free(queue.seen)
    free(queue.early)
    free(queue)


cdef int core_init(Core *core) noexcept nogil:
    """Set up a core, zeroed but for its CQ; return 0 or an errno. No lock.

    Whatever is returned, it is to be freed.
    """
    cdef epoll_event event
    core.finished_tail = &core.finished
    core.arrivals_tail = &core.arrivals
    core.wake_fd = core.loop_fd = core.rest_fd = -1
    core.news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if core.news_fd < 0:
        return errno
    core.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    core.loop_fd = epoll_create1(EPOLL_CLOEXEC)
    core.rest_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
    if core.wake_fd < 0 or core.loop_fd < 0 or core.rest_fd < 0:
        return errno
    memset(&event, 0, sizeof(event))
    event.events = EPOLLIN
    if (epoll_ctl(core.loop_fd, EPOLL_CTL_ADD, core.news_fd, &event)
            or epoll_ctl(core.loop_fd, EPOLL_CTL_ADD, core.rest_fd, &event)
            or epoll_ctl(core.loop_fd, EPOLL_CTL_ADD, core.channel.fd, &event)):
        return errno
    core.waits = True
    core.cq_limit = core.cq.cqe
    kvx_template_init(&core.template)
    return pthread_mutex_init(&core.lock, NULL)


cdef void core_free(Core *core) noexcept nogil:
    """Free a core and all that is in it. No lock; nobody else may use it."""
    cdef:
        uint32_t i
        Op *op
        Arrival *arrival
    for i in range(core.n_op_slots):
        if core.ops[i] is not NULL:
            release_batch(core.ops[i].batch)
    while core.finished is not NULL:
        op = core.finished
        core.finished = op.next
        release_batch(op.batch)
    for i in range(core.n_slots):
        if core.queues[i] is not NULL:
            free_queue(core.queues[i])
    while core.arrivals is not NULL:
        arrival = core.arrivals
        core.arrivals = arrival.next
        free(arrival.record)
        free(arrival)
    kvx_heap_free(&core.runnable)
    free(core.queues)
    free(core.ops)
    free(core.op_generation)
    free(core.op_free)
    pthread_mutex_destroy(&core.lock)
    core_close(core)
    free(core)


cdef void core_close(Core *core) noexcept nogil:
    """Close the core's descriptors. No lock; nobody may look at it any more."""
    if core.news_fd >= 0:
        close(core.news_fd)
    if core.wake_fd >= 0:
        close(core.wake_fd)
    if core.loop_fd >= 0:
        close(core.loop_fd)
    if core.rest_fd >= 0:
        close(core.rest_fd)
    core.news_fd = core.wake_fd = core.loop_fd = core.rest_fd = -1


cdef Batch *new_batch(uint32_t n_ops, uint32_t n_ids) noexcept nogil:
    """Make room for a submission, in one piece; NULL without memory. No lock."""
    cdef:
        size_t head = (sizeof(Batch) + 7) & ~<size_t>7
        Batch *batch = <Batch *>malloc(
            head + n_ops * sizeof(Op) + 2 * <size_t>n_ids * sizeof(uint32_t))
    if batch is NULL:
        return NULL
    memset(batch, 0, sizeof(Batch))
    batch.refs = 1
    batch.n_ids = n_ids
    batch.n_ops = n_ops
    batch.ops = <Op *>(<char *>batch + head)
    batch.local = <uint32_t *>(batch.ops + n_ops)
    batch.remote = batch.local + n_ids
    memset(batch.ops, 0, n_ops * sizeof(Op))
    return batch


cdef bint reserve(Core *core, Queue *queue, uint32_t n) noexcept nogil:
    """Have room for a submission of ``n`` operations; True without memory."""
    cdef:
        uint32_t room
        uint32_t i
        size_t n_ready = 1
        Op **ops
        uint32_t *generation
        uint32_t *stack
    # A submission may move from any heap to any other.
    for i in range(queue.n_roads):
        n_ready += queue.roads[i].ready.n
    for i in range(queue.n_roads):
        if kvx_heap_reserve(
                &queue.roads[i].ready, n_ready - queue.roads[i].ready.n):
            return True
    if core.n_op_free >= n:
        return False
    room = core.n_op_slots * 2 + n + 16
    ops = <Op **>calloc(room, sizeof(Op *))
    generation = <uint32_t *>calloc(room, sizeof(uint32_t))
    stack = <uint32_t *>calloc(room, sizeof(uint32_t))
    if ops is NULL or generation is NULL or stack is NULL:
        free(ops)
        free(generation)
        free(stack)
        return True
    if core.n_op_slots:
        memcpy(ops, core.ops, core.n_op_slots * sizeof(Op *))
        memcpy(generation, core.op_generation, core.n_op_slots * sizeof(uint32_t))
        memcpy(stack, core.op_free, core.n_op_free * sizeof(uint32_t))
    for i in range(core.n_op_slots, room):
        stack[core.n_op_free] = room - 1 - (i - core.n_op_slots)
        core.n_op_free += 1
    free(core.ops)
    free(core.op_generation)
    free(core.op_free)
    core.ops = ops
    core.op_generation = generation
    core.op_free = stack
    core.n_op_slots = room
    return False


cdef void admit(Core *core, Batch *batch) noexcept nogil:
    """Put a submission among those that are ready. Its rows and ids are filled in.

    There must be free indices and room in the heap.
    """
    cdef:
        uint32_t i
        uint32_t index
        Op *op
    core.order += 1
    batch.order = core.order
    batch.born_ns = now_ns()
    batch.refs += batch.n_ops
    batch.n_open = batch.n_ops
    for i in range(batch.n_ops):
        op = &batch.ops[i]
        core.n_op_free -= 1
        index = core.op_free[core.n_op_free]
        core.op_generation[index] += 1
        core.ops[index] = op
        op.id = (<uint64_t>core.op_generation[index] << 32) | index
        op.batch = batch
    batch.queue.n_ops += batch.n_ops
    core.n_ops += batch.n_ops
    batch.road = batch.ops[0].row.road
    kvx_heap_push(
        &batch.queue.roads[batch.road].ready, batch.key, batch.order, batch)
    core.n_ready += 1


cdef void append_posted(Core *core, Op *op) noexcept nogil:
    """Nothing of this operation is left to post: it waits for its last WRs.

    With one lane those that wait are in the order of their last WRs, where only a
    cancelled one does not belong at the end. With several there is no such order.
    """
    cdef:
        Queue *queue = op.batch.queue
        Op **place = &queue.first_posted
    op.cursor.stage = POSTED
    if (queue.last_posted is NULL or queue.n_lanes > 1
            or queue.last_posted.ends[0] <= op.ends[0]):
        op.next = NULL
        if queue.last_posted is NULL:
            queue.first_posted = op
        else:
            queue.last_posted.next = op
        queue.last_posted = op
        return
    while place[0].ends[0] <= op.ends[0]:
        place = &place[0].next
    op.next = place[0]
    place[0] = op


cdef void finish(Core *core, Op *op, int status) noexcept nogil:
    """Move an operation that is in no list any more to the finished ones."""
    cdef:
        uint32_t index = <uint32_t>op.id
        Queue *queue = op.batch.queue
    op.status = status
    op.died_ns = now_ns()
    op.qp_num = queue.lanes[0].qp_num
    if status:
        op.wr_id = queue.failed_wr_id
        op.vendor_err = queue.vendor_err
        if queue.failed_qp_num:
            op.qp_num = queue.failed_qp_num
    op.next = NULL
    core.finished_tail[0] = op
    core.finished_tail = &op.next
    core.ops[index] = NULL
    core.op_free[core.n_op_free] = index
    core.n_op_free += 1
    op.batch.n_open -= 1
    queue.n_ops -= 1
    core.n_ops -= 1


cdef bint is_done(Queue *queue, Op *op) noexcept nogil:
    """Whether every WR that an operation has posted is known to have succeeded."""
    cdef uint32_t i
    for i in range(queue.n_lanes):
        if op.ends[i] > queue.lanes[i].good:
            return False
    return True


cdef void retire_ops(Core *core, Queue *queue) noexcept nogil:
    """Finish the operations whose last WRs are known to be complete."""
    cdef:
        Op **place = &queue.first_posted
        Op *before = NULL
        Op *op = place[0]
    while op is not NULL:
        if is_done(queue, op):
            place[0] = op.next
            if op.next is NULL:
                queue.last_posted = before
            finish(core, op, CANCELLED if op.cancelled else 0)
        elif queue.n_lanes == 1:
            return    # those behind it wait for later WRs
        else:
            before = op
            place = &op.next
        op = place[0]


cdef void retire_bytes(Core *core, Queue *queue, Lane *lane) noexcept nogil:
    """Give back the windows of the chains that are retired."""
    cdef Chain *chain
    while lane.first_chain != lane.next_chain:
        chain = &lane.chains[lane.first_chain % lane.depth]
        if chain.end > lane.retired:
            return
        queue.flying_bytes -= chain.n_bytes
        core.flying_bytes -= chain.n_bytes
        core.n_chains -= 1
        lane.first_chain += 1


cdef bint is_drained(Queue *queue) noexcept nogil:
    """Whether no posted WR is left in flight on any lane."""
    cdef uint32_t i
    for i in range(queue.n_lanes):
        if queue.lanes[i].retired != queue.lanes[i].posted:
            return False
    return True


cdef void end_if_drained(Core *core, Queue *queue) noexcept nogil:
    """Once a failed queue has nothing in flight, end all its operations."""
    cdef:
        Op *op
        uint32_t i
    if not queue.failed or not is_drained(queue):
        return
    while queue.first_posted is not NULL:
        op = queue.first_posted
        queue.first_posted = op.next
        finish(core, op, queue.status)
    queue.last_posted = NULL
    while queue.first_closing is not NULL:
        op = queue.first_closing
        queue.first_closing = op.next
        finish(core, op, queue.status)
    queue.last_closing = NULL
    for i in range(queue.n_roads):
        end_ready(core, queue, &queue.roads[i].ready)


cdef void end_ready(Core *core, Queue *queue, kvx_heap *ready) noexcept nogil:
    """End the operations of a failed queue that still have data to post."""
    cdef:
        Op *op
        Batch *batch
    while ready.n:
        batch = <Batch *>kvx_heap_top(ready)
        kvx_heap_pop(ready)
        core.n_ready -= 1
        while batch.at < batch.n_ops:
            op = &batch.ops[batch.at]
            batch.at += 1
            # The others are in one of the lists, or ended.
            if op.cursor.stage == DATA:
                finish(core, op, queue.status)
        release_batch(batch)


cdef bint has_news(Core *core) noexcept nogil:
    """Whether Python has not taken something that has ended or arrived, or may have."""
    return (core.finished is not NULL or core.arrivals is not NULL
            or core.n_unreported != 0 or core.behind)


cdef void let_go(Core *core) noexcept nogil:
    """Let go of the lock, then wake the thread if it is wanted.

    Not the other way round: on a busy machine who is woken gets the processor of who
    wakes him, and then waits for this lock.
    """
    cdef bint wanted = core.wants_wake
    core.wants_wake = False
    pthread_mutex_unlock(&core.lock)
    if wanted:
        eventfd_write(core.wake_fd, 1)


cdef void leave(Core *core) noexcept nogil:
    """As ``let_go``; and wake Python if there is something for it and it waits.

    For whoever may have ended an operation and does not hand it over himself. News and
    the wish to be told are both under the lock, so none is missed.
    """
    cdef bint told = core.waits and has_news(core)
    if told:
        core.waits = False
    let_go(core)
    if told:
        eventfd_write(core.news_fd, 1)


cdef void fail(Core *core, Queue *queue, int status) noexcept nogil:
    """Note the first failure of a queue."""
    if queue.failed:
        return
    queue.failed = True
    queue.status = status
    core.n_unreported += 1


cdef void fail_all(Core *core, int status) noexcept nogil:
    cdef uint32_t slot
    for slot in range(core.n_slots):
        if core.queues[slot] is not NULL:
            fail(core, core.queues[slot], status)
