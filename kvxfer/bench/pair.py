"""What one process of a pair runs; ``runner`` starts it."""

from __future__ import annotations

import importlib

from kvxfer.bench.side import Making

KINDS = {
    "write_cache": ("kvxfer.bench.transfer", "Transfer", "serve"),
    "remote": ("kvxfer.bench.transfer", "Remote", ""),
}
"""Kind of contender -> module, initiator, target; a module is loaded where needed."""


def find(kind: str) -> Making:
    """Find the two sides of a kind of contender."""
    module_name, initiator, target = KINDS[kind]
    module = importlib.import_module(module_name)
    return getattr(module, initiator), getattr(module, target or initiator)
