"""Who can be measured: kvxfer in several ways, the machine's limits, other engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvxfer.errors import UsageError

OURS = "kvxfer"


@dataclass(frozen=True)
class Contender:
    """One way to move the blocks.

    Attributes:
      name: As it is asked for and shown.
      kind: Which code runs it; see ``pair``.
      what: One line for people.
      options: Options of kvxfer that it needs, beyond those asked for.
      environ: Variables of its processes.
      module: What must be importable in the Python of other engines, if it is one.
      packages: How that is installed.
      memory: ``shared`` or ``ordinary`` where it takes only the one.
      parameters: For its code.
    """

    name: str
    kind: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    module: str = ""
    packages: str = ""
    memory: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        """Whether it is another engine, in a Python of its own."""
        return bool(self.packages)


WRITE_CACHE = Contender(
    OURS, "write_cache", "await client.write_cache(...), by the options given"
)
REMOTE = Contender(OURS, "remote", "write_cache into a kvxfer serve elsewhere")

OTHERS: tuple[Contender, ...] = ()


def names() -> list[str]:
    """List what ``--against`` takes."""
    return [contender.name for contender in OTHERS]


def find(name: str) -> Contender:
    """Find a contender by its name; ``kvxfer:option=value+...`` is kvxfer otherwise.

    Raises:
      UsageError: There is none of this name.
    """
    if name.startswith(f"{OURS}:"):
        options = dict(_setting(part, name) for part in name[7:].split("+"))
        return replace(
            WRITE_CACHE,
            name=name,
            what="write_cache, by other options",
            options=options,
        )
    for contender in OTHERS:
        if contender.name == name:
            return contender
    raise UsageError(
        f"--against {name!r}: there is only {', '.join(names())}, and "
        "kvxfer:option=value+option=value"
    )


def _setting(part: str, name: str) -> tuple[str, str]:
    option, equals, value = part.partition("=")
    if not equals:
        raise UsageError(f"--against {name!r}: {part!r} is not option=value")
    return option.strip(), value.strip()
