"""Checks of arguments that the public calls have in common."""

from __future__ import annotations

from typing import Any

from kvxfer.errors import UsageError

__all__ = ["MAX_SECONDS", "request_bytes", "request_name", "seconds_of"]

_MAX_REQUEST_BYTES = 256
# Longer than any process lives, and still a number that timers take.
MAX_SECONDS = 10 * 365 * 86400.0


def request_bytes(request_id: str) -> bytes:
    """Return a request id as it travels.

    Raises:
      UsageError: It is no text, or too long.
    """
    try:
        found = request_id.encode()
    except (AttributeError, UnicodeEncodeError):
        raise UsageError(f"request_id is {request_id!r}, not text") from None
    if len(found) > _MAX_REQUEST_BYTES:
        raise UsageError(
            f"request_id has {len(found)} bytes, more than {_MAX_REQUEST_BYTES}"
        )
    return found


def request_name(request_id: str) -> str:
    """Check the id of a request that must have one.

    Raises:
      UsageError: It is empty, no text, or too long.
    """
    if not request_bytes(request_id):
        raise UsageError("request_id is empty")
    return request_id


def seconds_of(value: Any, default: float, name: str) -> float:
    """Return a time that was given, or the default for None.

    Raises:
      UsageError: It is not a positive number.
    """
    seconds = default if value is None else value
    try:
        usable = not isinstance(seconds, bool | str) and bool(seconds > 0)
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise UsageError(f"{name} is {value!r}, not a positive number of seconds")
    return float(seconds if seconds == default else min(seconds, MAX_SECONDS))
