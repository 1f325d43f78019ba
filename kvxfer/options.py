"""Every option once: name, type, default, unit, range, environment names.

A value is taken from the first place that has it: the argument, the
environment, the config file, the default. Each option reads ``KVXFER_<NAME>``;
some also read the ``KVCACHE_*`` name that other systems use for the same
thing. The config file is TOML, its table ``[kvxfer]``; its path comes from the
``config`` argument or from ``KVXFER_CONFIG``.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import operator
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from kvxfer.errors import OptionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    # Absent where mypy runs on a newer Python.
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = [
    "OPTIONS",
    "Option",
    "Options",
    "Setting",
    "WITHOUT_EFFECT",
    "remarks",
]

_log = logging.getLogger("kvxfer.options")

Value = bool | int | float | str | None

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_SIZE = re.compile(r"(\d+)\s*([kKMG]i?B?|B)?")
_SCALE = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
_BINARY_SCALE = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*(:[1-9]\d{0,2})?")
_PCI = re.compile(r"([0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")

# Above this the device needs minutes to report a dead peer.
_IB_TIMEOUT_SLOW = 22


@dataclass(frozen=True, slots=True)
class Option:
    """What is known about one option.

    Attributes:
      name: Field of :class:`Options` and key in the config file.
      kind: ``bool``, ``int``, ``float`` or ``str``.
      default: The default, ``None`` for "chosen automatically".
      unit: Unit of the number, or an empty string.
      low: Smallest value, inclusive.
      high: Largest value, inclusive.
      choices: The words permitted, or empty.
      env: Environment names, first wins.
      help: One sentence.
    """

    name: str
    kind: type
    default: Value
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    env: tuple[str, ...]
    help: str

    def parse(self, value: object, source: str) -> Value:
        """Turn ``value`` into this option's type and check its range.

        Args:
          value: A value of the type, or text as found in the environment.
          source: Where the value came from, for the message.

        Raises:
          OptionError: Wrong type or out of range.
        """
        if self.default is None and value in (None, "", "auto"):
            return None
        try:
            parsed: Value = _PARSERS[self.kind](self, value)
        except (TypeError, ValueError):
            raise self._error(value, source) from None
        if self.low is not None and not self.low <= cast(float, parsed):
            raise self._error(value, source)
        if self.high is not None and not cast(float, parsed) <= self.high:
            raise self._error(value, source)
        if self.choices and parsed not in self.choices:
            raise self._error(value, source)
        return parsed

    def describe_range(self) -> str:
        """Say in words what is permitted, such as ``an integer, 14 to 31``."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {bool: "true or false", int: "an integer", float: "a number"}
        text = words.get(self.kind, "text")
        if self.low is not None or self.high is not None:
            low = "" if self.low is None else f"{self.low:.15g}"
            high = "" if self.high is None else f"{self.high:.15g}"
            text = f"{text}, {low} to {high}"
        if self.unit:
            text = f"{text} {self.unit}"
        if self.default is None:
            text = f"{text}, or auto"
        return text

    def _error(self, value: object, source: str) -> OptionError:
        return OptionError(
            f"option {self.name} = {value!r} (from {source}) is not permitted: "
            f"expected {self.describe_range()}"
        )


def _parse_bool(_option: Option, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    raise ValueError(value)


def _parse_int(option: Option, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(value)
    if not isinstance(value, str):
        return operator.index(cast(Any, value))
    text = value.strip()
    if option.unit == "bytes":
        match = _SIZE.fullmatch(text)
        if match is None:
            raise ValueError(value)
        suffix = (match[2] or "").lower().rstrip("b")
        scale = _BINARY_SCALE[suffix[0]] if "i" in suffix else _SCALE[suffix]
        return int(match[1]) * scale
    return int(text, 10)


def _parse_float(_option: Option, value: object) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    number = float(cast(Any, value))
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _parse_str(option: Option, value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(value)
    text = str(os.fspath(value)).strip()
    if not text:
        raise ValueError(value)
    if option.name == "flush" and text.lower() in _TRUE | _FALSE:
        # The variable of other systems is a switch.
        return "initiator_read" if text.lower() in _TRUE else "none"
    return text


_PARSERS: dict[type, Any] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    str: _parse_str,
}


def _option(
    default: Value,
    help: str,
    *,
    kind: type | None = None,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> Any:
    """Declare one option; ``also`` names further environment variables."""
    metadata = {
        "kind": kind or type(default),
        "unit": unit,
        "low": low,
        "high": high,
        "choices": choices,
        "also": also,
        "help": help,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _seconds(default: float, help: str, low: float = 0.001) -> Any:
    return _option(default, help, unit="seconds", low=low, high=86400.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a client or a server. Immutable; made by :meth:`load`.

    Making one directly, or with :func:`dataclasses.replace`, checks the same
    ranges but reads neither environment nor file.

    Raises:
      OptionError: A value is out of range; the message names the option, the
        value, the range and where the value came from.
    """

    host: str = _option("127.0.0.1", "Address of the control connection.")
    port: int = _option(
        7777,
        "Port of the control connection; 0 takes a free one.",
        low=0,
        high=65535,
        also=("SET_RDMA_DEST_PORT",),
    )
    secret_key_file: str | None = _option(
        None,
        "File with this side's secret key; with it the control connection is "
        "encrypted and both sides are authenticated.",
        kind=str,
    )
    client_keys_dir: str | None = _option(
        None, "Directory with the public keys of who may connect: *.key.", kind=str
    )
    server_public_key: str | None = _option(
        None,
        "Public key of the servers that are dialed: its file, or its 40 characters.",
        kind=str,
    )
    device: str = _option(
        "auto", "Device to use: auto, or a name with an optional port (mlx5_0:1)."
    )
    require_rdma: bool = _option(
        False, "Refuse the software device instead of falling back to it."
    )
    nics: str | None = _option(
        None,
        "Devices to take in turn by gpu_index, by commas; each as device has it.",
        kind=str,
        also=("KVCACHE_RDMA_NICS",),
    )
    gpu_index: int | None = _option(
        None,
        "GPU that the cache is on, by its PCI address; a near device is chosen.",
        kind=int,
        low=0,
        high=1023,
    )
    gpu_pci: str | None = _option(
        None,
        "PCI address of that GPU (0000:1a:00.0), where its index is not known.",
        kind=str,
    )
    socket_ifname: str | None = _option(
        None,
        "Interface that a server listens on unless host says where, and whose "
        "network a GID should be in.",
        kind=str,
        also=("KVCACHE_SOCKET_IFNAME",),
    )
    sysfs: str = _option(
        "/sys",
        "Where the devices are described; a container may have it elsewhere. The "
        "networks are read from the `proc` beside it, or else from /proc.",
    )
    ibverbs_path: str | None = _option(
        None, "Path of libibverbs.so.1, if not the system's.", kind=str
    )
    gid_index: int | None = _option(
        None,
        "Index in the port's GID table. The software device has none, and ignores it.",
        kind=int,
        low=0,
        high=65535,
        also=("KVCACHE_RDMA_GID_INDEX",),
    )
    pkey_index: int = _option(
        0, "Index in the port's partition table.", low=0, high=65535
    )
    ib_timeout: int = _option(
        18,
        "Exponent of the time to wait for an acknowledgement: 4.096 us * 2^n.",
        low=14,
        high=31,
        also=("KVCACHE_IB_TIMEOUT",),
    )
    retry_cnt: int = _option(
        7, "Retries without an acknowledgement before a WR fails.", low=0, high=7
    )
    rnr_retry: int = _option(
        6, "Retries while the peer has no receive posted; 7 is for ever.", low=0, high=7
    )
    min_rnr_timer: int = _option(
        12, "Code of the pause asked for between those retries.", low=1, high=31
    )
    traffic_class: int = _option(
        0,
        "Traffic class of the packets; on RoCE DSCP * 4.",
        low=0,
        high=255,
        also=("KVXFER_TC",),
    )
    service_level: int = _option(
        0, "Service level of the packets.", low=0, high=15, also=("KVXFER_SL",)
    )
    path_mtu: int | None = _option(
        None,
        "Largest packet payload, a power of two; auto: what both ports can.",
        kind=int,
        unit="bytes",
        low=256,
        high=4096,
    )
    relaxed_ordering: bool = _option(
        False,
        "Let the device write cache memory in any order on the bus.",
        also=("KVCACHE_RELAX_ORDERING",),
    )
    region_bytes: int = _option(
        0,
        "Bytes in a memory region of the cache at most; longer layers are cut between "
        "blocks. 0: 3.5 GiB of GPU memory, any length of host memory.",
        unit="bytes",
        low=0,
        high=1 << 40,
    )
    flush: str = _option(
        "auto",
        "READ that has written bytes in place before anyone is told: of the writer, or "
        "of the side that is written to; auto: for GPUs of compute capability 8.x.",
        choices=("auto", "none", "initiator_read", "target_read"),
        also=("KVCACHE_GDRCOPY_FLUSH_ENABLE",),
    )
    sq_depth: int = _option(
        2048, "Send-queue slots of each QP.", unit="WRs", low=16, high=32768
    )
    qps_per_connection: int = _option(
        1,
        "QPs to each peer, over which large writes are spread; both sides must allow "
        "it. Of each wire, where a peer has two of the software device's, four in all.",
        unit="QPs",
        low=1,
        high=4,
    )
    chain: int = _option(
        64,
        "WRs posted with one doorbell; at most sq_depth.",
        unit="WRs",
        low=1,
        high=64,
    )
    max_sge: int = _option(
        8, "Local blocks gathered by one WR.", unit="SGEs", low=1, high=16
    )
    merge_bytes: int = _option(
        1 << 20,
        "Largest extent that neighbouring blocks are merged into.",
        unit="bytes",
        low=1,
        high=1 << 30,
    )
    notify_ring_bytes: int = _option(
        1 << 20,
        "Ring for the descriptors of arrivals, for each peer.",
        unit="bytes",
        low=1 << 12,
        high=1 << 26,
    )
    notify_receives: int = _option(
        128, "Receives posted for arrivals, for each QP.", unit="WRs", low=1, high=16384
    )
    listen: str | None = _option(
        None,
        "Where a client listens for invitations to requests: HOST:PORT or PORT.",
        kind=str,
    )
    stream_chunk_bytes: int = _option(
        4 << 20,
        "Largest part of a layer that a request sends at a time.",
        unit="bytes",
        low=1,
        high=1 << 30,
    )
    peer_window_bytes: int = _option(
        32 << 20,
        "Bytes in flight to one peer, beyond which no more are posted.",
        unit="bytes",
        low=1,
        high=1 << 40,
    )
    device_window_bytes: int = _option(
        128 << 20,
        "The same for all peers of a device together.",
        unit="bytes",
        low=1,
        high=1 << 40,
    )
    peer_window_wrs: int = _option(
        8192, "WRs of requests in flight to one peer.", unit="WRs", low=1, high=1 << 24
    )
    device_window_wrs: int = _option(
        32768,
        "WRs of requests in flight on one device.",
        unit="WRs",
        low=1,
        high=1 << 24,
    )
    request_lease: float = _seconds(
        30.0, "Time that a request waits for its offer, or an offer for its request."
    )
    stall_timeout: float = _seconds(
        10.0, "Time that a request may stand still while it is ready and offered."
    )
    connect_timeout: float = _seconds(10.0, "Time for a connection to be made.")
    write_timeout: float = _seconds(30.0, "Time for a write to complete.")
    drain_timeout: float = _seconds(
        2.0, "Time for posted WRs to complete once a write is abandoned."
    )
    fence_timeout: float = _seconds(
        2.0, "Time for the peer to confirm that late bytes are excluded."
    )
    ping_interval: float = _seconds(
        1.0, "Time between signs of life of the peer's process.", low=0.01
    )
    loop_timeout: float = _seconds(
        60.0,
        "Time that a peer's event loop may be busy with something else before it "
        "counts as gone.",
        low=0.02,
    )
    max_connections: int = _option(
        512, "Connections that a server keeps at once.", low=1, high=4096
    )
    max_client_connections: int = _option(
        256,
        "Connections that a server keeps with one key at once, or without keys with "
        "one address.",
        low=1,
        high=4096,
    )
    ping_timeout: float = _seconds(
        5.0, "Silence after which a peer counts as gone.", low=0.02
    )
    max_handshakes: int = _option(
        256, "Handshakes a server keeps pending at once.", low=1, high=65536
    )
    max_handshake_rate: int = _option(
        500,
        "Handshakes that a server begins with one key, or without keys with one "
        "address; who is faster is told to wait.",
        unit="a second",
        low=1,
        high=1 << 20,
    )
    max_message_rate: int = _option(
        50_000,
        "Control messages that a server takes on one connection; who sends more is "
        "disconnected.",
        unit="a second",
        low=1,
        high=1 << 30,
    )
    soft_wire: str = _option(
        "auto", "Wire of the software device.", choices=("auto", "shm", "cma", "tcp")
    )
    progress: str = _option(
        "adaptive",
        "Who sees to what is in flight: the event loop (event), a thread that looks "
        "without pause (spin), or the loop while it is little and else a thread that "
        "sleeps in between (adaptive).",
        choices=("adaptive", "event", "spin"),
    )

    metrics_port: int | None = _option(
        None,
        "Port that kvxfer serve gives its Prometheus metrics on; 0 takes a free one.",
        kind=int,
        low=0,
        high=65535,
    )
    metrics_host: str = _option("127.0.0.1", "Address that it gives them on.")
    debug: bool = _option(
        False,
        "Log everything, where a command or the drop-in sets up the log.",
        also=("KVCACHE_DEBUG", "KV_IS_DEBUG_ENABLED"),
    )
    debug_file: str | None = _option(
        None,
        "File that the log goes to; %h is the host, %p the process.",
        kind=str,
        also=("KVCACHE_DEBUG_FILE",),
    )
    error_file: str | None = _option(
        None,
        "File that warnings and errors go to; %h is the host, %p the process.",
        kind=str,
        also=("KVCACHE_ERROR_FILE",),
    )

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = option.parse(getattr(self, option.name), "argument")
            object.__setattr__(self, option.name, value)
        if not _DEVICE.fullmatch(self.device):
            raise OptionError(
                f"option device = {self.device!r} is not permitted: expected auto, "
                "or a device name with an optional port, such as mlx5_0:1"
            )
        for name in self.nic_names:
            if not _DEVICE.fullmatch(name):
                raise OptionError(
                    f"option nics = {self.nics!r} is not permitted: {name!r} is no "
                    "device name with an optional port, such as mlx5_0:1"
                )
        if self.path_mtu is not None and self.path_mtu & (self.path_mtu - 1):
            raise OptionError(
                f"option path_mtu = {self.path_mtu} is not permitted: expected 256, "
                "512, 1024, 2048 or 4096 bytes, or auto"
            )
        if self.gpu_pci is not None and not _PCI.fullmatch(self.gpu_pci):
            raise OptionError(
                f"option gpu_pci = {self.gpu_pci!r} is not permitted: expected an "
                "address such as 0000:1a:00.0"
            )
        if self.ping_timeout <= self.ping_interval:
            raise OptionError(
                f"option ping_timeout = {self.ping_timeout:g} seconds must be longer "
                f"than ping_interval = {self.ping_interval:g} seconds"
            )
        if self.loop_timeout < self.ping_timeout:
            raise OptionError(
                f"option loop_timeout = {self.loop_timeout:g} seconds must not be "
                f"shorter than ping_timeout = {self.ping_timeout:g} seconds"
            )

    @classmethod
    def load(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: object,
    ) -> Options:
        """Collect the options: argument, environment, config file, default.

        Args:
          config: Path of a TOML file; ``None`` takes it from ``KVXFER_CONFIG``,
            and without that there is none.
          environ: Environment to read; ``None`` is the process's, read now.
          overrides: Options by name. ``None`` means "not given"; where an
            option can be chosen automatically, ``"auto"`` asks for that.

        Raises:
          OptionError: An unknown name, a value out of range, or a config file
            that cannot be read.
        """
        found = _collect(config, environ, overrides)
        values: dict[str, Any] = {
            option.name: option.parse(raw, source)
            for option, raw, source in found
            if source
        }
        options = cls(**values)
        if options.ib_timeout > _IB_TIMEOUT_SLOW:
            _log.warning(
                "ib_timeout %d: a dead peer is noticed after %.0f seconds or more",
                options.ib_timeout,
                4.096e-6 * 2**options.ib_timeout * (options.retry_cnt + 1),
            )
        return options

    @classmethod
    def explain(
        cls,
        *,
        config: str | os.PathLike[str] | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: object,
    ) -> list[Setting]:
        """Say of each option what its value is and where that comes from.

        Arguments and errors are those of :meth:`load`.
        """
        options = cls.load(config=config, environ=environ, **overrides)
        return [
            Setting(option, getattr(options, option.name), source or "default")
            for option, _, source in _collect(config, environ, overrides)
        ]

    @property
    def nic_names(self) -> list[str]:
        """The devices listed by ``nics``, spaces apart; empty if none are."""
        return [] if self.nics is None else [n.strip() for n in self.nics.split(",")]

    @property
    def device_name(self) -> str | None:
        """The device's name without its port; ``None`` for ``auto``."""
        name = self.device.partition(":")[0]
        return None if name == "auto" else name

    @property
    def device_port(self) -> int | None:
        """The port asked for, from 1; ``None`` if any will do."""
        port = self.device.partition(":")[2]
        return int(port) if port else None


def _describe(field: dataclasses.Field[Any]) -> Option:
    meta = dict(field.metadata)
    env = (f"KVXFER_{field.name.upper()}", *meta.pop("also"))
    default = cast(Value, field.default)
    return Option(name=field.name, default=default, env=env, **meta)


OPTIONS: tuple[Option, ...] = tuple(
    _describe(field) for field in dataclasses.fields(Options)
)


@dataclass(frozen=True, slots=True)
class Setting:
    """An option's value, and where it comes from: ``environment KVXFER_PORT``."""

    option: Option
    value: Value
    source: str


#: Variables of other systems that ask for what kvxfer does not do, and why.
WITHOUT_EFFECT: dict[str, str] = {
    "KVCACHE_VERIFY_READ": "nothing is read back, as nothing is elsewhere",
    "KVCACHE_DEBUG_OUTPUT": "the bytes of a READ that flushes mean nothing",
    "KV_CACHE_SOCKET_IFNAME": "no system reads this name; KVCACHE_SOCKET_IFNAME is "
    "the one",
}
# Ours, but read by others than Options.
_OTHER_VARIABLES = (
    "KVXFER_CONFIG",
    "KVXFER_SOFT_",
    "KVXFER_CACHE_",
    "KVXFER_TEST_",
)


def remarks(environ: Mapping[str, str] | None = None) -> list[str]:
    """Say which variables of the environment are set and do nothing, and why."""
    environ = os.environ if environ is None else environ
    known = {name for option in OPTIONS for name in option.env}
    found = [
        f"{name} has no effect: {why}"
        for name, why in WITHOUT_EFFECT.items()
        if environ.get(name)
    ]
    for name in sorted(environ):
        # There are others, for tests and tools; only what looks like a slip is said.
        if not name.startswith("KVXFER_") or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near and not name.startswith(_OTHER_VARIABLES):
            found.append(f"{name} is no variable of kvxfer; did you mean {near[0]}?")
    return found


def _collect(
    config: str | os.PathLike[str] | None,
    environ: Mapping[str, str] | None,
    overrides: Mapping[str, object],
) -> list[tuple[Option, object, str]]:
    """Find each option's raw value and its source, empty for the default."""
    environ = os.environ if environ is None else environ
    path = config or environ.get("KVXFER_CONFIG")
    table = _read_config(path) if path else {}
    _refuse_unknown(table, f"file {path}")
    _refuse_unknown(overrides, "argument")
    return [
        (option, *_find(option, overrides, environ, table, f"file {path}"))
        for option in OPTIONS
    ]


def _find(
    option: Option,
    overrides: Mapping[str, object],
    environ: Mapping[str, str],
    table: Mapping[str, object],
    file: str,
) -> tuple[object, str]:
    """Find the raw value and its source; the source is empty for the default."""
    if overrides.get(option.name) is not None:
        return overrides[option.name], "argument"
    for name in option.env:
        # An empty variable is how a shell script spells "unset".
        if environ.get(name):
            value = environ[name]
            if name == "KV_IS_DEBUG_ENABLED" and value in ("2", "3"):
                value = "1"  # a level there, of which any is on
            return value, f"environment {name}"
    if option.name in table:
        return table[option.name], file
    return None, ""


def _read_config(path: str | os.PathLike[str]) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as exc:
        raise OptionError(f"config file {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise OptionError(f"config file {path} is not valid TOML: {exc}") from exc
    table = document.get("kvxfer", {})
    if not isinstance(table, dict):
        raise OptionError(f"config file {path}: [kvxfer] must be a table")
    return table


def _refuse_unknown(values: Mapping[str, object], source: str) -> None:
    known = [option.name for option in OPTIONS]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise OptionError(
                f"unknown option {name} (from {source})",
                hint=f"Did you mean {near[0]}?" if near else "",
            )
