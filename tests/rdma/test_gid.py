"""Which GID a connection leaves from, and what is said of a wrong choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvxfer import Client, _verbs, devices, ports
from kvxfer.errors import DeviceUnavailableError
from tests.endpoints import arena, connected, scattered

pytestmark = pytest.mark.rdma

IPV4_MAPPED = bytes(10) + b"\xff\xff"


@contextlib.contextmanager
def opened(name: str) -> Iterator[tuple[_verbs.Device, devices.DeviceSpec]]:
    name, _, port = name.partition(":")
    spec = devices.DeviceSpec(name, "libibverbs", int(port or 1))
    with _verbs.Device(name, provider="libibverbs") as device:
        yield device, spec


def table(device: _verbs.Device, spec: devices.DeviceSpec) -> dict[int, bytes]:
    """Return the entries of the port's GID table that are not empty."""
    length = device.query_port(spec.port_num).gid_tbl_len
    gids = {i: device.query_gid(spec.port_num, i) for i in range(length)}
    return {i: gid for i, gid in gids.items() if any(gid)}


def test_an_ipv4_address_is_chosen(device: str) -> None:
    with opened(device) as (handle, spec):
        if handle.query_port(spec.port_num).link_layer != "ethernet":
            pytest.skip("not on Ethernet")
        gids = table(handle, spec)
        choice = ports.choose_gid(handle, spec, None)
        assert gids[choice.index] == choice.gid
        if not any(gid.startswith(IPV4_MAPPED) for gid in gids.values()):
            pytest.skip("the netdev has no IPv4 address")
        assert choice.gid.startswith(IPV4_MAPPED)
        assert choice.gid_type == "RoCE v2"


def test_an_index_is_taken_at_its_word(device: str) -> None:
    with opened(device) as (handle, spec):
        for index, gid in table(handle, spec).items():
            choice = ports.choose_gid(handle, spec, index)
            assert (choice.index, choice.gid) == (index, gid)


async def test_an_empty_entry_is_refused(device: str) -> None:
    with opened(device) as (handle, spec):
        gids = table(handle, spec)
        length = handle.query_port(spec.port_num).gid_tbl_len
    empty = next(i for i in range(length + 1) if i not in gids)
    for index in (empty, length + 100):
        with arena() as source:
            client = Client(source.cache, gid_index=index)
            with pytest.raises(DeviceUnavailableError, match=f"GID at index {index}"):
                await client.open()


async def test_every_entry_carries_bytes(device: str) -> None:
    """An IPv4 address, a link-local one: whatever both ends use."""
    with opened(device) as (handle, spec):
        gids = table(handle, spec)
    for index in gids:
        async with connected(gid_index=index) as pair:
            await pair.check_write(scattered(32, 20, 1), scattered(32, 20, 2))


async def test_indices_that_do_not_go_together(device: str) -> None:
    with opened(device) as (handle, spec):
        gids = table(handle, spec)
    ipv4 = next((i for i, gid in gids.items() if gid.startswith(IPV4_MAPPED)), None)
    other = next((i for i, gid in gids.items() if gid.startswith(b"\xfe\x80")), None)
    if ipv4 is None or other is None:
        pytest.skip("the table has no two entries of different kinds")
    for ours, theirs in ((ipv4, other), (other, ipv4)):
        said = r"(?s)here:.*at the peer:.*(IPv4 here, IPv6 link-local|link-local here)"
        with pytest.raises(DeviceUnavailableError, match=said):
            async with connected(gid_index=ours, server_options={"gid_index": theirs}):
                pytest.fail("connected")


async def test_a_device_that_is_not_there(device: str) -> None:
    with arena() as source:
        client = Client(source.cache, device="rocket7")
        with pytest.raises(DeviceUnavailableError, match=device.partition(":")[0]):
            await client.open()
