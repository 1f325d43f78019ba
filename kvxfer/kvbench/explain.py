"""Why the reference's figures and the exact ones differ, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.exact import ExactSizes, heads_per_rank, stages
from kvxfer.kvbench.models import Model
from kvxfer.kvbench.precision import precision
from kvxfer.kvbench.sizing import Sizes, human_bytes

__all__ = ["explain"]


def explain(
    model: Model, config: ModelConfig, reference: Sizes, exact: ExactSizes
) -> list[str]:
    """Return one sentence for each reason that applies, or one that none does."""
    moved = sum(part.sizes.total_bytes for part in exact.parts)
    sentences = [
        sentence
        for sentences in (
            _scope(config, reference, moved),
            _rounding(config),
            _latent(model, config),
            _heads(model, config),
            _stages(model, config),
            _precision(model, config),
            _windows(model, config),
            _states(model),
            _growth(config, exact),
        )
        for sentence in sentences
    ]
    if not sentences and reference.total_bytes == moved:
        return ["Both sizings agree: nothing here makes them differ."]
    return sentences


def _scope(config: ModelConfig, reference: Sizes, moved: int) -> Iterator[str]:
    ranks = int(config.tp_size) * int(config.pp_size)
    if ranks > 1:
        yield (
            f"Scope: the reference lets one initiator move the cache of all "
            f"{ranks} GPUs ({human_bytes(reference.total_bytes)}); exactly, a GPU "
            f"moves its own share ({human_bytes(moved)})."
        )


def _rounding(config: ModelConfig) -> Iterator[str]:
    isl, page = int(config.isl), int(config.page_size)
    if isl % page:
        yield (
            f"Pages: {isl} tokens are {isl / page:.2f} pages of {page}; the reference "
            f"rounds once over all requests, exactly each of the "
            f"{config.num_requests} takes {math.ceil(isl / page)}."
        )


def _latent(model: Model, config: ModelConfig) -> Iterator[str]:
    tp = int(config.tp_size)
    if tp > 1 and any(kind.is_latent for kind in model.kinds):
        yield (
            f"MLA: the reference divides the latent by tp {tp}; exactly, every rank "
            f"holds all of it, so a transfer is {tp} times as large."
        )


def _heads(model: Model, config: ModelConfig) -> Iterator[str]:
    tp = int(config.tp_size)
    for kind in model.kinds:
        if not kind.kv_heads or kind.kv_heads % tp == 0:
            continue
        held = heads_per_rank(kind, tp)
        yield (
            f"KV heads: {kind.kv_heads} over tp {tp} would be "
            f"{kind.kv_heads / tp:.3g} a rank; exactly, the fullest rank holds {held}"
            f"{' and some ranks the same one' if kind.kv_heads < tp else ''}."
        )
        return


def _stages(model: Model, config: ModelConfig) -> Iterator[str]:
    n_layers, pp = len(model.layers), int(config.pp_size)
    if n_layers % pp and config.is_block:
        sizes = [len(stage) for stage in stages(model, pp)]
        counted = (
            f"{math.ceil(n_layers / pp)} in each"
            if model.reference.latent is not None
            else f"{n_layers / pp:.2f} in each"
        )
        yield (
            f"Stages: {n_layers} layers over pp {pp} are {counted} to the "
            f"reference; exactly {sizes[0]} in {sizes.count(sizes[0])} of them and "
            f"{sizes[-1]} in the others, and the larger ones count here."
        )


def _precision(model: Model, config: ModelConfig) -> Iterator[str]:
    kv = precision(config.kvcache_quant_mode)
    weights = precision(config.model_quant_mode)
    if model.reference.latent is None and weights.bits != kv.bits:
        yield (
            f"Precision: the reference counts the cache in that of the weights "
            f"({config.model_quant_mode}); exactly it is that of the cache "
            f"({config.kvcache_quant_mode})."
        )
    if kv.scale_bits:
        yield (
            f"Scales: {config.kvcache_quant_mode} keeps scales beside the elements, "
            f"which the reference leaves out."
        )
    for kind in model.kinds:
        if kind.index_dim:
            yield (
                f"Indexer: sparse attention keeps {kind.index_dim} more fp8 elements "
                f"with a scale for each token, which the reference leaves out."
            )
            break


def _windows(model: Model, config: ModelConfig) -> Iterator[str]:
    for kind in model.kinds:
        if kind.window is not None and kind.window < config.isl:
            yield (
                f"Window: {model.layers.count(kind)} of {len(model.layers)} layers "
                f"see {kind.window} tokens and keep no more of the {config.isl}; the "
                f"reference counts all tokens in all layers."
            )


def _states(model: Model) -> Iterator[str]:
    for kind in model.kinds:
        n_layers = model.layers.count(kind)
        where = f"{n_layers} of {len(model.layers)} layers ({kind.name})"
        if kind.states:
            yield (
                f"States: {where} keep one state a request, whatever its length; "
                f"the reference counts a cache of all tokens for them."
            )
        elif not kind.elements_per_token:
            yield f"No cache: {where} keep none; the reference counts one for them."


def _growth(config: ModelConfig, exact: ExactSizes) -> Iterator[str]:
    if exact.per_gpu_at_end > exact.per_gpu:
        yield (
            f"Output: with {config.osl} more tokens a GPU ends at "
            f"{human_bytes(exact.per_gpu_at_end)} instead of "
            f"{human_bytes(exact.per_gpu)}; these are not moved, and the reference "
            f"leaves them out."
        )
