# cython: language_level=3, embedsignature=True
"""The objects of verbs: all of their names, and the queues themselves.

Nothing here or below knows asyncio, ZMQ, layers or blocks. Calls that may wait
(opening, registering, changing a QP's state, closing) release the GIL and are meant
to be made off an event loop. Every object belongs to the process that made it: in a
forked child each call raises and nothing native is touched or freed.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport errno
from libc.stdlib cimport free
from libc.string cimport memcpy, memset, strlen
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl

from kvxfer._device cimport Device
from kvxfer._handles cimport Handle
from kvxfer._ibverbs cimport *
from kvxfer._memory cimport MemoryRegion, ProtectionDomain
from kvxfer._structs cimport fill_hint, fill_receive, send_chain, wc_to_python

from kvxfer._providers import list_devices, live_objects, take_violations
from kvxfer.errors import UsageError, verbs_error
from kvxfer.verbs_types import Access, QPState

# Events are acknowledged in batches, since each acknowledgement takes a lock.
cdef enum:
    ACK_BATCH = 64
    POLL_BATCH = 32

__all__ = [
    "CompletionQueue",
    "Device",
    "Handle",
    "MemoryRegion",
    "ProtectionDomain",
    "QueuePair",
    "list_devices",
    "live_objects",
    "take_violations",
]
# A class that is cimported is a name in C alone: Python gets it here.
globals().update(
    Device=Device,
    Handle=Handle,
    MemoryRegion=MemoryRegion,
    ProtectionDomain=ProtectionDomain,
)


cdef int take_cq_events(
    kvx_verbs_table *table, ibv_comp_channel *channel, ibv_cq *cq,
    unsigned int *unacked,
) noexcept nogil:
    """Take all events that wait for a CQ; acknowledge them in batches.

    Return how many. The channel is the CQ's own and does not block.
    """
    cdef:
        ibv_cq *found
        void *context
        int n = 0
    while table.get_cq_event(channel, &found, &context) == 0:
        n += 1
        unacked[0] += 1
        if unacked[0] >= ACK_BATCH:
            table.ack_cq_events(cq, unacked[0])
            unacked[0] = 0
    return n


cdef class CompletionQueue(Handle):
    """A completion queue with its completion channel: ibv_create_cq(3).

    Args:
      depth: WCs that it must hold; more are granted where the device rounds up.
    """

    def __init__(self, Device device not None, depth):
        cdef:
            int c_depth = depth
            int err = 0
        device._ensure_open()
        if not self.closed:
            raise UsageError("a CompletionQueue is made once")
        with nogil:
            self.channel = device.table.create_comp_channel(device.ctx)
            if self.channel is NULL:
                err = errno
        if self.channel is NULL:
            raise verbs_error(err, "ibv_create_comp_channel")
        fcntl(self.channel.fd, F_SETFL,
              fcntl(self.channel.fd, F_GETFL) | O_NONBLOCK)
        with nogil:
            self.cq = device.table.create_cq(
                device.ctx, c_depth, NULL, self.channel, 0)
            if self.cq is NULL:
                err = errno
                device.table.destroy_comp_channel(self.channel)
        if self.cq is NULL:
            raise verbs_error(err, "ibv_create_cq", f"depth {depth}")
        self.device = device
        self._opened(device)

    cdef int _destroy(self) except? -1:
        cdef int err
        with nogil:
            # An unacknowledged event would block the destruction for ever.
            if self.unacked:
                self.device.table.ack_cq_events(self.cq, self.unacked)
                self.unacked = 0
            err = 0
            if self.cq is not NULL:
                err = self.device.table.destroy_cq(self.cq)
            if err == 0:
                self.cq = NULL
                err = self.device.table.destroy_comp_channel(self.channel)
        return err

    @property
    def depth(self):
        """WCs that fit."""
        self._ensure_open()
        return self.cq.cqe

    @property
    def fd(self):
        """Readable when an event waits in the completion channel."""
        self._ensure_open()
        return self.channel.fd

    def drain_events(self):
        """Take all waiting events and return how many there were."""
        self._ensure_open()
        return take_cq_events(
            self.device.table, self.channel, self.cq, &self.unacked)

    def arm(self, *, solicited_only=False):
        """Ask for one event at the next completion, ibv_req_notify_cq(3).

        What is in the queue already causes none: poll after arming.
        """
        self._ensure_open()
        cdef int err = ibv_req_notify_cq(self.cq, solicited_only)
        if err:
            raise verbs_error(err, "ibv_req_notify_cq")

    def poll(self, limit=POLL_BATCH):
        """Return up to ``limit`` (at most 32) waiting WCs, oldest first."""
        cdef:
            ibv_wc wcs[POLL_BATCH]
            int wanted = min(limit, POLL_BATCH)
            int i
            int n
        self._ensure_open()
        with nogil:
            n = ibv_poll_cq(self.cq, wanted, wcs)
        if n < 0:
            raise verbs_error(errno, "ibv_poll_cq")
        return [wc_to_python(&wcs[i]) for i in range(n)]


cdef class QueuePair(Handle):
    """A reliably connected queue pair: ibv_create_qp(3).

    Args:
      pd: Protection domain of the memory that it may touch.
      cq: Receives the completions of both queues; it must hold
        ``max_send_wr + max_recv_wr`` of this QP besides those of others.
      limits: :class:`QPLimits`; what was granted is in the attributes.
    """

    def __init__(self, ProtectionDomain pd not None, CompletionQueue cq not None,
                 limits):
        cdef:
            ibv_qp_init_attr attr
            int err = 0
        pd._ensure_open()
        cq._ensure_open()
        if not self.closed:
            raise UsageError("a QueuePair is made once")
        memset(&attr, 0, sizeof(attr))
        attr.send_cq = cq.cq
        attr.recv_cq = cq.cq
        attr.qp_type = IBV_QPT_RC
        attr.sq_sig_all = limits.sq_sig_all
        attr.cap.max_send_wr = limits.max_send_wr
        attr.cap.max_recv_wr = limits.max_recv_wr
        attr.cap.max_send_sge = limits.max_send_sge
        attr.cap.max_recv_sge = 1
        attr.cap.max_inline_data = limits.max_inline
        with nogil:
            self.qp = pd.device.table.create_qp(pd.pd, &attr)
            if self.qp is NULL:
                err = errno
        if self.qp is NULL:
            raise verbs_error(err, "ibv_create_qp", str(limits))
        self.pd = pd
        self.cq = cq
        self.max_send_wr = attr.cap.max_send_wr
        self.max_recv_wr = attr.cap.max_recv_wr
        self.max_send_sge = attr.cap.max_send_sge
        self.max_inline = attr.cap.max_inline_data
        self._opened(pd)
        self._attach(cq)

    cdef int _destroy(self) except? -1:
        cdef int err
        with nogil:
            err = self.pd.device.table.destroy_qp(self.qp)
        return err

    @property
    def qp_num(self):
        """The QP's number, 24 bits."""
        self._ensure_open()
        return self.qp.qp_num

    @property
    def state(self):
        """The QP's state as the device has it."""
        cdef:
            ibv_qp_attr attr
            ibv_qp_init_attr init_attr
            int err
        self._ensure_open()
        memset(&attr, 0, sizeof(attr))
        with nogil:
            err = self.pd.device.table.query_qp(
                self.qp, &attr, IBV_QP_STATE, &init_attr)
        if err:
            raise verbs_error(err, "ibv_query_qp")
        return QPState(attr.qp_state)

    @property
    def wire(self):
        """How the bytes travel: ``rdma``, or of the software device ``shm``, ``cma``
        (both: same host), ``tcp`` or, before the first contact, ``none``; ``null``
        if they do not."""
        cdef char name[KVX_WIRE_NAME_BYTES]
        self._ensure_open()
        with nogil:
            self.pd.device.table.wire_name(self.qp, name)
        return name[:strlen(name)].decode()

    @property
    def cma_errno(self):
        """Why the peer, a process of this host, cannot read this one's memory: the
        errno of ``process_vm_readv``, once the software device has tried, or 0."""
        cdef:
            char name[KVX_WIRE_NAME_BYTES]
            int err
        self._ensure_open()
        with nogil:
            err = self.pd.device.table.wire_name(self.qp, name)
        return err

    cdef _modify(self, ibv_qp_attr *attr, int mask, str target):
        cdef int err
        self._ensure_open()
        with nogil:
            err = self.pd.device.table.modify_qp(self.qp, attr, mask)
        if err:
            raise verbs_error(
                err if err > 0 else errno, "ibv_modify_qp", f"to {target}")

    def to_reset(self):
        """Forget all that is queued, silently, and go back to RESET."""
        cdef ibv_qp_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.qp_state = IBV_QPS_RESET
        self._modify(&attr, IBV_QP_STATE, "RESET")

    def to_error(self):
        """Go to ERR: what is posted is flushed, and no write of the peer lands
        after this has returned."""
        cdef ibv_qp_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.qp_state = IBV_QPS_ERR
        self._modify(&attr, IBV_QP_STATE, "ERR")

    def to_init(self, *, port_num=1, pkey_index=0, access=Access(0)):
        """RESET to INIT. ``access`` says what the peer may do through this QP."""
        cdef ibv_qp_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.qp_state = IBV_QPS_INIT
        attr.port_num = port_num
        attr.pkey_index = pkey_index
        attr.qp_access_flags = access
        self._modify(
            &attr,
            IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
            "INIT",
        )

    def bind_peer(self, hint):
        """Say what verbs cannot about the peer (:class:`PeerHint`); before RTR."""
        cdef:
            kvx_peer_hint c_hint
            int err
        self._ensure_open()
        fill_hint(&c_hint, hint)
        with nogil:
            err = self.pd.device.table.bind_peer(self.qp, &c_hint)
        if err:
            raise verbs_error(err, "bind_peer", hint.address)

    def to_rtr(self, path):
        """INIT to RTR: ready to receive from the QP that ``path`` names."""
        cdef:
            ibv_qp_attr attr
            bytes gid = path.gid
        if len(gid) != 16:
            raise UsageError(f"a GID has 16 bytes, not {len(gid)}")
        memset(&attr, 0, sizeof(attr))
        attr.qp_state = IBV_QPS_RTR
        attr.path_mtu = path.mtu
        attr.dest_qp_num = path.qp_num
        attr.rq_psn = path.psn
        attr.max_dest_rd_atomic = path.max_dest_rd_atomic
        attr.min_rnr_timer = path.min_rnr_timer
        attr.ah_attr.is_global = path.is_global
        attr.ah_attr.dlid = path.lid
        attr.ah_attr.sl = path.service_level
        attr.ah_attr.port_num = path.port_num
        attr.ah_attr.grh.sgid_index = path.gid_index
        attr.ah_attr.grh.hop_limit = path.hop_limit
        attr.ah_attr.grh.traffic_class = path.traffic_class
        memcpy(attr.ah_attr.grh.dgid.raw, PyBytes_AS_STRING(gid), 16)
        self._modify(
            &attr,
            IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
            "RTR",
        )

    def to_rts(self, path):
        """RTR to RTS: ready to send, with the patience that ``path`` sets."""
        cdef ibv_qp_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.qp_state = IBV_QPS_RTS
        attr.sq_psn = path.own_psn
        attr.timeout = path.timeout
        attr.retry_cnt = path.retry_cnt
        attr.rnr_retry = path.rnr_retry
        attr.max_rd_atomic = path.max_rd_atomic
        self._modify(
            &attr,
            IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC,
            "RTS",
        )

    def post_send(self, wrs):
        """Post :class:`SendWR` objects as one chain; return how many there were.

        For tests and rare single WRs: the data path is the engine's.

        Raises:
          VerbsError: With ``n_posted``: so many WRs in front were accepted.
        """
        cdef:
            Py_ssize_t n = len(wrs)
            ibv_send_wr *chain
            ibv_send_wr *bad = NULL
            int err
        self._ensure_open()
        if n == 0:
            return 0
        chain = send_chain(wrs)
        try:
            with nogil:
                err = ibv_post_send(self.qp, chain, &bad)
            if err:
                error = verbs_error(err, "ibv_post_send")
                error.n_posted = bad - chain if bad is not NULL else 0
                raise error
            return n
        finally:
            free(chain)

    def post_recv(self, wrs):
        """Post :class:`RecvWR` objects (at most one SGE each)."""
        cdef:
            ibv_recv_wr c_wr
            ibv_recv_wr *bad = NULL
            ibv_sge sge
            int err
        self._ensure_open()
        for i, wr in enumerate(wrs):
            fill_receive(&c_wr, &sge, wr)
            with nogil:
                err = ibv_post_recv(self.qp, &c_wr, &bad)
            if err:
                error = verbs_error(err, "ibv_post_recv")
                error.n_posted = i
                raise error
