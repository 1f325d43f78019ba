"""What happens to a device reaches the connections that it concerns."""

from __future__ import annotations

import asyncio
import logging

import pytest

from kvxfer.errors import (
    BrokenPeerError,
    DeviceUnavailableError,
    KVXferError,
    RetryExceededError,
)
from kvxfer.testing import Loopback, loopback, set_faults
from kvxfer.verbs_types import AsyncEvent
from tests.endpoints import QUICK, failure_of, until

IDS = list(range(16))


def adapter(pair: Loopback, side: str = "client"):  # type: ignore[no-untyped-def]
    endpoint = pair.client if side == "client" else pair.server
    return endpoint._host.adapters[0]


async def connect_anew(pair: Loopback) -> None:
    await pair.peer.close()
    peer = await pair.reconnect()
    await pair.client.write_cache(peer, IDS, IDS)


async def test_writes_wait_for_a_port() -> None:
    async with loopback(**QUICK) as pair:
        await pair.client.write_cache(pair.peer, IDS, IDS)
        set_faults(pair.client, "act=port_down@t=0us")
        await until(lambda: adapter(pair).trouble)
        assert pair.peer.connected
        assert "port is down" in pair.peer.link.suspicion
        write = asyncio.ensure_future(pair.client.write_cache(pair.peer, IDS, IDS))
        set_faults(pair.client, "act=port_up@t=0us")
        await until(lambda: not adapter(pair).trouble)
        await write
        await connect_anew(pair)


async def test_a_port_that_stays_down_is_named() -> None:
    async with loopback(**{**QUICK, "ib_timeout": 14}) as pair:
        set_faults(pair.client, "nth=1,act=port_down,on=initiator")
        error = await failure_of(pair.client.write_cache(pair.peer, IDS, IDS))
        assert isinstance(error, RetryExceededError)
        assert "its port is down (PORT_ERR)" in str(error)


@pytest.mark.parametrize("side", ["client", "server"])
async def test_new_connections_leave_from_the_new_gid(
    side: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with loopback(**QUICK) as pair:
        device = adapter(pair, side)
        before = device.gid.gid
        endpoint = pair.client if side == "client" else pair.server
        set_faults(endpoint, "act=gid_change@t=0us")
        await until(lambda: device.gid.gid != before)
        assert not device.trouble
        if side == "client":
            assert "no longer has the GID" in pair.peer.link.suspicion
        await connect_anew(pair)
    assert "new connections leave from" in caplog.text


async def test_a_failed_qp_is_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Two peers of one device: the one whose QP fails is taken down, and says why."""
    async with loopback(**QUICK) as first, loopback(**QUICK) as second:
        other = await first.client.connect("127.0.0.1", second.server.port)
        qp_num = first.peer.link.qp.qp_num
        set_faults(first.client, f"nth=1,act=qp_fatal,qp={qp_num},on=initiator")
        error = await failure_of(first.client.write_cache(first.peer, IDS, IDS))
        assert isinstance(error, KVXferError)
        await until(lambda: not first.peer.connected)
        assert other.connected
        await first.client.write_cache(other, IDS, IDS)
        await connect_anew(first)


async def test_a_qp_that_fails_at_the_target(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with loopback(**QUICK) as pair:
            set_faults(pair.server, "nth=1,act=qp_fatal,on=target")
            error = await failure_of(pair.client.write_cache(pair.peer, IDS, IDS))
            assert isinstance(error, KVXferError)
            await until(lambda: not pair.server.peers)
    assert "QP_FATAL" in caplog.text


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_lost_device_is_opened_anew(side: str) -> None:
    """All its connections end at once, idle ones too; new ones can be made."""
    async with loopback(**QUICK) as pair:
        endpoint = pair.client if side == "client" else pair.server
        lost = adapter(pair, side)
        set_faults(endpoint, "act=device_fatal@t=0us")
        await until(lambda: not pair.peer.connected)
        if side == "client":
            assert isinstance(pair.peer.error, BrokenPeerError)
            assert "soft0: the device has failed" in str(pair.peer.error)
        await until(lambda: endpoint._host.adapters)
        assert adapter(pair, side) is not lost
        await connect_anew(pair)


async def test_a_device_that_cannot_be_opened_again_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with loopback(**QUICK) as pair:
        # A fault plan that is malformed keeps the device from being opened.
        monkeypatch.setenv("KVXFER_SOFT_FAULT", "act=nonsense")
        set_faults(pair.client, "act=device_fatal@t=0us")
        await until(lambda: not pair.peer.connected)
        await until(lambda: not pair.client._host._replacing)
        error = await failure_of(pair.reconnect())
        assert isinstance(error, DeviceUnavailableError)
        assert "soft0: the device has failed (DEVICE_FATAL)" in str(error)


async def test_a_completion_that_is_lost_ends_all_that_waits() -> None:
    async with loopback(**QUICK) as pair:
        set_faults(pair.client, "act=cq_overflow,nth=1")
        error = await asyncio.wait_for(
            failure_of(pair.client.write_cache(pair.peer, IDS, IDS)), 10
        )
        assert isinstance(error, KVXferError)
        await connect_anew(pair)


def test_events_have_names() -> None:
    assert AsyncEvent(8, None, None).name == "DEVICE_FATAL"
    assert AsyncEvent(99, None, None).name == "event 99"
