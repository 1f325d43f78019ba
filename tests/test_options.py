"""Where options come from and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvxfer.errors import OptionError
from kvxfer.options import OPTIONS, Option, Options

BY_NAME = {option.name: option for option in OPTIONS}


def test_defaults_are_valid_and_the_documented_ones() -> None:
    options = Options.load(environ={})
    assert options == Options()
    assert (options.ib_timeout, options.retry_cnt, options.rnr_retry) == (18, 7, 6)
    assert (options.sq_depth, options.chain, options.max_sge) == (2048, 64, 8)
    assert options.merge_bytes == 1 << 20
    assert options.gid_index is None
    assert options.write_timeout == 30.0


def test_order_of_sources(tmp_path: Path) -> None:
    config = tmp_path / "kvxfer.toml"
    config.write_text("[kvxfer]\nport = 1\nretry_cnt = 1\nchain = 1\n[other]\nx = 1\n")
    environ = {"KVXFER_PORT": "2", "KVXFER_RETRY_CNT": "2"}
    options = Options.load(config=config, environ=environ, port=3)
    assert (options.port, options.retry_cnt, options.chain) == (3, 2, 1)
    assert options.sq_depth == 2048


def test_config_path_from_the_environment(tmp_path: Path) -> None:
    config = tmp_path / "kvxfer.toml"
    config.write_text("[kvxfer]\nwrite_timeout = 3\n")
    options = Options.load(environ={"KVXFER_CONFIG": str(config)})
    assert options.write_timeout == 3.0
    assert isinstance(options.write_timeout, float)


def test_seed_names_are_read_and_ours_win() -> None:
    environ = {
        "KVCACHE_IB_TIMEOUT": "14",
        "KVCACHE_RDMA_GID_INDEX": "3",
        "KVCACHE_RELAX_ORDERING": "on",
    }
    options = Options.load(environ=environ)
    assert (options.ib_timeout, options.gid_index) == (14, 3)
    assert options.relaxed_ordering is True
    options = Options.load(environ={**environ, "KVXFER_IB_TIMEOUT": "20"})
    assert options.ib_timeout == 20


def test_a_path_mtu_is_a_power_of_two() -> None:
    assert Options().path_mtu is None
    assert Options(path_mtu=1024).path_mtu == 1024
    assert Options.load(environ={"KVXFER_PATH_MTU": "auto"}).path_mtu is None
    for bad, text in ((1500, "512, 1024, 2048 or 4096"), (128, "256 to 4096")):
        with pytest.raises(OptionError, match=text):
            Options(path_mtu=bad)


def test_environment_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_PORT", "4321")
    assert Options.load().port == 4321


def test_none_and_empty_are_not_given() -> None:
    assert Options.load(environ={"KVXFER_PORT": ""}, port=None).port == 7777
    environ = {"KVXFER_GID_INDEX": "5"}
    assert Options.load(environ=environ, gid_index=None).gid_index == 5
    assert Options.load(environ=environ, gid_index="auto").gid_index is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("64KiB", 65536),
        ("64kiB", 65536),
        ("1MiB", 1 << 20),
        ("1 MiB", 1 << 20),
        ("1M", 10**6),
        ("1MB", 10**6),
        ("1GiB", 1 << 30),
        ("512 B", 512),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert Options.load(environ={"KVXFER_MERGE_BYTES": text}).merge_bytes == value


@pytest.mark.parametrize("text", ["1", "true", "Yes", " on "])
def test_true(text: str) -> None:
    assert Options.load(environ={"KVXFER_REQUIRE_RDMA": text}).require_rdma is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF"])
def test_false(text: str) -> None:
    assert Options.load(environ={"KVXFER_REQUIRE_RDMA": text}).require_rdma is False


def test_integers_of_numpy_are_integers() -> None:
    assert Options.load(environ={}, port=np.uint16(9)).port == 9


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if o.low is not None], ids=lambda option: option.name
)
def test_ranges_are_inclusive(option: Option) -> None:
    assert option.low is not None
    assert option.high is not None
    assert option.parse(option.kind(option.low), "test") == option.low
    assert option.parse(option.kind(option.high), "test") == option.high
    step = 1 if option.kind is int else 1e-6
    for bad in (option.low - step, option.high + step):
        with pytest.raises(OptionError):
            option.parse(option.kind(bad), "test")


@pytest.mark.parametrize("value", [13, 32, "13", True, 18.0, "x", "1e1", -1, [18]])
def test_refusal_names_everything(value: object) -> None:
    with pytest.raises(OptionError) as caught:
        Options.load(environ={}, ib_timeout=value)
    for fact in ("ib_timeout", repr(value), "14 to 31", "argument"):
        assert fact in str(caught.value)


def test_refusal_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="environment KVCACHE_IB_TIMEOUT"):
        Options.load(environ={"KVCACHE_IB_TIMEOUT": "5"})
    config = tmp_path / "c.toml"
    config.write_text("[kvxfer]\nport = '70000'\n")
    with pytest.raises(OptionError, match=f"file {config}"):
        Options.load(config=config, environ={})


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1, "soon", True])
def test_waits_are_finite(value: object) -> None:
    with pytest.raises(OptionError, match="write_timeout"):
        Options.load(environ={}, write_timeout=value)


@pytest.mark.parametrize(
    "bad",
    [
        {"soft_wire": "pigeon"},
        {"progress": "busy"},
        {"host": ""},
        {"host": 7},
        {"require_rdma": "maybe"},
        {"require_rdma": 1},
        {"merge_bytes": "1TiB"},
        {"merge_bytes": "KiB"},
        {"device": "mlx5_0:0"},
        {"device": "mlx5 0"},
        {"ping_interval": 5, "ping_timeout": 5},
    ],
    ids=str,
)
def test_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"option {sorted(bad)[-1]}"):
        Options.load(environ={}, **bad)


def test_unknown_name_suggests(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Did you mean ib_timeout"):
        Options.load(environ={}, ib_timout=18)
    config = tmp_path / "c.toml"
    config.write_text("[kvxfer]\nzzz = 1\n")
    with pytest.raises(OptionError, match="unknown option zzz"):
        Options.load(config=config, environ={})


@pytest.mark.parametrize("text", ["[kvxfer\n", "kvxfer = 1\n", "a = '\xff'\n"])
def test_bad_config_file(tmp_path: Path, text: str) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError, match="config file"):
        Options.load(config=config, environ={})


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        Options.load(config=tmp_path / "none", environ={})


def test_device_and_port() -> None:
    options = Options(device="mlx5_0:2")
    assert (options.device_name, options.device_port) == ("mlx5_0", 2)
    options = Options(device="soft0")
    assert (options.device_name, options.device_port) == ("soft0", None)
    assert Options().device_name is None


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(OptionError, match="port"):
        Options(port=-1)
    with pytest.raises(OptionError, match="port"):
        dataclasses.replace(Options(), port=70000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().port = 1  # type: ignore[misc]


def test_slow_timeout_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Options.load(environ={}, ib_timeout=22)
        assert not caplog.records
        Options.load(environ={}, ib_timeout=23)
    assert "ib_timeout 23" in caplog.text


def test_every_option_is_described() -> None:
    names: list[str] = []
    for option in OPTIONS:
        assert option.help.endswith(".")
        assert option.env[0] == f"KVXFER_{option.name.upper()}"
        assert option.describe_range()
        names.extend(option.env)
    assert len(names) == len(set(names))
    assert "14 to 31" in BY_NAME["ib_timeout"].describe_range()
