"""The extensions and what they need. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PATHS = ["kvxfer/native", "kvxfer/softdev"]
VERBS_INCLUDE = os.environ.get("KVXFER_VERBS_INCLUDE", "")
# For debug builds: KVXFER_SANITIZE=address,undefined
SANITIZE = os.environ.get("KVXFER_SANITIZE", "")
# Generated code compares int with unsigned; hand-written C is checked in tests/c.
FLAGS = ["-std=gnu11", "-O2", "-pthread", "-Wall", "-Wno-sign-compare"]
FLAGS += ["-fvisibility=hidden"]
LINK_FLAGS = ["-pthread"]
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-g", "-O1", "-fno-omit-frame-pointer"]
    FLAGS += ["-UNDEBUG"]  # asserts on: Python's own flags switch them off
    LINK_FLAGS += [f"-fsanitize={SANITIZE}"]

NEEDED_HEADERS = {
    "Python.h": "python3-dev (Debian) or python3-devel (RHEL)",
    "infiniband/verbs.h": "libibverbs-dev (Debian) or rdma-core-devel (RHEL), "
    "or point KVXFER_VERBS_INCLUDE at the headers",
}


class BuildExt(build_ext):
    """Build the extensions, or stop with one line that says what is missing."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cython_c_in_temp = 1  # generated C stays out of the source tree
        self.cython_directives = {"language_level": "3"}

    def build_extensions(self) -> None:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
            stop(f"Linux on x86-64 or aarch64 only, not {sys.platform} on {machine}")
        try:
            import Cython  # noqa: F401
        except ImportError:
            stop("Cython is missing: pip install 'Cython>=3.1' setuptools wheel")
        for header, packages in NEEDED_HEADERS.items():
            if not self.has_header(header):
                stop(f"{header} is missing: install {packages}")
        super().build_extensions()

    def has_header(self, header: str) -> bool:
        paths = [*self.extensions[0].include_dirs, *self.include_dirs]
        command = [*self.compiler.compiler_so, *(f"-I{path}" for path in paths)]
        source = f"#include <{header}>\n".encode()
        try:
            run = subprocess.run(
                [*command, "-E", "-x", "c", "-"], input=source, capture_output=True
            )
        except FileNotFoundError:
            stop(f"{command[0]} is missing: install build-essential (Debian) or gcc")
        return run.returncode == 0


def stop(reason: str) -> None:
    raise SystemExit(f"kvxfer: {reason}")


def extension(name: str, sources: list[str], *flags: str) -> Extension:
    return Extension(
        f"kvxfer.{name}",
        [f"kvxfer/{name.replace('.', '/')}.pyx", *sources],
        include_dirs=[*PATHS, *filter(None, [VERBS_INCLUDE])],
        depends=[*glob("kvxfer/*.pxd"), *glob("kvxfer/*/*.h")],
        libraries=["dl", "rt"],
        extra_compile_args=[*FLAGS, *([] if SANITIZE else flags)],
        extra_link_args=LINK_FLAGS,
    )


# The software device is linked into _providers alone; the others reach it by table.
providers_c = ["kvxfer/native/verbs_dynamic.c", *sorted(glob("kvxfer/softdev/*.c"))]
setup(
    license="Apache-2.0",
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        extension("_handles", []),
        extension("_providers", providers_c),
        extension("_structs", []),
        extension("_device", []),
        extension("_memory", []),
        extension("_verbs", []),
        extension("_core", []),
        extension("_post", [], "-O3"),
        extension("_progress", []),
        extension("_driver", []),
        extension("_queues", []),
        # Its loops over block ids become vectors.
        extension("_submission", [], "-O3"),
        extension("_engine", []),
        extension("_records", [], "-O3"),
        extension("_counters", []),
        extension("_waiter", []),
        extension("_transfer", []),
        extension("_quick", []),
        extension("bench._limits", []),
    ],
)
