"""What figures are of: a NIC, copies of memory, or nothing that moves.

Said in one place, for a figure of one kind must never pass for one of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvxfer.devices import NULL_DEVICE, SOFTWARE_DEVICE
from kvxfer.sizes import format_size

NIC = "nic"
COPIES = "memory copies"
NOTHING = "nothing moves"

SOFTWARE = (
    f"{SOFTWARE_DEVICE} is kvxfer's software device: "
    "these figures are memory copies, not a NIC's."
)


def is_software(device: str) -> bool:
    """Say whether an option or a window names a device of kvxfer's own, and no NIC."""
    return device in ("soft", SOFTWARE_DEVICE, "null", NULL_DEVICE)


def kind_of(window: Mapping[str, Any]) -> str:
    """Return what a window or a row of the summary is of.

    Who names no device has none: the machine's limits, and other engines without a NIC.
    """
    device = window.get("device")
    if device == NULL_DEVICE:
        return NOTHING
    return COPIES if device in (None, SOFTWARE_DEVICE) else NIC


def labelled(windows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return windows, or rows of the summary, with what they are of as ``kind``."""
    return [{**window, "kind": kind_of(window)} for window in windows]


def all_null(windows: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether nothing moved in any of these, so that they have no bandwidth."""
    return all(kind_of(window) == NOTHING for window in windows)


def any_software(windows: Iterable[Mapping[str, Any]]) -> bool:
    """Say whether kvxfer's software device is among them, which needs a word."""
    return any(window.get("device") == SOFTWARE_DEVICE for window in windows)


def way_of(row: Mapping[str, Any]) -> str:
    """Say by what the blocks went, and what that is; empty where no device is named."""
    if row.get("device") is None:
        return ""
    way, kind = f"{row['device']} ({row['wire']})", kind_of(row)
    if kind == NIC:
        return way
    pages = row.get("page_bytes") if kind == COPIES else None
    return f"{way}, {kind}" + (f" on pages of {format_size(pages)}" if pages else "")
