"""The files by which a machine tells what it is; of this one, or of a copy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19

_LIBRARY_DIRS = ("usr/lib/*", "lib/*", "usr/lib64", "lib64", "usr/lib", "usr/local/lib")


@dataclass(frozen=True)
class Machine:
    """A root directory; ``/`` is this machine, and only that can be tried out."""

    root: Path = Path("/")

    @property
    def is_this(self) -> bool:
        """Whether it is the machine that this runs on."""
        return self.root == Path("/")

    def path(self, name: str) -> Path:
        """Return where a file of the machine is."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str:
        """Read a small file; empty where it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return ""

    def names(self, name: str, pattern: str = "*") -> list[str]:
        """List a directory; empty where there is none."""
        return sorted(path.name for path in self.path(name).glob(pattern))

    def exists(self, name: str) -> bool:
        """Say whether a file is there."""
        return self.path(name).exists()

    def hides(self, name: str) -> bool:
        """Say whether a file is there that cannot be read."""
        try:
            self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return False

    def library(self, name: str) -> Path | None:
        """Find a shared library where they usually are."""
        for directory in _LIBRARY_DIRS:
            for path in sorted(self.root.glob(f"{directory}/{name}")):
                return path
        return None

    def limit(self, name: str) -> int | None:
        """Return a soft limit of the process by its name in /proc; None: unlimited.

        Raises:
          LookupError: The machine does not tell.
        """
        for line in self.text("/proc/self/limits").splitlines():
            if line.startswith(name):
                word = line[len(name) :].split()[0]
                return None if word == "unlimited" else int(word)
        raise LookupError(name)

    def has_capability(self, number: int) -> bool:
        """Say whether the process has a capability."""
        match = re.search(
            r"^CapEff:\s*([0-9a-f]+)", self.text("/proc/self/status"), re.M
        )
        return match is not None and bool(int(match[1], 16) >> number & 1)

    def kernel(self) -> tuple[int, int]:
        """Return the kernel's version; (0, 0) where it is not known."""
        match = re.match(r"(\d+)\.(\d+)", self.text("/proc/sys/kernel/osrelease"))
        return (int(match[1]), int(match[2])) if match else (0, 0)

    def modules(self) -> set[str]:
        """Return the kernel modules that are loaded or built in."""
        return set(self.names("/sys/module"))

    def in_container(self) -> str:
        """Return what kind of container this is; empty if it is none."""
        for name, kind in (("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")):
            if self.exists(name):
                return kind
        if "KUBERNETES_SERVICE_HOST" in os.environ and self.is_this:
            return "Kubernetes"
        cgroup = self.text("/proc/1/cgroup")
        return "a container" if "kubepods" in cgroup or "docker" in cgroup else ""

    def may_use(self, names: Sequence[str]) -> bool:
        """Say whether all these files can be read and written."""
        return all(os.access(self.path(name), os.R_OK | os.W_OK) for name in names)
