"""How near the processors are to each other: how long a word takes there and back.

Where they are virtual that changes while a run goes on, with the cores that they are
given, and with it every figure of two threads that speak with each other.
"""

from __future__ import annotations

import os
import threading

import numpy as np

from kvxfer.bench import _limits

_MOST_NS = 5_000_000
_WORDS = 32


def word_round_trip() -> float | None:
    """Measure it for a few milliseconds, between the first two processors of ours.

    Returns:
      Nanoseconds, of the fastest words; None: only one processor is ours, or something
      else took it meanwhile.
    """
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        return None
    first, second = sorted(ours)[:2]
    words = np.zeros(_WORDS, np.uint64)

    def answer() -> None:
        os.sched_setaffinity(0, {second})  # of this thread alone
        _limits.answer_words(words)

    answering = threading.Thread(target=answer)
    os.sched_setaffinity(0, {first})
    try:
        answering.start()
        found = _limits.ask_words(words, _MOST_NS)
        answering.join()
    finally:
        os.sched_setaffinity(0, ours)
    return found or None
