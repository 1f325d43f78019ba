# cython: language_level=3, embedsignature=True
"""The objects of verbs: one owner per C handle, guarded, closed in order.

Nothing here knows asyncio, ZMQ, layers or blocks. Calls that may wait (opening,
registering, changing a QP's state, closing) release the GIL and are meant to be
made off an event loop. Every object belongs to the process that made it: in a
forked child each call raises and nothing native is touched or freed.
"""

import sys
import warnings
import weakref

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EBUSY, EINVAL, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strlen
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.unistd cimport getpid

from kvxfer._ibverbs cimport *
from kvxfer._softdev cimport (
    kvx_get_soft_counts,
    kvx_soft_counts,
    kvx_soft_take_violations,
)

from kvxfer.errors import (
    ClosedResourceError,
    DeviceUnavailableError,
    UsageError,
    verbs_error,
)
from kvxfer.verbs_types import (
    WC,
    Access,
    AsyncEvent,
    DeviceAttr,
    DeviceInfo,
    PortAttr,
    PortState,
    QPState,
)

cdef extern from "arpa/inet.h" nogil:
    uint32_t htonl(uint32_t)
    uint32_t ntohl(uint32_t)

# Events are acknowledged in batches, since each acknowledgement takes a lock.
cdef enum:
    ACK_BATCH = 64
    POLL_BATCH = 32

cdef kvx_verbs_table _soft_table
cdef kvx_verbs_table _null_table
cdef kvx_verbs_table _ibverbs_table
kvx_load_softdev(&_soft_table)
kvx_load_nulldev(&_null_table)

_ibverbs_path = False     # what the second table was filled from; False: not yet
_alive = {}               # class name -> number of open handles


def live_objects():
    """Return how many native objects of each kind are alive in this process.

    Handles that Python owns are counted under their class name, objects and
    threads of the software device as ``soft.<kind>``.
    """
    cdef kvx_soft_counts counts
    memset(&counts, 0, sizeof(counts))
    kvx_get_soft_counts(&counts)
    result = {name: number for name, number in _alive.items() if number}
    soft = {
        "contexts": counts.contexts,
        "pds": counts.pds,
        "mrs": counts.mrs,
        "cqs": counts.cqs,
        "channels": counts.channels,
        "qps": counts.qps,
        "connections": counts.connections,
        "threads": counts.threads,
    }
    result.update({f"soft.{name}": number for name, number in soft.items() if number})
    return result


def take_violations():
    """Return what strict mode of the software device has seen since the last call."""
    cdef char text[8192]
    kvx_soft_take_violations(text, sizeof(text))
    return text.decode().splitlines()


cdef kvx_verbs_table *_table(str provider, str path) except NULL:
    """Return the table of a provider, loading libibverbs at the first need."""
    global _ibverbs_path
    cdef:
        char message[256]
        bytes encoded
        const char *c_path = NULL
        int err

    if provider == "soft":
        return &_soft_table
    if provider == "null":
        return &_null_table
    if provider != "libibverbs":
        raise UsageError(
            f"provider {provider!r} is none of 'soft', 'null' and 'libibverbs'")
    if _ibverbs_path is not False:
        if path is not None and path != _ibverbs_path:
            raise UsageError(
                f"libibverbs was loaded from {_ibverbs_path or 'libibverbs.so.1'}; "
                f"a process cannot load {path} as well"
            )
        return &_ibverbs_table
    if path is not None:
        encoded = path.encode()
        c_path = encoded
    with nogil:
        err = kvx_load_libibverbs(c_path, &_ibverbs_table, message, sizeof(message))
    if err:
        raise DeviceUnavailableError(
            f"cannot load libibverbs: {message.decode(errors='replace')}; install "
            "rdma-core (Debian: libibverbs1 ibverbs-providers, RHEL: libibverbs) "
            "or use the software device"
        )
    _ibverbs_path = path
    return &_ibverbs_table


def list_devices(provider, *, path=None):
    """List the devices of a provider: ``"soft"``, ``"null"`` or ``"libibverbs"``.

    Raises:
      DeviceUnavailableError: libibverbs or its kernel part cannot be used.
    """
    cdef:
        kvx_verbs_table *table = _table(provider, path)
        ibv_device **devices
        int n = 0
        int i
        int err = 0

    with nogil:
        devices = table.get_device_list(&n)
        if devices is NULL:
            err = errno
    if devices is NULL:
        raise DeviceUnavailableError(
            f"no RDMA devices can be listed: {verbs_error(err, 'ibv_get_device_list')}"
        )
    try:
        return [
            DeviceInfo(
                table.get_device_name(devices[i]).decode(),
                provider,
                int.from_bytes(
                    (<uint64_t>table.get_device_guid(devices[i])).to_bytes(
                        8, sys.byteorder),
                    "big",
                ),
            )
            for i in range(n)
        ]
    finally:
        table.free_device_list(devices)


cdef class Handle:
    """Base of all verbs objects: open until closed, in the process that made it."""

    def __cinit__(self, *args, **kwargs):
        self.closed = True
        self._pid = getpid()
        self._children = weakref.WeakSet()
        self._parents = []

    cdef int _ensure_open(self) except -1:
        """Raise unless this object is open and belongs to this process."""
        if self._pid != getpid():
            raise ClosedResourceError(
                f"this {type(self).__name__} belongs to process {self._pid}; "
                "a forked child must open its own"
            )
        if self.closed:
            raise ClosedResourceError(f"this {type(self).__name__} is closed")
        return 0

    cdef int _opened(self, Handle parent) except -1:
        """Count this handle as open and let ``parent`` close it with itself."""
        self.closed = False
        name = type(self).__name__
        _alive[name] = _alive.get(name, 0) + 1
        if parent is not None:
            self._attach(parent)
        return 0

    cdef int _attach(self, Handle parent) except -1:
        """Let ``parent`` close this handle before itself."""
        parent._children.add(self)
        parent._n_children += 1
        self._parents.append(parent)
        return 0

    cdef int _destroy(self) except? -1:
        """Give the C handle back; return 0 or an errno."""
        raise NotImplementedError

    def close(self):
        """Close the children and then this object; a second call does nothing.

        In a forked child it does nothing at all. If the device refuses
        (VerbsError, for instance EBUSY), the object stays open.
        """
        if self.closed or self._pid != getpid():
            return
        cdef int err
        cdef Handle parent
        for child in list(self._children):
            child.close()
        if self._n_children:
            # Unreachable, and not finalized yet. Some devices would be closed
            # under them.
            raise verbs_error(EBUSY, f"destroy {type(self).__name__}")
        err = self._destroy()
        if err:
            raise verbs_error(err, f"destroy {type(self).__name__}")
        self.closed = True
        _alive[type(self).__name__] -= 1
        for parent in self._parents:
            parent._n_children -= 1
            if parent._abandoned and parent._n_children == 0:
                parent.close()
        self._parents.clear()

    def __enter__(self):
        self._ensure_open()
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __del__(self):
        if self.closed or self._pid != getpid():
            return
        try:
            warnings.warn(
                f"unclosed {type(self).__name__}", ResourceWarning, source=self
            )
        finally:
            # Also where warnings are errors: the parent no longer knows of this
            # object, and could not be closed itself. Of a tree that is collected
            # as a whole the parts are finalized in any order.
            if self._n_children:
                self._abandoned = True
            else:
                self.close()


cdef class Device(Handle):
    """An open device: ibv_open_device(3).

    Args:
      name: As :func:`list_devices` gives it.
      provider: ``"soft"``, ``"libibverbs"``, or ``"null"``: the device that
        completes every WR at once and moves nothing, for measuring.
      address: Numeric address at which peers reach this process; only the
        software device listens there, default loopback.
      wire: How the software device's bytes may travel: ``auto``, ``shm`` or
        ``cma`` (both: same host) or ``tcp``; None: as ``KVXFER_SOFT_WIRE`` says.
      path: The libibverbs to load instead of the system's.

    Raises:
      DeviceUnavailableError: No such device, or it cannot be opened.
    """

    def __init__(self, str name, *, str provider="soft", str address=None,
                 str wire=None, str path=None):
        cdef:
            kvx_verbs_table *table
            ibv_device **devices
            ibv_device *found = NULL
            bytes encoded = b"" if address is None else address.encode()
            const char *c_address = NULL if address is None else <const char *>encoded
            bytes encoded_wire = b"" if wire is None else wire.encode()
            const char *c_wire = NULL if wire is None else <const char *>encoded_wire
            int i
            int n = 0
            int err = 0

        if not self.closed:
            raise UsageError("a Device is opened once")
        if len(encoded) >= KVX_ADDRESS_BYTES:
            raise UsageError(f"address {address!r} is too long to be numeric")
        known = [device.name for device in list_devices(provider, path=path)]
        table = _table(provider, path)
        with nogil:
            devices = table.get_device_list(&n)
            if devices is NULL:
                err = errno
        if devices is NULL:
            raise verbs_error(err, "ibv_get_device_list")
        try:
            for i in range(n):
                if table.get_device_name(devices[i]).decode() == name:
                    found = devices[i]
            if found is NULL:
                raise DeviceUnavailableError(
                    f"no device {name!r} among {known or 'none'} of {provider}"
                )
            with nogil:
                self.ctx = table.open_device(found, c_address, c_wire)
                if self.ctx is NULL:
                    err = errno
        finally:
            table.free_device_list(devices)
        if self.ctx is NULL:
            raise DeviceUnavailableError(
                f"device {name!r} cannot be opened"
                f"{f' at {address}' if address else ''}: "
                f"{verbs_error(err, 'ibv_open_device')}"
            )
        # A wait for asynchronous events must never block the caller.
        fcntl(self.ctx.async_fd, F_SETFL,
              fcntl(self.ctx.async_fd, F_GETFL) | O_NONBLOCK)
        self.table = table
        self.name = name
        self.provider = provider
        self._opened(None)

    cdef int _destroy(self) except? -1:
        cdef int err
        with nogil:
            err = self.table.close_device(self.ctx)
            # ibv_close_device(3) is -1 with errno in some versions.
            if err < 0:
                err = errno
        return err

    @property
    def is_software(self):
        """Whether bytes travel by the software device and not by a NIC."""
        return self.provider != "libibverbs"

    @property
    def async_fd(self):
        """Readable when an asynchronous event waits."""
        self._ensure_open()
        return self.ctx.async_fd

    def take_async_event(self):
        """Return the next :class:`AsyncEvent`, or None.

        The event is acknowledged before this returns: what is not would keep its
        QP from being destroyed for ever.
        """
        cdef:
            ibv_async_event event
            uint32_t qp_num = 0
            int port_num = 0
            int rc
            int err = 0
        self._ensure_open()
        with nogil:
            rc = self.table.get_async_event(self.ctx, &event)
            if rc:
                err = errno
            else:
                # Its object is there until the event is acknowledged.
                if event.event_type in (1, 2, 3, 4, 5, 6, 7, 16):
                    qp_num = event.element.qp.qp_num
                elif event.event_type in (9, 10, 11, 12, 13, 17, 18):
                    port_num = event.element.port_num
                self.table.ack_async_event(&event)
        if rc == 0:
            return AsyncEvent(event.event_type, qp_num or None, port_num or None)
        if err == EAGAIN:
            return None
        raise verbs_error(err, "ibv_get_async_event")

    def set_faults(self, str plan):
        """Have the software device fail on purpose, by a plan; ``""`` ends it.

        The plan counts from here on; docs/testing.md has its rules. What a former
        plan did (a QP in ERR, a port that is down) stays done.

        Raises:
          UsageError: The plan is malformed; the message says where, and the old
            one stays in force. Or this is not the software device.
        """
        cdef:
            bytes encoded = plan.encode()
            const char *c_plan = encoded
            size_t at = 0
            int err
        self._ensure_open()
        with nogil:
            err = self.table.set_faults(self.ctx, c_plan, &at)
        if err == EINVAL:
            near = encoded[at:at + 40].decode(errors="replace")
            raise UsageError(f"fault plan, at offset {at}: {near!r} is not understood")
        if err == EOPNOTSUPP:
            raise UsageError(f"{self.name} is no software device: it has no fault plan")
        if err:
            raise verbs_error(err, "set_faults")

    def query(self):
        """Return the device's limits as :class:`DeviceAttr`."""
        cdef:
            ibv_device_attr attr
            int err
        self._ensure_open()
        memset(&attr, 0, sizeof(attr))
        with nogil:
            err = self.table.query_device(self.ctx, &attr)
        if err:
            raise verbs_error(err, "ibv_query_device")
        return DeviceAttr(
            fw_ver=attr.fw_ver[:strlen(attr.fw_ver)].decode(errors="replace"),
            max_mr_size=attr.max_mr_size,
            max_qp=attr.max_qp,
            max_qp_wr=attr.max_qp_wr,
            max_sge=attr.max_sge,
            max_cqe=attr.max_cqe,
            max_qp_rd_atom=attr.max_qp_rd_atom,
            phys_port_cnt=attr.phys_port_cnt,
        )

    def query_port(self, port_num=1):
        """Return state and limits of a port as :class:`PortAttr`."""
        cdef:
            ibv_port_attr attr
            uint8_t c_port = port_num
            int err
        self._ensure_open()
        memset(&attr, 0, sizeof(attr))
        with nogil:
            err = self.table.query_port(self.ctx, c_port, &attr)
        if err:
            raise verbs_error(err, "ibv_query_port", f"{self.name} port {port_num}")
        return PortAttr(
            state=PortState(attr.state),
            link_layer="ethernet" if attr.link_layer == 2 else "infiniband",
            lid=attr.lid,
            active_mtu=attr.active_mtu,
            max_msg_bytes=attr.max_msg_sz,
            gid_tbl_len=attr.gid_tbl_len,
        )

    def query_gid(self, port_num=1, index=0):
        """Return entry ``index`` of a port's GID table, 16 bytes."""
        cdef:
            ibv_gid gid
            uint8_t c_port = port_num
            int c_index = index
            int rc
            int err = 0
        self._ensure_open()
        with nogil:
            rc = self.table.query_gid(self.ctx, c_port, c_index, &gid)
            if rc:
                err = errno
        if rc:
            raise verbs_error(
                rc if rc > 0 else err, "ibv_query_gid",
                f"{self.name} port {port_num} index {index}")
        return PyBytes_FromStringAndSize(<char *>gid.raw, 16)


cdef class ProtectionDomain(Handle):
    """A protection domain: ibv_alloc_pd(3)."""

    def __init__(self, Device device not None):
        cdef int err = 0
        device._ensure_open()
        if not self.closed:
            raise UsageError("a ProtectionDomain is made once")
        with nogil:
            self.pd = device.table.alloc_pd(device.ctx)
            if self.pd is NULL:
                err = errno
        if self.pd is NULL:
            raise verbs_error(err, "ibv_alloc_pd")
        self.device = device
        self._opened(device)

    cdef int _destroy(self) except? -1:
        cdef int err
        with nogil:
            err = self.device.table.dealloc_pd(self.pd)
        return err


cdef class MemoryRegion(Handle):
    """Registered memory: ibv_reg_mr(3). Owns nothing that it did not allocate.

    After :meth:`close` has returned, no remote write lands in the region.

    Args:
      addr: Address of the first byte.
      length: Bytes, at least 1.
      access: :class:`Access` flags.
      fd: The file that is mapped there, shared, or -1. The software device lets
        peers on this host map it as well, where it is a memory file sealed against
        shrinking. The caller may close it afterwards.
      offset: Where in the file ``addr`` is.

    Raises:
      VerbsError: EFAULT where the memory is not mapped or not writable, ENOMEM
        where it cannot be pinned (RLIMIT_MEMLOCK).
    """

    def __init__(self, ProtectionDomain pd not None, addr, length,
                 access=Access.LOCAL_WRITE, *, fd=-1, offset=0):
        cdef:
            int c_fd = fd
            uint64_t c_offset = offset
            void *c_addr = <void *><uintptr_t>addr
            size_t c_length = length
            unsigned int c_access = access
            kvx_verbs_table *table
            int err = 0
        pd._ensure_open()
        if not self.closed:
            raise UsageError("a MemoryRegion is made once")
        table = pd.device.table
        with nogil:
            self.mr = table.reg_mr_fd(
                pd.pd, c_fd, c_offset, c_addr, c_length, c_access)
            if self.mr is NULL:
                err = errno
        if self.mr is NULL:
            raise verbs_error(
                err, "ibv_reg_mr", f"{length} bytes at {addr:#x}")
        self._registered(pd, addr, length)

    @staticmethod
    def from_dmabuf(ProtectionDomain pd not None, int fd, uint64_t offset, addr, length,
                    access=Access.LOCAL_WRITE):
        """Register memory by its dma-buf: ibv_reg_dmabuf_mr(3).

        Args:
          fd: The dma-buf; may be closed afterwards.
          offset: Where the region begins in it.
          addr: The address that WRs of both sides name its first byte by.
          length: Bytes, at least 1.

        Raises:
          VerbsError: EOPNOTSUPP where library, driver or device know no dma-buf.
        """
        cdef:
            MemoryRegion self = MemoryRegion.__new__(MemoryRegion)
            uint64_t iova = addr
            size_t c_length = length
            unsigned int c_access = access
            kvx_verbs_table *table
            int err = 0
        pd._ensure_open()
        table = pd.device.table
        with nogil:
            self.mr = table.reg_dmabuf_mr(
                pd.pd, offset, c_length, iova, fd, c_access)
            if self.mr is NULL:
                err = errno
        if self.mr is NULL:
            raise verbs_error(
                err, "ibv_reg_dmabuf_mr", f"{length} bytes at {addr:#x}")
        self._registered(pd, addr, length)
        return self

    cdef int _registered(self, ProtectionDomain pd, addr, length) except -1:
        self.pd = pd
        self.addr = addr
        self.length = length
        self._opened(pd)
        return 0

    cdef int _destroy(self) except? -1:
        cdef int err
        with nogil:
            err = self.pd.device.table.dereg_mr(self.mr)
        return err

    @property
    def lkey(self):
        """Key that local SGEs name the region by."""
        self._ensure_open()
        return self.mr.lkey

    @property
    def rkey(self):
        """Key that a peer's WRs name the region by."""
        self._ensure_open()
        return self.mr.rkey


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
        return [_wc_to_python(&wcs[i]) for i in range(n)]


cdef object _wc_to_python(ibv_wc *wc):
    if wc.status != IBV_WC_SUCCESS:
        return WC(wc.wr_id, wc.status, wc.qp_num, wc.vendor_err, 0, 0, None)
    return WC(
        wc.wr_id,
        wc.status,
        wc.qp_num,
        wc.vendor_err,
        wc.opcode,
        wc.byte_len,
        ntohl(wc.imm_data) if wc.wc_flags & IBV_WC_WITH_IMM else None,
    )


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
            bytes address = hint.address.encode()
            bytes local = hint.local_token
            bytes remote = hint.remote_token
            int err
        self._ensure_open()
        if len(address) >= KVX_ADDRESS_BYTES:
            raise UsageError(f"address {hint.address!r} is too long to be numeric")
        for token in (local, remote):
            if len(token) not in (0, KVX_TOKEN_BYTES):
                raise UsageError(f"a token has {KVX_TOKEN_BYTES} bytes, or none")
        memset(&c_hint, 0, sizeof(c_hint))
        memcpy(c_hint.address, PyBytes_AS_STRING(address), len(address))
        memcpy(c_hint.local_token, PyBytes_AS_STRING(local), len(local))
        memcpy(c_hint.remote_token, PyBytes_AS_STRING(remote), len(remote))
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
            Py_ssize_t n_sge = sum(len(wr.sges) for wr in wrs)
            ibv_send_wr *c_wrs
            ibv_sge *c_sges
            ibv_sge *next_sge
            ibv_send_wr *bad = NULL
            Py_ssize_t i
            int err
        self._ensure_open()
        if n == 0:
            return 0
        c_wrs = <ibv_send_wr *>calloc(n, sizeof(ibv_send_wr))
        c_sges = <ibv_sge *>calloc(n_sge + 1, sizeof(ibv_sge))
        try:
            if c_wrs is NULL or c_sges is NULL:
                raise MemoryError
            next_sge = c_sges
            for i, wr in enumerate(wrs):
                c_wrs[i].wr_id = wr.wr_id
                c_wrs[i].next = &c_wrs[i + 1] if i + 1 < n else NULL
                c_wrs[i].sg_list = next_sge
                c_wrs[i].num_sge = len(wr.sges)
                c_wrs[i].opcode = wr.opcode
                c_wrs[i].send_flags = (
                    (IBV_SEND_SIGNALED if wr.signaled else 0)
                    | (IBV_SEND_INLINE if wr.inline_ else 0)
                    | (IBV_SEND_FENCE if wr.fence else 0)
                    | (IBV_SEND_SOLICITED if wr.solicited else 0)
                )
                c_wrs[i].imm_data = htonl(wr.imm_data)
                c_wrs[i].wr.rdma.remote_addr = wr.remote_addr
                c_wrs[i].wr.rdma.rkey = wr.rkey
                next_sge = _fill_sges(next_sge, wr.sges)
            with nogil:
                err = ibv_post_send(self.qp, c_wrs, &bad)
            if err:
                error = verbs_error(err, "ibv_post_send")
                error.n_posted = bad - c_wrs if bad is not NULL else 0
                raise error
            return n
        finally:
            free(c_wrs)
            free(c_sges)

    def post_recv(self, wrs):
        """Post :class:`RecvWR` objects (at most one SGE each)."""
        cdef:
            ibv_recv_wr c_wr
            ibv_recv_wr *bad = NULL
            ibv_sge sge
            int err
        self._ensure_open()
        for i, wr in enumerate(wrs):
            if len(wr.sges) > 1:
                raise UsageError("a RecvWR has at most one SGE")
            memset(&c_wr, 0, sizeof(c_wr))
            c_wr.wr_id = wr.wr_id
            c_wr.sg_list = &sge
            c_wr.num_sge = len(wr.sges)
            _fill_sges(&sge, wr.sges)
            with nogil:
                err = ibv_post_recv(self.qp, &c_wr, &bad)
            if err:
                error = verbs_error(err, "ibv_post_recv")
                error.n_posted = i
                raise error


cdef ibv_sge *_fill_sges(ibv_sge *slot, sges) except NULL:
    """Write SGEs from ``slot`` on; return the slot behind them."""
    for addr, length, lkey in sges:
        slot.addr = addr
        slot.length = length
        slot.lkey = lkey
        slot += 1
    return slot
