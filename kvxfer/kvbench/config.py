"""A model_config file: strategy, runtime and system, and what overrides them."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvxfer.kvbench.errors import InputFileError, WrongUseError, suggestion
from kvxfer.kvbench.yamlio import Document, load_mapping

__all__ = ["OVERRIDES", "ModelConfig", "find_configs", "load_config"]

Warn = Callable[[str], None]

# Command line options that take the place of a key, and the key.
OVERRIDES: dict[str, tuple[str, str]] = {
    "pp": ("strategy", "pp_size"),
    "tp": ("strategy", "tp_size"),
    "isl": ("runtime", "isl"),
    "osl": ("runtime", "osl"),
    "num_requests": ("runtime", "num_requests"),
    "page_size": ("system", "page_size"),
    "access_pattern": ("system", "access_pattern"),
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "strategy": {
        "tp_size": 1,
        "pp_size": 1,
        "model_quant_mode": "fp8",
        "kvcache_quant_mode": "fp8",
    },
    "runtime": {"num_requests": 1, "isl": 1, "osl": 1},
    "system": {
        "hardware": None,
        "backend": "SGLANG",
        "page_size": 1,
        "access_pattern": None,
        "source": None,
        "destination": None,
    },
}
_NUMBERS = ("tp_size", "pp_size", "num_requests", "isl", "osl", "page_size")
ACCESS_PATTERNS = ("block", "layer")


@dataclass(slots=True)
class ModelConfig:
    """The values of one file after the overrides.

    The counts may be fractions or negative: the reference sizing computes with
    what it is given, as the reference does, and the exact one refuses.
    """

    path: str
    tp_size: int | float = 1
    pp_size: int | float = 1
    model_quant_mode: str = "fp8"
    kvcache_quant_mode: str = "fp8"
    num_requests: int | float = 1
    isl: int | float = 1
    osl: int | float = 1
    hardware: str | None = None
    backend: str | None = "SGLANG"
    page_size: int | float = 1
    access_pattern: str | None = None
    source: str | None = None
    destination: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def is_block(self) -> bool:
        """One transfer holds all layers of a stage; otherwise one layer."""
        return self.access_pattern == "block"


def find_configs(single: str | None, patterns: Sequence[str]) -> list[str]:
    """Return the config files meant: ``single`` first, then each pattern's, sorted.

    A file that is named twice, in whatever spelling, is taken once.

    Raises:
      WrongUseError: Nothing is named.
      InputFileError: A pattern matches no file.
    """
    if not single and not any(patterns):
        raise WrongUseError("--model_config or --model_configs is required")
    found = [single] if single else []
    for pattern in filter(None, patterns):
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches and os.path.exists(pattern):
            matches = [pattern]
        if not matches:
            raise InputFileError(pattern, "no file matches this pattern")
        found.extend(matches)
    once: dict[str, str] = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def load_config(path: str, overrides: Mapping[str, Any]) -> ModelConfig:
    """Read one config file and apply the overrides that were given.

    Keys that mean nothing are noted in ``warnings``, as they are most often a
    mistyped key whose default then holds.

    Raises:
      InputFileError: No such file, no mapping, or a value of a wrong type.
    """
    document = load_mapping(path)
    config = ModelConfig(path)
    for section, keys in document.data.items():
        _read_section(config, document, section, keys)
    for option, value in overrides.items():
        if option not in OVERRIDES or value is None:
            continue
        if not value:
            shown = repr(value) if isinstance(value, str) else value
            config.warnings.append(f"--{option} {shown} is not used: the file's holds")
            continue
        setattr(config, OVERRIDES[option][1], value)
    _check_values(config)
    return config


def _read_section(
    config: ModelConfig, document: Document, section: str, keys: object
) -> None:
    known = _DEFAULTS.get(section)
    if known is None:
        _note_unknown(config, document, (str(section),), _DEFAULTS)
        return
    if keys is None:
        return
    if not isinstance(keys, dict):
        raise document.error(f"{section!r} has to be a mapping", section)
    for key, value in keys.items():
        if key not in known:
            _note_unknown(config, document, (section, str(key)), known)
            continue
        setattr(config, key, _checked(config, document, section, key, value))


def _note_unknown(
    config: ModelConfig,
    document: Document,
    keys: tuple[str, ...],
    known: Mapping[str, Any],
) -> None:
    hint = suggestion(keys[-1], known)
    problem = f"unknown key {'.'.join(keys)!r} is not used{hint}"
    config.warnings.append(str(document.error(problem, *keys)))


def _checked(
    config: ModelConfig, document: Document, section: str, key: str, value: object
) -> object:
    """Check one value's type; the reference's own leniency is kept, and said."""
    where = (section, key)
    if key not in _NUMBERS:
        if value is not None and not isinstance(value, str):
            raise document.error(
                f"'{section}.{key}' has to be a word, not {value!r}", *where
            )
        if value is None and _DEFAULTS[section][key] is not None and "quant" in key:
            raise document.error(f"'{section}.{key}' is null", *where)
        return value
    if key == "isl" and isinstance(value, str) and value.strip().isdigit():
        problem = f"'{section}.{key}' is text, {value!r}, and taken as a number"
        config.warnings.append(str(document.error(problem, *where)))
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise document.error(
            f"'{section}.{key}' has to be a number, not {value!r}", *where
        )
    if isinstance(value, float):
        problem = f"'{section}.{key}' is {value}, not a whole number"
        config.warnings.append(str(document.error(problem, *where)))
    if value == 0 and key in ("tp_size", "pp_size", "page_size"):
        raise document.error(f"'{section}.{key}' is 0; expected 1 or more", *where)
    return value


def _check_values(config: ModelConfig) -> None:
    pattern = config.access_pattern
    if pattern is not None and pattern not in ACCESS_PATTERNS:
        config.warnings.append(
            f"access pattern {pattern!r} is none of {', '.join(ACCESS_PATTERNS)}"
            f"{suggestion(pattern, ACCESS_PATTERNS)}: counted as layer"
        )
    for key in _NUMBERS:
        value = getattr(config, key)
        if value < 0 or (value == 0 and key == "num_requests"):
            config.warnings.append(f"{key} is {value}: no benchmark can run that")
    for key in ("source", "destination"):
        value = getattr(config, key)
        if value is not None:
            config.warnings.append(
                f"{config.path}: 'system.{key}: {value}' is not used: give --{key}"
            )
