"""The exact sizing against arithmetic that is written out, one model after another.

Each expected figure is spelled out from the model's own description, not from the
code's data: layers x heads x dimensions x bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.errors import InputFileError, PlanError
from kvxfer.kvbench.exact import ExactSizes, exact_sizes, pages, stages
from kvxfer.kvbench.loading import load_model, shipped_models
from kvxfer.kvbench.models import Model
from kvxfer.kvbench.precision import precision

K, V = 1, 1  # of each there is one
BF16, FP32 = 2, 4


def sizes(
    name: str, *, kv: str = "bfloat16", block: bool = True, **values: Any
) -> ExactSizes:
    config = ModelConfig(
        "config.yaml",
        kvcache_quant_mode=kv,
        access_pattern="block" if block else "layer",
        **values,
    )
    return exact_sizes(load_model(name), config)


# --- one token, after first principles --------------------------------------------


PER_TOKEN = {
    # Multi-head attention: as many KV heads as query heads.
    "llama-2-7b": 32 * 32 * 128 * (K + V) * BF16,
    # Grouped: 8 KV heads for 64 query heads.
    "llama-2-70b": 80 * 8 * 128 * (K + V) * BF16,
    "llama-3.1-8b": 32 * 8 * 128 * (K + V) * BF16,
    "llama-3.1-70b": 80 * 8 * 128 * (K + V) * BF16,
    "llama-3.1-405b": 126 * 8 * 128 * (K + V) * BF16,
    "llama-4-scout": 48 * 8 * 128 * (K + V) * BF16,
    "mistral-7b-v0.1": 32 * 8 * 128 * (K + V) * BF16,
    "mixtral-8x7b": 32 * 8 * 128 * (K + V) * BF16,
    "qwen2.5-72b": 80 * 8 * 128 * (K + V) * BF16,
    "qwen3-32b": 64 * 8 * 128 * (K + V) * BF16,
    "qwen3-30b-a3b": 48 * 4 * 128 * (K + V) * BF16,
    # Every fourth layer has a cache; the others have a state.
    "qwen3-next-80b-a3b": 12 * 2 * 256 * (K + V) * BF16,
    "gemma-2-9b": 42 * 8 * 256 * (K + V) * BF16,
    "gemma-3-27b": 62 * 16 * 128 * (K + V) * BF16,
    "phi-4": 40 * 10 * 128 * (K + V) * BF16,
    "glm-4.5": 92 * 8 * 128 * (K + V) * BF16,
    # MLA: one latent of 512 and one rotary key of 64 for all heads.
    "deepseek-v2": 60 * (512 + 64) * BF16,
    "deepseek-r1": 61 * (512 + 64) * BF16,
    # And the indexer's key: 128 fp8 elements with one fp32 scale.
    "deepseek-v3.2": 61 * ((512 + 64) * BF16 + 128 + 4),
    "kimi-k2": 61 * (512 + 64) * BF16,
    "kimi-linear-48b-a3b": 7 * (512 + 64) * BF16,
    "gpt-oss-20b": 24 * 8 * 64 * (K + V) * BF16,
    "gpt-oss-120b": 36 * 8 * 64 * (K + V) * BF16,
    # Multi-query: one KV head for 71 query heads.
    "falcon-7b": 32 * 1 * 64 * (K + V) * BF16,
    "falcon-40b": 60 * 8 * 64 * (K + V) * BF16,
}


@pytest.mark.parametrize("name", shipped_models())
def test_bytes_of_a_token(name: str) -> None:
    assert sizes(name).per_token == PER_TOKEN[name]
    model = load_model(name)
    assert model.source.startswith("https://huggingface.co/")
    assert model.params is not None


# --- windows, states, parts ----------------------------------------------------------


def test_half_the_layers_see_a_window() -> None:
    # 100 pages of 16 in 12 layers, and the last 127 tokens' 8 in the others.
    got = sizes("gpt-oss-20b", isl=1600, page_size=16)
    page = 8 * 64 * 2 * BF16 * 16
    assert got.per_request == 12 * 100 * page + 12 * 8 * page
    assert {
        part.name: (part.sizes.io_bytes, part.sizes.batch) for part in got.parts
    } == {
        "sliding_attention": (12 * page, 8),
        "full_attention": (12 * page, 100),
    }


def test_a_window_that_begins_inside_a_page_needs_that_page() -> None:
    assert pages(1600, 16, 128) == 8
    assert pages(1601, 16, 128) == 9  # tokens 1474 to 1600: pages 92 to 100
    assert pages(1600, 1, 128) == 127  # the next token is the 128th
    assert pages(100, 16, 128) == 7
    assert pages(129, 64, 128) == 3  # token 2 on: pages 0, 1 and 2


def test_gemma_3_has_one_full_layer_in_six() -> None:
    model = load_model("gemma-3-27b")
    full = [i for i, kind in enumerate(model.layers) if kind.window is None]
    assert full == [5, 11, 17, 23, 29, 35, 41, 47, 53, 59]


def test_llama_4_has_one_full_layer_in_four() -> None:
    model = load_model("llama-4-scout")
    assert [kind.window for kind in model.layers[:5]] == [8192, 8192, 8192, None, 8192]


def test_linear_layers_keep_a_state_of_fixed_size() -> None:
    recurrent = 32 * 128 * 128 * FP32
    convolution = 3 * (2 * 16 * 128 + 32 * 128) * BF16
    state = recurrent + convolution
    for isl in (64, 64000):
        got = sizes("qwen3-next-80b-a3b", isl=isl, page_size=64, num_requests=5)
        parts = {part.name: part.sizes for part in got.parts}
        assert parts["linear_attention state"].io_bytes == 36 * state
        assert parts["linear_attention state"].batch == 5
        attention = 12 * 2 * 256 * 2 * BF16 * isl
        assert got.per_request == 36 * state + attention
    # Over 8 ranks each has an eighth of a state; over 64 no less than a head's.
    assert sizes("qwen3-next-80b-a3b", tp_size=8, pp_size=48, block=False).parts[
        0
    ].sizes.io_bytes == pytest.approx(state / 8)


def test_kimi_linear_mixes_states_and_latents() -> None:
    got = sizes("kimi-linear-48b-a3b", isl=100, page_size=100)
    state = 32 * 128 * 128 * FP32 + 3 * 3 * 32 * 128 * BF16
    assert got.per_request == 20 * state + 7 * (512 + 64) * BF16 * 100


# --- ranks and stages ----------------------------------------------------------------


def test_heads_are_divided_and_then_replicated() -> None:
    one = 64 * 128 * 2 * BF16  # a page of 64 of one head
    held = {
        tp: sizes("llama-3.1-70b", tp_size=tp, isl=64, page_size=64, pp_size=80).per_gpu
        for tp in (1, 2, 4, 8, 16, 64)
    }
    heads = {1: 8, 2: 4, 4: 2, 8: 1, 16: 1, 64: 1}
    assert held == {tp: n * one for tp, n in heads.items()}
    # 10 heads over 4 ranks: the fullest holds 3.
    phi = sizes("phi-4", tp_size=4, isl=64, page_size=64, pp_size=40)
    assert phi.per_gpu == 3 * one


def test_a_latent_is_on_every_rank() -> None:
    alone = sizes("deepseek-r1", isl=1000, page_size=64)
    shared = sizes("deepseek-r1", isl=1000, page_size=64, tp_size=8)
    assert shared.per_gpu == alone.per_gpu
    assert shared.total == 8 * alone.total


def test_uneven_stages() -> None:
    model = load_model("deepseek-r1")
    assert [len(stage) for stage in stages(model, 16)] == [4] * 13 + [3] * 3
    got = sizes("deepseek-r1", pp_size=16, isl=10000, page_size=256, num_requests=10)
    (part,) = got.parts
    # 40 whole pages a request, of the 4 layers of a large stage.
    assert part.sizes.io_bytes == 4 * 576 * BF16 * 256
    assert part.sizes.batch == 40 * 10
    assert got.total == 61 * 576 * BF16 * 256 * 40 * 10


def test_the_stage_with_the_most_bytes_counts() -> None:
    # Of 62 layers over 31 stages, some have two windows, some a full layer.
    got = sizes("gemma-3-27b", pp_size=31, isl=100_000, page_size=16)
    assert {part.name for part in got.parts} == {"sliding_attention", "full_attention"}


def test_layer_access_moves_a_layer_at_a_time() -> None:
    block = sizes("llama-3.1-8b", isl=1000, page_size=16, num_requests=3, pp_size=4)
    layer = sizes(
        "llama-3.1-8b", isl=1000, page_size=16, num_requests=3, pp_size=4, block=False
    )
    (a,), (b,) = block.parts, layer.parts
    assert a.sizes.io_bytes == 8 * b.sizes.io_bytes
    assert a.sizes.batch * 8 == b.sizes.batch
    assert a.sizes.total_bytes == b.sizes.total_bytes == block.per_gpu


def test_output_grows_the_cache_and_is_not_moved() -> None:
    got = sizes("llama-3.1-8b", isl=1000, osl=200, page_size=100)
    assert got.per_gpu_at_end * 10 == got.per_gpu * 12
    assert sum(part.sizes.total_bytes for part in got.parts) == got.per_gpu


def test_more_stages_than_layers() -> None:
    with pytest.raises(PlanError, match="some stay empty"):
        sizes("llama-3.1-8b", pp_size=33)


# --- precisions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("fp32", 128 * 4),
        ("fp16", 128 * 2),
        ("bf16", 128 * 2),
        ("BFloat16", 128 * 2),
        ("fp8", 128),
        ("fp8_e4m3", 128),
        ("int8", 128 + 4),  # an fp32 scale
        ("fp4", 64 + 128 // 16),  # an fp8 scale for 16 elements
        ("mxfp4", 64 + 128 // 32),  # a power-of-two byte for 32
        ("int4", 64 + 2 + 2),  # an fp16 scale and zero point
    ],
)
def test_bytes_of_a_vector(name: str, vector: int) -> None:
    assert precision(name).vector_bytes(128) == vector
    assert sizes("llama-3.1-8b", kv=name).per_token == 32 * 8 * 2 * vector


def test_the_layout_of_the_sparse_mla_kernels() -> None:
    got = sizes("deepseek-v3.2", kv="fp8_ds_mla").per_token
    assert got == 61 * (512 + 4 * 4 + 64 * 2 + 132) == 61 * (656 + 132)


# --- config.json ------------------------------------------------------------------


def config_json(folder: Path, **config: Any) -> Model:
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(str(folder))


PLAIN = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "llama"}, [None] * 6),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 6),
        ({"model_type": "mistral", "sliding_window": 64}, [64] * 6),
        ({"model_type": "qwen2", "sliding_window": 64}, [None] * 6),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            [None] * 4 + [64] * 2,
        ),
        ({"model_type": "gemma2"}, [4096, None] * 3),
        ({"model_type": "gemma3_text", "sliding_window": 9}, [9] * 5 + [None]),
        ({"model_type": "gpt_oss"}, [128, None] * 3),
        ({"model_type": "llama4_text"}, [8192, 8192, 8192, None, 8192, 8192]),
        (
            {"model_type": "llama4_text", "no_rope_layers": [0, 1, 1, 1, 1, 0]},
            [None, 8192, 8192, 8192, 8192, None],
        ),
        ({"model_type": "llama4_text", "attention_chunk_size": None}, [None] * 6),
        ({"model_type": "cohere2"}, [4096, 4096, 4096, None, 4096, 4096]),
        (
            {
                "model_type": "gpt_oss",
                "layer_types": ["full_attention"] * 5 + ["sliding_attention"],
            },
            [None] * 5 + [128],
        ),
    ],
)
def test_windows_by_layer(
    tmp_path: Path, config: dict[str, Any], windows: list[int | None]
) -> None:
    model = config_json(tmp_path, **PLAIN, **config)
    assert [kind.window for kind in model.layers] == windows


@pytest.mark.parametrize(
    ("config", "heads", "dim"),
    [
        ({"model_type": "llama"}, 2, 64),
        ({"model_type": "llama", "num_key_value_heads": None}, 8, 64),
        ({"model_type": "llama", "head_dim": 96}, 2, 96),
        ({"model_type": "falcon"}, 1, 64),
        ({"model_type": "falcon", "multi_query": False}, 8, 64),
        (
            {
                "model_type": "falcon",
                "new_decoder_architecture": True,
                "num_kv_heads": 4,
            },
            4,
            64,
        ),
        ({"model_type": "falcon", "new_decoder_architecture": True}, 8, 64),
        (
            {
                "model_type": "chatglm",
                "num_layers": 6,
                "kv_channels": 128,
                "multi_query_attention": True,
                "multi_query_group_num": 2,
            },
            2,
            128,
        ),
    ],
)
def test_heads(tmp_path: Path, config: dict[str, Any], heads: int, dim: int) -> None:
    model = config_json(tmp_path, **{**PLAIN, **config})
    assert len(model.layers) == 6
    (kind,) = model.kinds
    assert (kind.kv_heads, kind.k_dim, kind.v_dim) == (heads, dim, dim)


def test_a_text_config_inside_a_larger_one(tmp_path: Path) -> None:
    model = config_json(
        tmp_path,
        model_type="mistral3",
        vision_config={"num_hidden_layers": 24},
        text_config={"model_type": "mistral", **PLAIN},
    )
    assert len(model.layers) == 6
    assert model.name == tmp_path.name


@pytest.mark.parametrize(
    ("config", "per_request"),
    [
        (
            {
                "model_type": "jamba",
                "mamba_d_state": 16,
                "mamba_d_conv": 4,
                "mamba_expand": 2,
                "attn_layer_period": 3,
                "attn_layer_offset": 1,
            },
            # Layers 1 and 4 attend; the others keep 1024 channels of 16 and of 3.
            2 * 2 * 64 * 2 * BF16 * 10 + 4 * (1024 * 16 * FP32 + 1024 * 3 * BF16),
        ),
        (
            {
                "model_type": "falcon_h1",
                "mamba_n_heads": 4,
                "mamba_d_head": 32,
                "mamba_d_state": 8,
                "mamba_n_groups": 1,
                "mamba_d_conv": 4,
            },
            6
            * (
                2 * 64 * 2 * BF16 * 10 + 4 * 32 * 8 * FP32 + 3 * (4 * 32 + 2 * 8) * BF16
            ),
        ),
        (
            {
                "model_type": "nemotron_h",
                "hybrid_override_pattern": "M-M*M-",
                "mamba_num_heads": 4,
                "mamba_head_dim": 32,
                "ssm_state_size": 8,
                "n_groups": 2,
                "conv_kernel": 4,
            },
            2 * 64 * 2 * BF16 * 10
            + 3 * (4 * 32 * 8 * FP32 + 3 * (4 * 32 + 2 * 2 * 8) * BF16),
        ),
        (
            {
                "model_type": "bamba",
                "attn_layer_indices": [2],
                "mamba_n_heads": 4,
                "mamba_d_head": 32,
                "mamba_d_state": 8,
            },
            2 * 64 * 2 * BF16 * 10
            + 5 * (4 * 32 * 8 * FP32 + 3 * (4 * 32 + 2 * 8) * BF16),
        ),
        (
            {"model_type": "minimax", "head_dim": 64, "attn_type_list": [0, 1] * 3},
            3 * 2 * 64 * 2 * BF16 * 10 + 3 * 8 * 64 * 64 * FP32,
        ),
    ],
)
def test_hybrids(tmp_path: Path, config: dict[str, Any], per_request: int) -> None:
    model = config_json(tmp_path, **PLAIN, **config)
    given = ModelConfig("c", kvcache_quant_mode="bf16", isl=10, page_size=10)
    assert exact_sizes(model, given).per_request == per_request


def test_an_architecture_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(
        """\
model_name: MINE
config: {blocks: 4, width: 256, groups: 2, span: 32}
architecture:
  name: mine
  layers: blocks
  kind: "'near' if i % 2 else 'far'"
  kinds:
    near: {kv_heads: groups, head_dim: width // 8, window: span}
    far: {kv_heads: groups, k_dim: width // 8, v_dim: width // 4}
"""
    )
    model = load_model(str(path))
    config = ModelConfig("c", kvcache_quant_mode="fp16", isl=100, page_size=10)
    # Tokens 69 to 99 are in four pages of ten; the far layers hold ten pages.
    near, far = 2 * (32 + 32) * 2 * 10 * 4, 2 * (32 + 64) * 2 * 10 * 10
    assert exact_sizes(model, config).per_request == 2 * near + 2 * far


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("{layers: 2, kinds: {a: {heads: 2}}}", "unknown key 'heads'"),
        ("{layers: 2, kinds: {a: {}, b: {}}}", "several 'kinds' and no 'kind'"),
        ("{layers: 2, kind: c, kinds: {a: {}}}", "field 'c' is missing"),
        ("{layers: 2, kind: \"'c'\", kinds: {a: {}}}", "layer 0 is 'c', known here: a"),
        ("{layers: 1.5, kinds: {a: {}}}", "has to be a whole number"),
        ("{layers: 1 ** 9, kinds: {a: {}}}", "needs two numbers"),
        ("{layers: open('x'), kinds: {a: {}}}", "'open' is no function here"),
        ("{layers: x.__class__, kinds: {a: {}}}", "is missing"),
        ("{layers: (, kinds: {a: {}}}", "not an expression"),
        ("{layers: 1 // 0, kinds: {a: {}}}", "division"),
        ("{layers: 99999999, kinds: {a: {}}}", "expected 1 to 4096"),
        ("{layers: 2, kinds: {a: {kv_heads: -1}}}", "from 0 on"),
        ("{kinds: {a: {}}}", "'layers'"),
        ("llame", "did you mean 'llama"),
    ],
)
def test_wrong_architectures(tmp_path: Path, architecture: str, said: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"model_name: M\nconfig: {{x: 1}}\narchitecture: {architecture}\n")
    with pytest.raises(InputFileError) as caught:
        load_model(str(path))
    assert said in str(caught.value)
