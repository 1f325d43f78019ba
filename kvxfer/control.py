"""The control connection on asyncio and ZMQ: who is there, and are they ready.

:class:`ControlServer` listens (ROUTER), :class:`ControlClient` dials (DEALER; one
object, one connection). Both carry the messages of :mod:`kvxfer.wire` under the
rules of :mod:`kvxfer.protocol` and leave everything that has to do with devices to
a delegate. They know no verbs; either end may be the one that writes.
"""

from __future__ import annotations

from kvxfer.control_client import ControlClient, DialerDelegate, EstablishedInfo
from kvxfer.control_invite import InviteListener, Inviter
from kvxfer.control_io import Address, in_thread
from kvxfer.control_server import ControlServer, ControlStatistics, ListenerDelegate
from kvxfer.protocol import CloseCause, CloseReason, OfferParts

__all__ = [
    "Address",
    "CloseCause",
    "CloseReason",
    "ControlClient",
    "ControlServer",
    "ControlStatistics",
    "DialerDelegate",
    "EstablishedInfo",
    "InviteListener",
    "Inviter",
    "ListenerDelegate",
    "OfferParts",
    "in_thread",
]
