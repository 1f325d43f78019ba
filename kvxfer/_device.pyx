# cython: language_level=3, embedsignature=True
"""An open device: its limits, its ports, its asynchronous events, its faults."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINVAL, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl

from kvxfer._handles cimport Handle
from kvxfer._ibverbs cimport *
from kvxfer._providers cimport table_of
from kvxfer._structs cimport device_attr, event_source, port_attr

from kvxfer._providers import list_devices
from kvxfer.errors import DeviceUnavailableError, UsageError, verbs_error
from kvxfer.verbs_types import AsyncEvent


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
        table = table_of(provider, path)
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
                event_source(&event, &qp_num, &port_num)
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
        return device_attr(&attr)

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
        return port_attr(&attr)

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
