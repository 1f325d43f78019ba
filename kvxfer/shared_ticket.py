"""A request that a process has offered through a sidecar, as that process sees it.

It may be read and waited for in any thread, without an event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvxfer.errors import BrokenPeerError
from kvxfer.shared_messages import TicketNews

__all__ = ["SharedTicket"]

_OVER = ("done", "aborted", "failed")


class SharedTicket:
    """A request that this process has offered through the sidecar.

    All attributes may be read from any thread, without waiting.

    Attributes:
      request_id: As it was offered.
      state: As of ``Ticket``: offered, arriving, ending, done, aborted, failed. Or
        lost: the connection to the sidecar has ended first, and until the sidecar has
        fenced the request, or ended itself, its blocks may still be written.
      layers_done: The layers that are in place.
      error: Why it ended badly; empty while it goes on, and when all went well.
      aux: What the writer gave to ``finish``.
    """

    def __init__(self, request_id: str, give_up: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.state = "offered"
        self.layers_done: tuple[int, ...] = ()
        self.error = ""
        self.aux = b""
        self._give_up = give_up
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<SharedTicket {self.request_id!r}, {self.state}>"

    @property
    def is_over(self) -> bool:
        """Whether no byte of it can land any more; never of one that is lost."""
        return self.state in _OVER

    @property
    def _is_settled(self) -> bool:
        """Whether nothing more will be heard of it."""
        return self.is_over or self.state == "lost"

    def _take(self, news: TicketNews) -> None:
        with self._changed:
            self.state = news.state
            self.layers_done = tuple(news.layers_done)
            self.error = news.error
            self.aux = news.aux
            self._changed.notify_all()

    def _lose(self, error: str) -> None:
        with self._changed:
            if not self.is_over:
                self.state, self.error = "lost", error
            self._changed.notify_all()

    def join_layer(self, layer: int, timeout: float | None = None) -> None:
        """Wait until a layer is in place.

        Raises:
          BrokenPeerError: The request ended before, or is lost.
          TimeoutError: It is not there after so many seconds.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: layer in self.layers_done or self._is_settled, timeout
            )
        if layer in self.layers_done:
            return
        if not self._is_settled:
            raise TimeoutError(f"layer {layer} is not there after {timeout:g} s")
        raise self._failure()

    def join(self, timeout: float | None = None) -> None:
        """Wait until all is in place.

        Raises:
          BrokenPeerError: The request ended badly, or is lost.
          TimeoutError: It goes on after so many seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_settled, timeout)
        if not self._is_settled:
            raise TimeoutError(f"{self!r} goes on after {timeout:g} s")
        if self.state != "done":
            raise self._failure()

    def abort(self, reason: str = "") -> None:
        """Give it up; returns when no byte of it can land any more.

        Raises:
          BrokenPeerError: The sidecar is gone, or does not answer: its blocks may
            still be written.
        """
        self._give_up(reason)

    def _failure(self) -> BrokenPeerError:
        return BrokenPeerError(
            f"request {self.request_id!r} {self.state}: "
            f"{self.error or 'no writer holds that layer'}"
        )
