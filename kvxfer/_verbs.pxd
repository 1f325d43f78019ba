"""Fields of the verbs objects, for the modules that drive them without the GIL."""

from kvxfer._ibverbs cimport (
    ibv_comp_channel,
    ibv_context,
    ibv_cq,
    ibv_mr,
    ibv_pd,
    ibv_qp,
    ibv_qp_attr,
    kvx_verbs_table,
)


cdef int take_cq_events(
    kvx_verbs_table *table, ibv_comp_channel *channel, ibv_cq *cq,
    unsigned int *unacked) noexcept nogil


cdef class Handle:
    """One C handle, its creating process and the handles made from it."""
    cdef:
        object __weakref__
        object _children      # WeakSet of Handle: closed before this one
        list _parents         # of Handle: kept, so that they outlive this one
        int _n_children       # open ones; more than are in the set during a collection
        bint _abandoned       # to be closed with the last child
        readonly bint closed
        int _pid              # only this process may touch the C handle

    cdef int _ensure_open(self) except -1
    cdef int _opened(self, Handle parent) except -1
    cdef int _attach(self, Handle parent) except -1
    cdef int _destroy(self) except? -1


cdef class Device(Handle):
    cdef:
        kvx_verbs_table *table    # one of the module's, lives for ever
        ibv_context *ctx          # owned
        readonly str name
        readonly str provider


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


cdef class CompletionQueue(Handle):
    cdef:
        readonly Device device
        ibv_comp_channel *channel  # owned
        ibv_cq *cq                 # owned
        unsigned int unacked       # events got but not acknowledged yet


cdef class QueuePair(Handle):
    cdef:
        readonly ProtectionDomain pd
        readonly CompletionQueue cq
        ibv_qp *qp                 # owned
        readonly int max_send_wr
        readonly int max_recv_wr
        readonly int max_send_sge
        readonly int max_inline

    cdef _modify(self, ibv_qp_attr *attr, int mask, str target)
