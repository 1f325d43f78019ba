"""Stands for ``nixl._api``: as much of it as the bench calls."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tests.bench.stubs import moving

Descriptors = list[tuple[int, int, int]]


@dataclass
class nixl_agent_config:
    enable_prog_thread: bool = True
    backends: list[str] = field(default_factory=list)


@dataclass
class _Transfer:
    pid: int
    ours: Descriptors
    theirs: Descriptors
    state: str = "NEW"


class nixl_agent:
    """An agent whose metadata is the process that it lives in."""

    def __init__(self, name: str, config: nixl_agent_config) -> None:
        moving.log(engine="nixl", name=name, progress=config.enable_prog_thread)

    def create_backend(self, name: str, parameters: dict[str, str]) -> None:
        """Start a backend; its devices are named by the environment."""
        if os.environ.get("UCX_NET_DEVICES") != "lo":
            moving.open_nic()

    def register_memory(
        self, memory: list[tuple[int, int, int, str]], kind: str
    ) -> None:
        """Take memory."""

    def get_agent_metadata(self) -> bytes:
        """Return what the other side needs."""
        return str(os.getpid()).encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Return the name of the other side."""
        return metadata

    def get_xfer_descs(self, blocks: Descriptors, kind: str) -> Descriptors:
        """Return descriptors of blocks."""
        return blocks

    def initialize_xfer(
        self, operation: str, ours: Descriptors, theirs: Descriptors, remote: str
    ) -> _Transfer:
        """Return the handle of a transfer."""
        return _Transfer(int(remote), ours, theirs)

    def transfer(self, handle: _Transfer) -> str:
        """Start a transfer."""
        handle.state = "PROC"
        return handle.state

    def check_xfer_state(self, handle: _Transfer) -> str:
        """Move what was started; return how that ended."""
        ours, theirs = ([at for at, *_ in d] for d in (handle.ours, handle.theirs))
        lengths = [length for _, length, _ in handle.ours]
        moved = moving.write(handle.pid, ours, theirs, lengths)
        handle.state = "DONE" if moved else "ERR"
        return handle.state

    def release_xfer_handle(self, handle: _Transfer) -> None:
        """Forget a transfer."""
