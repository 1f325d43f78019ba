"""What Prometheus gets to see, over HTTP, and that it is so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
import urllib.request
from asyncio.subprocess import PIPE
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvxfer import Client, Server
from kvxfer.counters import BOUNDS, Histogram
from kvxfer.errors import ControlError, KVXferError, UsageError
from kvxfer.metrics import Collector, Exporter
from kvxfer.testing import loopback, set_faults
from tests.endpoints import QUICK, SOON, arena, connected, dial, failure_of, take, until
from tests.streaming import HASTY, streamed

T = TypeVar("T")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def fetch(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=SOON) as answer:
        return parse(answer.read().decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"kvxfer_{name}", frozenset(labels.items())]


async def test_a_transfer_as_both_sides_tell_it_over_http() -> None:
    async with loopback(**QUICK) as pair:
        exporters = [
            Exporter(end, "127.0.0.1", 0) for end in (pair.client, pair.server)
        ]
        try:
            for i in range(3):
                await pair.client.write_cache(pair.peer, [i, 5], [7, i], [0, 2])
            await take(pair.server, 6)
            ours, theirs = [
                await asyncio.to_thread(fetch, exporter.url) for exporter in exporters
            ]
        finally:
            for exporter in exporters:
                await asyncio.to_thread(exporter.close)
        n_bytes = 3 * 2 * 2 * 2 * 4096
        assert value(ours, "written_bytes_total") == n_bytes
        assert value(ours, "written_blocks_total") == 3 * 2 * 2
        assert value(ours, "work_requests_total") >= 3 * 2
        assert value(ours, "transfers_total", outcome="done") == 3
        assert value(ours, "transfers_total", outcome="failed") == 0
        assert value(ours, "stage_seconds_count", stage="write") == 3
        assert value(ours, "stage_seconds_count", stage="connect") == 1
        assert value(ours, "stage_seconds_bucket", stage="write", le="+Inf") == 3
        assert value(ours, "stage_seconds_sum", stage="write") > 0
        assert value(ours, "connections", state="connected") == 1
        assert value(ours, "connects_total", how="new") == 1
        assert value(ours, "in_flight_operations", device="soft0") == 0
        assert value(ours, "device_up", device="soft0") == 1
        gid = pair.client.device_states()[0].gid
        assert value(
            ours,
            "device_info",
            device="soft0",
            kind="soft",
            link_layer="ethernet",
            gid=gid,
        )
        assert value(theirs, "stage_seconds_count", stage="arrival_queue") == 6
        assert value(theirs, "arrivals_total") == 6
        assert value(theirs, "arrived_blocks_total") == 12
        assert value(theirs, "arrived_bytes_total") == n_bytes
        assert value(theirs, "waiting_arrivals") == 0
        assert value(theirs, "handshakes_total", outcome="accepted") == 1
        assert value(theirs, "control_links_total", state="taken") == 1
        assert value(theirs, "control_links_total", state="ready") == 1
        assert value(theirs, "connections", state="connected") == 1
        assert ("process_open_fds", frozenset()) in ours


def now(end: object) -> Samples:
    registry = CollectorRegistry()
    registry.register(Collector(end, {"rank": "3"}))  # type: ignore[arg-type]
    found = parse(generate_latest(registry).decode())
    bare = {}
    for (name, labels), sample in found.items():
        assert ("rank", "3") in labels
        bare[name, labels - {("rank", "3")}] = sample
    return bare


async def test_layers_of_requests_say_where_they_waited() -> None:
    """For the offer and the device, on the wire, and for the decode side's word."""
    async with streamed() as pair:
        request = pair.client.open("r")
        request.ready(None, [1, 2])
        request.finish()
        pair.server.offer(pair.prefill, "r", {"main": [3, 4]})
        await asyncio.wait_for(request.sent(), SOON)
        samples = now(pair.client)
        for stage in ("layer_queue", "layer_wire", "layer_announce"):
            assert value(samples, "stage_seconds_count", stage=stage) == 3
        seconds = [layer.posted - layer.ready for layer in request.metrics.layers]  # type: ignore[operator]
        told = value(samples, "stage_seconds_sum", stage="layer_queue")
        assert told == pytest.approx(sum(seconds))


async def test_failures_are_counted_by_what_they_are() -> None:
    async with loopback(**{**QUICK, "ib_timeout": 14}) as pair:
        set_faults(pair.client, "nth=1,act=ack_lost")
        await failure_of(pair.client.write_cache(pair.peer, [1], [2]))
        await until(lambda: not pair.peer.connected)
        found = now(pair.client)
        assert value(found, "transfers_total", outcome="failed") == 1
        assert value(found, "transfers_total", outcome="done") == 0
        status = "IBV_WC_RETRY_EXC_ERR"
        assert value(found, "completion_errors_total", status=status) == 1
        assert value(found, "broken_connections_total") == 1
        await pair.peer.close()
        assert value(now(pair.client), "stage_seconds_count", stage="fence") == 1
        set_faults(pair.client, "")
        peer = await pair.reconnect()
        await pair.client.write_cache(peer, [1], [2])
        found = now(pair.client)
        assert value(found, "connects_total", how="again") == 1
        assert value(found, "transfers_total", outcome="done") == 1
        await until(lambda: pair.server.counters.given_up)
        assert value(now(pair.server), "given_up_layers_total") == 4


async def test_deadlines_cancellations_and_refusals_are_counted() -> None:
    slow = "act=delay,us=5000"
    ids, back = list(range(16)), list(reversed(range(16)))
    async with loopback(client_faults=slow, **QUICK, sq_depth=16) as pair:
        write = pair.client.write_cache(pair.peer, ids, back, timeout=0.02)
        assert isinstance(await failure_of(write), KVXferError)
        task = asyncio.ensure_future(pair.client.write_cache(pair.peer, ids, back))
        await until(lambda: pair.client.device_states()[0].in_flight)
        assert value(now(pair.client), "in_flight_operations", device="soft0") > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = now(pair.client)
        assert value(found, "transfers_total", outcome="expired") == 1
        assert value(found, "transfers_total", outcome="cancelled") == 1
        with pytest.raises(KVXferError):
            await pair.client.connect("127.0.0.1", 1, timeout=0.3)
        assert value(now(pair.client), "connects_total", how="failed") == 1


async def test_a_closed_endpoint_still_answers() -> None:
    async with loopback(**QUICK) as pair:
        await pair.client.write_cache(pair.peer, [1], [2])
    assert value(now(pair.client), "transfers_total", outcome="done") == 1
    assert value(now(pair.server), "arrivals_total") == 4


async def test_a_port_that_is_taken_is_said() -> None:
    async with loopback(**QUICK) as pair:
        with (
            Exporter(pair.server, "127.0.0.1", 0) as first,
            pytest.raises(ControlError, match=f"port {first.port}"),
        ):
            Exporter(pair.server, "127.0.0.1", first.port)


async def test_ipv6() -> None:
    async with loopback(**QUICK) as pair:
        with Exporter(pair.server, "::1", 0) as exporter:
            assert exporter.url.startswith("http://[::1]:")
            assert await asyncio.to_thread(fetch, exporter.url)


async def test_without_prometheus_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    async with loopback(**QUICK) as pair:
        with pytest.raises(UsageError, match=r"pip install 'kvxfer\[metrics\]'"):
            Collector(pair.server)


async def test_serve_gives_metrics() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvxfer.serve", "--port", "0", "--json"),
        *("--metrics-port", "0", "--layers", "1", "--blocks", "2"),
        *("--block-bytes", "64", "--device", "soft"),
        stdout=PIPE,
    )
    assert process.stdout is not None
    try:
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), SOON))
        samples = await asyncio.to_thread(fetch, ready["metrics"])
        assert value(samples, "arrivals_total") == 0
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), SOON)
    assert process.returncode == 0


# -- while things change --------------------------------------------------------------


def line_by_line(look: Callable[[], T], change: Callable[[], object]) -> T:
    """Call ``look``; before each line of kvxfer that it runs, call ``change``.

    What another thread may do to it at a bad moment is so done at each of them.
    """

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "/kvxfer/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            change()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return look()
    finally:
        sys.settrace(before)


async def test_a_server_is_scraped_while_connections_come_and_go() -> None:
    """Its thread may be stopped anywhere, and the event loop's goes on."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        pair = await stack.enter_async_context(connected())
        source = stack.enter_context(arena(seed=3))
        other = await stack.enter_async_context(Client(source.cache, **QUICK))

        async def come_or_go() -> None:
            if not other.is_connected("127.0.0.1", pair.server.port):
                await dial(other, pair.server)
                return
            await (await dial(other, pair.server)).close()
            await until(lambda: len(pair.server.peers) == 1)

        def change() -> None:
            asyncio.run_coroutine_threadsafe(come_or_go(), loop).result(SOON)

        for end in (pair.server, other):
            states = await asyncio.to_thread(
                line_by_line, end.connection_states, change
            )
            assert set(states) >= {"connecting", "connected"}
        looks = (pair.server.handshakes, pair.server.links)
        for look in (*looks, lambda: pair.server.peers):
            assert await asyncio.to_thread(line_by_line, look, change)


async def test_a_client_is_scraped_while_it_is_invited() -> None:
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        pair = await stack.enter_async_context(streamed())

        async def invite(server: Server) -> None:
            n = pair.client.connection_states()["connected"]
            server.offer(pair.prefill, f"r{n}", {"main": [1]})
            await until(lambda: pair.client.connection_states()["connected"] > n)

        async def one_more() -> None:
            target = stack.enter_context(arena(seed=3))
            server = Server(target.cache, host="127.0.0.1", port=0, **HASTY)
            await invite(await stack.enter_async_context(server))

        def change() -> None:
            if pair.client.connection_states()["connected"] < 8:
                asyncio.run_coroutine_threadsafe(one_more(), loop).result(SOON)

        await invite(pair.server)
        look = pair.client.connection_states
        states = await asyncio.to_thread(line_by_line, look, change)
        assert 1 <= states["connected"] <= 8


def test_bounds_of_a_histogram() -> None:
    histogram = Histogram()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, 1e6):
        histogram.observe(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-1] == 1
    assert sum(histogram.counts) == 4


@pytest.fixture
def documented() -> Iterator[set[str]]:
    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    yield set(re.findall(r"`(kvxfer_\w+)`", page.read_text()))


async def test_every_metric_is_documented(documented: set[str]) -> None:
    async with loopback(**QUICK) as pair:
        registry = CollectorRegistry()
        registry.register(Collector(pair.server))
        families = text_string_to_metric_families(generate_latest(registry).decode())
        names = {
            f"{family.name}_total" if family.type == "counter" else family.name
            for family in families
        }
    assert names == documented
