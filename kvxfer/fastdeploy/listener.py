"""What a decode node listens with, once for all communicators of the same port.

The original's example makes its communicator twice. There the constructor does not
wait for the port, and the second finds out in a thread that it is taken; the first
goes on to serve the memory, which is the same. Here both have one listener.
"""

from __future__ import annotations

import os
import threading

from kvxfer.blocking import Arrival, Server
from kvxfer.cache import KVCache
from kvxfer.fastdeploy.settings import Settings

__all__ = ["Listener", "listen"]


class Listener:
    """A server and its cache. Made by :func:`listen`."""

    def __init__(self, cache: KVCache, settings: Settings, port: int) -> None:
        self.cache = cache
        self.settings = settings
        self.port = port
        self.server = Server(
            cache, settings.options, host=settings.host, port=port, on_arrival=_forget
        )
        self._users = 1
        self.server.open()

    def serves(self, cache: KVCache, settings: Settings, port: int) -> bool:
        """Say whether this is what somebody would make for these."""
        return (
            (self.port, self.settings) == (port, settings)
            and port != 0
            and self.cache.entries() == cache.entries()
        )

    def share(self) -> Listener:
        """Count one more who uses it. Under the lock."""
        self._users += 1
        return self

    def release(self) -> None:
        """One less uses it; the last one closes it."""
        with _lock:
            self._users -= 1
            if self._users:
                return
            if self in _listeners:  # not where a parent made it
                _listeners.remove(self)
        self.server.close()
        self.cache.close()


_lock = threading.Lock()
_listeners: list[Listener] = []


def listen(cache: KVCache, settings: Settings, port: int) -> Listener:
    """Give what listens on a port for a cache: what does so already, or a new one.

    Args:
      cache: Closed with the listener, unless there is one for the same memory.

    Raises:
      KVXferError: The port is taken, by somebody else or for other memory.
    """
    with _lock:
        for listener in _listeners:
            if listener.serves(cache, settings, port):
                return listener.share()
        _listeners.append(Listener(cache, settings, port))
        return _listeners[-1]


def _forget(arrival: Arrival) -> None:
    """Take an arrival: the engine's own channel tells the decode node."""


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    _listeners.clear()  # they are the parent's


os.register_at_fork(after_in_child=_in_child)
