"""Valid control messages for the tests of the control plane, made by hand."""

from __future__ import annotations

from typing import Any

from kvxfer import wire

GID = bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
NONCE = b"n" * 16
INCARNATION = b"i" * 16
CONN_ID = 0xC0FFEE


def qp(number: int = 17) -> wire.QPInfo:
    return wire.QPInfo(qp_num=number, psn=5, gid=GID, mtu=5, token=b"t" * 32)


def device(name: str = "soft0") -> wire.DeviceCandidate:
    return wire.DeviceCandidate(
        name=name, kind="soft", link_layer="ethernet", gid=GID, mtu=5
    )


def geometry(n_layers: int = 2, planes: str = "kv") -> list[wire.GroupGeometry]:
    return [
        wire.GroupGeometry(
            name="default",
            planes=[
                wire.PlaneGeometry(
                    name=name,
                    layers=list(range(n_layers)),
                    block_bytes=1024,
                    dtype="bf16",
                    n_blocks=64,
                )
                for name in planes
            ],
        )
    ]


def windows(n_layers: int = 2, planes: str = "kv") -> list[wire.Window]:
    return [
        wire.Window(
            group="default",
            plane=plane,
            layer=layer,
            base=(index * n_layers + layer + 1) << 20,
            block_stride=1024,
            block_bytes=1024,
            n_blocks=64,
            rkey=0xDEAD + layer,
        )
        for index, plane in enumerate(planes)
        for layer in range(n_layers)
    ]


def endpoint(role: wire.Role, **changes: Any) -> wire.Endpoint:
    if role == "initiator":
        fields: dict[str, Any] = {"qps": [qp()]}
    else:
        ring = wire.NotifyRing(address=1 << 30, length=1 << 16, rkey=7, receives=64)
        fields = {"qps": [qp(23)], "windows": windows(), "ring": ring}
    return wire.Endpoint(**{**fields, **changes})


def hello(role: wire.Role = "initiator", **changes: Any) -> wire.Hello:
    fields: dict[str, Any] = {
        "incarnation": INCARNATION,
        "versions": (1, 1),
        "features": 0b110,
        "role": role,
        "agent": "kvxfer test",
        "geometry": geometry(),
        "devices": [device()],
        "nonce": NONCE,
    }
    return wire.Hello(**{**fields, **changes})


def offer(role: wire.Role = "target", **changes: Any) -> wire.Offer:
    """An offer of a listener in ``role``."""
    fields: dict[str, Any] = {
        "conn_id": CONN_ID,
        "incarnation": b"l" * 16,
        "version": 1,
        "features": 0b010,
        "geometry": geometry(),
        "device": device("soft9"),
        "dialer_device": "soft0",
        "endpoint": endpoint(role),
        "nonce": NONCE,
    }
    return wire.Offer(**{**fields, **changes})


def accept(role: wire.Role = "initiator", **changes: Any) -> wire.Accept:
    """An Accept of a dialer in ``role``."""
    fields: dict[str, Any] = {"conn_id": CONN_ID, "endpoint": endpoint(role)}
    return wire.Accept(**{**fields, **changes})


def invite(**changes: Any) -> wire.Invite:
    fields: dict[str, Any] = {"invite": NONCE, "host": "::1", "port": 7777, **changes}
    return wire.Invite(incarnation=INCARNATION, **fields)


def requests_from_target() -> list[wire.RequestMessage]:
    group = wire.OfferedGroup(
        group="main", first_block=3, block_ids=b"\1\0\0\0" * 2, announced=[0]
    )
    layers = [wire.GroupLayers(group="main", layers=[1, 2])]
    return [
        wire.OfferBlocks(
            conn_id=CONN_ID, request_id=b"r1", generation=5, groups=[group], lease=30.0
        ),
        wire.Announced(conn_id=CONN_ID, generation=5, layers=layers),
        wire.Abort(conn_id=CONN_ID, generation=5, code="lease", reason="x", layer=1),
    ]


def requests_from_initiator() -> list[wire.RequestMessage]:
    final = wire.FinalLayer(group="main", layer=1, total=2, digest=2**64 - 1)
    return [
        wire.Resume(conn_id=CONN_ID, generations=[5, 6]),
        wire.LayersFinal(conn_id=CONN_ID, generation=5, layers=[final]),
        wire.Finish(conn_id=CONN_ID, generation=5, total=9, aux=b"aux"),
        wire.Ended(conn_id=CONN_ID, generation=5, code="aborted", bytes_done=7),
    ]


def one_of_each() -> list[wire.Message]:
    return [
        hello(),
        offer(),
        accept(),
        wire.Ready(conn_id=CONN_ID),
        wire.Refuse(code="busy", message="later", detail="try again"),
        wire.Ping(seq=1),
        wire.Pong(seq=1),
        wire.Credit(conn_id=CONN_ID, consumed_bytes=4096, consumed_records=3),
        wire.Fence(conn_id=CONN_ID, reason="a write failed"),
        wire.Fenced(conn_id=CONN_ID),
        wire.Failed(conn_id=CONN_ID, request_id=b"r1", layers=[0, 1], reason="x"),
        wire.Bye(conn_id=CONN_ID, reason="done"),
        wire.Drain(conn_id=CONN_ID, reason="an update"),
        wire.Drained(conn_id=CONN_ID),
        invite(),
        *requests_from_target(),
        *requests_from_initiator(),
    ]
