"""Structs of verbs from Python's objects, and the other way."""

from libc.stdint cimport uint32_t

from kvxfer._ibverbs cimport (
    ibv_async_event,
    ibv_device_attr,
    ibv_port_attr,
    ibv_recv_wr,
    ibv_send_wr,
    ibv_sge,
    ibv_wc,
    kvx_peer_hint,
)


cdef ibv_send_wr *send_chain(wrs) except NULL
cdef int fill_receive(ibv_recv_wr *c_wr, ibv_sge *sge, wr) except -1
cdef int fill_hint(kvx_peer_hint *c_hint, hint) except -1
cdef object wc_to_python(const ibv_wc *wc)
cdef void event_source(
    const ibv_async_event *event, uint32_t *qp_num, int *port_num) noexcept nogil
cdef object device_attr(const ibv_device_attr *attr)
cdef object port_attr(const ibv_port_attr *attr)
