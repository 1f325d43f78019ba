"""The public names: complete, sorted, lazy, and the same for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import kvxfer

SOURCE = Path(str(kvxfer.__file__))


def names_for_type_checkers() -> set[str]:
    """What kvxfer/__init__.py imports, lazily or not."""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(SOURCE.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if (node.module or "").startswith("kvxfer") or node.level
    }


def test_all_is_sorted_and_has_no_doubles() -> None:
    assert list(kvxfer.__all__) == sorted(set(kvxfer.__all__))


def test_every_public_name_is_there() -> None:
    missing = [name for name in kvxfer.__all__ if not hasattr(kvxfer, name)]
    assert missing == []


def test_dir_shows_every_public_name() -> None:
    assert set(kvxfer.__all__) <= set(dir(kvxfer))


def test_type_checkers_see_every_public_name_and_no_other() -> None:
    public = {name for name in names_for_type_checkers() if not name.startswith("_")}
    assert public == set(kvxfer.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(kvxfer, "no_such_name")


def test_import_is_free_of_side_effects() -> None:
    """Importing the package loads neither the extensions nor ZMQ nor asyncio."""
    code = (
        "import sys, kvxfer; "
        "heavy = {'asyncio', 'numpy', 'zmq', 'kvxfer._verbs', 'kvxfer._engine'}; "
        "sys.exit(', '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
