from collections.abc import Callable
from typing import Any, final

from kvxfer._counters import Traffic
from kvxfer._engine import Engine

@final
class Turns:
    every: int
    at_most: float

    def __init__(self) -> None: ...
    def note(self, seconds: float) -> None: ...
    def forget(self) -> None: ...
    @property
    def owed(self) -> bool: ...

@final
class QuickWrites:
    def __init__(
        self,
        engine: Engine,
        slot: int,
        key: int,
        plans: dict[Any, Any],
        traffic: Traffic,
        turns: Turns,
        result: Callable[..., Any],
        device: str,
        wires: tuple[str, ...],
    ) -> None: ...
    def knows(self, wires: int) -> bool: ...
    # The result; or a Transfer; or None.
    def write(
        self,
        local_ids: object,
        remote_ids: object,
        layer: object,
        group: object,
        request_id: object,
    ) -> Any: ...
