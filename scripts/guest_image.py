"""Put what the tests in the guest import on a disk image; scripts/test-rdma calls this.

python scripts/guest_image.py IMAGE [DIRECTORY...]

The guest has the file system of the host over 9p, where each look at a file is a
round trip and nothing is kept: an import of numpy takes half a minute there. From a
disk of its own the guest's page cache works. The image holds directories and files
under their absolute names, and in ``mounts`` those that the guest puts in their place.
In ``libraries`` are those of the system, for LD_LIBRARY_PATH. Each DIRECTORY is put in
as well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Of the standard library: what no test imports, and what is large.
LEFT_OUT = ("site-packages", "test", "idlelib", "ensurepip", "config-*")
SPARE = 64 << 20
# Their libraries are used besides Python's; libibverbs opens all its providers.
PROGRAMS = ("/bin/ip", "/usr/bin/rdma", "/usr/bin/ib_write_bw", "/usr/bin/ibv_devinfo")
PROVIDERS = Path("/usr/lib/x86_64-linux-gnu/libibverbs")


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


def copy_distributions(packages: Path, stage: Path) -> list[Path]:
    """Copy what kvxfer and its tests need of ``packages``, without what else is in.

    Return the compiled modules.
    """
    target = stage / packages.relative_to("/")
    modules = []
    for name in requirements("kvxfer", "dev", set()):
        for file in metadata.files(name) or []:
            if file.parts[0] == "..":
                continue  # a command
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            if (packages / file).is_file():
                shutil.copy2(packages / file, target / file)
            if file.suffix == ".so":
                modules.append(packages / file)
            # Not all of what is compiled is in the list: pytest's plugins, by pytest.
            compiled = Path(file).parent / "__pycache__"
            for path in (packages / compiled).glob(f"{Path(file).stem}.*.pyc"):
                (target / compiled).mkdir(exist_ok=True)
                shutil.copy2(path, target / compiled / path.name)
    return modules


def libraries(programs: Iterable[Path]) -> set[Path]:
    """Find the shared libraries that programs and modules load."""
    command = ["ldd", *(str(path) for path in programs)]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return {Path(line) for line in re.findall(r"(?:=> |\t)(/\S+) \(", listed.stdout)}


def copy_libraries(stage: Path, modules: list[Path]) -> None:
    """Copy the libraries of the system that the tests load.

    Each start of a program maps them, and over 9p each page is a round trip again.
    """
    programs = [Path(sys.executable).resolve(), *map(Path, PROGRAMS), *modules]
    programs += Path(sysconfig.get_path("stdlib")).glob("lib-dynload/*.so")
    (stage / "libraries").mkdir()
    for library in libraries([*programs, *PROVIDERS.glob("*.so")]):
        if not any(library.is_relative_to(module.parent) for module in modules):
            shutil.copy2(library, stage / "libraries" / library.name)


def fill(stage: Path, others: list[Path]) -> list[Path]:
    """Copy everything; return what is to be mounted in the guest."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    trees = [ROOT / "kvxfer", ROOT / "tests", PROVIDERS, *others]
    for tree in dict.fromkeys([library, *trees]):
        shutil.copytree(
            tree,
            stage / tree.relative_to("/"),
            ignore=shutil.ignore_patterns(*LEFT_OUT),
            symlinks=True,
        )
    modules = copy_distributions(packages, stage)
    python = Path(sys.executable).resolve()
    (stage / python.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(python, stage / python.relative_to("/"))
    copy_libraries(stage, modules + [so for at in others for so in at.glob("*.so")])
    return [library, packages, python, *trees]


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit("usage: guest_image.py IMAGE [DIRECTORY...]")
    image = Path(arguments[0])
    with tempfile.TemporaryDirectory(dir=image.parent) as directory:
        stage = Path(directory)
        mounts = fill(stage, [Path(argument) for argument in arguments[1:]])
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
