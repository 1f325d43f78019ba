# cython: language_level=3, cdivision=True
"""The core of the engine: operations into WRs, completions into finished operations.

Nothing of Python in here. All functions run without the GIL and, unless they say
otherwise, with the core's lock held; they return codes and never raise. The
structs are in ``_core.pxd``.

Send-queue accounting. A slot of the send queue is free again only when a CQE at
or after it has been polled. Per queue, in WRs since the beginning::

    posted  accepted by ibv_post_send
    retired known to be complete
    free    = depth - (posted - retired)

The last WR of every chain is signaled and a chain is at most ``chain`` long, so
each posted WR has a signaled one close behind it and the queue cannot fill up
with WRs of which nothing will ever be heard. RC completes in order: a CQE retires
all WRs up to its own. The sum of unretired WRs and posted receives of all queues
never exceeds the CQ, since each of them may end in a CQE.

Failure. The first failed WR of a queue stops all posting on it; its operations
end when every posted WR has been flushed, and not before: then the device is done
with their blocks. An operation that is cancelled posts nothing further and ends
when what it had posted is retired.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvxfer._ibverbs cimport *

cdef uint64_t RECEIVE_BIT = <uint64_t>1 << 39
cdef uint64_t SEQUENCE_MASK = (<uint64_t>1 << 39) - 1


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec ts
    clock_gettime(CLOCK_MONOTONIC, &ts)
    return <uint64_t>ts.tv_sec * 1000000000 + ts.tv_nsec


cdef uint64_t make_wr_id(Queue *queue, uint64_t sequence) noexcept nogil:
    return (
        (<uint64_t>queue.slot << SLOT_SHIFT)
        | (<uint64_t>queue.generation << GENERATION_SHIFT)
        | (sequence & SEQUENCE_MASK)
    )


cdef int find_bad_id(
    const int64_t *ids, uint32_t n, uint64_t limit, uint32_t *position
) noexcept nogil:
    """Return 1 and the position of the first id outside ``[0, limit)``, or 0."""
    cdef uint32_t i
    for i in range(n):
        if <uint64_t>ids[i] >= limit:    # a negative id is huge here
            position[0] = i
            return 1
    return 0


cdef int find_duplicate(
    uint8_t *seen, const int64_t *ids, uint32_t n, uint32_t *position
) noexcept nogil:
    """Return 1 and the position of an id that came before, or 0.

    ``seen`` is all zero before and after.
    """
    cdef:
        uint32_t i
        uint32_t marked = n
        int found = 0
    for i in range(n):
        if seen[ids[i] >> 3] & (1 << (ids[i] & 7)):
            position[0] = i
            marked = i
            found = 1
            break
        seen[ids[i] >> 3] |= 1 << (ids[i] & 7)
    for i in range(marked):
        seen[ids[i] >> 3] = 0
    return found


cdef void release_ids(Ids *ids) noexcept nogil:
    ids.refs -= 1
    if ids.refs == 0:
        free(ids)


cdef void free_queue(Queue *queue) noexcept nogil:
    """Free a queue that is in no slot any more. No lock."""
    kvx_heap_free(&queue.ready)
    free(queue.rows)
    free(queue.pairs)
    free(queue.seen)
    free(queue.owners)
    free(queue)


cdef int core_init(
    Core *core, ibv_cq *cq, uint32_t chain, uint32_t max_sge,
    uint64_t merge_bytes, uint64_t max_wr_bytes,
) noexcept nogil:
    """Set up a zeroed core; return 0 or an errno. No lock."""
    cdef:
        uint32_t i
        int err = pthread_mutex_init(&core.lock, NULL)
    if err:
        return err
    core.cq = cq
    core.cq_limit = cq.cqe
    core.chain = chain
    core.max_sge = max_sge
    core.merge_bytes = merge_bytes
    core.max_wr_bytes = max_wr_bytes
    core.finished_tail = &core.finished
    core.arrivals_tail = &core.arrivals
    for i in range(MAX_CHAIN):
        core.wrs[i].next = &core.wrs[i + 1] if i + 1 < MAX_CHAIN else NULL
        core.wrs[i].sg_list = &core.sges[i * MAX_SGE]
    return 0


cdef void core_free(Core *core) noexcept nogil:
    """Free a core and all that is in it. No lock; nobody else may use it."""
    cdef:
        uint32_t i
        Op *op
        Arrival *arrival
    for i in range(core.n_slots):
        if core.queues[i] is not NULL:
            free_queue(core.queues[i])
    for i in range(core.n_op_slots):
        if core.ops[i] is not NULL:
            release_ids(core.ops[i].ids)
            free(core.ops[i])
    while core.finished is not NULL:
        op = core.finished
        core.finished = op.next
        release_ids(op.ids)
        free(op)
    while core.arrivals is not NULL:
        arrival = core.arrivals
        core.arrivals = arrival.next
        free(arrival.record)
        free(arrival)
    free(core.queues)
    free(core.ops)
    free(core.op_generation)
    free(core.op_free)
    pthread_mutex_destroy(&core.lock)
    free(core)


cdef Op *admit(
    Core *core, Queue *queue, Row *row, Ids *ids, uint64_t key
) noexcept nogil:
    """Make an operation and put it among the ready ones; NULL without memory.

    There must be a free index and room in the heap.
    """
    cdef:
        Op *op = <Op *>calloc(1, sizeof(Op))
        uint32_t index
    if op is NULL:
        return NULL
    core.n_op_free -= 1
    index = core.op_free[core.n_op_free]
    core.op_generation[index] += 1
    core.ops[index] = op
    core.op_order += 1
    op.id = (<uint64_t>core.op_generation[index] << 32) | index
    op.queue = queue
    op.row = row
    op.ids = ids
    op.born_ns = now_ns()
    ids.refs += 1
    queue.n_ops += 1
    core.n_ops += 1
    kvx_heap_push(&queue.ready, key, core.op_order, op)
    return op


cdef void cancel(Core *core, uint64_t op_id) noexcept nogil:
    """Post nothing further of an operation; one that is gone is left alone."""
    cdef:
        uint32_t index = <uint32_t>op_id
        Op *op = core.ops[index] if index < core.n_op_slots else NULL
        Queue *queue
    # Once its place in the ring is taken, the record has to follow.
    if (op is NULL or op.id != op_id or op.cursor.stage == POSTED or op.reserved
            or op.cancelled or op.queue.failed):
        return
    op.cancelled = True
    kvx_heap_remove(&op.queue.ready, op)
    queue = op.queue
    # One that has posted nothing waits for nobody: op.end is 0.
    append_posted(core, op)
    retire_ops(core, queue)
    # Others may have waited behind it.
    pump(core, queue)


cdef void stop(Core *core, Queue *queue) noexcept nogil:
    """Stop posting on a queue since its owner says so."""
    if not queue.failed:
        queue.reported = True     # the owner knows
        queue.failed = True
        queue.status = IBV_WC_WR_FLUSH_ERR
    end_if_drained(core, queue)


cdef void flush(Core *core, Queue *queue) noexcept nogil:
    """Let a failed queue, its QP in ERR, report its last WR.

    A WR posted in ERR is flushed behind all others, so it speaks for the
    unsignaled ones that were executed before.
    """
    cdef:
        ibv_send_wr *bad = NULL
        ibv_send_wr wr
    if not queue.tail_unsignaled or queue.posted == queue.retired:
        return
    memset(&wr, 0, sizeof(wr))
    wr.wr_id = make_wr_id(queue, queue.posted)
    wr.opcode = IBV_WR_RDMA_WRITE
    wr.send_flags = IBV_SEND_SIGNALED
    if ibv_post_send(queue.qp, &wr, &bad) == 0:
        queue.posted += 1
        core.outstanding += 1
        queue.tail_unsignaled = False


cdef void forget(Core *core, Queue *queue) noexcept nogil:
    """End the operations of a queue whose QP has been destroyed."""
    fail(core, queue, IBV_WC_WR_FLUSH_ERR)
    core.outstanding -= queue.posted - queue.retired
    queue.retired = queue.posted
    end_if_drained(core, queue)
    # Others may have waited for its part of the CQ.
    pump_all(core)


cdef int post_receive(Core *core, Queue *queue) noexcept nogil:
    """Post one receive without memory. Return 0 or an errno. Lock held."""
    cdef:
        ibv_recv_wr wr
        ibv_recv_wr *bad = NULL
        int err
    memset(&wr, 0, sizeof(wr))
    wr.wr_id = make_wr_id(queue, 0) | RECEIVE_BIT
    err = ibv_post_recv(queue.qp, &wr, &bad)
    if err == 0:
        queue.receives += 1
        core.outstanding += 1
    return err


cdef void append_posted(Core *core, Op *op) noexcept nogil:
    """Nothing of this operation is left to post: it waits for its last WR.

    Those that wait are in the order of their last WRs. Only a cancelled one does
    not belong at the end.
    """
    cdef:
        Queue *queue = op.queue
        Op **place = &queue.first_posted
    op.cursor.stage = POSTED
    if queue.last_posted is NULL or queue.last_posted.end <= op.end:
        op.next = NULL
        if queue.last_posted is NULL:
            queue.first_posted = op
        else:
            queue.last_posted.next = op
        queue.last_posted = op
        return
    while place[0].end <= op.end:
        place = &place[0].next
    op.next = place[0]
    place[0] = op


cdef void finish(Core *core, Op *op, int status) noexcept nogil:
    """Move an operation that is in no list any more to the finished ones."""
    cdef uint32_t index = <uint32_t>op.id
    op.status = status
    op.died_ns = now_ns()
    op.qp_num = op.queue.qp_num
    if status:
        op.wr_id = op.queue.failed_wr_id
        op.vendor_err = op.queue.vendor_err
    op.next = NULL
    core.finished_tail[0] = op
    core.finished_tail = &op.next
    core.ops[index] = NULL
    core.op_free[core.n_op_free] = index
    core.n_op_free += 1
    op.queue.n_ops -= 1
    core.n_ops -= 1


cdef void retire_ops(Core *core, Queue *queue) noexcept nogil:
    """Finish the operations whose last WR is known to be complete."""
    cdef Op *op = queue.first_posted
    while op is not NULL and op.end <= queue.retired:
        queue.first_posted = op.next
        if op.next is NULL:
            queue.last_posted = NULL
        finish(core, op, CANCELLED if op.cancelled else 0)
        op = queue.first_posted


cdef void end_if_drained(Core *core, Queue *queue) noexcept nogil:
    """Once a failed queue has nothing in flight, end all its operations."""
    cdef Op *op
    if not queue.failed or queue.retired != queue.posted:
        return
    while queue.first_posted is not NULL:
        op = queue.first_posted
        queue.first_posted = op.next
        finish(core, op, queue.status)
    queue.last_posted = NULL
    while queue.ready.n:
        op = <Op *>kvx_heap_top(&queue.ready)
        kvx_heap_pop(&queue.ready)
        finish(core, op, queue.status)


cdef void fail(Core *core, Queue *queue, int status) noexcept nogil:
    """Note the first failure of a queue."""
    if queue.failed:
        return
    queue.failed = True
    queue.status = status
    core.n_unreported += 1


cdef void pump(Core *core, Queue *queue) noexcept nogil:
    """Post while there is something to post and room for it."""
    cdef:
        Op *op
        uint64_t room
        uint32_t n
    while queue.ready.n and not queue.failed:
        op = <Op *>kvx_heap_top(&queue.ready)
        if (op.cursor.stage == RECORD and not op.reserved
                and not reserve_record(core, op)):
            return
        if core.outstanding >= core.cq_limit:
            return
        room = min(queue.depth - (queue.posted - queue.retired),
                   core.cq_limit - core.outstanding)
        if room == 0:
            return
        n = build(core, op, <uint32_t>min(
            room, min(core.chain, FIRST_CHAIN) if op.n_wrs == 0 else core.chain))
        if n and not post(core, queue, op, n):
            return
        if op.cursor.stage == POSTED:
            kvx_heap_pop(&queue.ready)
            append_posted(core, op)


cdef bint reserve_record(Core *core, Op *op) noexcept nogil:
    """Take a place in the peer's ring and write the record into our copy."""
    cdef:
        Queue *queue = op.queue
        uint64_t length = kvx_notify_length(op.ids.request_bytes, op.ids.n)
        uint64_t start
        uint64_t head = kvx_notify_place(
            queue.ring_head, length, queue.ring_bytes, &start)
        kvx_notify_record *record
        uint32_t *ids
        uint32_t i
    if (head - queue.ring_tail > queue.ring_bytes
            or queue.records_sent - queue.records_consumed >= queue.max_records):
        return False
    record = <kvx_notify_record *>(queue.ring + start % queue.ring_bytes)
    memset(record, 0, sizeof(kvx_notify_record))
    record.magic = KVX_NOTIFY_MAGIC
    record.length = <uint32_t>length
    record.sequence = queue.records_sent
    record.n_bytes = op.n_bytes
    record.layer = op.row.layer
    record.group = <uint16_t>op.row.group
    record.n_ids = op.ids.n
    record.n_qps = 1
    record.request_bytes = <uint16_t>op.ids.request_bytes
    record.generation = op.ids.generation
    record.total = op.ids.total
    record.digest = op.ids.digest
    memcpy(record + 1, op.ids.request, op.ids.request_bytes)
    ids = <uint32_t *>(
        <char *>(record + 1) + kvx_pad(op.ids.request_bytes, 8))
    for i in range(op.ids.n):
        ids[i] = <uint32_t>op.ids.local[op.ids.n + i]
    op.ring_start = start
    op.reserved = True
    queue.ring_head = head
    queue.records_sent += 1
    return True


cdef uint32_t build(Core *core, Op *op, uint32_t limit) noexcept nogil:
    """Write up to ``limit`` WRs of an operation into the template.

    Moves the operation's cursor; ``after[i]`` is where it stood behind WR i.
    Stops before the record if its place in the ring is not taken yet.
    """
    cdef:
        uint32_t n = 0
        Cursor *cursor = &op.cursor
        Queue *queue = op.queue
        uint64_t n_bytes = op.n_bytes
        ibv_send_wr *wr
    core.before = cursor[0]
    while n < limit and cursor.stage != POSTED:
        wr = &core.wrs[n]
        if cursor.stage == DATA:
            n_bytes += build_data(core, op, wr)
        elif cursor.stage == RECORD:
            if not op.reserved:
                break
            wr.opcode = IBV_WR_RDMA_WRITE
            wr.num_sge = 1
            wr.sg_list[0].addr = <uint64_t><uintptr_t>(
                queue.ring + op.ring_start % queue.ring_bytes)
            wr.sg_list[0].length = <uint32_t>kvx_notify_length(
                op.ids.request_bytes, op.ids.n)
            wr.sg_list[0].lkey = queue.ring_lkey
            wr.wr.rdma.remote_addr = (
                queue.ring_remote + op.ring_start % queue.ring_bytes)
            wr.wr.rdma.rkey = queue.ring_rkey
            cursor.stage = IMMEDIATE
        else:
            wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM
            wr.num_sge = 0
            wr.wr.rdma.remote_addr = queue.ring_remote
            wr.wr.rdma.rkey = queue.ring_rkey
            wr.imm_data = htonl(<uint32_t>(
                op.ring_start % queue.ring_bytes // KVX_NOTIFY_ALIGN))
            cursor.stage = POSTED
        core.after[n] = cursor[0]
        core.bytes_after[n] = n_bytes
        n += 1
    return n


cdef uint64_t build_data(Core *core, Op *op, ibv_send_wr *wr) noexcept nogil:
    """Write the next WR of blocks; return its bytes.

    Blocks that are neighbours on both sides lengthen the SGE, blocks that are
    neighbours on the remote side alone become further SGEs of the same WR.
    """
    cdef:
        Cursor *cursor = &op.cursor
        Pair *pair = &op.queue.pairs[op.row.first_pair + cursor.pair]
        uint32_t n_ids = op.ids.n
        const int64_t *local = op.ids.local
        const int64_t *remote = op.ids.local + n_ids
        uint64_t length
        uint64_t total
        uint64_t from_addr
        uint64_t remote_end
        ibv_sge *sge = wr.sg_list
    from_addr = (pair.local_base + <uint64_t>local[cursor.index]
                 * pair.local_stride + cursor.offset)
    length = min(pair.block_bytes - cursor.offset, core.max_wr_bytes)
    wr.opcode = IBV_WR_RDMA_WRITE
    wr.num_sge = 1
    wr.wr.rdma.remote_addr = (
        pair.remote_base + <uint64_t>remote[cursor.index] * pair.remote_stride
        + cursor.offset)
    wr.wr.rdma.rkey = pair.rkey
    sge.addr = from_addr
    sge.length = <uint32_t>length
    sge.lkey = pair.lkey
    total = length
    if cursor.offset + length < pair.block_bytes:
        cursor.offset += length
        return total
    cursor.offset = 0
    cursor.index += 1
    remote_end = wr.wr.rdma.remote_addr + length
    while (cursor.index < n_ids
           and total + pair.block_bytes <= core.merge_bytes
           and pair.remote_base + <uint64_t>remote[cursor.index]
           * pair.remote_stride == remote_end):
        from_addr = (pair.local_base
                     + <uint64_t>local[cursor.index] * pair.local_stride)
        if from_addr == sge.addr + sge.length:
            sge.length += <uint32_t>pair.block_bytes
        elif <uint32_t>wr.num_sge < op.queue.max_sge:
            sge += 1
            sge.addr = from_addr
            sge.length = <uint32_t>pair.block_bytes
            sge.lkey = pair.lkey
            wr.num_sge += 1
        else:
            break
        total += pair.block_bytes
        remote_end += pair.block_bytes
        cursor.index += 1
    if cursor.index == n_ids:
        cursor.index = 0
        cursor.pair += 1
        if cursor.pair == op.row.n_pairs:
            cursor.stage = POSTED if op.queue.ring is NULL else RECORD
    return total


cdef bint post(Core *core, Queue *queue, Op *op, uint32_t n) noexcept nogil:
    """Post the first ``n`` WRs of the template as one chain: one doorbell.

    The operation's cursor ends behind the last accepted WR. Returns whether
    to go on; if not, either a completion is due that will pump again, or the
    queue has failed.
    """
    cdef:
        uint32_t i
        uint32_t n_posted = n
        ibv_send_wr *bad = NULL
        uint64_t place = queue.posted % queue.depth
        bint was_empty = queue.posted == queue.retired
        int err
    for i in range(n):
        core.wrs[i].wr_id = make_wr_id(queue, queue.posted + i)
        core.wrs[i].send_flags = 0
        queue.owners[place] = <uint32_t>op.id
        place = place + 1 if place + 1 < queue.depth else 0
    # RC completes in order: the tail's CQE retires the whole chain.
    core.wrs[n - 1].send_flags = IBV_SEND_SIGNALED
    core.wrs[n - 1].next = NULL
    err = ibv_post_send(queue.qp, core.wrs, &bad)
    if n < MAX_CHAIN:
        core.wrs[n - 1].next = &core.wrs[n]
    if err:
        n_posted = <uint32_t>(bad - core.wrs) if bad is not NULL else 0
    queue.posted += n_posted
    core.outstanding += n_posted
    op.n_wrs += n_posted
    if n_posted:
        op.end = queue.posted
        op.n_bytes = core.bytes_after[n_posted - 1]
        queue.tail_unsignaled = err != 0
    if err == 0:
        return True
    op.cursor = core.after[n_posted - 1] if n_posted else core.before
    if err == ENOMEM and n_posted:
        return True     # the rest is tried at once, with a signaled tail
    # Only a signaled WR that is on its way can tell when there is room again.
    if err != ENOMEM or was_empty or queue.tail_unsignaled:
        fail(core, queue, -err)
    return False


cdef int drain(Core *core, uint32_t budget) noexcept nogil:
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
            return 0
        for i in range(n):
            completed(core, &wcs[i])
        done += n
        # Free slots are filled at once, before the rest is polled.
        pump_all(core)
    return 1


cdef void fail_all(Core *core, int status) noexcept nogil:
    cdef uint32_t slot
    for slot in range(core.n_slots):
        if core.queues[slot] is not NULL:
            fail(core, core.queues[slot], status)


cdef void pump_all(Core *core) noexcept nogil:
    cdef uint32_t slot
    for slot in range(core.n_slots):
        if core.queues[slot] is not NULL and core.queues[slot].ready.n:
            pump(core, core.queues[slot])


cdef void completed(Core *core, ibv_wc *wc) noexcept nogil:
    """Account for one WC."""
    cdef:
        uint32_t slot = (wc.wr_id >> SLOT_SHIFT) & FIELD_MASK
        uint32_t generation = (wc.wr_id >> GENERATION_SHIFT) & FIELD_MASK
        Queue *queue = core.queues[slot] if slot < core.n_slots else NULL
        uint64_t sequence
        uint64_t before
    # Some devices keep the CQEs of a QP that is gone.
    if queue is NULL or queue.generation != generation:
        return
    if wc.wr_id & RECEIVE_BIT:
        received(core, queue, wc)
        return
    # Undo the wrapping of the sequence: it is never behind ``retired``.
    sequence = queue.retired + (
        ((wc.wr_id & SEQUENCE_MASK) - (queue.retired & SEQUENCE_MASK))
        & SEQUENCE_MASK)
    before = queue.retired
    if wc.status != IBV_WC_SUCCESS and not queue.flushing:
        # All WRs before this one were executed: their operations may be done.
        queue.flushing = True
        queue.retired = sequence
        retire_ops(core, queue)
        if not queue.failed:
            fail(core, queue, wc.status)
            queue.vendor_err = wc.vendor_err
            queue.failed_wr_id = wc.wr_id
            blame(core, queue, sequence)
    queue.retired = sequence + 1
    core.outstanding -= queue.retired - before
    if not queue.flushing:
        retire_ops(core, queue)
    end_if_drained(core, queue)


cdef void blame(Core *core, Queue *queue, uint64_t sequence) noexcept nogil:
    """Mark the operation that the failed WR belongs to."""
    # Unretired until now, so its operation has not ended.
    cdef Op *op = core.ops[queue.owners[sequence % queue.depth]]
    if op is not NULL and op.queue is queue:
        op.culprit = True


cdef void received(Core *core, Queue *queue, ibv_wc *wc) noexcept nogil:
    """Take the record that an immediate announces and repost the receive."""
    cdef:
        Arrival *arrival
        uint64_t offset
    queue.receives -= 1
    core.outstanding -= 1
    if wc.status != IBV_WC_SUCCESS:
        fail(core, queue, wc.status)
        end_if_drained(core, queue)
        return
    arrival = <Arrival *>calloc(1, sizeof(Arrival))
    if arrival is NULL:
        fail(core, queue, -ENOMEM)
        return
    arrival.slot = queue.slot
    if wc.opcode != IBV_WC_RECV_RDMA_WITH_IMM:
        arrival.error = 3
    else:
        offset = <uint64_t>ntohl(wc.imm_data) * KVX_NOTIFY_ALIGN
        arrival.error = take_record(core, queue, offset, arrival)
    core.arrivals_tail[0] = arrival
    core.arrivals_tail = &arrival.next
    if arrival.error == 0 and post_receive(core, queue):
        fail(core, queue, -ENOMEM)


cdef int take_record(
        Core *core, Queue *queue, uint64_t offset, Arrival *arrival) noexcept nogil:
    """Copy the record at ``offset``; return 0 or why it is refused."""
    cdef:
        kvx_notify_record header
        uint64_t start
        uint64_t head
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
            or header.sequence != queue.own_records):
        return 2
    head = kvx_notify_place(
        queue.own_head, header.length, queue.own_bytes, &start)
    if start % queue.own_bytes != offset:
        return 1
    arrival.record = <char *>malloc(header.length)
    if arrival.record is NULL:
        return 2
    memcpy(arrival.record, &header, sizeof(header))
    memcpy(arrival.record + sizeof(header),
           queue.own_ring + offset + sizeof(header),
           header.length - sizeof(header))
    arrival.length = header.length
    arrival.head = head
    queue.own_head = head
    queue.own_records += 1
    return 0
