"""What happens to a listener's links below the messages: who came, who is gone.

ZMQ tells it by descriptors, which are used again. All is said by one thread, and a
link's coming before any message of it; so whoever has taken all that was said before
a link's first message knows whose descriptor it is.
"""

from __future__ import annotations

import logging
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvxfer.control_link import Link

__all__ = ["MONITORED", "LinkWatch"]

_log = logging.getLogger("kvxfer.control")

MONITORED = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
)
_LOG_INTERVAL = 10.0


class LinkWatch:
    """Counts a listener's links, and says whose is gone.

    Attributes:
      accepted: Links taken.
      ready: Links that got through ZMQ's handshake.
      closed: Links that are gone, ready or not.
    """

    def __init__(self) -> None:
        self.accepted = self.ready = self.closed = 0
        self._by_fd: dict[int, set[Link]] = {}
        self._fd_of: dict[Link, int] = {}
        self._next_log = 0.0

    def add(self, fd: int | str | bytes, link: Link) -> None:
        """Note the descriptor of a link, as its first message has it."""
        number = int(fd)
        self._by_fd.setdefault(number, set()).add(link)
        self._fd_of[link] = number

    def remove(self, link: Link) -> None:
        """Forget a link. Twice is fine."""
        fd = self._fd_of.pop(link, None)
        if fd is not None:
            links = self._by_fd[fd]
            links.discard(link)
            if not links:
                del self._by_fd[fd]

    def take(self, frames: list[bytes]) -> list[Link]:
        """Take one message of the monitor; return the links that are gone by it."""
        event = parse_monitor_message(frames)
        kind = int(event["event"])
        if kind == zmq.EVENT_ACCEPTED:
            self.accepted += 1
        elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.ready += 1
        elif kind == zmq.EVENT_ACCEPT_FAILED:
            self.log_refused(zmq.strerror(int(event["value"])))
        elif kind == zmq.EVENT_DISCONNECTED:
            self.closed += 1
            return list(self._by_fd.get(int(event["value"]), ()))
        return []

    def log_refused(self, why: str) -> None:
        """Log why a connection could not be taken, every ten seconds at most."""
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL
            _log.error("control: a connection could not be taken: %s", why)
