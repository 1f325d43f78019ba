# cython: language_level=3, embedsignature=True
"""Protection domains and the memory that is registered in them."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t

from kvxfer._device cimport Device
from kvxfer._handles cimport Handle
from kvxfer._ibverbs cimport *

from kvxfer.errors import UsageError, verbs_error
from kvxfer.verbs_types import Access


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
