"""Presets: one name for each figure of ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INTERLEAVED: dict[str, Any] = {"rounds": 12, "window": 0.2}
# Copies of memory, whatever NIC the machine has.
_SOFTWARE: dict[str, Any] = {**_INTERLEAVED, "device": "soft"}
# Nothing reads these pools, or one block at a time: 2 GiB of them, new in each window,
# would take most of the minutes. 256 MiB is still eight times a large cache.
_SMALL: dict[str, Any] = {**_INTERLEAVED, "pool": "256M"}


@dataclass(frozen=True)
class Preset:
    """Defaults for the options of a sweep.

    Attributes:
      what: What it shows, one line.
      defaults: Options by the name of their parameter; what is given counts more.
    """

    what: str
    defaults: Mapping[str, Any]


PRESETS = {
    "shm": Preset(
        "same host, shared memory: beside a memcpy of the same table, and NIXL",
        {**_SOFTWARE, "wire": "shm", "against": "shm-memcpy,nixl"},
    ),
    "ordinary": Preset(
        "same host, private memory: beside bare process_vm_readv and TCP",
        {**_SOFTWARE, "memory": "ordinary", "against": "pvm-readv,tcp"},
    ),
    "ordinary-small": Preset(
        "the same, of a cache whose blocks have 2 KiB at the most",
        {**_SOFTWARE, "memory": "ordinary", "sizes": "1K,2K"}
        | {"against": "pvm-readv,tcp"},
    ),
    "tcp": Preset(
        "TCP on loopback: beside Mooncake, NIXL over TCP and bare sockets",
        {
            **_SOFTWARE,
            "wire": "tcp",
            "memory": "ordinary",
            "against": "mooncake,mooncake-bench,nixl-tcp,tcp",
        },
    ),
    "null": Preset(
        "the library's own cost of a call: a null device, beside a bare loop",
        {**_SMALL, "null": True, "sizes": "1K", "against": "verbs"},
    ),
    "null-runs": Preset(
        "the same, in runs of 8 blocks",
        {**_SMALL, "null": True, "sizes": "1K", "against": "verbs"}
        | {"pattern": "runs:8"},
    ),
    "null-planes": Preset(
        "the same, two planes",
        {**_SMALL, "null": True, "sizes": "1K", "against": "verbs"} | {"planes": "k,v"},
    ),
    "latency": Preset(
        "one block of 64 KiB: what asyncio adds",
        {**_SMALL, "sizes": "64K", "batches": "1", "against": "no-asyncio"},
    ),
    "concurrency": Preset(
        "1000 awaits of 4 MiB at once, beside the same bytes in ten",
        {
            **_INTERLEAVED,
            "sizes": "64K",
            "batches": "16000",
            "contender": "writes:1000x4M",
            "against": "writes:10x400M",
        },
    ),
    "saturation": Preset(
        "several threads, several batches in flight",
        {"threads": 2, "depth": 2, "rounds": 3, "pool": "4G"},
    ),
}
