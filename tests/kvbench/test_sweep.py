"""How long a transfer takes: the figures by hand, and the drawings."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest

from kvxfer.kvbench.cli import main
from kvxfer.kvbench.config import ModelConfig
from kvxfer.kvbench.errors import WrongUseError
from kvxfer.kvbench.loading import load_model
from kvxfer.kvbench.sweep import bandwidth, parse_axis, points, prefill_seconds

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kvbench" / "examples"
CONFIG = str(EXAMPLES / "block-tp8-pp2.yaml")
BASE = ["--model", "llama-3.1-70b", "--model_config", CONFIG]


def drawing(test: Any) -> Any:
    """Mark a test that needs matplotlib, which keeps its fonts' files open."""
    missing = importlib.util.find_spec("matplotlib") is None
    test = pytest.mark.skipif(missing, reason="matplotlib is not installed")(test)
    return pytest.mark.leaky("matplotlib keeps its fonts open")(test)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400G", 50e9),
        ("400g", 50e9),
        ("400Gb/s", 50e9),
        ("400Gbps", 50e9),
        ("400 Gbit/s", 50e9),
        ("50GB/s", 50e9),
        ("50 GB", 50e9),
        ("1GiB/s", float(1 << 30)),
        ("1.6T", 200e9),
        ("800", 100.0),
    ],
)
def test_bandwidths(text: str, rate: float) -> None:
    assert bandwidth(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "0G", "-1G", "4 parsecs", "1.2.3G"])
def test_no_bandwidths(text: str) -> None:
    with pytest.raises(WrongUseError, match="--bandwidth"):
        bandwidth(text)


@pytest.mark.parametrize(
    "text", ["isl", "isl=", "isl=0", "isl=1.5", "isl=a", "osl=1", "=1", ""]
)
def test_no_axes(text: str) -> None:
    with pytest.raises(WrongUseError, match="--sweep"):
        parse_axis(text)


def test_a_transfer_and_the_prefill_before_it() -> None:
    model = load_model("llama-3.1-70b")
    config = ModelConfig(
        "c",
        tp_size=8,
        page_size=16,
        hardware="H100",
        model_quant_mode="bfloat16",
        kvcache_quant_mode="bfloat16",
        num_requests=99,  # the question is about one prompt
    )
    (point,) = points(model, config, parse_axis("isl=16000"), [50e9])
    # One of 8 heads on each of 8 ranks, 80 layers.
    size = 80 * 128 * 2 * 2 * 16000
    assert point.bytes == size
    assert point.transfer_seconds == pytest.approx(size / 50e9)
    work = 2 * 70.6e9 * 16000 + 80 * 2 * 64 * 256 * 16000**2 / 2
    prefill = work / (8 * 989e12 * 0.4)
    assert point.prefill_seconds == pytest.approx(prefill)
    assert point.hidden
    # The last layer's part cannot hide.
    assert point.wait_seconds == pytest.approx(size / 50e9 / 80)


def test_a_slow_nic_is_not_hidden() -> None:
    model = load_model("llama-3.1-8b")
    config = ModelConfig("c", hardware="h100", isl=1000, page_size=16)
    (point,) = points(model, config, parse_axis("isl=1000"), [125e6])
    assert point.hidden is False
    assert point.prefill_seconds is not None
    assert point.wait_seconds == pytest.approx(
        point.transfer_seconds - point.prefill_seconds * 31 / 32
    )


def test_prefill_that_cannot_be_told() -> None:
    model = load_model("llama-3.1-8b")
    assert prefill_seconds(model, ModelConfig("c"), None, 0.4) is None
    assert prefill_seconds(model, ModelConfig("c", hardware="X9"), None, 0.4) is None
    known = ModelConfig("c", hardware="H100", isl=10)
    assert prefill_seconds(model, known, 1e9, 0.4) is not None


@pytest.mark.parametrize("name", ["deepseek_r1", "gpt_oss_120b", "qwen3_235b_a22b"])
def test_all_experts_are_not_what_a_token_meets(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # These files count every expert: prefill would look far too long.
    model = str(EXAMPLES / f"model_{name}.yaml")
    words = ["kvcache", "--model", model, "--model_config", CONFIG, "--bandwidth=1G"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("?")
    assert "--active_params" in err
    assert main([*words, "--active_params=37e9"]) == 0
    assert "?" not in capsys.readouterr().out


@drawing
@pytest.mark.parametrize(
    "axis",
    [
        "tp=1,2,4,8,16",
        "pp=1,2,4",
        "isl=1000,2000",
        "page_size=16,64",
        "page-size=16,64",
        "bandwidth=100G,200G,50GB/s",
    ],
)
def test_axes_on_the_command_line(
    axis: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.svg"
    words = ["--sweep", axis, "--plot", str(out), "--format", "json"]
    assert main(["kvcache", *BASE, *words]) == 0
    rows = json.loads(capsys.readouterr().out)
    rates = 1 if axis.startswith("bandwidth") else 3  # 100, 200 and 400 Gbit/s
    assert len(rows) == rates * (axis.count(",") + 1)
    assert all(row["hidden"] is True for row in rows)
    assert "<svg" in out.read_text()


def test_tables_and_csv(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["kvcache", *BASE, "--bandwidth", "400G", "--bandwidth", "25G"]
    assert main(words) == 0
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "isl", "Bandwidth", "Per", "GPU", "Transfer", "Prefill", "Wait", "Hidden"
    ]  # fmt: skip
    assert first.split()[:3] == ["1000", "400", "Gbit/s"]
    assert second.split()[:3] == ["1000", "25", "Gbit/s"]
    assert main([*words, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["bandwidth"] for row in rows] == ["50000000000.0", "3125000000.0"]


@drawing
def test_a_png_of_several_configs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    words = ["--model_configs", str(EXAMPLES / "block-tp8-pp[48].yaml")]
    words += ["--bandwidth", "400G", "--plot", str(out)]
    assert main(["kvcache", "--model", "deepseek-r1", *words]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "Config" in capsys.readouterr().out


def test_what_is_missing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    # A config that names no hardware.
    config = Path(__file__).parent / "golden" / "golden_fixtures" / "cfg_defaults.yaml"
    words = ["--model", "qwen3-32b", "--model_config", str(config)]
    assert main(["kvcache", *words, "--bandwidth", "100G"]) == 0
    out, err = capsys.readouterr()
    assert "?" in out
    assert "system.hardware" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plot", "x.pdf"], ".png or .svg"),
        (["--bandwidth", "x"], "--bandwidth 'x'"),
        (["--sweep", "tpp=1"], "did you mean 'tp'"),
        (["--bandwidth", "1G", "--mfu", "2"], "--mfu"),
    ],
)
def test_wrong_use(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kvcache", *BASE, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


@drawing
def test_a_plot_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kvcache", *BASE, "--plot", "/nowhere/x.png"]) == 1
    assert "/nowhere/x.png" in capsys.readouterr().err


def test_profile_measures_nothing_if_the_sweep_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["profile", "--engine=file", "--backend=POSIX", f"--filepath={tmp_path}"]
    assert main([*words, *BASE, "--sweep", "tp=0"]) == 2
    assert main([*words, *BASE, "--sweep", "pp=999"]) == 1
    assert capsys.readouterr().out == ""


@drawing
def test_profile_draws_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.svg"
    words = ["profile", "--engine=file", "--backend=POSIX", f"--filepath={tmp_path}"]
    words += ["--isl=64", "--num_requests=1", "--num_iter=1", "--warmup_iter=0"]
    words += ["--large_blk_iter_ftr=1", "--pp=1", "--plot", str(out)]
    assert main([*words, *BASE]) == 0
    assert "Transfer" in capsys.readouterr().out
    assert out.exists()
