"""What a model keeps in its KV cache, layer by layer.

:func:`build` turns a config's fields into a :class:`Model` by the rules of one
entry of ``data/architectures.yaml``. It does no I/O of its own beyond that file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvxfer.kvbench.errors import PlanError, suggestion
from kvxfer.kvbench.expr import ExpressionError, MissingNameError, first
from kvxfer.kvbench.yamlio import load_data

__all__ = [
    "LayerKind",
    "Model",
    "ReferenceRule",
    "State",
    "architecture_of_type",
    "architectures",
    "build",
]

Number = int | float
Architecture = Mapping[str, Any]

_MAX_LAYERS = 4096
_KIND_FIELDS = (
    "kv_heads",
    "head_dim",
    "k_dim",
    "v_dim",
    "latent_dim",
    "rope_dim",
    "index_dim",
    "score_dim",
)


@dataclass(frozen=True, slots=True)
class State:
    """What a linear or state-space layer keeps of one request, at any length."""

    name: str
    elements: int
    element_bytes: int
    shards: int  # ranks that it can be split over


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer keeps: of each token, and of each request.

    ``kv_heads`` may be a fraction where a config's figures do not divide; the
    reference sizing computes with it, the exact one refuses it.
    """

    name: str
    kv_heads: Number = 0
    k_dim: int = 0
    v_dim: int = 0
    latent_dim: int = 0
    rope_dim: int = 0
    index_dim: int = 0
    score_dim: int = 0  # of a query's and a value's head, where not k_dim + v_dim
    window: int | None = None  # tokens that one sees, itself too; None for all
    states: tuple[State, ...] = ()

    @property
    def elements_per_token(self) -> Number:
        """Elements of one token in one layer, the indexer's left out."""
        if self.latent_dim or self.rope_dim:
            return self.latent_dim + self.rope_dim
        return self.kv_heads * (self.k_dim + self.v_dim)

    @property
    def score_elements(self) -> int:
        """Elements that attention multiplies for one query head and token."""
        return self.score_dim or self.k_dim + self.v_dim

    @property
    def is_latent(self) -> bool:
        """Is it multi-head latent attention?"""
        return bool(self.latent_dim or self.rope_dim)


@dataclass(frozen=True, slots=True)
class ReferenceRule:
    """What the reference's formula takes: all layers alike.

    ``latent`` is for MLA elements a token, else it is ``heads`` of ``head_dim``.
    """

    latent: int | None
    heads: Number = 0
    head_dim: Number = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model's layers, and what else its config tells."""

    name: str
    architecture: str
    layers: tuple[LayerKind, ...]
    reference: ReferenceRule
    query_heads: int = 0
    params: Number | None = None  # that one token meets
    source: str = ""

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The distinct kinds, in the order of their first layer."""
        return tuple(dict.fromkeys(self.layers))


@functools.cache
def architectures() -> dict[str, Architecture]:
    """The package's architectures by name."""
    data: dict[str, Architecture] = load_data("architectures")
    return data


def architecture_of_type(model_type: str) -> tuple[str, Architecture]:
    """Return the architecture of a HuggingFace ``model_type``.

    Raises:
      PlanError: None has it; the message says what would add it.
    """
    types: list[str] = []
    for name, entry in architectures().items():
        if model_type in entry.get("model_types", ()):
            return name, entry
        types.extend(entry.get("model_types", ()))
    raise PlanError(
        f"model_type {model_type!r} is not known{suggestion(model_type, types)}; "
        f"give the file an 'architecture:' of its own, or one of "
        f"{', '.join(sorted(types))}"
    )


def build(
    name: str,
    architecture_name: str,
    architecture: Architecture,
    config: Mapping[str, Any],
    *,
    source: str = "",
) -> Model:
    """Compute a model's layers from ``config`` by the rules of ``architecture``.

    Raises:
      PlanError: A field is missing or has a value that gives no cache.
    """
    # A null in the config is an answer: it takes the default's place, as nothing.
    names = {**architecture.get("defaults", {}), **config}
    names = {key: value for key, value in names.items() if value is not None}
    try:
        for extra, rule in architecture.get("names", {}).items():
            names[extra] = first(rule, names)
        n_layers = _whole("the number of layers", first(architecture["layers"], names))
        if not 1 <= n_layers <= _MAX_LAYERS:
            raise PlanError(f"{n_layers} layers: expected 1 to {_MAX_LAYERS}")
        names["n_layers"] = n_layers
        layers = _layers(architecture, names, n_layers)
        heads = _optional(architecture.get("query_heads"), names)
        params = _optional(architecture.get("params"), names)
        reference = _reference(architecture, layers, names)
    except MissingNameError as error:
        raise PlanError(
            f"field {str(error)!r} is missing, and architecture "
            f"{architecture_name!r} needs it"
        ) from error
    except (ExpressionError, KeyError, AttributeError) as error:
        raise PlanError(f"architecture {architecture_name!r}: {error}") from error
    return Model(
        name=name,
        architecture=architecture_name,
        layers=layers,
        reference=reference,
        query_heads=_whole("query heads", heads or 0),
        params=params,
        source=source,
    )


def _layers(
    architecture: Architecture, names: dict[str, Any], n_layers: int
) -> tuple[LayerKind, ...]:
    kinds: Mapping[str, Any] = architecture["kinds"]
    rule = architecture.get("kind")
    if rule is None:
        if len(kinds) != 1:
            raise PlanError("several 'kinds' and no 'kind' to choose among them")
        only = next(iter(kinds))
        return (_kind(only, kinds[only] or {}, names),) * n_layers
    built: dict[str, LayerKind] = {}
    layers = []
    for i in range(n_layers):
        chosen = first(rule, {**names, "i": i})
        if chosen not in kinds:
            known = ", ".join(kinds)
            raise PlanError(f"layer {i} is {chosen!r}, known here: {known}")
        if chosen not in built:
            built[chosen] = _kind(chosen, kinds[chosen] or {}, names)
        layers.append(built[chosen])
    return tuple(layers)


def _kind(name: str, rules: Mapping[str, Any], names: Mapping[str, Any]) -> LayerKind:
    known = {*_KIND_FIELDS, "window", "states"}
    for key in rules:
        if key not in known:
            hint = suggestion(key, known)
            raise PlanError(f"kind {name!r}: unknown key {key!r}{hint}")
    values: dict[str, Number] = {}
    for field in _KIND_FIELDS:
        if field in rules:
            values[field] = _count(f"{name}.{field}", first(rules[field], names))
    head_dim = values.pop("head_dim", None)
    if head_dim is not None:
        values.setdefault("k_dim", head_dim)
        values.setdefault("v_dim", head_dim)
    heads = values.pop("kv_heads", 0)
    window = _optional(rules.get("window"), names)
    return LayerKind(
        name=name,
        kv_heads=int(heads) if heads == int(heads) else heads,
        window=None if window is None else _whole(f"{name}.window", window),
        states=tuple(_state(name, state, names) for state in rules.get("states", ())),
        **{key: _whole(f"{name}.{key}", value) for key, value in values.items()},
    )


def _state(kind: str, rules: Mapping[str, Any], names: Mapping[str, Any]) -> State:
    place = f"{kind}.{rules['name']}"
    return State(
        name=rules["name"],
        elements=_whole(f"{place}.elements", first(rules["elements"], names)),
        element_bytes=_whole(f"{place}.bytes", first(rules["bytes"], names)),
        shards=_whole(f"{place}.shards", first(rules.get("shards", 1), names)),
    )


def _reference(
    architecture: Architecture, layers: tuple[LayerKind, ...], names: Mapping[str, Any]
) -> ReferenceRule:
    """Take the widest kind for all layers, as a formula without kinds has to."""
    rules = architecture.get("reference")
    if rules is not None:
        return ReferenceRule(
            latent=_optional(rules.get("latent"), names),
            heads=_optional(rules.get("heads"), names) or 0,
            head_dim=_optional(rules.get("head_dim"), names) or 0,
        )
    widest = max(layers, key=lambda layer: layer.elements_per_token)
    if widest.is_latent:
        return ReferenceRule(latent=widest.latent_dim + widest.rope_dim)
    both = widest.k_dim + widest.v_dim
    head_dim = both // 2 if both % 2 == 0 else both / 2
    return ReferenceRule(latent=None, heads=widest.kv_heads, head_dim=head_dim)


def _optional(rule: object, names: Mapping[str, Any]) -> Any:
    """Compute ``rule``; None where there is none or its fields are missing."""
    if rule is None:
        return None
    try:
        return first(rule, names)
    except MissingNameError:
        return None


def _count(what: str, value: object) -> Number:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise PlanError(f"{what} has to be a number from 0 on, not {value!r}")
    return value


def _whole(what: str, value: object) -> int:
    number = _count(what, value)
    if number != int(number):
        raise PlanError(f"{what} has to be a whole number, not {value!r}")
    return int(number)
