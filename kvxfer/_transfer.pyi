import asyncio
import enum
from collections.abc import Callable, Generator
from typing import Any

from kvxfer._engine import Finished, Watch

class Outcome(enum.Enum):
    DONE = ...
    FAILED = ...
    EXPIRED = ...

class Transfer(Watch):
    slot: int
    layers: tuple[int, ...]
    failures: list[tuple[int, Finished]] | None
    n_bytes: int
    n_wrs: int
    n_blocks: int
    wires: int
    expired: bool
    abandoned: bool
    due: float
    timeout: float
    request: bytes
    undrained: Callable[[], None] | None
    drain: asyncio.TimerHandle | None
    on_end: Callable[[Transfer], None] | None
    began: float

    def __init__(
        self, slot: int, layers: tuple[int, ...], op_ids: list[int]
    ) -> None: ...
    def __await__(self) -> Generator[Any]: ...
    def wake(self) -> None: ...
    def tell(self) -> None: ...
    @property
    def ended(self) -> bool: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def pending(self) -> list[int]: ...
    @property
    def outcome(self) -> Outcome: ...
    @property
    def layers_done(self) -> list[int]: ...
