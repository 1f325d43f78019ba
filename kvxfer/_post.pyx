# cython: language_level=3, cdivision=True
"""Operations into WRs: which one is next, how much of it, and on which QP.

Nothing of Python in here; all functions run without the GIL, with the core's lock
held.

Heaps decide what is next. Each queue has one of its submissions that still have data
to post, or two: see below. The core has one of the queues that could post something,
by the first of their submissions; so peers compete as submissions do. All order by
key, smallest first, then by age. One *chunk* is posted at a time, up to a chain of WRs
or a megabyte. A submission that has had 4 MiB or 4096 WRs while others of the same key
may be waiting goes behind them: a large one delays small ones by that much.

What is in flight is bounded in WRs by the send queues and the CQ, and in bytes by a
window for each queue and one for all: what is urgent waits for no more than that.

Where a READ flushes what an operation wrote, its record waits for the answer, and all
that is behind the record. So some data of the next operation goes first: a chain of it,
even if another queue has something more urgent.

A queue with several lanes, which are QPs, changes the lane every ``stripe_bytes``.
Rows may be restricted to some of the lanes: these are a *road*, which has its own heap,
so that what waits for a place in the send queues of one does not keep back what goes by
the other; the window of bytes is of both. A
submission is on the road of the operation that is next.
Records are always written on the first lane, in order; behind the record goes an
immediate, and one on each further lane that carried data of the operation.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from kvxfer._core cimport *
from kvxfer._ibverbs cimport *

cdef extern from *:
    int __builtin_popcount(unsigned int) nogil
    int __builtin_ctz(unsigned int) nogil

cdef enum:
    FIRST_CHAIN = 16           # on an idle QP, so that the device starts early
    CHUNK_BYTES = 1 << 20
    TURN_BYTES = 4 << 20
    TURN_WRS = 4096
    FLUSH_BYTES = 8
    GAP_BYTES = 128 << 10      # 5 us at 25 GB/s: about as long as a READ takes

cdef uint64_t RECEIVE_BIT = <uint64_t>1 << 37
cdef uint64_t SEQUENCE_MASK = (<uint64_t>1 << 37) - 1


cdef int post_receive(Core *core, Queue *queue, unsigned int lane) noexcept nogil:
    """Post one receive without memory. Return 0 or an errno."""
    cdef:
        ibv_recv_wr wr
        ibv_recv_wr *bad = NULL
        int err
    memset(&wr, 0, sizeof(wr))
    wr.wr_id = make_wr_id(queue, lane, 0) | RECEIVE_BIT
    err = ibv_post_recv(queue.lanes[lane].qp, &wr, &bad)
    if err == 0:
        queue.lanes[lane].receives += 1
        core.outstanding += 1
    return err


cdef uint64_t room_of(Lane *lane) noexcept nogil:
    return lane.depth - (lane.posted - lane.retired)


cdef bint has_credit(Queue *queue, Op *op) noexcept nogil:
    """Whether the peer has room for the operation's record and a receive for it."""
    cdef:
        uint64_t start
        uint64_t head = kvx_notify_place(
            queue.ring_head,
            kvx_notify_length(op.batch.request_bytes, op.batch.n_ids),
            queue.ring_bytes, &start)
    return (head - queue.ring_tail <= queue.ring_bytes
            and queue.records_sent - queue.records_consumed < queue.max_records)


cdef uint32_t closing_lane(Op *op) noexcept nogil:
    """The lane that the next WR of a flush or a notification goes to."""
    if op.cursor.stage == FLUSH:
        return __builtin_ctz(op.cursor.reads)
    return __builtin_ctz(op.cursor.due) if op.cursor.stage == OTHERS else 0


cdef bint may_close(Queue *queue) noexcept nogil:
    """Whether the next notification can be posted, in part at least."""
    cdef Op *op = queue.first_closing
    return (op is not NULL and room_of(&queue.lanes[closing_lane(op)])
            and (op.cursor.stage == FLUSH or op.reserved or has_credit(queue, op)))


cdef int data_lane(Core *core, Queue *queue, Road *road) noexcept nogil:
    """The lane that data of a road goes to now; -1: none of its lanes has room."""
    cdef:
        uint32_t i
        uint32_t lane
    if road.stripe == 0:
        road.stripe = core.stripe_bytes
        road.lane = (road.lane + 1) % queue.n_lanes
        while not road.lanes >> road.lane & 1:
            road.lane = (road.lane + 1) % queue.n_lanes
    for i in range(queue.n_lanes):
        lane = (road.lane + i) % queue.n_lanes
        if road.lanes >> lane & 1 and room_of(&queue.lanes[lane]):
            return lane
    return -1


cdef Road *next_road(Core *core, Queue *queue, int *lane) noexcept nogil:
    """The road of the first submission that has room, and the lane there.

    NULL: there is no data, no room for any, or the window is full.
    """
    cdef:
        Road *found = NULL
        Road *road
        uint32_t i
        int free_lane
    if queue.flying_bytes >= core.window_bytes:
        return NULL
    for i in range(queue.n_roads):
        road = &queue.roads[i]
        if road.ready.n == 0 or (found is not NULL and not is_before(
                road.ready.items[0].key, road.ready.items[0].order,
                found.ready.items[0].key, found.ready.items[0].order)):
            continue
        free_lane = data_lane(core, queue, road)
        if free_lane >= 0:
            found = road
            lane[0] = free_lane
    return found


cdef bint is_before(
    uint64_t key, uint64_t order, uint64_t other_key, uint64_t other_order
) noexcept nogil:
    return key < other_key or (key == other_key and order < other_order)


cdef void relist(Core *core, Queue *queue) noexcept nogil:
    """Put a queue in its place among the runnable ones, or take it out.

    To be called when something has changed for it: what there is to post, room,
    credit.
    """
    cdef:
        bint wanted = False
        uint64_t key = 0
        uint64_t order = 0
        Batch *batch
        Road *road
        int lane
    if not queue.failed:
        road = next_road(core, queue, &lane)
        if road is not NULL:
            wanted = True
            key = road.ready.items[0].key
            order = road.ready.items[0].order
        if may_close(queue):
            batch = queue.first_closing.batch
            if not wanted or is_before(batch.key, batch.order, key, order):
                key = batch.key
                order = batch.order
            wanted = True
    if (wanted and queue.listed
            and queue.listed_key == key and queue.listed_order == order):
        return
    if queue.listed:
        kvx_heap_remove(&core.runnable, queue)
    if wanted:
        kvx_heap_push(&core.runnable, key, order, queue)
    queue.listed = wanted
    queue.listed_key = key
    queue.listed_order = order


cdef void pump(Core *core) noexcept nogil:
    """Post while there is something to post and room for it."""
    cdef:
        Queue *queue
        bint more
    while (core.runnable.n and core.outstanding < core.cq_limit
           and core.flying_bytes < core.device_window_bytes):
        queue = <Queue *>kvx_heap_top(&core.runnable)
        if queue.failed:
            more = False
        elif may_close(queue) and not has_gap(core, queue):
            more = post_closing(core, queue)
        else:
            more = post_data(core, queue)
        if more:
            relist(core, queue)
        else:
            # Until a completion or its owner says otherwise.
            kvx_heap_remove(&core.runnable, queue)
            queue.listed = False


cdef bint post_closing(Core *core, Queue *queue) noexcept nogil:
    """Post what there is room for of the first waiting flush and notification."""
    cdef:
        Op *op = queue.first_closing
        uint32_t lane = closing_lane(op)
        bint more
    op.cursor.gap = False    # or there would be data for it
    if op.cursor.stage != FLUSH and not op.reserved:
        reserve_record(queue, op)
    more = post_chunk(core, queue, lane, op, 2, 0)
    if op.cursor.stage == POSTED:
        queue.first_closing = op.next
        if op.next is NULL:
            queue.last_closing = NULL
        append_posted(core, op)
    return more


cdef bint post_data(Core *core, Queue *queue) noexcept nogil:
    """Post the next chunk of the queue's first submission."""
    cdef:
        int lane
        Road *road = next_road(core, queue, &lane)
        Batch *batch
        Op *op
        Op *closing = queue.first_closing
        uint64_t max_bytes = CHUNK_BYTES
        uint64_t before
        uint64_t n_wrs
        uint64_t n_bytes
        bint more
        bint idle
        bint striped
    if road is NULL:
        return False
    batch = <Batch *>kvx_heap_top(&road.ready)
    op = &batch.ops[batch.at]
    striped = (road.lanes & (road.lanes - 1)) != 0
    if striped:
        max_bytes = min(max_bytes, road.stripe)
    if closing is not NULL and closing.cursor.gap:
        closing.cursor.gap = False
        max_bytes = min(max_bytes, GAP_BYTES)
    before = op.cursor.n_bytes
    n_wrs = op.n_wrs
    idle = queue.lanes[lane].posted == queue.lanes[lane].retired
    more = post_chunk(
        core, queue, lane, op,
        min(core.chain, FIRST_CHAIN) if idle else core.chain, max_bytes)
    n_bytes = op.cursor.n_bytes - before
    if striped:
        road.stripe -= min(road.stripe, n_bytes)
    if op.cursor.stage == POSTED:
        append_posted(core, op)
    elif op.cursor.stage != DATA:
        append_closing(queue, op)
    batch.turn_bytes += n_bytes
    batch.turn_wrs += op.n_wrs - n_wrs
    settle_batch(core, batch)
    return more


cdef bint has_gap(Core *core, Queue *queue) noexcept nogil:
    """Whether data can go between the READ that was posted last and its record."""
    cdef int lane
    return (queue.first_closing.cursor.gap
            and next_road(core, queue, &lane) is not NULL)


cdef bint has_data_behind(Queue *queue, Op *op) noexcept nogil:
    """Whether other operations of the queue have data to post."""
    cdef:
        Batch *batch = NULL
        size_t n_ready = 0
        uint32_t i
    for i in range(queue.n_roads):
        if queue.roads[i].ready.n:
            batch = <Batch *>kvx_heap_top(&queue.roads[i].ready)
            n_ready += queue.roads[i].ready.n
    if n_ready != 1:
        return n_ready > 1
    return op is not &batch.ops[batch.n_ops - 1]


cdef void append_closing(Queue *queue, Op *op) noexcept nogil:
    op.next = NULL
    if queue.last_closing is NULL:
        queue.first_closing = op
    else:
        queue.last_closing.next = op
    queue.last_closing = op


cdef void settle_batch(Core *core, Batch *batch) noexcept nogil:
    """Go on to the submission's next operation, or let another have its turn."""
    cdef:
        Queue *queue = batch.queue
        kvx_heap *ready = &queue.roads[batch.road].ready
        uint32_t road
    while batch.at < batch.n_ops and batch.ops[batch.at].cursor.stage != DATA:
        batch.at += 1
    if batch.at == batch.n_ops:
        kvx_heap_remove(ready, batch)
        core.n_ready -= 1
        release_batch(batch)
        return
    road = batch.ops[batch.at].row.road
    if batch.turn_bytes >= TURN_BYTES or batch.turn_wrs >= TURN_WRS:
        batch.turn_bytes = batch.turn_wrs = 0
        core.order += 1
        batch.order = core.order
    elif road == batch.road:
        return
    kvx_heap_remove(ready, batch)
    batch.road = road
    kvx_heap_push(&queue.roads[road].ready, batch.key, batch.order, batch)


cdef bint post_chunk(
    Core *core, Queue *queue, uint32_t lane_index, Op *op, uint32_t limit,
    uint64_t max_bytes,
) noexcept nogil:
    """Build a chain and post it. Return whether to go on with this queue.

    The operation's cursor ends behind the last WR that was accepted. If the answer
    is no, either a completion is due, or the queue has failed.
    """
    cdef:
        Lane *lane = &queue.lanes[lane_index]
        Cursor before = op.cursor
        bint reserved = op.reserved
        uint64_t ring_head = queue.ring_head
        uint64_t left = SEQUENCE_MASK + 1 - (lane.posted & SEQUENCE_MASK)
        uint32_t n
        uint32_t n_posted
        int err
    limit = <uint32_t>min(min(limit, left), min(
        room_of(lane), core.cq_limit - core.outstanding))
    n = build(core, queue, lane_index, op, limit, max_bytes)
    if n == 0:
        return False
    err = post(core, lane, n, &n_posted)
    if n_posted < n:
        # As far as it was accepted; the same WRs as before.
        op.cursor = before
        build(core, queue, lane_index, op, n_posted, max_bytes)
        if not reserved and op.reserved and op.cursor.stage == DATA:
            # Records go out in the order of their places: give this one back.
            op.reserved = False
            queue.ring_head = ring_head
            queue.records_sent -= 1
    note_posted(core, queue, lane, op, n_posted, op.cursor.n_bytes - before.n_bytes)
    if err == 0 or (err == ENOMEM and n_posted):
        return True     # the rest is tried at once, with a signaled tail
    # Only a signaled WR that is on its way can tell when there is room again.
    if err != ENOMEM or lane.posted == lane.retired or lane.tail_unsignaled:
        fail(core, queue, -err)
    return False


cdef void note_posted(
    Core *core, Queue *queue, Lane *lane, Op *op, uint32_t n, uint64_t n_bytes
) noexcept nogil:
    """Account for WRs that were accepted."""
    cdef Chain *chain
    if n == 0:
        return
    lane.posted += n
    core.outstanding += n
    queue.flying_bytes += n_bytes
    core.flying_bytes += n_bytes
    op.n_wrs += n
    op.ends[lane - &queue.lanes[0]] = lane.posted
    chain = &lane.chains[lane.next_chain % lane.depth]
    lane.next_chain += 1
    core.n_chains += 1
    chain.end = lane.posted
    chain.n_bytes = n_bytes
    chain.op = <uint32_t>op.id


cdef int post(Core *core, Lane *lane, uint32_t n, uint32_t *n_posted) noexcept nogil:
    """Post the first ``n`` WRs of the template: one doorbell. Return an errno."""
    cdef:
        ibv_send_wr *wrs = core.template.wrs
        ibv_send_wr *tail = &wrs[n - 1]
        ibv_send_wr *following = tail.next
        ibv_send_wr *bad = NULL
        int err
    # RC completes in order: the tail's CQE retires the whole chain.
    tail.send_flags |= IBV_SEND_SIGNALED
    tail.next = NULL
    err = ibv_post_send(lane.qp, wrs, &bad)
    tail.send_flags = 0
    tail.next = following
    n_posted[0] = n
    if err:
        n_posted[0] = <uint32_t>(bad - wrs) if bad is not NULL else 0
    if n_posted[0]:
        lane.tail_unsignaled = err != 0
    return err


cdef uint32_t build(
    Core *core, Queue *queue, uint32_t lane, Op *op, uint32_t limit,
    uint64_t max_bytes,
) noexcept nogil:
    """Write up to ``limit`` WRs of an operation into the template.

    They all go to one lane. Moves the operation's cursor behind them.
    """
    cdef:
        Cursor *cursor = &op.cursor
        uint64_t wr_id = make_wr_id(queue, lane, queue.lanes[lane].posted)
        uint64_t enough = cursor.n_bytes + max_bytes
        uint32_t n = 0
    while n < limit:
        if cursor.stage == DATA:
            if cursor.n_bytes >= enough:
                break
            n = build_data(core, queue, op, n, limit, wr_id + n, enough)
            cursor.lanes |= 1 << lane
            if cursor.plane == op.row.n_planes:
                cursor.due = cursor.lanes & ~<uint32_t>1
                cursor.reads = lanes_to_flush(queue, op)
                cursor.stage = FLUSH if cursor.reads else after_flush(queue)
            continue
        if cursor.stage == FLUSH:
            if not cursor.reads & (<uint32_t>1 << lane):
                break
            write_flush(queue, op, &core.template.wrs[n])
            cursor.reads &= ~(<uint32_t>1 << lane)
            if cursor.reads == 0:
                cursor.stage = after_flush(queue)
                cursor.gap = (
                    cursor.stage == RECORD
                    and (queue.first_closing is NULL or queue.first_closing is op)
                    and has_data_behind(queue, op))
        elif cursor.stage == RECORD:
            if lane or cursor.gap or not (op.reserved or (
                    queue.first_closing is NULL and has_credit(queue, op))):
                break
            if not op.reserved:
                reserve_record(queue, op)
            write_record(queue, op, &core.template.wrs[n])
            cursor.stage = IMMEDIATE
        elif cursor.stage == IMMEDIATE and lane == 0:
            write_immediate(queue, op, &core.template.wrs[n])
            cursor.stage = OTHERS if cursor.due else POSTED
        elif cursor.stage == OTHERS and cursor.due & (<uint32_t>1 << lane):
            write_immediate(queue, op, &core.template.wrs[n])
            cursor.due &= ~(<uint32_t>1 << lane)
            cursor.stage = OTHERS if cursor.due else POSTED
        else:
            break
        core.template.wrs[n].wr_id = wr_id + n
        core.template.planes[n] = NULL
        n += 1
    return n


cdef uint32_t lanes_to_flush(Queue *queue, Op *op) noexcept nogil:
    """The lanes that get a READ behind an operation's data: bit mask.

    Where each operation is announced, those that it has used. Else none but the last
    of a submission, and then all, since any of its operations may have used any.
    """
    if queue.flush_addr == 0:
        return 0
    if queue.ring is not NULL:
        return op.cursor.lanes
    if op is not &op.batch.ops[op.batch.n_ops - 1]:
        return 0
    return (<uint32_t>1 << queue.n_lanes) - 1


cdef Stage after_flush(Queue *queue) noexcept nogil:
    return POSTED if queue.ring is NULL else RECORD


cdef uint32_t build_data(
    Core *core, Queue *queue, Op *op, uint32_t n, uint32_t limit, uint64_t wr_id,
    uint64_t enough,
) noexcept nogil:
    """Write WRs of the blocks of one plane; return how many there are then."""
    cdef:
        Cursor *cursor = &op.cursor
        kvx_blocks blocks
    blocks.plane = &queue.planes[op.row.first_plane + cursor.plane]
    blocks.local = op.batch.local
    blocks.remote = op.batch.remote
    blocks.n = op.batch.n_ids
    blocks.at = cursor.index
    blocks.offset = cursor.offset
    n = kvx_fill(
        &core.template, &blocks, &queue.limits, n, limit, wr_id,
        enough - cursor.n_bytes, &cursor.n_bytes)
    cursor.index = blocks.at
    cursor.offset = blocks.offset
    if cursor.index == blocks.n:
        cursor.index = 0
        cursor.plane += 1
    return n


cdef void write_flush(Queue *queue, Op *op, ibv_send_wr *wr) noexcept nogil:
    """The READ of some of the last bytes: it is answered when all are in place."""
    cdef:
        const kvx_plane *plane = &queue.planes[
            op.row.first_plane + op.row.n_planes - 1]
        uint32_t last = op.batch.remote[op.batch.n_ids - 1]
    wr.opcode = IBV_WR_RDMA_READ
    wr.send_flags = 0
    wr.num_sge = 1
    wr.sg_list[0].addr = queue.flush_addr
    wr.sg_list[0].length = <uint32_t>min(FLUSH_BYTES, plane.block_bytes)
    wr.sg_list[0].lkey = queue.flush_lkey
    wr.wr.rdma.remote_addr = plane.remote_base + last * plane.remote_stride
    wr.wr.rdma.rkey = kvx_rkey(plane, last)


cdef unsigned int fence(Queue *queue) noexcept nogil:
    """What makes a WR wait for the answers of the READs before it."""
    return IBV_SEND_FENCE if queue.flush_addr else 0


cdef void write_record(Queue *queue, Op *op, ibv_send_wr *wr) noexcept nogil:
    """The WR that carries the record from our copy of the ring to the peer's."""
    wr.opcode = IBV_WR_RDMA_WRITE
    wr.send_flags = fence(queue)
    wr.num_sge = 1
    wr.sg_list[0].addr = <uint64_t><uintptr_t>(
        queue.ring + op.ring_start % queue.ring_bytes)
    wr.sg_list[0].length = <uint32_t>kvx_notify_length(
        op.batch.request_bytes, op.batch.n_ids)
    wr.sg_list[0].lkey = queue.ring_lkey
    wr.wr.rdma.remote_addr = queue.ring_remote + op.ring_start % queue.ring_bytes
    wr.wr.rdma.rkey = queue.ring_rkey


cdef void write_immediate(Queue *queue, Op *op, ibv_send_wr *wr) noexcept nogil:
    """The WR without bytes that has the peer look at the record."""
    wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM
    wr.send_flags = fence(queue) if op.cursor.stage == OTHERS else 0
    wr.num_sge = 0
    wr.wr.rdma.remote_addr = queue.ring_remote
    wr.wr.rdma.rkey = queue.ring_rkey
    wr.imm_data = htonl(<uint32_t>(
        op.ring_start % queue.ring_bytes // KVX_NOTIFY_ALIGN))


cdef void reserve_record(Queue *queue, Op *op) noexcept nogil:
    """Take a place in the peer's ring and write the record into our copy.

    There must be credit for it.
    """
    cdef:
        Batch *batch = op.batch
        uint64_t length = kvx_notify_length(batch.request_bytes, batch.n_ids)
        uint64_t start
        uint64_t head = kvx_notify_place(
            queue.ring_head, length, queue.ring_bytes, &start)
        kvx_notify_record *record = <kvx_notify_record *>(
            queue.ring + start % queue.ring_bytes)
    memset(record, 0, sizeof(kvx_notify_record))
    record.magic = KVX_NOTIFY_MAGIC
    record.length = <uint32_t>length
    record.sequence = queue.records_sent
    record.n_bytes = op.cursor.n_bytes
    record.layer = op.row.layer
    record.group = <uint16_t>op.row.group
    record.n_ids = batch.n_ids
    record.n_qps = <uint16_t>(1 + __builtin_popcount(op.cursor.due))
    record.request_bytes = <uint16_t>batch.request_bytes
    record.generation = batch.generation
    record.total = batch.total
    record.digest = batch.digest
    memcpy(record + 1, batch.request, batch.request_bytes)
    memset(<char *>(record + 1) + batch.request_bytes, 0,
           kvx_pad(batch.request_bytes, 8) - batch.request_bytes)
    memcpy(<char *>(record + 1) + kvx_pad(batch.request_bytes, 8),
           batch.remote, batch.n_ids * sizeof(uint32_t))
    op.ring_start = start
    op.reserved = True
    queue.ring_head = head
    queue.records_sent += 1


cdef void flush(Core *core, Queue *queue) noexcept nogil:
    """Let a failed queue, its QPs in ERR, report the last WR of each.

    A WR posted in ERR is flushed behind all others, so it speaks for the
    unsignaled ones that were executed before.
    """
    cdef:
        ibv_send_wr *bad = NULL
        ibv_send_wr wr
        Lane *lane
        uint32_t i
    for i in range(queue.n_lanes):
        lane = &queue.lanes[i]
        if not lane.tail_unsignaled or lane.posted == lane.retired:
            continue
        memset(&wr, 0, sizeof(wr))
        wr.wr_id = make_wr_id(queue, i, lane.posted)
        wr.opcode = IBV_WR_RDMA_WRITE
        wr.send_flags = IBV_SEND_SIGNALED
        if ibv_post_send(lane.qp, &wr, &bad) == 0:
            lane.posted += 1
            core.outstanding += 1
            lane.tail_unsignaled = False
