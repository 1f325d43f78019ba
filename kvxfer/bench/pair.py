"""What one process of a pair runs; ``runner`` starts it."""

from __future__ import annotations

import importlib

from kvxfer.bench.side import Making

KINDS = {
    "write_cache": ("kvxfer.bench.transfer", "Transfer", "serve"),
    "writes": ("kvxfer.bench.transfer", "Writes", "serve"),
    "remote": ("kvxfer.bench.transfer", "Remote", ""),
    "engine": ("kvxfer.bench.direct", "ByEngine", "serve"),
    "verbs": ("kvxfer.bench.direct", "ByLoop", "serve"),
    "read": ("kvxfer.bench.direct", "ByReading", "serve"),
    "memcpy": ("kvxfer.bench.limits", "Copy", ""),
    "pvm-readv": ("kvxfer.bench.limits", "ReadMemory", "serve"),
    "tcp": ("kvxfer.bench.limits", "Stream", "serve"),
    "scale": ("kvxfer.bench.scale", "Scale", "serve"),
    "mooncake": ("kvxfer.bench.peers", "Mooncake", "serve_mooncake"),
    "mooncake-bench": ("kvxfer.bench.peers", "MooncakeBench", ""),
    "nixl": ("kvxfer.bench.peers", "Nixl", "serve_nixl"),
}
"""Kind of contender -> module, initiator, target; a module is loaded where needed."""


def find(kind: str) -> Making:
    """Find the two sides of a kind of contender."""
    module_name, initiator, target = KINDS[kind]
    module = importlib.import_module(module_name)
    return getattr(module, initiator), getattr(module, target or initiator)
