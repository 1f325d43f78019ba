"""What vLLM's scheduler and workers call of a KV connector, as far as it matters here.

Written from the documentation of ``KVConnectorBase_V1``: names, arguments and what is
promised, and nothing of its code.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ConnectorMetadata",
    "KVConnectorBase",
    "Request",
    "Role",
    "Scheduled",
    "SchedulerOutput",
]


class Role(enum.Enum):
    """A connector is made twice: for the scheduler and for the worker."""

    SCHEDULER = 0
    WORKER = 1


@dataclass(eq=False)
class Request:
    """A request as the scheduler holds it."""

    request_id: str
    n_prompt_tokens: int
    kv_transfer_params: dict[str, Any]


@dataclass(frozen=True)
class Scheduled:
    """What one step computes of one request.

    Attributes:
      block_ids: All blocks that it has so far.
      n_computed: Tokens that were computed before this step.
      n_tokens: Tokens that this step computes.
    """

    request: Request
    block_ids: tuple[int, ...]
    n_computed: int
    n_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """What one step does."""

    scheduled: tuple[Scheduled, ...] = ()
    preempted: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()


@dataclass
class ConnectorMetadata:
    """What the scheduler's connector tells the worker's, once a step."""

    items: dict[str, list[Any]] = field(default_factory=dict)


class KVConnectorBase(abc.ABC):
    """The calls of one step, in their order; all of them synchronous."""

    def __init__(self, config: Mapping[str, Any], role: Role) -> None:
        self.role = role
        self.config = config
        self.metadata = ConnectorMetadata()

    # -- scheduler -----------------------------------------------------------------

    @abc.abstractmethod
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many tokens come from elsewhere, and whether beside other steps."""

    @abc.abstractmethod
    def update_state_after_alloc(
        self, request: Request, block_ids: list[int], num_external_tokens: int
    ) -> None:
        """Blocks have been allocated for them."""

    @abc.abstractmethod
    def build_connector_meta(self, output: SchedulerOutput) -> ConnectorMetadata:
        """Say what the worker has to know of this step."""

    @abc.abstractmethod
    def request_finished(self, request: Request, block_ids: list[int]) -> bool:
        """A request is over; true if its blocks are still used."""

    # -- worker --------------------------------------------------------------------

    def bind_connector_metadata(self, metadata: ConnectorMetadata) -> None:
        self.metadata = metadata

    @abc.abstractmethod
    def register_kv_caches(self, caches: Any) -> None:
        """The tensors of all layers."""

    @abc.abstractmethod
    def handle_preemptions(self, preempted: frozenset[str]) -> None:
        """The blocks of these requests are overwritten when this returns."""

    @abc.abstractmethod
    def start_load_kv(self) -> None:
        """A step begins. Must not block."""

    @abc.abstractmethod
    def wait_for_layer_load(self, layer: int) -> None:
        """A layer is about to be computed."""

    @abc.abstractmethod
    def save_kv_layer(self, layer: int, event: Any) -> None:
        """A layer has been computed, when ``event`` has happened."""

    @abc.abstractmethod
    def wait_for_save(self) -> None:
        """A step ends."""

    @abc.abstractmethod
    def get_finished(self, finished: frozenset[str]) -> tuple[set[str], set[str]]:
        """Requests of which all has been sent, and of which all has been received."""

    @abc.abstractmethod
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were received in vain since the last call."""

    @abc.abstractmethod
    def shutdown(self) -> None:
        """The end."""
