"""Protocol version 1 without any feature, as its first release spoke it. Frozen.

``frames.json`` holds messages as that code encoded them. The codec here is its own
and small, and knows what that release knew: which messages there are, and which
fields each must have. Nothing here changes when the protocol grows; a change that
these tests need would break that release.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["FRAMES", "REQUIRED", "decode", "encode", "frame"]

_HEAD = b"KVXF\x00\x01"

FRAMES: dict[str, bytes] = {
    name: bytes.fromhex(text)
    for name, text in json.loads(
        (Path(__file__).parent / "frames.json").read_text()
    ).items()
}

_QP = {"qp_num": int, "psn": int, "gid": bytes, "mtu": int}
_DEVICE = {"name": str, "kind": str, "link_layer": str, "gid": bytes, "mtu": int}
_PLANE = {
    "name": str,
    "layers": [int],
    "block_bytes": int,
    "dtype": str,
    "n_blocks": int,
}
_GEOMETRY = [{"name": str, "planes": [_PLANE]}]

#: What that release needed of each message; all else it ignored or had defaults for.
REQUIRED: dict[str, dict[str, Any]] = {
    "hello": {
        "incarnation": bytes,
        "versions": [int],
        "role": str,
        "geometry": _GEOMETRY,
        "devices": [_DEVICE],
        "nonce": bytes,
    },
    "offer": {
        "conn_id": int,
        "incarnation": bytes,
        "version": int,
        "geometry": _GEOMETRY,
        "device": _DEVICE,
        "dialer_device": str,
        "endpoint": {"qps": [_QP]},
        "nonce": bytes,
    },
    "accept": {"conn_id": int, "endpoint": {"qps": [_QP]}},
    "ready": {"conn_id": int},
    "refuse": {"code": str},
    "ping": {"seq": int},
    "pong": {"seq": int},
    "credit": {"conn_id": int, "consumed_bytes": int, "consumed_records": int},
    "fence": {"conn_id": int},
    "fenced": {"conn_id": int},
    "failed": {"conn_id": int, "layers": [int]},
    "bye": {"conn_id": int},
}


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        for name, inner in shape.items():
            assert name in value, f"{where}.{name} is missing"
            _check(value[name], inner, f"{where}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for item in value:
            _check(item, shape[0], f"{where}[]")
    else:
        assert type(value) is shape, f"{where} is {type(value).__name__}"


def decode(data: bytes) -> dict[str, Any]:
    """Take a frame as that release did.

    Raises:
      AssertionError: That release would have refused it.
    """
    assert data[: len(_HEAD)] == _HEAD, "another magic or version"
    message: dict[str, Any] = msgspec.msgpack.decode(data[len(_HEAD) :])
    tag = message["type"]
    assert tag in REQUIRED, f"a message that version 1 does not know: {tag}"
    _check(message, REQUIRED[tag], tag)
    return message


def encode(message: dict[str, Any]) -> bytes:
    """Make a frame of a map, as it is."""
    return _HEAD + msgspec.msgpack.encode(message)


def frame(name: str, **changes: Any) -> bytes:
    """Return a recorded frame with some fields changed."""
    return encode({**decode(FRAMES[name]), **changes})
