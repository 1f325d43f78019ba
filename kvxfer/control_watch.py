"""What happens to a listener's links below the messages: who came, who is gone.

ZMQ tells it by descriptors, which are used again. All is said by one thread, and a
link's coming before any message of it; so whoever has taken all that was said before
a link's first message knows whose descriptor it is. What a link that is gone has said
may be unread at that time; it is lost when that has been heard.
"""

from __future__ import annotations

import logging
import math
import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvxfer.control_io import RECEIVE_QUEUE
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
        self._gone: dict[Link, int] = {}
        """With how many messages will have been heard when its last surely has."""
        self._next_log = 0.0

    def add(self, fd: int | str | bytes, link: Link) -> None:
        """Note the descriptor of a link, as its first message has it."""
        number = int(fd)
        self._by_fd.setdefault(number, set()).add(link)
        self._fd_of[link] = number

    def remove(self, link: Link) -> None:
        """Forget a link. Twice is fine."""
        self._gone.pop(link, None)
        fd = self._fd_of.pop(link, None)
        if fd is not None:
            links = self._by_fd[fd]
            links.discard(link)
            if not links:
                del self._by_fd[fd]

    def take(self, frames: list[bytes], heard: int) -> None:
        """Take one message of the monitor.

        Args:
          frames: The message.
          heard: How many messages of all links have been heard so far.
        """
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
            fd = int(event["value"])
            links = self._by_fd.get(fd, set()) - self._gone.keys()
            # ZMQ gives messages of all links in turn, and has a queue of each.
            n_queues = self.accepted - self.closed + len(self._gone) + len(links)
            for link in links:
                self._gone[link] = heard + n_queues * RECEIVE_QUEUE

    def lost(self, heard: float = math.inf) -> list[Link]:
        """Return once the links that are gone, and of which all has been heard.

        Args:
          heard: As for :meth:`take`; infinite when none waits.
        """
        found = [link for link, due in self._gone.items() if due <= heard]
        for link in found:
            del self._gone[link]
        return found

    def log_refused(self, why: str) -> None:
        """Log why a connection could not be taken, every ten seconds at most."""
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL
            _log.error("control: a connection could not be taken: %s", why)
