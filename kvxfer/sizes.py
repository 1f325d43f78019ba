"""Sizes as people write them: ``64K`` is 65536."""

from __future__ import annotations

import re
from collections.abc import Callable

from kvxfer.errors import UsageError

__all__ = ["format_size", "parse_list", "parse_size", "parse_sizes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SIZE = re.compile(r"(\d+)([KMG]?)(?:iB|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read ``4096``, ``64K``, ``2M`` or ``1G``; the letters are powers of 1024.

    Raises:
      UsageError: It is none of these, or 0.
    """
    match = _SIZE.fullmatch(text.strip())
    n_bytes = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if n_bytes < 1:
        raise UsageError(f"{text!r} is not a size such as 4096, 64K, 2M or 1G")
    return n_bytes


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read sizes by commas; ``1K..256K`` is every power of two between the two.

    Raises:
      UsageError: A part is no size, or a range runs backwards.
    """
    return parse_list(text, parse_size)


def parse_list(text: str, parse: Callable[[str], int]) -> tuple[int, ...]:
    """Read numbers by commas, each by ``parse``; ``A..B`` goes up by doubling.

    Raises:
      UsageError: A range runs backwards, or what ``parse`` raises.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = parse(first)
        high = parse(last) if dots else low
        if high < low:
            raise UsageError(f"{part!r} runs backwards: the smaller one comes first")
        while low <= high:
            found.append(low)
            low *= 2
    return tuple(dict.fromkeys(found))


def format_size(n_bytes: int) -> str:
    """Return ``64K`` for 65536; what is no multiple of 1024 stays a number."""
    for letter in "GMK":
        if n_bytes % _UNITS[letter] == 0:
            return f"{n_bytes // _UNITS[letter]}{letter}"
    return str(n_bytes)
