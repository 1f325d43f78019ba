"""Messages: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvxfer import wire
from kvxfer.errors import KVXferError, ProtocolError, VersionMismatchError
from tests import control_messages as make

MESSAGES = make.one_of_each()
FRAMES = [wire.encode(message) for message in MESSAGES]
REFUSALS = (ProtocolError, VersionMismatchError)


def _ids(message: wire.Message) -> str:
    return type(message).__name__


def _frame(body: Any, version: int = 1) -> bytes:
    return wire.MAGIC + version.to_bytes(2, "big") + msgspec.msgpack.encode(body)


@pytest.mark.parametrize("message", MESSAGES, ids=_ids)
def test_a_message_survives_the_wire(message: wire.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


def test_every_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.Message.__args__)


@pytest.mark.parametrize("message", MESSAGES, ids=_ids)
def test_unknown_fields_are_ignored(message: wire.Message) -> None:
    body = msgspec.to_builtins(message, builtin_types=(bytes,))
    body["from_the_future"] = {"deep": [1, 2, {"er": None}]}
    for part in ("endpoint", "device"):
        if part in body:
            body[part]["also_new"] = 1
    assert wire.decode(_frame(body)) == message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(b"")
@example(b"KVXF\x00\x01")
@example(b"KVXF\x00\x01\xdd\xff\xff\xff\xff")
@example(b"KVXF\x00\x01" + b"\x91" * 100_000)
@example(b"KVXF\x00\x01\x82\xa4type\xa3bye\xa6reason\xa1\xff")
def test_random_bytes_are_refused(data: bytes) -> None:
    for frame in (data, wire.MAGIC + b"\x00\x01" + data):
        with pytest.raises(REFUSALS):
            wire.decode(frame)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(FRAMES), st.data())
def test_a_mutated_message_is_a_message_or_refused(
    frame: bytes, data: st.DataObject
) -> None:
    mutant = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            mutant[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut" and len(mutant) > 1:
            del mutant[at]
        else:
            mutant.insert(at, data.draw(st.integers(0, 255)))
    with contextlib.suppress(*REFUSALS):
        message = wire.decode(bytes(mutant))
        assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("frame", FRAMES, ids=[_ids(m) for m in MESSAGES])
def test_every_truncation_is_refused(frame: bytes) -> None:
    for end in range(len(frame)):
        with pytest.raises(REFUSALS):
            wire.decode(frame[:end])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_field_of_anything_is_a_message_or_refused(
    message: wire.Message, data: st.DataObject
) -> None:
    body = msgspec.to_builtins(message, builtin_types=(bytes,))
    where: Any = body
    while True:
        keys = list(where) if isinstance(where, dict) else range(len(where))
        key = data.draw(st.sampled_from(list(keys)))
        inner = where[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            where = inner
            continue
        if isinstance(where, tuple):
            return
        where[key] = data.draw(JSON)
        break
    with contextlib.suppress(*REFUSALS):
        wire.decode(_frame(body))


def _hello_with(**changes: Any) -> wire.Hello:
    return make.hello(**changes)


def _qp(**changes: Any) -> wire.Accept:
    qp = msgspec.structs.replace(make.qp(), **changes)
    return make.accept(endpoint=wire.Endpoint(qps=[qp]))


def _window(**changes: Any) -> wire.Offer:
    window = msgspec.structs.replace(make.windows()[0], **changes)
    return make.offer(endpoint=make.endpoint("target", windows=[window]))


def _ring(**changes: Any) -> wire.Offer:
    fields = {"address": 0, "length": 64, "rkey": 1, "receives": 1, **changes}
    ring = wire.NotifyRing(**fields)
    return make.offer(endpoint=make.endpoint("target", ring=ring))


def _plane(**changes: Any) -> wire.Hello:
    plane = msgspec.structs.replace(make.geometry()[0].planes[0], **changes)
    return _hello_with(geometry=[wire.GroupGeometry(name="g", planes=[plane])])


def _many_planes() -> wire.Hello:
    plane = make.geometry()[0].planes[0]
    planes = [
        msgspec.structs.replace(plane, name=str(i), layers=list(range(1000)))
        for i in range(5)
    ]
    return _hello_with(geometry=[wire.GroupGeometry(name="g", planes=planes)])


BAD: dict[str, Any] = {
    "qpn of 25 bits": lambda: _qp(qp_num=1 << 24),
    "qpn zero": lambda: _qp(qp_num=0),
    "psn of 25 bits": lambda: _qp(psn=1 << 24),
    "mtu 0": lambda: _qp(mtu=0),
    "mtu 6": lambda: _qp(mtu=6),
    "short gid": lambda: _qp(gid=b"\x01"),
    "no gid and no lid": lambda: _qp(gid=bytes(16)),
    "multicast lid": lambda: _qp(gid=bytes(16), lid=0xC000),
    "multicast gid": lambda: _qp(gid=b"\xff" * 16),
    "short token": lambda: _qp(token=b"x"),
    "port 0": lambda: _qp(port_num=0),
    "no qps": lambda: make.accept(endpoint=wire.Endpoint(qps=[])),
    "65 qps": lambda: make.accept(
        endpoint=wire.Endpoint(qps=[make.qp(i + 1) for i in range(65)])
    ),
    "one qp twice": lambda: make.accept(
        endpoint=wire.Endpoint(qps=[make.qp(), make.qp()])
    ),
    "window beyond 64 bits": lambda: _window(base=2**64 - 64 * 1024 + 1),
    "stride times blocks beyond 64 bits": lambda: _window(
        block_stride=1 << 40, n_blocks=1 << 30
    ),
    "overlapping blocks": lambda: _window(block_stride=1023),
    "empty blocks": lambda: _window(block_bytes=0),
    "no blocks": lambda: _window(n_blocks=0),
    "negative base": lambda: _window(base=-1),
    "layer 1024": lambda: _window(layer=1024),
    "rkey of 33 bits": lambda: _window(rkey=1 << 32),
    "window twice": lambda: make.offer(
        endpoint=make.endpoint("target", windows=make.windows() * 2)
    ),
    "ring beyond 64 bits": lambda: _ring(address=2**64 - 1, length=2),
    "ring of nothing": lambda: _ring(length=0),
    "plane without layers": lambda: _plane(layers=[]),
    "layer twice": lambda: _plane(layers=[1, 1]),
    "plane without a name": lambda: _plane(name=""),
    "plane too large": lambda: _plane(block_bytes=1 << 40, n_blocks=1 << 30),
    "5000 planes times layers": _many_planes,
    "plane twice": lambda: _hello_with(geometry=make.geometry(planes="kk")),
    "group twice": lambda: _hello_with(geometry=make.geometry() * 2),
    "device twice": lambda: _hello_with(devices=[make.device(), make.device()]),
    "empty version range": lambda: _hello_with(versions=(2, 1)),
    "version 0": lambda: _hello_with(versions=(0, 1)),
    "unknown role": lambda: _hello_with(role="bystander"),
    "short incarnation": lambda: _hello_with(incarnation=b"x"),
    "short nonce": lambda: _hello_with(nonce=b"x"),
    "offered device of an unknown kind": lambda: make.offer(
        device=msgspec.structs.replace(make.device(), kind="quantum")
    ),
    "request id of 257 bytes": lambda: wire.Failed(
        conn_id=1, request_id=b"r" * 257, layers=[]
    ),
    "endless reason": lambda: wire.Bye(conn_id=1, reason="x" * 8193),
}


@pytest.mark.parametrize("name", BAD)
def test_a_number_beyond_its_limit_is_refused_by_both_sides(name: str) -> None:
    message = BAD[name]()
    with pytest.raises(ProtocolError):
        wire.encode(message)
    body = msgspec.to_builtins(message, builtin_types=(bytes,))
    with pytest.raises(ProtocolError):
        wire.decode(_frame(body))


def test_limits_themselves_are_allowed() -> None:
    for message in (
        _qp(qp_num=0xFFFFFF, psn=0xFFFFFF, mtu=1),
        _qp(gid=bytes(16), lid=0xBFFF, token=b""),
        _window(base=2**64 - 64 * 1024),
        _window(layer=1023, rkey=0xFFFF_FFFF),
        _ring(address=2**64 - 64),
        make.offer(conn_id=2**64 - 1, features=2**64 - 1),
    ):
        assert wire.decode(wire.encode(message)) == message


def test_a_device_kind_of_a_newer_release_passes() -> None:
    new = msgspec.structs.replace(make.device("efa0"), kind="efa", link_layer="efa")
    message = _hello_with(devices=[make.device(), new])
    decoded = wire.decode(wire.encode(message))
    assert isinstance(decoded, wire.Hello)
    assert [device.known for device in decoded.devices] == [True, False]


def test_a_large_windows_table_fits_easily() -> None:
    windows = make.windows(n_layers=128, planes="kvst")
    assert len(windows) == 512
    frame = wire.encode(make.offer(endpoint=make.endpoint("target", windows=windows)))
    assert len(frame) < wire.MAX_MESSAGE_BYTES / 10
    largest = make.windows(n_layers=1024, planes="kvst")
    frame = wire.encode(make.offer(endpoint=make.endpoint("target", windows=largest)))
    assert len(frame) < wire.MAX_MESSAGE_BYTES / 4


def test_an_oversized_frame_is_refused_unread() -> None:
    frame = FRAMES[0][:6] + b"\x00" * wire.MAX_MESSAGE_BYTES
    with pytest.raises(ProtocolError, match="limit is 4194304"):
        wire.decode(frame)


def test_another_version_is_told_apart_from_garbage() -> None:
    ready = msgspec.to_builtins(wire.Ready(conn_id=1))
    with pytest.raises(VersionMismatchError, match=r"version 7.*speaks 1 to 1"):
        wire.decode(_frame({"type": "ready", **ready}, version=7))
    with pytest.raises(ProtocolError):
        wire.decode(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_hello_and_refuse_are_readable_by_every_version() -> None:
    for message in (make.hello(), wire.Refuse(code="version")):
        frame = wire.encode(message, version=9)
        assert wire.decode(frame, versions=(8, 9)) == message
    frame = wire.encode(wire.Ping(seq=1), version=1)
    with pytest.raises(VersionMismatchError):
        wire.decode(frame, versions=(8, 9))
    frame = wire.encode(wire.Ping(seq=1), version=9)
    assert wire.decode(frame, versions=(8, 9)) == wire.Ping(seq=1)


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [((1, 1), (1, 1), 1), ((1, 4), (2, 3), 3), ((2, 3), (1, 2), 2)],
)
def test_the_highest_common_version(
    ours: tuple[int, int], theirs: tuple[int, int], common: int
) -> None:
    assert wire.common_version(ours, theirs) == common
    assert wire.common_version(theirs, ours) == common


def test_no_common_version_names_both_ranges() -> None:
    with pytest.raises(VersionMismatchError, match=r"1 to 2.*3 to 4"):
        wire.common_version((1, 2), (3, 4))


def test_no_repr_shows_a_capability() -> None:
    token = b"SECRETSECRETSECRETSECRETSECRETSE"
    qp = msgspec.structs.replace(make.qp(), token=token)
    window = msgspec.structs.replace(make.windows()[0], rkey=987654321)
    ring = wire.NotifyRing(address=1, length=64, rkey=987654322, receives=1)
    text = repr(
        make.offer(endpoint=wire.Endpoint(qps=[qp], windows=[window], ring=ring))
    )
    assert "SECRET" not in text and token.hex() not in text
    assert "98765432" not in text


def test_errors_carry_no_control_characters_of_the_peer() -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.decode(_frame({"type": "\x1b[31mred\x07"}))
    assert "\x1b" not in str(caught.value)
    assert wire.printable("a\x00b\nc") == "a\ufffdb\nc"
    assert len(wire.printable("x" * 10_000)) < 3000


def test_encoding_nonsense_is_our_error_too() -> None:
    with pytest.raises(KVXferError):
        wire.encode(wire.Bye(conn_id=2**70))
    with pytest.raises(KVXferError):
        wire.encode(wire.Bye(conn_id=object()))  # type: ignore[arg-type]
