"""What can go wrong, one class each.

::

    KVXferError
      UsageError (ValueError)          you passed something that cannot be done
        LayoutError                    ids, blocks, planes, tensors
        OptionError                    an option out of range
      ClosedResourceError              you closed it
      BrokenPeerError                  the peer or the link died
      DeviceUnavailableError           no device as wanted; says why
      VerbsError (OSError)             a verb returned an errno
        QueueFullError                 no room in a send or receive queue
      CompletionError                  a work request failed
        LocalLengthError
        LocalQPError
        LocalProtectionError
        LocalAccessError
        FlushedError                   a consequence, never the cause
        MemoryWindowError
        BadResponseError
        RemoteInvalidRequestError
        RemoteAccessError
        RemoteOperationError
        RemoteAbortedError
        RetryExceededError
        RNRRetryExceededError
        ResponseTimeoutError
        ReliableDatagramError
        TagMatchingError
        DeviceFatalError
        UnknownCompletionError         a status this release has no name for
      ControlError                     the handshake or the control link
        ProtocolError                  bytes that are no valid message
        VersionMismatchError
        GeometryMismatchError (LayoutError)
        RefusedError                   the peer said no
        AuthenticationError            keys that the other side does not know
        AddressInUseError (OSError)
      ConnectTimeoutError (TimeoutError)
      WriteTimeoutError (TimeoutError)
      RequestError                     a streamed request ended before its end
        RequestAbortedError            one of the sides gave it up
        RequestExpiredError (TimeoutError)
        RequestStalledError (TimeoutError)
        RequestIncompleteError         finished, with blocks missing
        ChecksumError                  what arrived is not what was sent
      NotQuiescentError                the device may still touch the blocks
      InternalError                    a bug of ours

``asyncio.CancelledError`` passes through unchanged. All classes pickle.

This module imports nothing else of the package, so anything may import it.
"""

from __future__ import annotations

import errno as _errno
import os
import resource
from typing import NamedTuple

__all__ = [
    "WC_STATUSES",
    "AddressInUseError",
    "AuthenticationError",
    "BadResponseError",
    "BrokenPeerError",
    "ChecksumError",
    "ClosedResourceError",
    "CompletionError",
    "ConnectTimeoutError",
    "ControlError",
    "DeviceFatalError",
    "DeviceUnavailableError",
    "FlushedError",
    "GeometryMismatchError",
    "InternalError",
    "KVXferError",
    "LayoutError",
    "LocalAccessError",
    "LocalLengthError",
    "LocalProtectionError",
    "LocalQPError",
    "MemoryWindowError",
    "NotQuiescentError",
    "OptionError",
    "ProtocolError",
    "QueueFullError",
    "RNRRetryExceededError",
    "RefusedError",
    "ReliableDatagramError",
    "RemoteAbortedError",
    "RemoteAccessError",
    "RemoteInvalidRequestError",
    "RemoteOperationError",
    "RequestAbortedError",
    "RequestError",
    "RequestExpiredError",
    "RequestIncompleteError",
    "RequestStalledError",
    "ResponseTimeoutError",
    "RetryExceededError",
    "TagMatchingError",
    "UnknownCompletionError",
    "UsageError",
    "VerbsError",
    "VersionMismatchError",
    "WCStatus",
    "WriteTimeoutError",
    "completion_error",
    "status_name",
    "verbs_error",
]


class KVXferError(Exception):
    """Base of everything that kvxfer raises on its own account.

    Attributes:
      hint: One sentence on what to do about it, or an empty string.
      peer: The peer concerned, as text, where there is one.
      layer: The model layer concerned, where there is one.
      request_id: The request concerned, where there is one.
      fenced: For failed transfers, whether the peer confirmed that nothing of
        this transfer can land in its blocks any more. ``None`` where the
        question does not arise or was not asked.
      bytes_done: Of a streamed request, the bytes that had been moved.
    """

    hint: str = ""
    peer: str | None = None
    layer: int | None = None
    request_id: object = None
    fenced: bool | None = None
    bytes_done: int | None = None

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message)
        if hint:
            self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        context = [
            f"{name} {value}"
            for name, value in (
                ("peer", self.peer),
                ("layer", self.layer),
                ("request", self.request_id),
            )
            if value is not None
        ]
        if context:
            text = f"{text} ({', '.join(context)})"
        if self.fenced is not None:
            outcome = "confirmed" if self.fenced else "not confirmed"
            text = f"{text}; fence at the peer {outcome}"
        if self.hint:
            end = "" if text.endswith("?") else "."
            text = f"{text.rstrip('.')}{end} {self.hint}"
        return text


class UsageError(KVXferError, ValueError):
    """The call cannot be done as asked. Nothing was changed or posted."""


class LayoutError(UsageError):
    """Block ids, layers, planes or tensors do not fit. Nothing was posted."""


class OptionError(UsageError):
    """An option is unknown or its value is out of range."""


class ClosedResourceError(KVXferError):
    """The object was closed by its owner, before the call or during it."""


class BrokenPeerError(KVXferError):
    """The peer or the link to it is gone; ``__cause__`` tells more if known."""


class DeviceUnavailableError(KVXferError):
    """No device meets the options; the message lists what was rejected."""


class VerbsError(KVXferError, OSError):
    """A verb returned an error number.

    Attributes:
      errno: The positive error number.
      call: The verb that returned it, as in the man pages.
      n_posted: WRs of a post that were accepted before the one that was not.
    """

    n_posted: int = 0

    def __init__(
        self, errno: int, message: str, *, call: str = "", hint: str = ""
    ) -> None:
        OSError.__init__(self, errno, message)
        self.call = call
        if hint:
            self.hint = hint


class QueueFullError(VerbsError):
    """A send or receive queue has no room; the WR was not posted.

    The library counts free slots and does not get here; users of the verbs
    classes can.
    """


class CompletionError(KVXferError):
    """A work request completed with an error.

    The bytes it names are in an unknown state at the destination: a failed
    WRITE may have been executed.

    Attributes:
      status: The number, as in ``enum ibv_wc_status``.
      status_name: Its name there.
      wr_id: The id of the failed WR.
      qp_num: The QP it was posted to.
      vendor_err: The device's own error code; 0 if none.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int = -1,
        status_name: str = "",
        wr_id: int = 0,
        qp_num: int = 0,
        vendor_err: int = 0,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.status_name = status_name
        self.wr_id = wr_id
        self.qp_num = qp_num
        self.vendor_err = vendor_err


class LocalLengthError(CompletionError):
    """A local buffer is too short, or the message too long for the port."""


class LocalQPError(CompletionError):
    """The WR is malformed for this QP."""


class LocalProtectionError(CompletionError):
    """A local buffer is outside its MR, or the MR is gone."""


class LocalAccessError(CompletionError):
    """The responder's own memory does not permit the access."""


class FlushedError(CompletionError):
    """The QP was in the error state already; look for the first error."""


class MemoryWindowError(CompletionError):
    """A memory window could not be bound."""


class BadResponseError(CompletionError):
    """The responder answered with an opcode that makes no sense."""


class RemoteInvalidRequestError(CompletionError):
    """The responder's QP does not permit this operation or its length."""


class RemoteAccessError(CompletionError):
    """The responder refused the rkey, the range or the access."""


class RemoteOperationError(CompletionError):
    """The responder could not complete the operation."""


class RemoteAbortedError(CompletionError):
    """The responder aborted the operation."""


class RetryExceededError(CompletionError):
    """No acknowledgement came, however often the device retried."""


class RNRRetryExceededError(CompletionError):
    """The peer had no receive posted, however often the device retried."""


class ResponseTimeoutError(CompletionError):
    """The device waited too long for a response."""


class ReliableDatagramError(CompletionError):
    """A status of the reliable datagram transport, which kvxfer never uses."""


class TagMatchingError(CompletionError):
    """A status of tag matching, which kvxfer never uses."""


class DeviceFatalError(CompletionError):
    """The device failed; every connection on it is lost."""


class UnknownCompletionError(CompletionError):
    """The device reported a status that this release has no name for."""


class ControlError(KVXferError):
    """The handshake failed or the control link broke."""


class ProtocolError(ControlError):
    """The peer sent bytes that are no valid message, or at the wrong time."""


class VersionMismatchError(ControlError):
    """The two sides have no protocol version in common."""


class GeometryMismatchError(ControlError, LayoutError):
    """The two caches do not fit; the message has both sides' figures."""


class AuthenticationError(ControlError):
    """One side's key is not known to the other, or only one side has keys."""


class RefusedError(ControlError):
    """The peer refused the connection and said why.

    Attributes:
      code: The peer's reason in one word, as on the wire.
    """

    def __init__(self, message: str = "", *, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class AddressInUseError(ControlError, OSError):
    """Somebody listens on that address already. ``errno`` is EADDRINUSE."""

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = _errno.EADDRINUSE


class ConnectTimeoutError(KVXferError, TimeoutError):
    """The peer did not complete the handshake in time. Nothing is left open."""


class WriteTimeoutError(KVXferError, TimeoutError):
    """A transfer missed its deadline.

    It is raised only once the device has let go of the source blocks, so they
    may be reused. The destination blocks are in an unknown state; ``fenced``
    says whether late bytes are excluded.
    """


class RequestError(KVXferError):
    """A streamed request ended before it was complete.

    No write of it is in flight, and no byte of it can land any more, when this is
    seen: the blocks on both sides may be reused. ``layer`` and ``bytes_done`` say
    how far it was.

    Attributes:
      code: Why, in one word; see ``kvxfer.requests.EndCode``.
    """

    code: str = "failed"


class RequestAbortedError(RequestError):
    """One of the sides gave the request up, or cancelled who waited for it."""


class RequestExpiredError(RequestError, TimeoutError):
    """The deadline or the lease of the request passed."""


class RequestStalledError(RequestError, TimeoutError):
    """Blocks were both ready and offered, and nothing moved for too long."""


class RequestIncompleteError(RequestError):
    """The writer finished a request of which blocks or layers are missing."""


class ChecksumError(RequestError):
    """A layer arrived with other bytes than were sent.

    Attributes:
      block_ids: The blocks of the layer that the digest covers.
    """

    code = "checksum"
    block_ids: tuple[int, ...] = ()


class NotQuiescentError(KVXferError):
    """The device did not let go within the drain deadline.

    The blocks concerned must not be reused before the device is closed.
    """


class InternalError(KVXferError):
    """A bug in kvxfer. Please report it with the traceback."""


class WCStatus(NamedTuple):
    """One row of :data:`WC_STATUSES`; ``error`` is ``None`` for success."""

    status: int
    name: str
    error: type[CompletionError] | None
    hint: str


_RECONNECT = "Connect again before the next transfer."
_NOT_OURS = "kvxfer never asks for this; please report it."

# Every value of enum ibv_wc_status in its order; a test compares this with the
# installed header.
WC_STATUSES: tuple[WCStatus, ...] = tuple(
    WCStatus(status, name, error, hint)
    for status, (name, error, hint) in enumerate(
        (
            ("IBV_WC_SUCCESS", None, ""),
            (
                "IBV_WC_LOC_LEN_ERR",
                LocalLengthError,
                "A message is longer than the port's limit, or longer than the "
                "receive it met; lower merge_bytes and please report it.",
            ),
            (
                "IBV_WC_LOC_QP_OP_ERR",
                LocalQPError,
                "The WR is malformed, or on some devices its lkey is unknown: was "
                "the cache's memory registered with another device or freed?",
            ),
            ("IBV_WC_LOC_EEC_OP_ERR", ReliableDatagramError, _NOT_OURS),
            (
                "IBV_WC_LOC_PROT_ERR",
                LocalProtectionError,
                "Local memory is not registered or is unmapped: keep the cache's "
                "memory alive while it is in use; with GPUs look at PCIe ACS and "
                "the IOMMU.",
            ),
            (
                "IBV_WC_WR_FLUSH_ERR",
                FlushedError,
                "The QP was in error or closed before this WR ran: an earlier "
                "error is the cause. " + _RECONNECT,
            ),
            ("IBV_WC_MW_BIND_ERR", MemoryWindowError, _NOT_OURS),
            (
                "IBV_WC_BAD_RESP_ERR",
                BadResponseError,
                "The peer's device broke the protocol; check firmware on both "
                "sides. " + _RECONNECT,
            ),
            (
                "IBV_WC_LOC_ACCESS_ERR",
                LocalAccessError,
                "Memory of this side does not permit the peer's access; was it "
                "deregistered while the peer still wrote?",
            ),
            (
                "IBV_WC_REM_INV_REQ_ERR",
                RemoteInvalidRequestError,
                "The peer's QP does not permit this operation or length: the two "
                "sides are configured differently.",
            ),
            (
                "IBV_WC_REM_ACCESS_ERR",
                RemoteAccessError,
                "The peer's rkey is stale or the range is outside its memory: it "
                "has restarted or registered again. " + _RECONNECT,
            ),
            (
                "IBV_WC_REM_OP_ERR",
                RemoteOperationError,
                "The peer's device could not complete the operation; see its log. "
                + _RECONNECT,
            ),
            (
                "IBV_WC_RETRY_EXC_ERR",
                RetryExceededError,
                "No acknowledgement came: the peer is dead or unreachable, or GID, "
                "MTU, VLAN, flow control or the cable is wrong. " + _RECONNECT,
            ),
            (
                "IBV_WC_RNR_RETRY_EXC_ERR",
                RNRRetryExceededError,
                "The peer had no receive posted in time: its process is stopped or "
                "overloaded. " + _RECONNECT,
            ),
            ("IBV_WC_LOC_RDD_VIOL_ERR", ReliableDatagramError, _NOT_OURS),
            ("IBV_WC_REM_INV_RD_REQ_ERR", ReliableDatagramError, _RECONNECT),
            (
                "IBV_WC_REM_ABORT_ERR",
                RemoteAbortedError,
                "The peer's device gave up. " + _RECONNECT,
            ),
            ("IBV_WC_INV_EECN_ERR", ReliableDatagramError, _NOT_OURS),
            ("IBV_WC_INV_EEC_STATE_ERR", ReliableDatagramError, _NOT_OURS),
            (
                "IBV_WC_FATAL_ERR",
                DeviceFatalError,
                "The device is lost: close everything on it and look at the kernel "
                "log.",
            ),
            (
                "IBV_WC_RESP_TIMEOUT_ERR",
                ResponseTimeoutError,
                "The peer's device answered too late. " + _RECONNECT,
            ),
            (
                "IBV_WC_GENERAL_ERR",
                DeviceFatalError,
                "The device reports an error of its own: look at vendor_err and at "
                "the kernel log.",
            ),
            ("IBV_WC_TM_ERR", TagMatchingError, _NOT_OURS),
            ("IBV_WC_TM_RNDV_INCOMPLETE", TagMatchingError, _NOT_OURS),
        )
    )
)


def status_name(status: int) -> str:
    """Return the name that verbs give a status of a work completion."""
    return next(
        (row.name for row in WC_STATUSES if row.status == status), f"status {status}"
    )


def completion_error(
    status: int,
    *,
    wr_id: int = 0,
    qp_num: int = 0,
    vendor_err: int = 0,
    opname: str = "work request",
    detail: str = "",
) -> CompletionError:
    """Make the exception for a failed work completion; the caller raises it.

    Args:
      status: The completion's ``enum ibv_wc_status``. Numbers without a name
        give :class:`UnknownCompletionError`.
      wr_id: The completion's ``wr_id``.
      qp_num: The completion's QP number.
      vendor_err: The device's own code.
      opname: What was attempted, for the message, such as ``"RDMA WRITE"``.
      detail: More facts for the message, such as GIDs, MTU and timeout.

    Raises:
      InternalError: ``status`` is success; no exception may be made of that.
    """
    if 0 <= status < len(WC_STATUSES):
        row = WC_STATUSES[status]
    else:
        row = WCStatus(
            status,
            f"ibv_wc_status {status}",
            UnknownCompletionError,
            "See the device vendor's documentation. " + _RECONNECT,
        )
    if row.error is None:
        raise InternalError("a successful completion was treated as an error")
    message = (
        f"{opname} failed with {row.name} ({status}): "
        f"wr_id {wr_id:#x}, QP {qp_num:#x}, vendor_err {vendor_err:#x}"
    )
    if detail:
        message = f"{message}; {detail}"
    return row.error(
        message,
        status=status,
        status_name=row.name,
        wr_id=wr_id,
        qp_num=qp_num,
        vendor_err=vendor_err,
        hint=row.hint,
    )


# Keyed by errno and verb; the verb "" stands for all others.
_ERRNO_HINTS: dict[tuple[int, str], str] = {
    (_errno.EINVAL, "reg_mr"): (
        "The length is zero, or remote access was asked for without local write."
    ),
    (_errno.EFAULT, "reg_mr"): (
        "Part of the range is not mapped or not writable in this process; GPU "
        "memory needs nvidia-peermem or dma-buf."
    ),
    (_errno.EINVAL, "modify_qp"): (
        "The transition or an attribute is not valid: check port, GID index, MTU "
        "and ib_timeout of both sides."
    ),
    (_errno.ETIMEDOUT, "modify_qp"): (
        "The peer's address did not resolve: check that both GIDs are in one "
        "network and that the GID index is right."
    ),
    (_errno.ENETUNREACH, "modify_qp"): "There is no route to the peer's GID.",
    (_errno.EHOSTUNREACH, "modify_qp"): "There is no route to the peer's GID.",
    (_errno.EADDRNOTAVAIL, "open_device"): (
        "No interface of this host has that address: see the option host."
    ),
    (_errno.EINVAL, "create_qp"): (
        "A queue depth or SGE count is beyond the device's limits: lower sq_depth "
        "or max_sge."
    ),
    (_errno.EINVAL, "create_cq"): "The depth is beyond the device's limit.",
    (_errno.EACCES, ""): (
        "No permission on /dev/infiniband/uverbs*: give the user access (group "
        "rdma) or pass the device into the container."
    ),
    (_errno.EPERM, ""): (
        "Not permitted: a container needs /dev/infiniband and CAP_IPC_LOCK."
    ),
    (_errno.ENODEV, ""): "The device has gone; was it hot-plugged or reset?",
    (_errno.EIO, ""): "The device does not respond; look at the kernel log.",
    (_errno.EBUSY, ""): (
        "Something made from it still exists: close QPs, MRs, CQs, channels and PD "
        "in that order."
    ),
    (_errno.EMFILE, ""): "Out of file descriptors: raise `ulimit -n`.",
    (_errno.ENFILE, ""): "The system is out of file descriptors.",
    (_errno.EOPNOTSUPP, ""): "The device or its driver does not offer this.",
    (_errno.ENOSYS, ""): "The kernel or the driver does not offer this.",
}

_POSTING = ("post_send", "post_recv")


def _memlock_hint() -> str:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return (
        f"RLIMIT_MEMLOCK is {limit} here: raise it with `ulimit -l unlimited`, for "
        "docker with `--ulimit memlock=-1`, or grant CAP_IPC_LOCK; and check that "
        "there is free memory."
    )


def verbs_error(errno: int, call: str, detail: str = "") -> VerbsError:
    """Make the exception for a verb that returned ``errno``; the caller raises it.

    Args:
      errno: The error number, positive. Take it before anything else runs.
      call: The verb, as in the man pages, with or without ``ibv_``.
      detail: More facts for the message, such as an address and a length.
    """
    verb = call[4:] if call.startswith("ibv_") else call
    code = _errno.errorcode.get(errno, f"errno {errno}")
    message = f"{call} failed with {code}: {os.strerror(errno)}"
    if detail:
        message = f"{message}; {detail}"
    if errno == _errno.ENOMEM and verb in _POSTING:
        return QueueFullError(
            errno,
            message,
            call=call,
            hint="The queue is full, or the WR has more SGEs than the QP permits.",
        )
    if errno == _errno.ENOMEM:
        hint = _memlock_hint()
    else:
        hint = _ERRNO_HINTS.get((errno, verb)) or _ERRNO_HINTS.get((errno, ""), "")
    return VerbsError(errno, message, call=call, hint=hint)
