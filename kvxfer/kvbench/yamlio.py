"""Read a YAML mapping and remember where each key stood.

The safe loader builds plain data only. Line numbers are kept beside the data
so that a later complaint about a value can name its line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvxfer.kvbench.errors import InputFileError

__all__ = ["Document", "load_data", "load_mapping"]

# The C parser is several times faster; both build the same plain data.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_BYTES = 4 << 20
DATA = Path(__file__).parent / "data"


@dataclass(slots=True)
class Document:
    """A file's mapping, with the line of each key.

    ``lines`` goes by the key's path, ``("strategy", "tp_size")`` for one.
    """

    path: str
    data: dict[str, Any]
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)

    def error(self, problem: str, *keys: str) -> InputFileError:
        """Return the complaint about the key at ``keys``, for the caller to raise."""
        return InputFileError(self.path, problem, self.lines.get(keys))


def load_mapping(path: str) -> Document:
    """Read ``path``; its top level has to be a mapping.

    Raises:
      InputFileError: The file is missing, unreadable, no YAML, no mapping, or
        names a key twice.
    """
    text = read_text(path)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        problem = ", ".join(filter(None, [error.context, error.problem]))
        raise InputFileError(path, f"not valid YAML: {problem}", line) from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputFileError(path, f"not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if data is None:
        raise InputFileError(path, "the file is empty")
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise InputFileError(
            path, f"expected a mapping of keys to values, got a {kind}"
        )
    document = Document(path, data)
    _note_lines(document, node, ())
    return document


def read_text(path: str) -> str:
    """Return a file's text; the caller's path goes into the complaint."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputFileError(path, error.strerror or str(error)) from error
    if len(raw) > _MAX_BYTES:
        raise InputFileError(path, f"larger than {_MAX_BYTES} bytes: no such file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(path, f"not UTF-8 text: {error.reason}") from error


def load_data(name: str) -> Any:
    """Return one of the package's own data files, ``name`` without its suffix."""
    text = (DATA / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, _Loader)


def _note_lines(document: Document, node: yaml.Node, above: tuple[str, ...]) -> None:
    # No key that we know is deeper; aliases could nest without end.
    if not isinstance(node, yaml.MappingNode) or len(above) >= 3:
        return
    for key, value in node.value:
        keys = (*above, str(key.value))
        line = key.start_mark.line + 1
        if keys in document.lines:
            name = ".".join(keys)
            first = document.lines[keys]
            raise InputFileError(
                document.path, f"key {name!r} given twice, first in line {first}", line
            )
        document.lines[keys] = line
        _note_lines(document, value, keys)
