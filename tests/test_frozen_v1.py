"""Today's code and the first release's protocol, in both roles and both directions."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from kvxfer import wire
from kvxfer.control import ControlClient, ControlServer
from kvxfer.errors import VersionMismatchError
from tests import control_messages as make
from tests import frozen_v1
from tests.test_control import FAST, PATIENCE, Dialer, Listener

# -- messages ------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(frozen_v1.FRAMES))
def test_what_it_said_is_understood(name: str) -> None:
    data = frozen_v1.FRAMES[name]
    message = wire.decode(data)
    said = frozen_v1.decode(data)
    today = frozen_v1.decode(wire.encode(message))
    # What it left out had defaults, and still has the same meaning.
    assert _only(today, said) == said


def _only(value: Any, like: Any) -> Any:
    """Return ``value`` without what ``like`` does not have."""
    if isinstance(like, dict):
        return {name: _only(value[name], like[name]) for name in like}
    if isinstance(like, list):
        return [_only(a, b) for a, b in zip(value, like, strict=True)]
    return value


@pytest.mark.parametrize("message", make.one_of_each(), ids=lambda m: type(m).__name__)
def test_what_is_said_today_it_understood(message: wire.Message) -> None:
    """Of the messages that need no feature; the others are not sent to it."""
    tag = message.__struct_config__.tag
    if tag in frozen_v1.REQUIRED:
        assert frozen_v1.decode(wire.encode(message))["type"] == tag
    else:
        with pytest.raises(AssertionError, match="does not know"):
            frozen_v1.decode(wire.encode(message))


def test_every_message_that_it_knew_still_exists() -> None:
    today = {kind.__struct_config__.tag for kind in wire.Message.__args__}
    assert set(frozen_v1.REQUIRED) <= today


@pytest.mark.parametrize("name", sorted(frozen_v1.FRAMES))
def test_unknown_fields_are_ignored_at_every_level(name: str) -> None:
    def grown(value: Any) -> Any:
        if isinstance(value, dict):
            inner = {key: grown(item) for key, item in value.items()}
            return {**inner, "x-new": [{"a": 1}], "x-other": "text"}
        return [grown(item) for item in value] if isinstance(value, list) else value

    data = frozen_v1.FRAMES[name]
    newer = frozen_v1.encode(grown(frozen_v1.decode(data)))
    assert len(newer) > len(data)
    assert wire.decode(newer) == wire.decode(data)


# -- conversations ---------------------------------------------------------------


class Old:
    """The old release's end of a ZMQ socket; each frame is checked as it did."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket
        self.identity: list[bytes] = []

    async def hear(self, wanted: str) -> dict[str, Any]:
        """Wait for a message, answering pings as it goes."""
        while True:
            *self.identity, data = await asyncio.wait_for(
                self.socket.recv_multipart(), PATIENCE
            )
            message = frozen_v1.decode(data)
            if message["type"] == "ping":
                await self.say("pong", seq=message["seq"])
            else:
                assert message["type"] == wanted
                return message

    async def say(self, name: str, **changes: Any) -> None:
        await self.socket.send_multipart(
            [*self.identity, frozen_v1.frame(name, **changes)]
        )


@pytest.mark.parametrize("role", ["initiator", "target"])
async def test_it_dials(role: wire.Role) -> None:
    ours: wire.Role = "target" if role == "initiator" else "initiator"
    listener = Listener(ours)
    async with ControlServer(
        listener, incarnation=b"l" * 16, options=FAST, features=wire.FEATURES
    ) as server:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(f"tcp://{server.endpoint}")
            old = Old(dealer)
            await old.say(
                "hello" if role == "initiator" else "hello target", features=0
            )
            offer = await old.hear("offer")
            assert (offer["version"], offer.get("features", 0)) == (1, 0)
            conn_id = offer["conn_id"]
            endpoint = frozen_v1.decode(
                frozen_v1.FRAMES["accept" if role == "initiator" else "offer"]
            )["endpoint"]
            await old.say("accept", conn_id=conn_id, endpoint=endpoint)
            assert (await old.hear("ready"))["conn_id"] == conn_id
            await old.say("ping", seq=7)
            assert (await old.hear("pong"))["seq"] == 7
            if role == "initiator":
                assert server.send_credit(conn_id, 64, 1)
                assert (await old.hear("credit"))["consumed_records"] == 1
            else:
                await old.say("credit", conn_id=conn_id)
            await old.say("failed", conn_id=conn_id)
            await listener.wait_for(lambda: "failed" in listener.calls)
            await old.say("fence", conn_id=conn_id)
            await old.hear("fenced")
            fence = asyncio.ensure_future(server.fence(conn_id, "x", timeout=PATIENCE))
            await old.hear("fence")
            await old.say("fenced", conn_id=conn_id)
            assert await fence
            server.drop(conn_id, "enough")
            assert (await old.hear("bye"))["reason"] == "enough"
            await old.say("ping", seq=8)
            refuse = await old.hear("refuse")
            assert refuse["code"] == "unknown-connection"


async def test_it_listens() -> None:
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        old = Old(router)
        dialer = Dialer(features=wire.FEATURES)
        client = ControlClient(dialer, options=FAST)
        connecting = asyncio.ensure_future(
            client.connect(f"127.0.0.1:{port}", timeout=PATIENCE)
        )
        hello = await old.hear("hello")
        assert hello["versions"] == [1, 1]
        await old.say("offer", nonce=hello["nonce"], features=0)
        conn_id = (await old.hear("accept"))["conn_id"]
        await old.say("ready", conn_id=conn_id)
        info = await connecting
        assert (info.version, info.features) == (1, 0)
        await old.say("credit", conn_id=conn_id)
        await old.say("failed", conn_id=conn_id)
        await dialer.wait_for(lambda: {"credit", "failed"} <= set(dialer.calls))
        fence = asyncio.ensure_future(client.request_fence("x", timeout=PATIENCE))
        await old.hear("fence")
        await old.say("fenced", conn_id=conn_id)
        assert await fence
        await old.say("fence", conn_id=conn_id)
        await old.hear("fenced")
        await client.close("that was all")
        assert (await old.hear("bye"))["reason"] == "that was all"


@pytest.mark.parametrize("ours", [(1, 1), (1, 2), (1, 9), (2, 3)])
@pytest.mark.parametrize("theirs", [(1, 1), (1, 3), (2, 9), (3, 9)])
def test_the_highest_common_version_is_spoken(
    ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    common = set(range(ours[0], ours[1] + 1)) & set(range(theirs[0], theirs[1] + 1))
    if common:
        assert wire.common_version(ours, theirs) == max(common)
    else:
        with pytest.raises(VersionMismatchError):
            wire.common_version(ours, theirs)


def test_each_feature_has_a_bit_of_its_own() -> None:
    bits = [
        value
        for name, value in vars(wire).items()
        if name.startswith("FEATURE_") and isinstance(value, int)
    ]
    assert all(bit.bit_count() == 1 for bit in bits)
    assert all(not a & b for a, b in itertools.combinations(bits, 2))
    assert sum(bits) == wire.FEATURES


def test_the_recorded_frames_are_what_they_were() -> None:
    """They came out of the code of then, and are never made anew."""
    assert msgspec.msgpack.decode(frozen_v1.FRAMES["ping"][6:]) == {
        "type": "ping",
        "seq": 1,
    }
    assert {len(data) for data in frozen_v1.FRAMES.values()} == {
        22, 31, 32, 41, 53, 60, 66, 68, 182, 357, 360, 505, 902,
    }  # fmt: skip
