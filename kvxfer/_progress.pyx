# cython: language_level=3, cdivision=True
"""Completions into finished operations and arrivals; and other ways to end.

Nothing of Python in here; all functions run without the GIL, with the core's lock
held.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport itimerspec

from kvxfer._core cimport *
from kvxfer._ibverbs cimport *
from kvxfer._post cimport post_receive, pump, relist, settle_batch
from kvxfer._verbs cimport take_cq_events

cdef enum:
    POLL_BATCH = 32
    REST_NS = 200000    # between wake-ups for arrivals, where they come more densely

cdef uint64_t RECEIVE_BIT = <uint64_t>1 << 37
cdef uint64_t SEQUENCE_MASK = (<uint64_t>1 << 37) - 1


cdef bint settle(Core *core, uint32_t budget) noexcept nogil:
    """Post what can be posted, take what has completed, and have the rest announced.

    For Python's thread. When this returns false, the next completion of what is in
    flight makes an event, or has made one, or the engine's own thread sees to it.
    True means that the budget of CQEs was used up: no event may come for what is left,
    so it is news by itself until Python has called again, unless the thread drives.
    """
    cdef bint more = _advance(core, budget)
    if core.thread_drives:
        return more
    core.behind = more or listen(core, budget)
    return core.behind


cdef bint settle_all(Core *core, uint32_t budget) noexcept nogil:
    """As ``settle``, for who takes all that there is right after.

    Where arrivals come densely he rests, and hears of the next ones together: a timer
    wakes him, and the CQ stays as it is. A wake-up costs many times what an arrival
    does, and a device with an event to make has to be awake for it.
    """
    cdef:
        bint rested = False
        bint more
        uint64_t count
    if core.rests and eventfd_read(core.rest_fd, &count) == 0:
        core.rests = False
        rested = True
    more = _advance(core, budget)
    if core.thread_drives:
        return more
    if not more and core.arrivals is not NULL and _rest(core, rested):
        core.behind = False
        return False
    core.behind = more or listen(core, budget)
    return core.behind


cdef bint _advance(Core *core, uint32_t budget) noexcept nogil:
    """Do what ``settle`` does but to listen, unless it is the thread that listens."""
    cdef bint more
    pump(core)
    more = drain(core, budget)
    if core.threaded:
        if not core.thread_drives and (more or wants_thread(core)):
            hand_over(core)
        if core.thread_drives:
            # It may sleep with nothing to listen for, where a queue has failed and
            # cannot post what it has; then it has not heard of what is posted here.
            if core.outstanding and not core.armed:
                wake_thread(core)
            core.behind = False
    return more


cdef bint _rest(Core *core, bint rested) noexcept nogil:
    """Start the timer if arrivals come densely and nothing else may end meanwhile."""
    cdef:
        uint64_t now = now_ns()
        bint dense = core.arrivals.next is not NULL
        itimerspec when
    if not rested and now - core.took_ns < REST_NS:
        dense = True
    core.took_ns = now
    if not dense or core.n_ops or core.armed:
        return False
    if not core.rests:    # or he was woken by something else, and it still runs
        memset(&when, 0, sizeof(when))
        when.it_value.tv_nsec = REST_NS
        core.rests = timerfd_settime(core.rest_fd, 0, &when, NULL) == 0
    return core.rests


cdef bint listen(Core *core, uint32_t budget) noexcept nogil:
    """Have the next completion make an event, then look once more.

    Return true if the budget was used up.
    """
    if core.outstanding == 0 or core.armed:
        return False
    if ibv_req_notify_cq(core.cq, 0):
        # No event will come any more: what is in flight must not wait.
        fail_all(core, IBV_WC_GENERAL_ERR)
        return False
    core.armed = True
    return drain(core, budget)


cdef void take_events(Core *core) noexcept nogil:
    """Take the events of the completion channel; the CQ is no longer armed then."""
    if take_cq_events(core.table, core.channel, core.cq, core.unacked):
        core.armed = False


cdef bint wants_thread(Core *core) noexcept nogil:
    """Whether there is more to do for what is in flight than to hear of its end.

    Something waits for room, or several chains will each complete by themselves: a
    loop would be woken for each, and what is to be posted would wait for the loop.
    """
    return core.n_ready > 0 or core.n_chains > 1


cdef void hand_over(Core *core) noexcept nogil:
    """Let the thread see to completions, and Python wait for news alone."""
    core.thread_drives = True
    watch_channel(core, False)
    wake_thread(core)


cdef void wake_thread(Core *core) noexcept nogil:
    """Have the thread look, if it sleeps, once the lock is let go."""
    if core.threaded and core.thread_sleeps:
        core.thread_sleeps = False
        core.wants_wake = True


cdef void watch_channel(Core *core, bint wanted) noexcept nogil:
    """Say whether Python is to be woken by events of the completion channel."""
    cdef epoll_event event
    memset(&event, 0, sizeof(event))
    event.events = EPOLLIN if wanted else 0
    # It is in there and open: there is nothing to go wrong.
    epoll_ctl(core.loop_fd, EPOLL_CTL_MOD, core.channel.fd, &event)


cdef bint drain(Core *core, uint32_t budget) noexcept nogil:
    """Poll until the CQ is empty or the budget is used; return if it was."""
    cdef:
        ibv_wc wcs[POLL_BATCH]
        int n
        int i
        uint32_t done = 0
    while done < budget:
        n = ibv_poll_cq(core.cq, POLL_BATCH, wcs)
        if n < 0:
            # Overrun or gone: of what is in flight nothing will be heard again.
            fail_all(core, IBV_WC_GENERAL_ERR)
        if n <= 0:
            return False
        for i in range(n):
            completed(core, &wcs[i])
        done += n
        core.n_polled += n
        # Free slots are filled at once, before the rest is polled.
        pump(core)
    return True


cdef void completed(Core *core, ibv_wc *wc) noexcept nogil:
    """Account for one WC."""
    cdef:
        uint32_t slot = (wc.wr_id >> SLOT_SHIFT) & FIELD_MASK
        uint32_t generation = (wc.wr_id >> GENERATION_SHIFT) & FIELD_MASK
        uint32_t lane_index = (wc.wr_id >> LANE_SHIFT) & (MAX_LANES - 1)
        Queue *queue = core.queues[slot] if slot < core.n_slots else NULL
        Lane *lane
        uint64_t sequence
        uint64_t before
    # Soft-RoCE keeps the CQEs of a QP that is gone; NICs drop them with it.
    if (queue is NULL or queue.generation != generation
            or lane_index >= queue.n_lanes):
        return
    lane = &queue.lanes[lane_index]
    if wc.wr_id & RECEIVE_BIT:
        received(core, queue, lane_index, wc)
        return
    # Undo the wrapping of the sequence: it is never behind ``retired``.
    before = lane.retired
    sequence = before + (
        ((wc.wr_id & SEQUENCE_MASK) - (before & SEQUENCE_MASK)) & SEQUENCE_MASK)
    if wc.status != IBV_WC_SUCCESS and not lane.flushing:
        # All WRs before this one were executed: their operations may be done.
        lane.flushing = True
        lane.good = sequence
        retire_ops(core, queue)
        if not queue.failed:
            fail(core, queue, wc.status)
            queue.vendor_err = wc.vendor_err
            queue.failed_wr_id = wc.wr_id
            queue.failed_qp_num = lane.qp_num
            blame(core, queue, lane, sequence)
    lane.retired = sequence + 1
    core.outstanding -= lane.retired - before
    retire_bytes(core, queue, lane)
    if not lane.flushing:
        lane.good = lane.retired
        retire_ops(core, queue)
    end_if_drained(core, queue)
    relist(core, queue)


cdef void blame(
    Core *core, Queue *queue, Lane *lane, uint64_t sequence
) noexcept nogil:
    """Mark the operation that the failed WR belongs to."""
    cdef:
        uint64_t i = lane.first_chain
        Op *op
    while i != lane.next_chain and lane.chains[i % lane.depth].end <= sequence:
        i += 1
    if i == lane.next_chain:
        return
    # Unretired until now, so its operation has not ended.
    op = core.ops[lane.chains[i % lane.depth].op]
    if op is not NULL and op.batch.queue is queue:
        op.culprit = True


cdef void received(
    Core *core, Queue *queue, uint32_t lane, ibv_wc *wc
) noexcept nogil:
    """Take the record that an immediate announces and repost the receive."""
    cdef:
        uint64_t offset
        int error = 0
    queue.lanes[lane].receives -= 1
    core.outstanding -= 1
    if wc.status != IBV_WC_SUCCESS:
        fail(core, queue, wc.status)
        end_if_drained(core, queue)
        return
    offset = <uint64_t>ntohl(wc.imm_data) * KVX_NOTIFY_ALIGN
    if wc.opcode != IBV_WC_RECV_RDMA_WITH_IMM:
        error = 3
    elif lane == 0:
        error = take_record(core, queue, offset)
    else:
        error = take_immediate(queue, offset)
    if error > 0:
        error = refuse(core, queue, error)
    elif error == 0:
        announce(core, queue)
        # The QP of a failed queue may be about to be destroyed.
        if not queue.failed:
            error = post_receive(core, queue, lane)
    if error:
        fail(core, queue, -ENOMEM)


cdef int refuse(Core *core, Queue *queue, int error) noexcept nogil:
    """Report that the peer broke a rule; return 0, or -1 without memory."""
    cdef Arrival *arrival = <Arrival *>calloc(1, sizeof(Arrival))
    if arrival is NULL:
        return -1
    arrival.slot = queue.slot
    arrival.error = error
    core.arrivals_tail[0] = arrival
    core.arrivals_tail = &arrival.next
    return 0


cdef void announce(Core *core, Queue *queue) noexcept nogil:
    """Hand over the records whose immediates are all here, in the ring's order."""
    cdef Arrival *arrival = queue.first_partial
    while arrival is not NULL and arrival.missing == 0:
        queue.first_partial = arrival.next
        if arrival.next is NULL:
            queue.last_partial = NULL
        arrival.next = NULL
        core.arrivals_tail[0] = arrival
        core.arrivals_tail = &arrival.next
        arrival = queue.first_partial


cdef int take_immediate(Queue *queue, uint64_t offset) noexcept nogil:
    """Count an immediate of a further QP; return 0 or why it is refused."""
    cdef Arrival *arrival = queue.first_partial
    if offset >= queue.own_bytes:
        return 1
    while arrival is not NULL:
        if arrival.offset == offset // KVX_NOTIFY_ALIGN and arrival.missing:
            arrival.missing -= 1
            return 0
        arrival = arrival.next
    # Its record comes by another QP, and later.
    if queue.early[offset // KVX_NOTIFY_ALIGN] >= queue.n_lanes - 1:
        return 4
    queue.early[offset // KVX_NOTIFY_ALIGN] += 1
    return 0


cdef int take_record(Core *core, Queue *queue, uint64_t offset) noexcept nogil:
    """Copy the record at ``offset``.

    Return 0, why it is refused, or -1 without memory.
    """
    cdef:
        kvx_notify_record header
        Arrival *arrival
        uint64_t start
        uint64_t head
        uint32_t early = 0
    if (offset >= queue.own_bytes
            or queue.own_bytes - offset < sizeof(kvx_notify_record)):
        return 1
    # Copied before it is looked at: the peer could still write here.
    memcpy(&header, queue.own_ring + offset, sizeof(header))
    if (header.magic != KVX_NOTIFY_MAGIC
            or header.length > queue.own_bytes - offset
            or header.length > kvx_notify_limit(queue.own_bytes)
            or header.request_bytes > KVX_NOTIFY_MAX_REQUEST
            or header.length != kvx_notify_length(
                header.request_bytes, header.n_ids)
            or header.sequence != queue.own_records
            or header.n_qps < 1 or header.n_qps > queue.n_lanes):
        return 2
    head = kvx_notify_place(
        queue.own_head, header.length, queue.own_bytes, &start)
    if start % queue.own_bytes != offset:
        return 1
    if queue.early is not NULL:
        early = queue.early[offset // KVX_NOTIFY_ALIGN]
        queue.early[offset // KVX_NOTIFY_ALIGN] = 0
        if early > header.n_qps - 1:
            return 4
    arrival = <Arrival *>calloc(1, sizeof(Arrival))
    if arrival is NULL:
        return -1
    arrival.record = <char *>malloc(header.length)
    if arrival.record is NULL:
        free(arrival)
        return -1
    memcpy(arrival.record, &header, sizeof(header))
    memcpy(arrival.record + sizeof(header),
           queue.own_ring + offset + sizeof(header),
           header.length - sizeof(header))
    arrival.slot = queue.slot
    arrival.length = header.length
    arrival.head = head
    arrival.offset = <uint32_t>(offset // KVX_NOTIFY_ALIGN)
    arrival.missing = header.n_qps - 1 - early
    if queue.last_partial is NULL:
        queue.first_partial = arrival
    else:
        queue.last_partial.next = arrival
    queue.last_partial = arrival
    queue.own_head = head
    queue.own_records += 1
    return 0


cdef void cancel(Core *core, uint64_t op_id) noexcept nogil:
    """Post nothing further of an operation; one that is gone is left alone."""
    cdef:
        uint32_t index = <uint32_t>op_id
        Op *op = core.ops[index] if index < core.n_op_slots else NULL
        Queue *queue
    # Once its place in the ring is taken, the record has to follow.
    if (op is NULL or op.id != op_id or op.cursor.stage == POSTED or op.reserved
            or op.cancelled or op.batch.queue.failed):
        return
    queue = op.batch.queue
    op.cancelled = True
    if op.cursor.stage == DATA:
        op.cursor.stage = POSTED
        settle_batch(core, op.batch)
    else:
        remove_closing(queue, op)
    # One that has posted nothing waits for nobody: its ends are 0.
    append_posted(core, op)
    retire_ops(core, queue)
    # Others may have waited behind it.
    relist(core, queue)


cdef void remove_closing(Queue *queue, Op *op) noexcept nogil:
    cdef:
        Op **place = &queue.first_closing
        Op *before = NULL
    while place[0] is not op:
        before = place[0]
        place = &before.next
    place[0] = op.next
    if queue.last_closing is op:
        queue.last_closing = before


cdef void stop(Core *core, Queue *queue) noexcept nogil:
    """Stop posting on a queue since its owner says so."""
    if not queue.failed:
        queue.reported = True     # the owner knows
        queue.failed = True
        queue.status = IBV_WC_WR_FLUSH_ERR
    end_if_drained(core, queue)
    relist(core, queue)


cdef void forget(Core *core, Queue *queue) noexcept nogil:
    """End the operations of a queue whose QPs have been destroyed."""
    cdef:
        uint32_t i
        Lane *lane
    fail(core, queue, IBV_WC_WR_FLUSH_ERR)
    for i in range(queue.n_lanes):
        lane = &queue.lanes[i]
        core.outstanding -= lane.posted - lane.retired
        lane.retired = lane.posted
        retire_bytes(core, queue, lane)
    # Of no wr_id: what a device kept of these QPs says nothing any more.
    queue.generation = FIELD_MASK + 1
    end_if_drained(core, queue)
    relist(core, queue)
