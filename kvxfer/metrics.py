"""Prometheus metrics of a client or server, made when they are asked for.

    registry.register(kvxfer.metrics.Collector(client))

or, for programs without an exporter of their own, :class:`Exporter`, which is what
``kvxfer serve --metrics-port`` uses. Needs prometheus-client: ``kvxfer[metrics]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvxfer import Client, Server
from kvxfer._version import __version__
from kvxfer.counters import BOUNDS, Histogram
from kvxfer.errors import ControlError, UsageError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

_PREFIX = "kvxfer_"


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise UsageError(
            "metrics need prometheus-client", hint="pip install 'kvxfer[metrics]'"
        ) from error
    return prometheus_client


class Collector:
    """Turns the counts of a client or server into metrics; registers nowhere itself.

    It may be asked from any thread, also once the endpoint is closed.

    Args:
      endpoint: An open or closed client or server.
      labels: Put on every metric, for processes with several endpoints.

    Raises:
      UsageError: prometheus-client is not installed.
    """

    def __init__(
        self, endpoint: Client | Server, labels: Mapping[str, str] | None = None
    ) -> None:
        _prometheus()
        self._endpoint = endpoint
        self._names = tuple(labels or {})
        self._values = tuple((labels or {}).values())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        yield self._gauge(
            "build_info", "The version.", {(__version__,): 1}, ("version",)
        )
        yield from self._transfers()
        yield from self._connections()
        yield from self._devices()
        if isinstance(self._endpoint, Server):
            yield from self._target(self._endpoint)

    def _transfers(self) -> Iterator[Metric]:
        counts = self._endpoint.counters
        for name, text, value in (
            (
                "written_bytes",
                "Bytes that peers' devices acknowledged.",
                "written_bytes",
            ),
            ("written_blocks", "Blocks likewise, once a layer.", "written_blocks"),
            ("work_requests", "Work requests of those writes.", "work_requests"),
        ):
            yield self._counter(name, text, {(): getattr(counts, value)})
        yield self._counter(
            "transfers",
            "Writes by how they ended.",
            _by_one(counts.transfers),
            ("outcome",),
        )
        yield self._counter(
            "completion_errors",
            "Work completions that failed, by the status of verbs.",
            _by_one(counts.completion_errors),
            ("status",),
        )
        yield self._histogram(
            "stage_seconds", "How long what took.", counts.stages, "stage"
        )

    def _connections(self) -> Iterator[Metric]:
        counts = self._endpoint.counters
        yield self._gauge(
            "connections",
            "Connections by state.",
            _by_one(self._endpoint.connection_states()),
            ("state",),
        )
        yield self._counter(
            "connects",
            "Connections by how they came about.",
            _by_one(counts.connects),
            ("how",),
        )
        yield self._counter(
            "broken_connections", "Connections that broke.", {(): counts.broken}
        )

    def _devices(self) -> Iterator[Metric]:
        states = self._endpoint.device_states()
        names = ("device", "kind", "link_layer", "gid")
        yield self._gauge(
            "device_info",
            "The devices in use.",
            {(s.name, s.kind, s.link_layer, s.gid): 1 for s in states},
            names,
        )
        yield self._gauge(
            "device_up",
            "Whether new connections go by it.",
            {(s.name,): int(not s.trouble) for s in states},
            ("device",),
        )
        yield self._gauge(
            "in_flight_operations",
            "Operations that the device has not finished.",
            {(s.name,): s.in_flight for s in states},
            ("device",),
        )

    def _target(self, server: Server) -> Iterator[Metric]:
        counts = server.counters
        for name, text, value in (
            ("arrivals", "Layers of writes that have landed.", counts.arrivals),
            ("arrived_blocks", "Blocks in them.", counts.arrived_blocks),
            ("arrived_bytes", "Bytes in them.", counts.arrived_bytes),
            ("given_up_layers", "Layers that peers gave up.", counts.given_up),
        ):
            yield self._counter(name, text, {(): value})
        yield self._gauge(
            "waiting_arrivals",
            "Arrivals that nobody has taken yet.",
            {(): server.n_waiting},
        )
        yield self._counter(
            "handshakes",
            "What came to the control port, by how it ended.",
            _by_one(server.handshakes()),
            ("outcome",),
        )
        yield self._counter(
            "control_links",
            "Connections to the control port: taken, and through ZMQ's handshake.",
            _by_one(server.links()),
            ("state",),
        )

    # -- the forms of prometheus-client --------------------------------------------

    def _counter(
        self,
        name: str,
        text: str,
        values: Mapping[tuple[str, ...], float],
        labels: tuple[str, ...] = (),
    ) -> Metric:
        return self._family("CounterMetricFamily", name, text, values, labels)

    def _gauge(
        self,
        name: str,
        text: str,
        values: Mapping[tuple[str, ...], float],
        labels: tuple[str, ...] = (),
    ) -> Metric:
        return self._family("GaugeMetricFamily", name, text, values, labels)

    def _family(
        self,
        kind: str,
        name: str,
        text: str,
        values: Mapping[tuple[str, ...], float],
        labels: tuple[str, ...],
    ) -> Metric:
        from prometheus_client import core

        family = getattr(core, kind)(
            _PREFIX + name, text, labels=(*self._names, *labels)
        )
        for own, value in values.items():
            family.add_metric((*self._values, *own), value)
        return family

    def _histogram(
        self, name: str, text: str, stages: Mapping[str, Histogram], label: str
    ) -> Metric:
        from prometheus_client import core

        family = core.HistogramMetricFamily(
            _PREFIX + name, text, labels=(*self._names, label)
        )
        for stage, histogram in stages.items():
            total, buckets = 0, []
            for bound, count in zip(
                (*map(str, BOUNDS), "+Inf"), list(histogram.counts), strict=True
            ):
                total += count
                buckets.append((bound, total))
            family.add_metric((*self._values, stage), buckets, histogram.seconds)
        return family


def _by_one(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    # A copy, in one step: the event loop's thread goes on counting.
    return {(name,): value for name, value in dict(values).items()}


class Exporter:
    """Gives the metrics of an endpoint over HTTP, from a thread of its own.

    Args:
      endpoint: An open client or server.
      host: Address to listen on, IPv4 or IPv6.
      port: Port; 0 takes a free one.

    Raises:
      UsageError: prometheus-client is not installed.
      ControlError: The address cannot be listened on.
    """

    def __init__(self, endpoint: Client | Server, host: str, port: int) -> None:
        prometheus = _prometheus()
        registry: CollectorRegistry = prometheus.CollectorRegistry()
        registry.register(Collector(endpoint))
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        try:
            self._server, self._thread = prometheus.start_http_server(
                port, addr=host, registry=registry
            )
        except OSError as error:
            raise ControlError(
                f"metrics cannot be given on {host} port {port}: {error.strerror}",
                hint="Choose another metrics_port, or 0 for a free one.",
            ) from error
        self.host = host
        self.port: int = self._server.server_address[1]

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop listening and wait for the thread. Twice is fine."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
