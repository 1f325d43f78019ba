"""Each difference between the two sizings is said, and none that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench.cli import main
from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.exact import exact_sizes
from kvxfer.kvbench.explain import explain
from kvxfer.kvbench.loading import load_model
from kvxfer.kvbench.sizing import reference_sizes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kvbench" / "examples"


def why(name: str, **values: Any) -> list[str]:
    values = {
        "access_pattern": "block",
        "osl": 0,
        "page_size": 10,
        "isl": 100,
        **values,
    }
    config = ModelConfig("c", **values)
    model = load_model(name)
    return explain(
        model, config, reference_sizes(model, config), exact_sizes(model, config)
    )


def topics(sentences: list[str]) -> list[str]:
    return [sentence.partition(":")[0] for sentence in sentences]


def test_nothing_to_say() -> None:
    (sentence,) = why("llama-3.1-8b")
    assert "agree" in sentence


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("llama-3.1-8b", {"tp_size": 4}, ["Scope"]),
        ("llama-3.1-8b", {"isl": 105}, ["Pages"]),
        ("llama-3.1-8b", {"tp_size": 16}, ["Scope", "KV heads"]),
        ("llama-3.1-8b", {"pp_size": 5}, ["Scope", "Stages"]),
        ("llama-3.1-8b", {"pp_size": 5, "access_pattern": "layer"}, ["Scope"]),
        ("llama-3.1-8b", {"kvcache_quant_mode": "fp16"}, ["Precision"]),
        (
            "llama-3.1-8b",
            {"kvcache_quant_mode": "int4", "model_quant_mode": "int4"},
            ["Scales"],
        ),
        ("llama-3.1-8b", {"osl": 50}, ["Output"]),
        ("deepseek-r1", {"tp_size": 8}, ["Scope", "MLA"]),
        ("deepseek-r1", {"pp_size": 2}, ["Scope", "Stages"]),
        ("deepseek-v3.2", {}, ["Indexer"]),
        ("gpt-oss-20b", {"isl": 200}, ["Window"]),
        ("gpt-oss-20b", {"isl": 100}, []),
        ("qwen3-next-80b-a3b", {}, ["States"]),
        ("kimi-linear-48b-a3b", {"tp_size": 2}, ["Scope", "MLA", "States"]),
    ],
)
def test_what_is_said(name: str, values: dict[str, Any], said: list[str]) -> None:
    assert topics(why(name, **values)) == (said or topics(why("llama-3.1-8b")))


def test_the_figures_in_the_words() -> None:
    scope, latent = why("deepseek-r1", tp_size=8, isl=1000, page_size=10)
    # 61 layers of 576 bytes: 1000 tokens for all, and the same on each rank.
    assert "33.51 MB" in scope
    assert scope.count("33.51 MB") == 2
    assert "8 times as large" in latent


def test_both_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "gpt-oss-20b", "--sizing", "both"]
    words += ["--model_config", str(EXAMPLES / "block-tp8-pp4.yaml")]
    for command in ("plan", "kvcache"):
        assert main([command, *words]) == 0
        out = capsys.readouterr().out
        assert "Why the sizings differ" in out
        assert "Window: 12 of 24 layers see 128 tokens" in out
        assert main([command, *words, "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["sizing"] for row in rows] == ["reference", "exact", "exact"]
        assert main([command, *words, "--format", "csv"]) == 0
        assert "Window:" in capsys.readouterr().err
    assert main(["plan", *words, "--format", "json"]) == 0
    for row in json.loads(capsys.readouterr().out):
        assert any("Window:" in sentence for sentence in row["explanation"])


def test_an_explanation_without_the_exact_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["kvcache", "--model", "gpt-oss-20b", "--explain"]
    words += ["--model_config", str(EXAMPLES / "block-tp8-pp4.yaml")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("Batch Size") == 1
    assert "Window:" in out
