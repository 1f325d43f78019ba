"""Which pair of devices two peers use: theirs and ours, and a GID of each. Pure.

Both sides list what they have, best first. The listener decides, since it is the
first to know both lists. A pair must have the same link layer, the same type of GID
and the same family of address; one whose addresses are in one network goes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from kvxfer import gids
from kvxfer.errors import DeviceUnavailableError
from kvxfer.gids import GID
from kvxfer.sysfs import Port
from kvxfer.wire import DeviceCandidate, GIDCandidate

# As the messages have it.
_MAX_GIDS = 64


def candidate(
    name: str, kind: str, port: Port, gid: GID, *, only: bool = False
) -> DeviceCandidate:
    """Make what peers are told of a port.

    Args:
      kind: As :class:`~kvxfer.wire.DeviceCandidate` has it.
      gid: The GID that is preferred.
      only: No other will do.
    """
    table = [gid] if only else gids.rank(port.gids, port.link_layer)
    table = [gid, *(entry for entry in table if entry.index != gid.index)]
    return DeviceCandidate(
        name=name,
        kind=kind,
        link_layer=port.link_layer,
        gid=gid.gid,
        gid_type=gid.gid_type,
        lid=port.lid,
        # The enum of verbs: 256 bytes are 1, 4096 are 5.
        mtu=min(5, max(1, port.mtu_bytes.bit_length() - 8)),
        gids=[
            GIDCandidate(
                gid=entry.gid, gid_type=entry.gid_type, prefix_len=entry.prefix_len
            )
            for entry in table[:_MAX_GIDS]
        ],
    )


@dataclass(frozen=True)
class Agreement:
    """A pair of devices, and the GID that each side's packets leave from."""

    ours: DeviceCandidate
    our_gid: GIDCandidate
    theirs: DeviceCandidate
    their_gid: GIDCandidate


def agree(
    ours: Sequence[DeviceCandidate], theirs: Sequence[DeviceCandidate]
) -> Agreement:
    """Choose a pair that can work.

    Raises:
      DeviceUnavailableError: None can; the message has both lists, and why each
        pair was rejected.
    """
    best: tuple[tuple[int, ...], Agreement] | None = None
    for (i, our), (j, their) in product(enumerate(ours), enumerate(theirs)):
        if _mismatch(our, their):
            continue
        for k, l, mine, other in _pairs(our, their):  # noqa: E741 - beside i, j, k
            rank = (
                our.kind != "rdma",
                not _one_network(our, mine, other),
                # The first choice of one side, before the second of both.
                min(i, j),
                i + j,
                i,
                k + l,
            )
            if best is None or rank < best[0]:
                best = rank, Agreement(our, mine, their, other)
    if best is None:
        raise DeviceUnavailableError(_refusal(ours, theirs))
    return best[1]


def table_of(candidate: DeviceCandidate) -> list[GIDCandidate]:
    """List the GIDs of a candidate, best first; an old peer names one only."""
    return candidate.gids or [
        GIDCandidate(gid=candidate.gid, gid_type=candidate.gid_type)
    ]


def is_global(link_layer: str, ours: bytes, theirs: bytes) -> bool:
    """Say whether packets need a GRH: on Ethernet, and between subnets."""
    return link_layer == "ethernet" or ours[:8] != theirs[:8]


def _mismatch(ours: DeviceCandidate, theirs: DeviceCandidate) -> str:
    """Say why two devices can never talk; empty if they may."""
    if not theirs.known:
        return f"{theirs.kind}, {theirs.link_layer}: not known here"
    if ours.kind != theirs.kind:
        return f"{ours.kind} here, {theirs.kind} there"
    if ours.link_layer != theirs.link_layer:
        return f"{ours.link_layer} here, {theirs.link_layer} there"
    return ""


def _pairs(
    ours: DeviceCandidate, theirs: DeviceCandidate
) -> Iterator[tuple[int, int, GIDCandidate, GIDCandidate]]:
    """List the pairs of GIDs that packets can go between."""
    mine, other = table_of(ours), table_of(theirs)
    if ours.link_layer == "infiniband":
        # The LIDs lead there; the GIDs count between subnets only.
        yield 0, 0, mine[0], other[0]
        return
    for (k, a), (l, b) in product(enumerate(mine), enumerate(other)):  # noqa: E741
        if not _gid_mismatch(a, b):
            yield k, l, a, b


def _gid_mismatch(ours: GIDCandidate, theirs: GIDCandidate) -> str:
    if ours.gid_type != theirs.gid_type:
        return (
            f"{ours.gid_type or 'unknown'} here, {theirs.gid_type or 'unknown'} there"
        )
    mine, other = gids.family_of(ours.gid), gids.family_of(theirs.gid)
    if mine is not other:
        return f"{mine} here, {other} there"
    return ""


def _one_network(
    device: DeviceCandidate, ours: GIDCandidate, theirs: GIDCandidate
) -> bool:
    if device.link_layer == "infiniband":
        return ours.gid[:8] == theirs.gid[:8]
    return gids.share_subnet(ours.gid, ours.prefix_len, theirs.gid, theirs.prefix_len)


def _refusal(ours: Sequence[DeviceCandidate], theirs: Sequence[DeviceCandidate]) -> str:
    """Put both tables and the reason of each pair into a message."""
    lines = ["no pair of devices can talk to each other"]
    for where, table in (("here", ours), ("at the peer", theirs)):
        lines.append(f"{where}:")
        lines += [f"  {_row(device)}" for device in table] or ["  none"]
    for our, their in product(ours, theirs):
        lines.append(f"{our.name} with {their.name}: {_why_not(our, their)}")
    return "\n".join(lines)


def _row(device: DeviceCandidate) -> str:
    if device.link_layer == "infiniband":
        where = f"LID {device.lid}"
    else:
        where = ", ".join(
            f"{gids.gid_address(gid.gid)} {gid.gid_type}".rstrip()
            for gid in table_of(device)
        )
    return f"{device.name} ({device.kind}, {device.link_layer}): {where}"


def _why_not(ours: DeviceCandidate, theirs: DeviceCandidate) -> str:
    if why := _mismatch(ours, theirs):
        return why
    reasons = dict.fromkeys(
        _gid_mismatch(a, b) for a, b in product(table_of(ours), table_of(theirs))
    )
    return "; ".join(reasons)
