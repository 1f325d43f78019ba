"""Fields of the verbs objects, for the modules that drive them without the GIL."""

from kvxfer._device cimport Device
from kvxfer._handles cimport Handle
from kvxfer._ibverbs cimport (
    ibv_comp_channel,
    ibv_cq,
    ibv_qp,
    ibv_qp_attr,
    kvx_verbs_table,
)
from kvxfer._memory cimport MemoryRegion, ProtectionDomain


cdef int take_cq_events(
    kvx_verbs_table *table, ibv_comp_channel *channel, ibv_cq *cq,
    unsigned int *unacked) noexcept nogil


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
