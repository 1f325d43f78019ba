"""What one GPU really holds and moves.

The arithmetic, for one rank of tensor parallelism in one pipeline stage:

* A stage has ``n_layers // pp`` layers, the first ``n_layers % pp`` stages one more.
* KV heads are divided over the ranks; with fewer heads than ranks each rank holds
  one, and several ranks the same. A latent (MLA) is on every rank.
* A token's vector takes the bytes of the KV precision, with its scales.
* A request takes whole pages, of all its tokens or of the last ``window - 1``: a
  token sees a window with itself in it, so the next one needs no more.
* A linear layer keeps one state a request, whatever its length.

The stage with the most bytes counts. After prefill a request has ``isl`` tokens:
these are moved. At its end it has ``osl`` more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvxfer.kvbench.config import ACCESS_PATTERNS, ModelConfig
from kvxfer.kvbench.errors import PlanError
from kvxfer.kvbench.models import LayerKind, Model, State
from kvxfer.kvbench.precision import Precision, precision
from kvxfer.kvbench.sizing import Sizes

__all__ = [
    "ExactSizes",
    "Part",
    "exact_io_bytes",
    "exact_sizes",
    "heads_per_rank",
    "pages",
    "stages",
    "state_bytes",
    "token_bytes",
]

_INDEX_GROUP = 128  # elements of an indexer's key that share an fp32 scale


@dataclass(frozen=True, slots=True)
class Part:
    """The transfers of one kind of layer in the largest stage, for one rank."""

    name: str
    layers: int
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class ExactSizes:
    """The parts of a plan, and the bytes in all.

    ``per_token``, ``per_page`` and ``per_request`` count each byte of the model
    once; ``per_gpu`` is the largest rank's; ``total`` adds up all ranks, copies
    included. All are after prefill, but for ``per_gpu_at_end``.
    """

    parts: tuple[Part, ...]
    per_token: int
    per_page: int
    per_request: int
    per_gpu: int
    per_gpu_at_end: int
    total: int


def stages(model: Model, pp: int) -> list[tuple[LayerKind, ...]]:
    """Divide the layers over ``pp`` stages, the first ones getting what is over."""
    base, over = divmod(len(model.layers), pp)
    if base == 0:
        raise PlanError(f"{pp} stages for {len(model.layers)} layers: some stay empty")
    result = []
    start = 0
    for stage in range(pp):
        end = start + base + (stage < over)
        result.append(model.layers[start:end])
        start = end
    return result


def heads_per_rank(kind: LayerKind, tp: int) -> int:
    """KV heads of the fullest rank; never less than one."""
    if kind.kv_heads != int(kind.kv_heads):
        raise PlanError(
            f"{kind.kv_heads:.2f} KV heads: the query heads do not divide by the group"
        )
    return -(-int(kind.kv_heads) // tp)


def token_bytes(kind: LayerKind, tp: int, kv: Precision) -> int:
    """Bytes of one token in one layer of that kind, on the fullest rank."""
    index = kind.index_dim
    index_bytes = index + 4 * -(-index // _INDEX_GROUP)
    if kind.is_latent:
        rope = precision(kv.rope) if kv.rope else None
        if rope is None:
            latent = kv.vector_bytes(kind.latent_dim + kind.rope_dim)
        else:
            latent = kv.vector_bytes(kind.latent_dim) + rope.vector_bytes(kind.rope_dim)
        return latent + index_bytes
    both = kv.vector_bytes(kind.k_dim) + kv.vector_bytes(kind.v_dim)
    return heads_per_rank(kind, tp) * both + index_bytes


def state_bytes(states: Sequence[State], tp: int) -> int:
    """Bytes of one request's state in one layer, on the fullest rank."""
    total = 0
    for state in states:
        ranks = min(tp, state.shards)
        total += -(-state.elements // ranks) * state.element_bytes
    return total


def pages(tokens: int, page_size: int, window: int | None) -> int:
    """Pages that a request of ``tokens`` holds: all, or those of its window."""
    first = 0 if window is None else max(0, tokens - max(0, window - 1))
    return -(-tokens // page_size) - first // page_size


def exact_io_bytes(model: Model, config: ModelConfig) -> int:
    """Bytes of one token, as one transfer of the largest part on one GPU."""
    one = ModelConfig(
        path=config.path,
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        kvcache_quant_mode=config.kvcache_quant_mode,
        access_pattern=config.access_pattern,
    )
    return max(part.sizes.io_bytes for part in exact_sizes(model, one).parts)


def exact_sizes(model: Model, config: ModelConfig) -> ExactSizes:
    """Compute what a GPU holds and moves.

    Raises:
      PlanError: A value makes no sense, or there are more stages than layers.
    """
    tp, pp, page, isl, osl, requests = _counts(config)
    kv = precision(config.kvcache_quant_mode)
    all_stages = stages(model, pp)
    held = [_held(stage, tp, kv, isl, page) for stage in all_stages]
    largest = all_stages[held.index(max(held))]
    parts = _parts(largest, tp, kv, config)
    if not parts:
        raise PlanError(f"{model.name} keeps no cache at all")
    at_end = (_held(stage, tp, kv, isl + osl, page) for stage in all_stages)
    per_token = sum(token_bytes(kind, 1, kv) for kind in model.layers)
    return ExactSizes(
        parts=parts,
        per_token=per_token,
        per_page=per_token * page,
        per_request=_held(model.layers, 1, kv, isl, page),
        per_gpu=max(held) * requests,
        per_gpu_at_end=max(at_end) * requests,
        total=sum(held) * tp * requests,
    )


def _held(
    layers: Sequence[LayerKind], tp: int, kv: Precision, tokens: int, page: int
) -> int:
    """Bytes that one request takes in these layers on one rank."""
    total = 0
    for kind in dict.fromkeys(layers):
        a_token = token_bytes(kind, tp, kv)
        a_layer = a_token * page * pages(tokens, page, kind.window)
        total += layers.count(kind) * (a_layer + state_bytes(kind.states, tp))
    return total


def _parts(
    stage: Sequence[LayerKind], tp: int, kv: Precision, config: ModelConfig
) -> tuple[Part, ...]:
    page, requests = int(config.page_size), int(config.num_requests)
    parts = []
    for kind in dict.fromkeys(stage):
        n_layers = stage.count(kind)
        together = n_layers if config.is_block else 1  # layers in one transfer
        n_pages = pages(int(config.isl), page, kind.window)
        for name, size, count in (
            (kind.name, token_bytes(kind, tp, kv) * page, n_pages * requests),
            (f"{kind.name} state", state_bytes(kind.states, tp), requests),
        ):
            if size:
                sizes = Sizes(size * together, count * (n_layers // together))
                parts.append(Part(name, n_layers, sizes))
    return tuple(parts)


def _counts(config: ModelConfig) -> tuple[int, ...]:
    if config.access_pattern not in (None, *ACCESS_PATTERNS):
        raise PlanError(
            f"access pattern {config.access_pattern!r} "
            f"(one of {', '.join(ACCESS_PATTERNS)})"
        )
    counts = []
    for name in ("tp_size", "pp_size", "page_size", "isl", "osl", "num_requests"):
        value = getattr(config, name)
        least = 0 if name == "osl" else 1
        if value != int(value) or value < least:
            raise PlanError(
                f"{name} is {value}; expected a whole number from {least} on"
            )
        counts.append(int(value))
    return tuple(counts)
