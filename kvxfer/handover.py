"""Calls from any thread, carried out on one event loop, in their order."""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Callable

from kvxfer.errors import ClosedResourceError, UsageError

__all__ = ["Mailbox"]


class Mailbox:
    """Hands calls over to the loop that made it: one wake-up, however many there are.

    Args:
      what: What the owner is called, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._woken = False
        self._closed = False

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return threading.get_ident() == self._thread

    def check_elsewhere(self) -> None:
        """Raise UsageError on the loop's own thread: waiting would be for ever."""
        if self.is_here:
            raise UsageError("the event loop must not wait for itself: await instead")

    def post(self, call: Callable[[], None]) -> None:
        """Have ``call`` carried out on the loop soon. Any thread; never waits.

        Raises:
          ClosedResourceError: The owner is closed.
        """
        with self._lock:
            if self._closed:
                raise ClosedResourceError(f"the {self._what} is closed")
            self._calls.append(call)
            if self._woken:
                return
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self.empty)
        except RuntimeError as error:  # the loop is closed
            raise ClosedResourceError(f"the {self._what}'s event loop is") from error

    def empty(self) -> None:
        """Carry out what is there. On the loop."""
        with self._lock:
            self._woken = False
            calls, self._calls = self._calls, collections.deque()
        for call in calls:
            try:
                call()
            except Exception as error:  # noqa: BLE001 - goes to the loop's handler
                message = f"a call to the {self._what} failed"
                self._loop.call_exception_handler(
                    {"message": message, "exception": error}
                )

    def close(self) -> None:
        """Carry out what is there and take no more. On the loop; twice is fine."""
        with self._lock:
            self._closed = True
        self.empty()
