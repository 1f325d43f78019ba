# cython: language_level=3
"""Structs of verbs, out of Python and into it.

What is filled is the caller's memory; a chain of send WRs is new, and his to free.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strlen

from kvxfer._ibverbs cimport *

from kvxfer.errors import UsageError
from kvxfer.verbs_types import WC, DeviceAttr, PortAttr, PortState

cdef extern from "arpa/inet.h" nogil:
    uint32_t htonl(uint32_t)
    uint32_t ntohl(uint32_t)


cdef ibv_send_wr *send_chain(wrs) except NULL:
    """Return :class:`SendWR` objects as one chain, and one piece of memory to free.

    There is at least one, and they stay as they are for the time of this call.
    """
    cdef:
        Py_ssize_t n = len(wrs)
        Py_ssize_t n_sge = 0
        Py_ssize_t i
        ibv_send_wr *chain
        ibv_sge *slot
    for wr in wrs:
        n_sge += len(wr.sges)
    chain = <ibv_send_wr *>calloc(
        1, n * sizeof(ibv_send_wr) + n_sge * sizeof(ibv_sge))
    if chain is NULL:
        raise MemoryError
    slot = <ibv_sge *>(chain + n)
    try:
        for i, wr in enumerate(wrs):
            chain[i].next = &chain[i + 1] if i + 1 < n else NULL
            chain[i].sg_list = slot
            slot = _fill_send(&chain[i], slot, wr)
    except BaseException:
        free(chain)
        raise
    return chain


cdef ibv_sge *_fill_send(ibv_send_wr *c_wr, ibv_sge *slot, wr) except NULL:
    """Write one WR, its SGEs from ``slot`` on; return the slot behind them."""
    c_wr.wr_id = wr.wr_id
    c_wr.num_sge = len(wr.sges)
    c_wr.opcode = wr.opcode
    c_wr.send_flags = (
        (IBV_SEND_SIGNALED if wr.signaled else 0)
        | (IBV_SEND_INLINE if wr.inline_ else 0)
        | (IBV_SEND_FENCE if wr.fence else 0)
        | (IBV_SEND_SOLICITED if wr.solicited else 0)
    )
    c_wr.imm_data = htonl(wr.imm_data)
    c_wr.wr.rdma.remote_addr = wr.remote_addr
    c_wr.wr.rdma.rkey = wr.rkey
    return _fill_sges(slot, wr.sges)


cdef int fill_receive(ibv_recv_wr *c_wr, ibv_sge *sge, wr) except -1:
    """Write a :class:`RecvWR` with its SGE, if it has one."""
    if len(wr.sges) > 1:
        raise UsageError("a RecvWR has at most one SGE")
    memset(c_wr, 0, sizeof(c_wr[0]))
    c_wr.wr_id = wr.wr_id
    c_wr.sg_list = sge
    c_wr.num_sge = len(wr.sges)
    _fill_sges(sge, wr.sges)
    return 0


cdef ibv_sge *_fill_sges(ibv_sge *slot, sges) except NULL:
    """Write SGEs from ``slot`` on; return the slot behind them."""
    for addr, length, lkey in sges:
        slot.addr = addr
        slot.length = length
        slot.lkey = lkey
        slot += 1
    return slot


cdef int fill_hint(kvx_peer_hint *c_hint, hint) except -1:
    """Write a :class:`PeerHint`."""
    cdef:
        bytes address = hint.address.encode()
        bytes local = hint.local_token
        bytes remote = hint.remote_token
        bytes wire = hint.wire.encode()
    if len(address) >= KVX_ADDRESS_BYTES:
        raise UsageError(f"address {hint.address!r} is too long to be numeric")
    for token in (local, remote):
        if len(token) not in (0, KVX_TOKEN_BYTES):
            raise UsageError(f"a token has {KVX_TOKEN_BYTES} bytes, or none")
    if len(wire) >= KVX_WIRE_NAME_BYTES:
        raise UsageError(f"{hint.wire!r} is no wire")
    memset(c_hint, 0, sizeof(c_hint[0]))
    memcpy(c_hint.address, PyBytes_AS_STRING(address), len(address))
    memcpy(c_hint.local_token, PyBytes_AS_STRING(local), len(local))
    memcpy(c_hint.remote_token, PyBytes_AS_STRING(remote), len(remote))
    memcpy(c_hint.wire, PyBytes_AS_STRING(wire), len(wire))
    return 0


cdef object wc_to_python(const ibv_wc *wc):
    """A :class:`WC`; where it tells of a failure, only what is valid then."""
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


cdef void event_source(
    const ibv_async_event *event, uint32_t *qp_num, int *port_num,
) noexcept nogil:
    """Say which QP or which port an event is of; what it is not of stays as it was.

    Only until the event is acknowledged: its QP may be gone from then on.
    """
    if event.event_type in (1, 2, 3, 4, 5, 6, 7, 16):
        qp_num[0] = event.element.qp.qp_num
    elif event.event_type in (9, 10, 11, 12, 13, 17, 18):
        port_num[0] = event.element.port_num


cdef object device_attr(const ibv_device_attr *attr):
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


cdef object port_attr(const ibv_port_attr *attr):
    return PortAttr(
        state=PortState(attr.state),
        link_layer="ethernet" if attr.link_layer == 2 else "infiniband",
        lid=attr.lid,
        active_mtu=attr.active_mtu,
        max_msg_bytes=attr.max_msg_sz,
        gid_tbl_len=attr.gid_tbl_len,
    )
