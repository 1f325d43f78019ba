"""Who can be measured: kvxfer in several ways, the machine's limits, other engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvxfer.errors import UsageError
from kvxfer.sizes import parse_size

OURS = "kvxfer"


@dataclass(frozen=True)
class Contender:
    """One way to move the blocks.

    Attributes:
      name: As it is asked for and shown.
      kind: Which code runs it; see ``pair``.
      what: One line for people.
      options: Options of kvxfer that it needs, beyond those asked for.
      environ: Variables of its processes.
      module: What must be importable in the Python of other engines, if it is one.
      packages: How that is installed.
      memory: ``shared`` or ``ordinary`` where it takes only the one.
      parameters: For its code.
      ignores: Options of the bench that it takes no notice of, and does one of.
      restless: It keeps a processor busy while it waits for its turn, and so is
        stopped meanwhile.
      no_nic: Why it is never beside a NIC; empty if it can be, see ``nics``.
      nic_what: ``what`` where it uses a NIC.
      nic_environ: ``environ`` there, for ``{name}`` and ``{port}`` of the NIC.
    """

    name: str
    kind: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    module: str = ""
    packages: str = ""
    memory: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    restless: bool = False
    no_nic: str = ""
    nic_what: str = ""
    nic_environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether kvxfer's engine moves the blocks."""
        return self.kind in ("write_cache", "writes", "remote", "engine")

    @property
    def is_peer(self) -> bool:
        """Whether it is another engine, in a Python of its own."""
        return bool(self.packages)


WRITE_CACHE = Contender(
    OURS, "write_cache", "await client.write_cache(...), by the options given"
)
REMOTE = Contender(OURS, "remote", "write_cache into a kvxfer serve elsewhere")

_ALONE = ("--threads", "--depth")
_COPIES = "copies memory, which is not put beside one"
_BY_TCP = "goes by TCP on loopback, which is not put beside one"
_NOT_TRIED = "has not been tried on one"
_LOOPBACK = {"UCX_NET_DEVICES": "lo"}
_MOONCAKE: dict[str, Any] = {
    "module": "mooncake.engine",
    "packages": "numpy mooncake-transfer-engine-non-cuda",
    "ignores": _ALONE,
}
_NIXL: dict[str, Any] = {
    "module": "nixl",
    "packages": "numpy torch nixl",
    "ignores": _ALONE,
    # The target's progress thread polls.
    "restless": True,
}

OTHERS: tuple[Contender, ...] = (
    Contender("no-asyncio", "engine", "kvxfer's engine, without asyncio"),
    Contender("verbs", "verbs", "a bare C loop posts the table to the same device"),
    Contender("read", "read", "the same with RDMA READ"),
    Contender(
        "memcpy",
        "memcpy",
        "memcpy in one process, private memory",
        memory="ordinary",
        ignores=_ALONE,
        no_nic=_COPIES,
    ),
    Contender(
        "shm-memcpy",
        "memcpy",
        "memcpy in one process, memory of KVCache.allocate",
        memory="shared",
        ignores=_ALONE,
        no_nic=_COPIES,
    ),
    Contender(
        "pvm-readv",
        "pvm-readv",
        "process_vm_readv by the target, 1024 blocks a call",
        memory="ordinary",
        ignores=_ALONE,
        no_nic=_COPIES,
    ),
    Contender(
        "tcp",
        "tcp",
        "sendmsg and readv on loopback, 4 MiB buffers",
        memory="ordinary",
        ignores=_ALONE,
        no_nic=_BY_TCP,
    ),
    Contender(
        "mooncake",
        "mooncake",
        "Mooncake, batch_transfer_sync_write over TCP, its defaults",
        # Its engine takes any NIC that it finds, whichever protocol is asked for, and
        # TCP where it finds none: one of the two has to be ruled out.
        environ={"MC_FORCE_TCP": "1"},
        nic_what="Mooncake, batch_transfer_sync_write over RDMA, its defaults",
        nic_environ={"MC_FORCE_HCA": "1", "MC_IB_PORT": "{port}"},
        **_MOONCAKE,
    ),
    Contender(
        "mooncake-bench",
        "mooncake-bench",
        "Mooncake's transfer_engine_bench: its own, contiguous addresses, unchecked",
        no_nic=_NOT_TRIED,
        **_MOONCAKE,
    ),
    Contender(
        "nixl",
        "nixl",
        "NIXL over UCX's choice, handles made before, no progress thread",
        environ=_LOOPBACK,
        nic_what="NIXL over UCX's RC, handles made before, no progress thread",
        # By its choice UCX would copy memory from process to process.
        nic_environ={"UCX_NET_DEVICES": "{name}:{port}", "UCX_TLS": "rc"},
        **_NIXL,
    ),
    Contender(
        "nixl-tcp",
        "nixl",
        "NIXL over UCX's TCP, handles made before, no progress thread",
        environ={**_LOOPBACK, "UCX_TLS": "tcp"},
        no_nic=_BY_TCP,
        **_NIXL,
    ),
)


def names() -> list[str]:
    """List what ``--against`` takes."""
    return [contender.name for contender in OTHERS]


def find(name: str) -> Contender:
    """Find a contender by its name.

    ``kvxfer:option=value+...`` is kvxfer by other options, ``writes:1000x4M`` so many
    writes of so many bytes at once.

    Raises:
      UsageError: There is none of this name.
    """
    if name.startswith(f"{OURS}:"):
        options = dict(_setting(part, name) for part in name[7:].split("+"))
        return replace(
            WRITE_CACHE,
            name=name,
            what="write_cache, by other options",
            options=options,
        )
    if name.startswith("writes:"):
        return _writes(name)
    if name == OURS:
        return WRITE_CACHE
    for contender in OTHERS:
        if contender.name == name:
            return contender
    raise UsageError(
        f"no contender {name!r}: there is only {', '.join(names())}, "
        "kvxfer:option=value+option=value, and writes:COUNTxSIZE"
    )


def _writes(name: str) -> Contender:
    count, _, size = name[7:].partition("x")
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(f"{name!r} is not writes:COUNTxSIZE, such as writes:1000x4M")
    return Contender(
        name,
        "writes",
        f"{count} awaits of write_cache at once, {size} each",
        # Large batches: one of them is long enough.
        parameters={
            "writes": int(count),
            "write_bytes": parse_size(size),
            "at_least": 1,
        },
    )


def _setting(part: str, name: str) -> tuple[str, str]:
    option, equals, value = part.partition("=")
    if not equals:
        raise UsageError(f"{name!r}: {part!r} is not option=value")
    return option.strip(), value.strip()
