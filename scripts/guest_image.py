"""Put what the tests in the guest import on a disk image; scripts/test-rdma calls this.

python scripts/guest_image.py IMAGE

The guest has the file system of the host over 9p, where each look at a file is a
round trip and nothing is kept: an import of numpy takes half a minute there. From a
disk of its own the guest's page cache works. The image holds directories and files
under their absolute names, and in ``mounts`` those that the guest puts in their place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Of the standard library: what no test imports, and what is large.
LEFT_OUT = ("site-packages", "test", "idlelib", "ensurepip", "config-*")
SPARE = 64 << 20


def requirements(name: str, extra: str, known: set[str]) -> Iterator[str]:
    """Yield ``name`` and the distributions it needs, each once."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in known:
        return
    known.add(name)
    yield name
    for text in metadata.requires(name) or []:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
            for other in {"", *wanted.extras}:
                yield from requirements(wanted.name, other, known)


def copy_distributions(packages: Path, stage: Path) -> None:
    """Copy what kvxfer and its tests need of ``packages``, without what else is in."""
    target = stage / packages.relative_to("/")
    for name in requirements("kvxfer", "dev", set()):
        for file in metadata.files(name) or []:
            if file.parts[0] == "..":
                continue  # a command
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            if (packages / file).is_file():
                shutil.copy2(packages / file, target / file)


def fill(stage: Path) -> list[Path]:
    """Copy everything; return what is to be mounted in the guest."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    sources = [ROOT / "kvxfer", ROOT / "tests"]
    for tree in (library, *sources):
        shutil.copytree(
            tree,
            stage / tree.relative_to("/"),
            ignore=shutil.ignore_patterns(*LEFT_OUT),
            symlinks=True,
        )
    copy_distributions(packages, stage)
    python = Path(sys.executable).resolve()
    (stage / python.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(python, stage / python.relative_to("/"))
    return [library, packages, python, *sources]


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: guest_image.py IMAGE")
    image = Path(arguments[0])
    with tempfile.TemporaryDirectory(dir=image.parent) as directory:
        stage = Path(directory)
        mounts = fill(stage)
        (stage / "mounts").write_text("".join(f"{path}\n" for path in mounts))
        files = [path.stat().st_size for path in stage.rglob("*") if path.is_file()]
        # Blocks of 4 KiB, and an inode of 256 bytes each.
        size = sum(-(-n // 4096) * 4096 + 512 for n in files) * 9 // 8 + SPARE
        image.unlink(missing_ok=True)
        command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-N"]
        command += [str(2 * len(files) + 4096), "-d", str(stage), str(image)]
        subprocess.run([*command, f"{size >> 10}K"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
