"""Prove a wheel: look at its contents, install it where nothing else is, use it.

python scripts/try_wheel.py dist/kvxfer-*.whl [dist/kvxfer-*.tar.gz]

A source distribution beside it is looked into as well.

The clean environment sees no libibverbs, whether this machine has one or not:
a small auditing library makes the loader fail to find it. Exit status 0 means
that the wheel works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

WANTED = [
    "kvxfer/__init__.py",
    "kvxfer/_verbs.pyi",
    "kvxfer/_verbs.pxd",
    "kvxfer/_engine.pyi",
    "kvxfer/py.typed",
    "kvxfer/client.py",
    "kvxfer/serve.py",
    "kvxfer/bench/_limits.pyi",
    "kvxfer/kvbench/__init__.py",
    "rdma_comm.py",
]
VERBS = ["_handles", "_providers", "_structs", "_device", "_memory", "_verbs"]
ENGINE = ["_core", "_post", "_progress", "_driver", "_queues", "_submission"]
ENGINE += ["_engine"]
EXTENSIONS = [f"kvxfer/{name}." for name in [*VERBS, *ENGINE, "bench/_limits"]]
UNWANTED = (".c", ".h", ".pyx", ".o", ".pyc")
TOP_LEVEL = {"kvxfer", "rdma_comm.py"}
# Of the source distribution: sources and scripts, and nothing made from them.
SOURCES = ["kvxfer/_verbs.pyx", "kvxfer/softdev/softdev.h", "scripts/setup"]
MADE = (".so", *(f"/{extension}c" for extension in EXTENSIONS))

# The loader asks la_objsearch for every library; 0 means "not here".
AUDITOR = r"""
#define _GNU_SOURCE
#include <link.h>
#include <string.h>

unsigned int la_version(unsigned int version)
{
	return version;
}

char *la_objsearch(const char *name, uintptr_t *cookie, unsigned int flag)
{
	return strstr(name, "libibverbs") ? 0 : (char *)name;
}
"""

# What someone does who has just installed it. The software device is there;
# the one that needs rdma-core says in words that it is not.
TRIAL = r"""
import ctypes
import kvxfer, kvxfer._engine, kvxfer._verbs, kvxfer.kvbench
import kvxfer.bench._limits
from kvxfer.errors import DeviceUnavailableError

try:
    ctypes.CDLL("libibverbs.so.1")
except OSError:
    pass
else:
    raise SystemExit("libibverbs is still visible: this proves nothing")
assert kvxfer._verbs.list_devices("soft"), "no software device"
with kvxfer._verbs.Device("soft0") as device:
    assert device.query_gid(), "no GID"
try:
    kvxfer._verbs.list_devices("libibverbs")
except DeviceUnavailableError as error:
    assert "libibverbs" in str(error), error
else:
    raise SystemExit("libibverbs is not there, and nobody said so")
assert not any(kvxfer._verbs.live_objects().values())
for name in kvxfer.__all__:
    getattr(kvxfer, name)
import rdma_comm
memory = (ctypes.c_char * 8192)()
comm = rdma_comm.RDMACommunicator(
    "prefill", 0, "0", [ctypes.addressof(memory)], [], 2, 4096
)
assert not comm.connect("127.0.0.1", "not a port")
assert rdma_comm.__version__ == kvxfer.__version__
print(kvxfer.__version__)
"""


def check_contents(wheel: Path) -> None:
    """Fail unless the wheel holds what it must and nothing it must not."""
    if wheel.stem.endswith("-any"):
        raise SystemExit(f"{wheel.name} is said to be for every machine")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in WANTED if name not in names]
    missing += [
        e
        for e in EXTENSIONS
        if not any(n.startswith(e) and n.endswith(".so") for n in names)
    ]
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")
    sources = [name for name in names if name.endswith(UNWANTED)]
    sources += [n for n in names if n.split("/")[1:2] in (["native"], ["softdev"])]
    if sources:
        raise SystemExit(f"{wheel.name} carries {', '.join(sources)}")
    tops = {name.split("/")[0] for name in names}
    strangers = {top for top in tops - TOP_LEVEL if not top.startswith("kvxfer-")}
    if strangers:
        raise SystemExit(f"{wheel.name} installs {', '.join(strangers)} as well")


def check_sources(sdist: Path) -> None:
    """Fail unless the source distribution can be built from, and only that."""
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    missing = [s for s in SOURCES if not any(n.endswith(f"/{s}") for n in names)]
    if missing:
        raise SystemExit(f"{sdist.name} lacks {', '.join(missing)}")
    made = [name for name in names if name.endswith(MADE)]
    if made:
        raise SystemExit(f"{sdist.name} carries {', '.join(made)}")


def hide_libibverbs(workdir: Path) -> dict[str, str]:
    """Return an environment in which the loader finds no libibverbs."""
    source, library = workdir / "auditor.c", workdir / "auditor.so"
    source.write_text(AUDITOR)
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return {"LD_AUDIT": str(library)}


def clean_environment() -> dict[str, str]:
    """This environment without what points back to this source tree."""
    points_here = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "LD_LIBRARY_PATH"}
    return {key: value for key, value in os.environ.items() if key not in points_here}


def try_it(wheel: Path, workdir: Path) -> str:
    """Install the wheel into a clean venv, use it, and return its version."""
    environment = workdir / "venv"
    venv.create(environment, with_pip=True, clear=True)
    python = environment / "bin" / "python"
    env = clean_environment()
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*pip, str(wheel.resolve())], check=True, env=env)
    env |= hide_libibverbs(workdir)
    trial = subprocess.run(
        [str(python), "-c", TRIAL],
        check=True,
        env=env,
        cwd=workdir,  # not the source tree, whose kvxfer would be found first
        stdout=subprocess.PIPE,
        text=True,
    )
    subprocess.run(
        [str(environment / "bin" / "kvxfer"), "--help"],
        check=True,
        env=env,
        cwd=workdir,
        stdout=subprocess.DEVNULL,
    )
    return trial.stdout.strip()


def main(arguments: list[str]) -> None:
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("usage: try_wheel.py WHEEL [SDIST] (one of each)")
    wheel, *sdist = (Path(argument) for argument in arguments)
    check_contents(wheel)
    for archive in sdist:
        check_sources(archive)
    workdir = Path(tempfile.mkdtemp(prefix="kvxfer-wheel-"))
    try:
        version = try_it(wheel, workdir)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{wheel.name} does not work: {error}") from error
    finally:
        shutil.rmtree(workdir)
    print(f"{wheel.name}: contents right, and {version} works without rdma-core")


if __name__ == "__main__":
    main(sys.argv[1:])
