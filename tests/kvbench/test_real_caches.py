"""The exact sizing against the cache tensors that transformers really allocates.

For each architecture a small random model reads a prompt; its config, as it would
be saved beside the weights, goes through our loader; and the bytes of the tensors
in its cache, layer by layer, have to be the ones that we compute.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench.exact import token_bytes
from kvxfer.kvbench.loading import load_model
from kvxfer.kvbench.models import LayerKind
from kvxfer.kvbench.precision import precision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.leaky("torch keeps its threads"),
    pytest.mark.filterwarnings("ignore"),  # theirs, about kernels not installed
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("transformers") is None,
        reason="torch and transformers are not installed",
    ),
]

TOKENS = 40
WINDOW = 16
BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    **MOE,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {"head_dim": 16, "attention_chunk_size": WINDOW, **MOE},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": MOE,
    "qwen2": {},
    "qwen2_moe": MOE,
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, **MOE},
    "qwen3_next": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        **MOE,
    },
    "gemma2": {"head_dim": 32, "sliding_window": WINDOW},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": WINDOW,
        "num_hidden_layers": 7,
    },
    "phi": {},
    "phi3": {},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {"head_dim": 16, **MOE},
    "deepseek_v2": {**MLA, "head_dim": 8},
    "deepseek_v3": MLA,
    "deepseek_v32": {**MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8},
    "gpt_oss": {"head_dim": 16, "sliding_window": WINDOW, **MOE},
    "falcon": {},
    "cohere2": {"sliding_window": WINDOW},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        **MOE,
    },
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "bamba": {**MAMBA2, "attn_layer_indices": [2], "mamba_chunk_size": 16},
    "kimi_linear": {
        **MLA,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "q_lora_rank": None,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense"] * 4,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M-*M",
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "head_dim": 16,
    },
}


def real_layers(model_type: str, folder: Path) -> list[dict[str, Any]]:
    """Save the config to ``folder``; return each layer's tensors by name."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = AutoConfig.for_model(model_type, **{**BASE, **MODELS[model_type]})
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        cache = model(torch.randint(3, 64, (1, TOKENS)), use_cache=True).past_key_values
    layers: list[dict[str, Any]] = []
    for layer in cache.layers:
        tensors: dict[str, Any] = {}
        for name, value in vars(layer).items():
            parts = value if isinstance(value, dict) else {"": value}
            for part, tensor in parts.items():
                if isinstance(tensor, torch.Tensor) and tensor.dim():
                    tensors[f"{name}{part}"] = tensor
        layers.append(tensors)
    return layers


def n_bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def check(kind: LayerKind, tensors: dict[str, Any]) -> None:
    per_token = [t for name, t in tensors.items() if name in ("keys", "values")]
    index = tensors.get("indexer_keys")
    kept = TOKENS if kind.window is None else min(TOKENS, kind.window - 1)
    held = sum(map(n_bytes, per_token))
    if kind.elements_per_token:
        in_fp32 = token_bytes(kind, 1, precision("fp32"))
        if index is not None:
            # Here fp32; engines keep fp8 with a scale, and so do we.
            assert index.shape[-1] == kind.index_dim
            in_fp32 -= kind.index_dim + 4 * -(-kind.index_dim // 128)
        assert {tensor.shape[-2] for tensor in per_token} == {kept}
        assert held == in_fp32 * kept
    else:
        assert held == 0
    states = {state.name: state for state in kind.states}
    convolution = states.pop("convolution", None)
    if convolution is not None:
        real = tensors["conv_states0"]
        # One column more than the next token needs: it is shifted out unread.
        assert real.shape[-1] == 4
        assert real[..., 1:].numel() == convolution.elements
    for state in states.values():
        real = tensors["recurrent_states0"]
        assert n_bytes(real) == state.elements * state.element_bytes


@pytest.mark.parametrize("model_type", MODELS)
def test_agrees_with_the_real_tensors(model_type: str, tmp_path: Path) -> None:
    real = real_layers(model_type, tmp_path)
    ours = load_model(str(tmp_path))
    assert (
        json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    )
    assert len(ours.layers) == len(real)
    for kind, tensors in zip(ours.layers, real, strict=True):
        check(kind, tensors)
