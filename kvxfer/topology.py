"""How far a NIC is from a GPU, in NCCL's classes. Pure.

Both are given by their places in the PCI tree, as sysfs has them: the host bridge,
then one name a bridge, then the device itself.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

#: ``("pci0000:16", "0000:16:01.0", ..., "0000:1a:00.0")``
PCIPath = tuple[str, ...]


class Distance(enum.IntEnum):
    """What lies between two PCI devices, nearest first."""

    PIX = 0
    """One PCI switch at most."""
    PXB = 1
    """Several PCI switches, and no host bridge."""
    PHB = 2
    """A host bridge: the root complex of one CPU."""
    NODE = 3
    """Host bridges of one NUMA node."""
    SYS = 4
    """The link between NUMA nodes, or it is not known."""


@dataclass(frozen=True)
class Place:
    """Where a device is: its PCI path, empty if it has none, and its NUMA node."""

    path: PCIPath = ()
    numa_node: int | None = None

    @property
    def address(self) -> str:
        """The PCI address, such as ``0000:1a:00.0``; empty without a path."""
        return self.path[-1] if self.path else ""


def distance(a: Place, b: Place) -> Distance:
    """Return how far two devices are from each other."""
    common = 0
    for ours, theirs in zip(a.path, b.path, strict=False):
        if ours != theirs:
            break
        common += 1
    if common == 0:
        same = a.numa_node is not None and a.numa_node == b.numa_node
        return Distance.NODE if same else Distance.SYS
    if common == 1:
        return Distance.PHB
    # Beneath a switch are its own port and the device: two names a side.
    if max(len(a.path), len(b.path)) - common <= 2:
        return Distance.PIX
    return Distance.PXB
