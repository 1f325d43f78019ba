"""What SGLang's schedulers call of a transfer backend, as far as it matters here.

Written from the documentation of ``BaseKVManager``, ``BaseKVSender`` and
``BaseKVReceiver``: names, arguments and what is promised, and nothing of its code.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BaseKVManager",
    "BaseKVReceiver",
    "BaseKVSender",
    "KVArgs",
    "KVPoll",
    "Mode",
]


class Mode(enum.Enum):
    """Which side an engine is."""

    PREFILL = "prefill"
    DECODE = "decode"


class KVPoll(enum.IntEnum):
    """Where a request stands; ranks agree on the least of theirs."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4


@dataclass(frozen=True)
class KVArgs:
    """The memory of an engine.

    Attributes:
      kv_data_ptrs: Address of each buffer: K of all layers, then V of all layers.
      kv_data_lens: Bytes of each.
      kv_item_lens: Bytes of a page of each.
      aux_data_ptrs: Address of each auxiliary buffer.
      aux_item_lens: Bytes of an item of each.
      page_size: Tokens of a page.
    """

    kv_data_ptrs: Sequence[int]
    kv_data_lens: Sequence[int]
    kv_item_lens: Sequence[int]
    aux_data_ptrs: Sequence[int]
    aux_item_lens: Sequence[int]
    page_size: int


class BaseKVManager(abc.ABC):
    """One an engine: what all of its requests share."""

    @abc.abstractmethod
    def __init__(self, args: KVArgs, mode: Mode, server_args: object) -> None: ...

    @abc.abstractmethod
    def register_to_bootstrap(self) -> None:
        """Say where this engine can be found."""


class BaseKVSender(abc.ABC):
    """One request at the prefill engine."""

    @abc.abstractmethod
    def __init__(self, mgr: BaseKVManager, bootstrap_room: int) -> None: ...

    @abc.abstractmethod
    def init(self, num_kv_indices: int, aux_index: int) -> None:
        """So many pages will be sent, and this auxiliary item."""

    @abc.abstractmethod
    def send(self, kv_indices: Sequence[int]) -> None:
        """A chunk is computed: its pages, in all layers. Must not block."""

    @abc.abstractmethod
    def poll(self) -> KVPoll:
        """Where it stands. Must not block."""

    @abc.abstractmethod
    def failure_exception(self) -> None:
        """Raise why it failed."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Give it up; the pages may be reused when this returns."""

    @abc.abstractmethod
    def clear(self) -> None:
        """The engine has no more to ask."""


class BaseKVReceiver(abc.ABC):
    """One request at the decode engine."""

    @abc.abstractmethod
    def __init__(
        self, mgr: BaseKVManager, bootstrap_addr: str, bootstrap_room: int
    ) -> None: ...

    @abc.abstractmethod
    def init(self, prefill_dp_rank: int) -> None:
        """The prefill engine is known."""

    @abc.abstractmethod
    def send_metadata(
        self, kv_indices: Sequence[int], aux_index: int, decode_prefix_len: int
    ) -> None:
        """Pages for what lies behind a prefix of so many tokens."""

    @abc.abstractmethod
    def poll(self) -> KVPoll:
        """Where it stands. Must not block."""

    @abc.abstractmethod
    def failure_exception(self) -> None:
        """Raise why it failed."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Give it up; the pages may be reused when this returns."""

    @abc.abstractmethod
    def clear(self) -> None:
        """The engine has no more to ask."""
