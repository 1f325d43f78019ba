"""From what ``--model`` names to a :class:`~kvxfer.kvbench.models.Model`.

It may name a YAML file of the reference's schema, a HuggingFace ``config.json``
or a folder with one, a YAML file with such a config inside, or a model that the
package ships.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kvxfer.kvbench.errors import InputFileError, PlanError, suggestion
from kvxfer.kvbench.models import (
    Architecture,
    Model,
    architecture_of_type,
    architectures,
    build,
)
from kvxfer.kvbench.yamlio import DATA, Document, load_mapping, read_text

__all__ = ["load_model", "shipped_models"]

# The parts of a multi-modal config that hold the language model's own.
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_WRAPPER_KEYS = {
    "model_name",
    "source",
    "num_model_params",
    "active_params",
    "config",
    "architecture",
}


def shipped_models() -> list[str]:
    """Names of the models whose configs come with the package."""
    return sorted(path.stem for path in (DATA / "models").glob("*.yaml"))


def load_model(name: str) -> Model:
    """Read the model that ``name`` names.

    Raises:
      InputFileError: There is no such file or shipped model, or what it holds
        is no model; the message says which key and what would do.
    """
    path = _find(name)
    try:
        if path.endswith(".json"):
            return _from_config(path, _load_json(path), {})
        document = load_mapping(path)
        if "config" in document.data:
            return _from_wrapper(document)
        if "model_type" in document.data and "model_name" not in document.data:
            return _from_config(path, document.data, {})
        return _from_reference(document)
    except PlanError as error:
        raise InputFileError(path, str(error)) from error


def _find(name: str) -> str:
    if os.path.isdir(name):
        inside = os.path.join(name, "config.json")
        if not os.path.exists(inside):
            raise InputFileError(name, "a folder without a config.json")
        return inside
    if os.path.exists(name) or os.sep in name:
        return name
    shipped = shipped_models()
    if name.lower() in shipped:
        return str(DATA / "models" / f"{name.lower()}.yaml")
    if "." in name and name.endswith((".yaml", ".yml", ".json")):
        return name
    raise InputFileError(
        name,
        f"no such file, and no shipped model{suggestion(name, shipped)} "
        f"(one of {', '.join(shipped)})",
    )


def _load_json(path: str) -> dict[str, Any]:
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputFileError(
            path, f"not valid JSON: {error.msg}", error.lineno
        ) from error
    except RecursionError as error:
        raise InputFileError(path, "not valid JSON: nested too deep") from error
    if not isinstance(data, dict):
        raise InputFileError(path, "expected a JSON object")
    return data


def _from_config(
    path: str, config: Mapping[str, Any], above: Mapping[str, Any]
) -> Model:
    """Build from a HuggingFace config; ``above`` is what our own wrapper says."""
    inner = config
    for part in _TEXT_PARTS:
        candidate = inner.get(part)
        if isinstance(candidate, dict):
            # A part may leave out what the whole says; the part's word is final.
            inner = {**inner, **candidate}
    model_type = inner.get("model_type")
    own = above.get("architecture")
    name = str(above.get("model_name") or _name_of(path, config))
    if isinstance(own, dict):
        architecture_name: str = str(own.get("name", "its own"))
        rules: Architecture = own
    elif own is not None:
        if own not in architectures():
            hint = suggestion(str(own), architectures())
            raise PlanError(f"architecture {own!r} is not known{hint}")
        architecture_name, rules = str(own), architectures()[own]
    elif isinstance(model_type, str):
        architecture_name, rules = architecture_of_type(model_type)
    else:
        raise PlanError("key 'model_type' is missing: is this a model's config?")
    names = dict(inner)
    # Of a mixture of experts, what one token meets is what prefill costs.
    params = above.get("active_params") or above.get("num_model_params")
    if params is not None:
        names["num_model_params"] = params
    source = str(above.get("source") or "")
    return build(name, architecture_name, rules, names, source=source)


def _name_of(path: str, config: Mapping[str, Any]) -> str:
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("./"):
        return given.rstrip("/").rsplit("/", 1)[-1]
    if os.path.basename(path) == "config.json":
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        if folder:
            return folder
    return os.path.splitext(os.path.basename(path))[0]


def _from_wrapper(document: Document) -> Model:
    for key in document.data:
        if key not in _WRAPPER_KEYS:
            hint = suggestion(str(key), _WRAPPER_KEYS)
            raise document.error(f"unknown key {key!r}{hint}", str(key))
    config = document.data["config"]
    if not isinstance(config, dict):
        raise document.error("'config' has to be a mapping", "config")
    return _from_config(document.path, config, document.data)


def _from_reference(document: Document) -> Model:
    """Build from the reference's schema: every field required, no others."""
    data = document.data
    name = data.get("model_name")
    if name is None:
        hint = " (this file says 'model')" if "model" in data else ""
        raise InputFileError(
            document.path, f"key 'model_name' is missing or null{hint}"
        )
    own = data.get("architecture")
    if own is not None:
        rest = {key: value for key, value in data.items() if key != "architecture"}
        return _from_config(document.path, rest, data)
    known = {
        entry["name_contains"]: key
        for key, entry in architectures().items()
        if "name_contains" in entry
    }
    folded = str(name).lower()
    part = next((part for part in known if part in folded), None)
    if part is None:
        raise document.error(
            f"model_name {name!r} is not supported{suggestion(folded, known)} "
            f"(it has to contain one of {', '.join(known)}; or give the file an "
            f"'architecture:' of its own)",
            "model_name",
        )
    key = known[part]
    entry = architectures()[key]
    _check_fields(document, entry["fields"])
    return build(str(name), key, entry, data)


def _check_fields(document: Document, fields: list[str]) -> None:
    data = document.data
    for key in data:
        if key not in fields:
            hint = suggestion(str(key), fields)
            raise document.error(
                f"unknown key {key!r}{hint} (known: {', '.join(fields)})", str(key)
            )
    missing = [field for field in fields if data.get(field) is None]
    if missing:
        raise InputFileError(document.path, f"missing or null: {', '.join(missing)}")
    for field in fields:
        value = data[field]
        if field != "model_name" and (
            isinstance(value, bool) or not isinstance(value, (int, float))
        ):
            raise document.error(f"{field!r} has to be a number, not {value!r}", field)
