"""Fields of protection domains and memory regions."""

from kvxfer._device cimport Device
from kvxfer._handles cimport Handle
from kvxfer._ibverbs cimport ibv_mr, ibv_pd


cdef class ProtectionDomain(Handle):
    cdef:
        readonly Device device    # keeps ctx open
        ibv_pd *pd                # owned


cdef class MemoryRegion(Handle):
    cdef:
        readonly ProtectionDomain pd
        ibv_mr *mr                # owned
        readonly object addr
        readonly object length

    cdef int _registered(self, ProtectionDomain pd, addr, length) except -1
