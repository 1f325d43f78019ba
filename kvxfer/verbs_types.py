"""Plain data that goes into and comes out of the verbs objects.

Names and numbers are those of infiniband/verbs.h; see the man pages named in
each docstring.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple


class Access(enum.IntFlag):
    """What a memory region or a QP permits, ibv_reg_mr(3)."""

    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4
    RELAXED_ORDERING = 1 << 20


class QPState(enum.IntEnum):
    """State of a queue pair, ibv_modify_qp(3)."""

    RESET = 0
    INIT = 1
    RTR = 2
    RTS = 3
    SQD = 4
    SQE = 5
    ERR = 6


class Opcode(enum.IntEnum):
    """What a posted WR does, ibv_post_send(3)."""

    RDMA_WRITE = 0
    RDMA_WRITE_WITH_IMM = 1
    SEND = 2
    SEND_WITH_IMM = 3
    RDMA_READ = 4


class WCOpcode(enum.IntEnum):
    """What a WC reports; valid only on success, ibv_poll_cq(3)."""

    SEND = 0
    RDMA_WRITE = 1
    RDMA_READ = 2
    RECV = 128
    RECV_RDMA_WITH_IMM = 129


class PortState(enum.IntEnum):
    """State of a port, ibv_query_port(3)."""

    NOP = 0
    DOWN = 1
    INIT = 2
    ARMED = 3
    ACTIVE = 4
    ACTIVE_DEFER = 5


class EventType(enum.IntEnum):
    """What an asynchronous event reports, ibv_get_async_event(3)."""

    CQ_ERR = 0
    QP_FATAL = 1
    QP_REQ_ERR = 2
    QP_ACCESS_ERR = 3
    COMM_EST = 4
    SQ_DRAINED = 5
    PATH_MIG = 6
    PATH_MIG_ERR = 7
    DEVICE_FATAL = 8
    PORT_ACTIVE = 9
    PORT_ERR = 10
    LID_CHANGE = 11
    PKEY_CHANGE = 12
    SM_CHANGE = 13
    SRQ_ERR = 14
    SRQ_LIMIT_REACHED = 15
    QP_LAST_WQE_REACHED = 16
    CLIENT_REREGISTER = 17
    GID_CHANGE = 18
    WQ_FATAL = 19


class AsyncEvent(NamedTuple):
    """One asynchronous event: its number, and the QP or port that it is about."""

    event_type: int
    qp_num: int | None
    port_num: int | None

    @property
    def name(self) -> str:
        """The name that verbs give it, or its number."""
        try:
            return EventType(self.event_type).name
        except ValueError:
            return f"event {self.event_type}"


@dataclass(frozen=True)
class DeviceInfo:
    """A device that can be opened, before it is."""

    name: str
    provider: str
    """``"soft"``, ``"null"`` or ``"libibverbs"``."""
    guid: int


@dataclass(frozen=True)
class DeviceAttr:
    """Limits of an open device, ibv_query_device(3)."""

    fw_ver: str
    max_mr_size: int
    max_qp: int
    max_qp_wr: int
    max_sge: int
    max_cqe: int
    max_qp_rd_atom: int
    phys_port_cnt: int


@dataclass(frozen=True)
class PortAttr:
    """State and limits of a port, ibv_query_port(3)."""

    state: PortState
    link_layer: str
    """``"infiniband"`` or ``"ethernet"``."""
    lid: int
    active_mtu: int
    """The enum of verbs: 1 = 256 bytes to 5 = 4096 bytes."""
    max_msg_bytes: int
    gid_tbl_len: int


@dataclass(frozen=True)
class QPLimits:
    """How much a QP can hold, ibv_create_qp(3). Granted values may be higher."""

    max_send_wr: int = 128
    max_recv_wr: int = 1
    max_send_sge: int = 1
    max_inline: int = 0
    sq_sig_all: bool = False


@dataclass(frozen=True)
class QPPath:
    """All that brings a QP from INIT to RTS, ibv_modify_qp(3).

    The first group describes the peer's QP, the second our own end and the
    patience of the transport. ``timeout`` is the exponent of
    4.096 us * 2**timeout; 0 would wait for ever.
    """

    qp_num: int
    psn: int
    gid: bytes
    lid: int = 0
    mtu: int = 5

    own_psn: int = 0
    port_num: int = 1
    gid_index: int = 0
    is_global: bool = True
    timeout: int = 18
    retry_cnt: int = 7
    rnr_retry: int = 6
    min_rnr_timer: int = 12
    max_rd_atomic: int = 1
    max_dest_rd_atomic: int = 1
    hop_limit: int = 64
    traffic_class: int = 0
    service_level: int = 0


@dataclass(frozen=True)
class PeerHint:
    """What the control plane knows of a peer's QP and verbs have no word for.

    Only the software device uses it: the address it is reached at, the tokens (32
    bytes each, or empty) that connections must present, and the wire that this side's
    QP takes, of those that the device was opened for; empty: any.
    """

    address: str = ""
    local_token: bytes = b""
    remote_token: bytes = b""
    wire: str = ""


class SGE(NamedTuple):
    """One piece of local memory."""

    addr: int
    length: int
    lkey: int


@dataclass(frozen=True)
class SendWR:
    """One WR for :meth:`QueuePair.post_send`."""

    opcode: Opcode = Opcode.RDMA_WRITE
    sges: tuple[SGE, ...] = ()
    remote_addr: int = 0
    rkey: int = 0
    wr_id: int = 0
    signaled: bool = True
    inline_: bool = False
    fence: bool = False
    solicited: bool = False
    imm_data: int = 0


@dataclass(frozen=True)
class RecvWR:
    """One WR for :meth:`QueuePair.post_recv`."""

    wr_id: int = 0
    sges: tuple[SGE, ...] = field(default=())


class WC(NamedTuple):
    """One work completion.

    With a status other than 0 only ``wr_id``, ``status``, ``qp_num`` and
    ``vendor_err`` mean anything, ibv_poll_cq(3).
    """

    wr_id: int
    status: int
    qp_num: int
    vendor_err: int
    opcode: int
    byte_len: int
    imm_data: int | None
