"""The reference's arithmetic: figures that agree with NIXL's KVBench to the byte.

It counts all layers alike, the whole cluster's cache for one initiator, and
rounds once over all requests. :mod:`kvxfer.kvbench.exact` says what a GPU really
holds. The order of the operations, and where they truncate, is part of what has
to agree: do not tidy it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.errors import PlanError
from kvxfer.kvbench.models import Model
from kvxfer.kvbench.precision import precision

__all__ = ["Sizes", "human_bytes", "kv_bytes", "reference_io_bytes", "reference_sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many transfers (``batch``) of how many bytes (``io_bytes``)."""

    io_bytes: int
    batch: int

    @property
    def total_bytes(self) -> int:
        """Bytes that all the transfers move together."""
        return self.io_bytes * self.batch


def kv_bytes(model: Model, config: ModelConfig, tokens: int) -> int | float:
    """Bytes of the cache of ``tokens`` tokens, over the whole model.

    MLA models count in the precision of the cache, all others in that of the
    weights: so does the reference.
    """
    rule = model.reference
    n_layers = len(model.layers)
    if rule.latent is not None:
        size = precision(config.kvcache_quant_mode).element_bytes
        return rule.latent * size * n_layers * tokens
    size = precision(config.model_quant_mode).element_bytes
    return int(n_layers * rule.heads * rule.head_dim * 2 * size * tokens)


def reference_io_bytes(model: Model, config: ModelConfig, page_size: float) -> int:
    """Bytes of one transfer: a page of one layer, or of all layers of a stage.

    Raises:
      PlanError: It comes out as 0: nothing would be moved.
    """
    n_layers = len(model.layers)
    token_layer = kv_bytes(model, config, 1) / n_layers
    if model.reference.latent is not None:
        stage = math.ceil(n_layers / config.pp_size) if config.is_block else 1
        size = int(token_layer / config.tp_size * stage * page_size)
    else:
        size = int(token_layer / config.tp_size)
        if config.is_block:
            size = int(size * (n_layers / config.pp_size))
        size = int(size * page_size)
    if size == 0:
        raise PlanError(
            f"the transfer size of {model.name} comes out as 0 bytes "
            f"(tp {config.tp_size}, pp {config.pp_size}, page {page_size})"
        )
    return size


def reference_sizes(model: Model, config: ModelConfig) -> Sizes:
    """Return what the reference plans for ``model`` under ``config``.

    Raises:
      PlanError: A precision is not known, or a transfer has no bytes.
    """
    io_bytes = reference_io_bytes(model, config, config.page_size)
    total = kv_bytes(model, config, int(config.isl))
    return Sizes(io_bytes, math.ceil(total / io_bytes * config.num_requests))


def human_bytes(count: int | float) -> str:
    """Return ``1179648`` as ``1.12 MB``: powers of 1024, two decimals at most."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{round(size, 2)} {unit}"
        size /= 1024
    return f"{round(size, 2)} TB"
