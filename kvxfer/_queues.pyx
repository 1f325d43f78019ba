# cython: language_level=3, cdivision=True
"""Queues: made of Python's QPs, rows, keys and rings, and taken out again.

A queue is in the core from ``new_queue`` to ``drop_queue``. It has a lane for each QP
and either a route, which is a table of planes for each row, or the ring that the peer
writes.

With the GIL, and raising Python's errors. The core's lock is taken here where it is
needed, so the caller must not hold it, unless something else is said.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvxfer._core cimport *
from kvxfer._post cimport post_receive, relist
from kvxfer._progress cimport wake_thread
from kvxfer._verbs cimport CompletionQueue, QueuePair

from kvxfer.errors import LayoutError, UsageError


cdef Queue *new_queue(
    Core *core, CompletionQueue cq, list qps, uint32_t receives
) except NULL:
    """Make a queue in a free slot; the caller fills in its route or ring.

    Its QPs, of the CQ that is open, are for the caller to keep alive.
    """
    cdef:
        Queue *queue
        uint32_t slot = 0
        QueuePair qp
    _check_qps(core, cq, qps, receives)
    while slot < core.n_slots and core.queues[slot] is not NULL:
        slot += 1
    if slot > FIELD_MASK:
        raise UsageError(f"more than {FIELD_MASK + 1} connections on one engine")
    queue = <Queue *>calloc(1, sizeof(Queue))
    if queue is NULL:
        raise MemoryError
    core.next_generation = (core.next_generation + 1) & FIELD_MASK
    queue.slot = slot
    queue.generation = core.next_generation
    queue.limits = core.limits
    for qp in qps:
        queue.lanes[queue.n_lanes].qp = qp.qp
        queue.lanes[queue.n_lanes].qp_num = qp.qp.qp_num
        queue.lanes[queue.n_lanes].depth = qp.max_send_wr
        queue.n_lanes += 1
        queue.limits.max_sge = min(queue.limits.max_sge, qp.max_send_sge)
    queue.n_roads = 1
    _open_road(queue, &queue.roads[0], (<uint32_t>1 << queue.n_lanes) - 1)
    pthread_mutex_lock(&core.lock)
    if not _make_slot(core, slot):
        let_go(core)
        free(queue)
        raise MemoryError
    core.queues[slot] = queue
    core.n_queues += 1
    if core.mode == SPIN:
        wake_thread(core)
    let_go(core)
    return queue


cdef void _open_road(Queue *queue, Road *road, uint32_t lanes) noexcept:
    road.lanes = lanes
    road.lane = queue.n_lanes - 1    # the first of them is next


cdef int _check_qps(
    Core *core, CompletionQueue cq, list qps, uint32_t receives
) except -1:
    """Refuse QPs that cannot make a queue, or whose receives the CQ has no room for."""
    cdef QueuePair qp
    if not 1 <= len(qps) <= MAX_LANES:
        raise UsageError(f"{len(qps)} QPs for one queue, not 1 to {MAX_LANES}")
    for qp in qps:
        qp._ensure_open()
        if qp.cq is not cq:
            raise UsageError("the QP completes into another CQ than the engine's")
    if core.outstanding + receives * len(qps) >= core.cq_limit:
        raise UsageError(
            f"no room in the CQ for {receives * len(qps)} more receives: of its "
            f"{core.cq_limit} entries {core.outstanding} are spoken for"
        )
    return 0


cdef bint _make_slot(Core *core, uint32_t slot) noexcept:
    """Have room for a queue in ``slot``; False without memory. Lock held."""
    cdef:
        Queue **grown
        uint32_t room = core.n_slots * 2 + 8
    if slot < core.n_slots:
        return True
    grown = <Queue **>calloc(room, sizeof(Queue *))
    if grown is NULL or kvx_heap_reserve(&core.runnable, room):
        free(grown)
        return False
    if core.n_slots:
        memcpy(grown, core.queues, core.n_slots * sizeof(Queue *))
    free(core.queues)
    core.queues = grown
    core.n_slots = room
    return True


cdef void drop_queue(Core *core, Queue *queue) noexcept:
    """Take a queue out of its slot and free it, whatever it still has."""
    cdef:
        uint32_t lane
        uint32_t road
    pthread_mutex_lock(&core.lock)
    for lane in range(queue.n_lanes):
        core.outstanding -= (
            queue.lanes[lane].posted - queue.lanes[lane].retired
            + queue.lanes[lane].receives)
        core.n_chains -= (
            queue.lanes[lane].next_chain - queue.lanes[lane].first_chain)
    for road in range(queue.n_roads):
        core.n_ready -= queue.roads[road].ready.n
    core.n_queues -= 1
    core.flying_bytes -= queue.flying_bytes
    queue.failed = True
    relist(core, queue)
    core.queues[queue.slot] = NULL
    kvx_template_forget(&core.template)
    let_go(core)
    free_queue(queue)


cdef int fill_route(Queue *queue, rows, ring, flush_to, lanes) except -1:
    """Fill in whose blocks are written, the peer's notify ring and where READs go.

    The arguments are those of ``Engine.add_initiator``. After an error the queue is
    to be dropped.
    """
    cdef:
        uint32_t n_rows = len(rows)
        uint32_t at = 0
        uint32_t at_key = 0
    _make_tables(queue, rows)
    for i, (layer, group, n_local, n_remote, pairs) in enumerate(rows):
        queue.rows[i] = Row(
            at, len(pairs), min(n_local, 1 << 32), min(n_remote, 1 << 32),
            layer, group, 0)
        for pair in pairs:
            at_key += _fill_plane(
                &queue.planes[at], pair, &queue.keys[at_key], n_local, n_remote)
            at += 1
    queue.n_rows = n_rows
    if lanes is not None:
        _fill_roads(queue, lanes)
    if ring is not None:
        address, lkey, remote, rkey, length, max_records = ring
        queue.ring = <char *><uintptr_t>address
        queue.ring_lkey = lkey
        queue.ring_remote = remote
        queue.ring_rkey = rkey
        queue.ring_bytes = length
        queue.max_records = max_records
    if flush_to is not None:
        queue.flush_addr, queue.flush_lkey = flush_to
    return 0


cdef int _fill_roads(Queue *queue, lanes) except -1:
    """Restrict each row to the lanes of its bit mask."""
    cdef uint32_t all_lanes = (<uint32_t>1 << queue.n_lanes) - 1
    masks = sorted(set(lanes), key=list(lanes).index)
    if len(lanes) != queue.n_rows:
        raise UsageError(f"lanes for {len(lanes)} rows, not {queue.n_rows}")
    if len(masks) > MAX_ROADS:
        raise UsageError(f"{len(masks)} sets of QPs, not 1 to {MAX_ROADS}")
    for mask in masks:
        if not 0 < mask <= all_lanes:
            raise UsageError(f"lanes {mask:#x} are not some of {all_lanes:#x}")
    for i, mask in enumerate(masks):
        _open_road(queue, &queue.roads[<uint32_t>i], mask)
    queue.n_roads = max(1, len(masks))
    for i, mask in enumerate(lanes):
        queue.rows[<uint32_t>i].road = masks.index(mask)
    return 0


cdef int _make_tables(Queue *queue, rows) except -1:
    """Have room for the rows, their planes, keys and blocks; and for chains."""
    cdef:
        uint32_t n_rows = len(rows)
        uint32_t n_planes = sum(len(row[4]) for row in rows)
        uint64_t n_blocks = max((row[3] for row in rows), default=0)
        uint64_t n_keys = _n_keys(rows)
        uint32_t lane
    queue.rows = <Row *>calloc(n_rows + 1, sizeof(Row))
    queue.planes = <kvx_plane *>calloc(n_planes + 1, sizeof(kvx_plane))
    queue.seen = <uint64_t *>calloc(n_blocks // 64 + 1, sizeof(uint64_t))
    queue.keys = <uint32_t *>calloc(n_keys + 1, sizeof(uint32_t))
    if (queue.rows is NULL or queue.planes is NULL or queue.seen is NULL
            or queue.keys is NULL):
        raise MemoryError
    for lane in range(queue.n_lanes):
        queue.lanes[lane].chains = <Chain *>calloc(
            queue.lanes[lane].depth, sizeof(Chain))
        if queue.lanes[lane].chains is NULL:
            raise MemoryError
    return 0


cdef uint64_t _n_keys(rows):
    """Count the keys of the planes that are in slices."""
    return sum(
        len(key[1]) for row in rows for pair in row[4] for key in pair[5:]
        if not isinstance(key, int))


cdef uint32_t _fill_plane(
    kvx_plane *slot, tuple pair, uint32_t *room, uint64_t n_local, uint64_t n_remote
) except? 0xffffffff:
    """Fill in a plane; return how many keys of its slices went into ``room``."""
    cdef uint32_t n = 0
    (slot.local_base, slot.local_stride, slot.remote_base, slot.remote_stride,
     slot.block_bytes, lkey, rkey) = pair
    if slot.block_bytes == 0:
        raise LayoutError("a block has no bytes")
    if isinstance(lkey, int):
        slot.lkey = lkey
    else:
        slot.local_slice, keys = lkey
        n = _fill_keys(room, keys, slot.local_slice, n_local)
        slot.lkeys = room
    if isinstance(rkey, int):
        slot.rkey = rkey
    else:
        slot.remote_slice, keys = rkey
        slot.rkeys = room + n
        n += _fill_keys(room + n, keys, slot.remote_slice, n_remote)
    return n


cdef uint32_t _fill_keys(
    uint32_t *room, keys, uint64_t blocks, uint64_t n_blocks
) except? 0xffffffff:
    """Copy the keys of slices of so many blocks; return how many there are."""
    cdef uint32_t n = 0
    if blocks == 0 or len(keys) * blocks < n_blocks:
        raise LayoutError(
            f"{len(keys)} keys, each for {blocks} blocks, are not for {n_blocks}")
    for key in keys:
        room[n] = key
        n += 1
    return n


cdef int fill_ring(Queue *queue, address, length) except -1:
    """Fill in this side's notify ring, where the peer writes."""
    queue.own_ring = <const char *><uintptr_t>address
    queue.own_bytes = length
    if queue.n_lanes > 1:
        queue.early = <uint8_t *>calloc(length // KVX_NOTIFY_ALIGN + 1, 1)
        if queue.early is NULL:
            raise MemoryError
    return 0


cdef int post_receives(Core *core, Queue *queue, uint32_t n) noexcept nogil:
    """Post ``n`` receives on each QP; return 0 or an errno. Lock held."""
    cdef:
        uint32_t lane
        uint32_t _i
        int err
    for lane in range(queue.n_lanes):
        for _i in range(n):
            err = post_receive(core, queue, lane)
            if err:
                return err
    return 0


cdef uint64_t unretired(Queue *queue) noexcept nogil:
    """Return how many posted WRs have not come back yet. No lock."""
    cdef:
        uint64_t found = 0
        uint32_t lane
    for lane in range(queue.n_lanes):
        found += queue.lanes[lane].posted - queue.lanes[lane].retired
    return found


cdef list take_failed(Core *core):
    """Return the slots of the queues that have failed and were not told of."""
    cdef:
        list result = []
        Queue *queue
        uint32_t slot
    pthread_mutex_lock(&core.lock)
    for slot in range(core.n_slots):
        queue = core.queues[slot]
        if queue is not NULL and queue.failed and not queue.reported:
            queue.reported = True
            result.append(slot)
    core.n_unreported = 0
    let_go(core)
    return result
