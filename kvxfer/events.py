"""What a request's bytes may wait for: events of a device, a loop, or a thread."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

from kvxfer.control import in_thread
from kvxfer.errors import UsageError

__all__ = ["check_event", "happens", "has_happened"]

# Polled like this an event costs little and its layer loses little.
_FIRST_POLL = 0.0001
_SLOWEST_POLL = 0.002


def check_event(event: object) -> None:
    """Refuse what cannot be waited for.

    Raises:
      UsageError: It has neither ``query`` nor ``synchronize``, is no asyncio event
        and cannot be called.
    """
    if event is None or isinstance(event, asyncio.Event) or callable(event):
        return
    if callable(getattr(event, "query", None)):
        return
    if callable(getattr(event, "synchronize", None)):
        return
    raise UsageError(
        f"event is a {type(event).__name__}: expected something with query() or "
        "synchronize(), an asyncio.Event, or a callable"
    )


def has_happened(event: Any) -> bool:
    """Look whether an event has happened, where looking does not wait."""
    if event is None:
        return True
    if isinstance(event, asyncio.Event):
        return event.is_set()
    query = getattr(event, "query", None)
    return bool(callable(query) and query())


async def happens(event: Any) -> None:
    """Wait until an event has happened.

    ``query()`` is polled; ``synchronize()``, and a callable that is no coroutine
    function, run in a thread of their own. A callable that returns False is called
    again; anything else means that the event has happened.

    Raises:
      Exception: Whatever the event raises.
    """
    if isinstance(event, asyncio.Event):
        await event.wait()
        return
    if callable(getattr(event, "query", None)):
        await _until(event.query)
        return
    synchronize = getattr(event, "synchronize", None)
    if callable(synchronize):
        await in_thread(synchronize)
        return
    pause = _FIRST_POLL
    while True:
        if inspect.iscoroutinefunction(event):
            result = await event()
        else:
            result = await in_thread(event)
            if isinstance(result, Awaitable):
                result = await result
        if result is not False:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, _SLOWEST_POLL)


async def _until(query: Any) -> None:
    pause = _FIRST_POLL
    while not query():
        await asyncio.sleep(pause)
        pause = min(2 * pause, _SLOWEST_POLL)
