"""Fields of a device, for the modules that drive it without the GIL."""

from kvxfer._handles cimport Handle
from kvxfer._ibverbs cimport ibv_context, kvx_verbs_table


cdef class Device(Handle):
    cdef:
        kvx_verbs_table *table    # the provider's, lives for ever
        ibv_context *ctx          # owned
        readonly str name
        readonly str provider
