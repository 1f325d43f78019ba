"""Stands for ``mooncake.engine``: as much of it as the bench calls."""

from __future__ import annotations

import os

from tests.bench.stubs import moving


class TransferEngine:
    """An engine whose port is the process that it lives in."""

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        """Start; as Mooncake's, it heeds the environment and not ``protocol``."""
        moving.log(engine="mooncake", arguments=[host, metadata, protocol, device])
        if "MC_FORCE_HCA" in os.environ and "MC_FORCE_TCP" not in os.environ:
            moving.open_nic()
        return 0

    def register_memory(self, address: int, length: int) -> int:
        """Take memory."""
        return 0 if address and length else -1

    def get_rpc_port(self) -> int:
        """Return what is behind the colon of the endpoint."""
        return os.getpid()

    def batch_transfer_sync_write(
        self, endpoint: str, ours: list[int], theirs: list[int], lengths: list[int]
    ) -> int:
        """Write blocks; return 0, or -1."""
        pid = int(endpoint.rpartition(":")[2])
        return 0 if moving.write(pid, ours, theirs, lengths) else -1
