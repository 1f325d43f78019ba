"""How soon ZMQ finds out that a peer is frozen or gone. Pure."""

from __future__ import annotations

from kvxfer.options import Options

__all__ = ["heartbeat"]

# By how much a link may be closed after its time: ZMQ's timers, one for the question
# and one for the answer, count whole milliseconds and end up to one late each; the rest
# is for its thread and the event loop to get their turns.
_LATE_MS = 10


def heartbeat(options: Options) -> tuple[int, int]:
    """Return how often ZMQ asks for a sign of life, and how long it waits for one.

    Both in milliseconds. The wait starts with a question, at most an interval after the
    peer's last moment, so the two together, and their lateness, are ``ping_timeout``.
    """
    whole = int(options.ping_timeout * 1000) - _LATE_MS  # 20 at least without
    interval = min(int(options.ping_interval * 1000), whole - 1)
    return interval, whole - interval
