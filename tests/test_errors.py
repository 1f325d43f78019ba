"""The exception tree and the two tables that lead into it."""

from __future__ import annotations

import errno
import inspect
import pickle
import re
from pathlib import Path

import pytest

from kvxfer import errors

HEADER = Path("/usr/include/infiniband/verbs.h")

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, errors.KVXferError)
]


def header_statuses() -> list[str]:
    """The names of enum ibv_wc_status in the installed header, in order."""
    body = re.search(r"enum ibv_wc_status \{(.*?)\};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    return re.findall(r"IBV_WC_\w+", body.group(1))


@pytest.mark.parametrize("row", errors.WC_STATUSES[1:], ids=lambda row: row.name)
def test_every_status_has_its_error(row: errors.WCStatus) -> None:
    error = errors.completion_error(
        row.status, wr_id=7, qp_num=0x11, vendor_err=0x81, opname="RDMA WRITE"
    )
    assert row.error is not None
    assert type(error) is row.error
    assert (error.status, error.status_name) == (row.status, row.name)
    assert (error.wr_id, error.qp_num, error.vendor_err) == (7, 0x11, 0x81)
    assert error.hint == row.hint
    assert row.hint.endswith((".", "?"))
    for fact in (row.name, "RDMA WRITE", "0x11", "0x81", row.hint):
        assert fact in str(error)


def test_table_covers_the_range() -> None:
    assert [row.status for row in errors.WC_STATUSES] == list(range(24))


@pytest.mark.skipif(not HEADER.exists(), reason="infiniband/verbs.h not installed")
def test_table_agrees_with_the_header() -> None:
    assert [row.name for row in errors.WC_STATUSES] == header_statuses()


def test_every_completion_class_is_used() -> None:
    used = {row.error for row in errors.WC_STATUSES}
    subclasses = set(errors.CompletionError.__subclasses__())
    assert subclasses - used == {errors.UnknownCompletionError}


def test_success_never_becomes_an_error() -> None:
    with pytest.raises(errors.InternalError):
        errors.completion_error(0)


@pytest.mark.parametrize("status", [24, 255, -1])
def test_unknown_status(status: int) -> None:
    error = errors.completion_error(status)
    assert type(error) is errors.UnknownCompletionError
    assert error.status == status
    assert str(status) in str(error)


def test_context_is_part_of_the_text() -> None:
    error = errors.completion_error(10)
    error.peer = "10.0.0.2:7777"
    error.layer = 0
    error.request_id = b"r1"
    error.fenced = False
    text = str(error)
    for fact in ("10.0.0.2:7777", "layer 0", "b'r1'", "not confirmed"):
        assert fact in text


@pytest.mark.parametrize("call", ["ibv_reg_mr", "reg_mr"])
def test_memlock(call: str) -> None:
    error = errors.verbs_error(errno.ENOMEM, call, "length 1024")
    assert error.errno == errno.ENOMEM
    assert error.call == call
    for fact in ("RLIMIT_MEMLOCK", "ulimit -l", "memlock=-1", "length 1024", "ENOMEM"):
        assert fact in str(error)


@pytest.mark.parametrize("call", ["ibv_post_send", "ibv_post_recv"])
def test_full_queue(call: str) -> None:
    error = errors.verbs_error(errno.ENOMEM, call)
    assert type(error) is errors.QueueFullError
    assert "RLIMIT_MEMLOCK" not in str(error)


def test_permission_names_the_device_file() -> None:
    error = errors.verbs_error(errno.EACCES, "ibv_open_device")
    assert "uverbs" in error.hint
    assert isinstance(error, OSError)


def test_unknown_errno_has_an_error() -> None:
    error = errors.verbs_error(54321, "ibv_modify_qp")
    assert error.errno == 54321
    assert "54321" in str(error)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_class_is_exported_drawn_and_documented(cls: type[BaseException]) -> None:
    assert cls.__name__ in errors.__all__
    assert errors.__doc__ is not None
    assert re.search(rf"^ +{cls.__name__}\b", errors.__doc__, re.MULTILINE)
    assert cls.__doc__


@pytest.mark.parametrize(
    "error",
    [
        errors.completion_error(12, wr_id=3, qp_num=4, vendor_err=5),
        errors.verbs_error(errno.ENOMEM, "ibv_reg_mr"),
        errors.AddressInUseError("tcp://[::1]:7777", hint="Choose another port."),
        errors.RefusedError("no", code="busy"),
        errors.GeometryMismatchError("32 != 16"),
        errors.WriteTimeoutError("30 s"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pickle(error: errors.KVXferError) -> None:
    error.peer = "a"
    error.fenced = True
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


def test_bases() -> None:
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.GeometryMismatchError, errors.LayoutError)
    assert issubclass(errors.ConnectTimeoutError, TimeoutError)
    assert issubclass(errors.WriteTimeoutError, TimeoutError)
    assert errors.AddressInUseError("x").errno == errno.EADDRINUSE
    assert str(errors.AddressInUseError("x")) == "x"
