"""What a client says of its requests at a moment: plain data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvxfer.requests import LayerTimes

__all__ = ["ClientStatistics", "LayerWaits", "Lacks", "PeerLoad", "RequestMetrics"]


class Lacks(str, enum.Enum):
    """What a layer lacks to reach the wire."""

    OFFER = "an offer"
    EVENT = "its event"
    EARLIER = "the acknowledgement of an earlier write of the same block"
    WINDOW = "room in the window of its peer or device"
    TURN = "its turn"


@dataclass(frozen=True)
class LayerWaits:
    """A layer of a request that has something ready and not posted.

    Attributes:
      request_id: The request.
      group: The layer's group.
      layer: Model layer.
      n_blocks: Blocks that wait.
      lacks: What for.
    """

    request_id: str
    group: str
    layer: int
    n_blocks: int
    lacks: Lacks


@dataclass(frozen=True)
class PeerLoad:
    """What is in flight to one peer.

    Attributes:
      peer: Its address.
      n_bytes: Bytes of blocks in flight.
      n_wrs: WRs in flight at most, before neighbours are merged.
    """

    peer: str
    n_bytes: int
    n_wrs: int


@dataclass(frozen=True)
class ClientStatistics:
    """What a client does at this moment.

    Attributes:
      requests: Number of requests that are not over, by state.
      parked_offers: Offers to requests that have not been opened.
      waiting: Layers that have something ready and not posted, and why.
      in_flight: What is in flight, by peer.
    """

    requests: Mapping[str, int] = field(default_factory=dict)
    parked_offers: int = 0
    waiting: tuple[LayerWaits, ...] = ()
    in_flight: tuple[PeerLoad, ...] = ()


@dataclass(frozen=True)
class RequestMetrics:
    """What a request has done so far.

    Attributes:
      bytes: Bytes of blocks acknowledged; what was sent twice counts twice.
      wrs: WRs that it took, notifications included.
      seconds: Since it was opened, until now or its end.
      layers: When each layer got how far.
      device: Name of the device that moved them last; empty before.
      wire: How they travelled, as in :class:`kvxfer.WriteResult`; empty before.
    """

    bytes: int
    wrs: int
    seconds: float
    layers: tuple[LayerTimes, ...]
    device: str = ""
    wire: str = ""
