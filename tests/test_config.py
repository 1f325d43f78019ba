"""``kvxfer config``, where values come from, and variables of other systems."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvxfer import KVCache, Server, config_cli
from kvxfer.errors import OptionError
from kvxfer.interfaces import address_of
from kvxfer.options import OPTIONS, WITHOUT_EFFECT, Options, remarks

SEED = {
    "KVCACHE_RDMA_GID_INDEX": ("5", "gid_index", 5),
    "KVCACHE_RDMA_NICS": ("mlx5_0, mlx5_1", "nics", "mlx5_0, mlx5_1"),
    "KVCACHE_IB_TIMEOUT": ("16", "ib_timeout", 16),
    "KVCACHE_RELAX_ORDERING": ("1", "relaxed_ordering", True),
    "KVCACHE_GDRCOPY_FLUSH_ENABLE": ("1", "flush", "initiator_read"),
    "KVCACHE_SOCKET_IFNAME": ("eth0", "socket_ifname", "eth0"),
    "KVCACHE_DEBUG": ("true", "debug", True),
    "KVCACHE_DEBUG_FILE": ("/tmp/%h", "debug_file", "/tmp/%h"),
    "KVCACHE_ERROR_FILE": ("/tmp/%p", "error_file", "/tmp/%p"),
    "KV_IS_DEBUG_ENABLED": ("3", "debug", True),
    "SET_RDMA_DEST_PORT": ("6000", "port", 6000),
}


def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
    result = CliRunner(env=environ).invoke(config_cli.main, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("variable", SEED)
def test_variables_of_the_seed(variable: str) -> None:
    text, name, value = SEED[variable]
    options = Options.load(environ={variable: text})
    assert getattr(options, name) == value
    (setting,) = [
        s for s in Options.explain(environ={variable: text}) if s.option.name == name
    ]
    assert (setting.value, setting.source) == (value, f"environment {variable}")


def test_the_page_of_options_has_the_variables_of_the_seed() -> None:
    """Those that are read are in the table, the others in the sentence."""
    page = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    _, _, part = page.partition("## Variables of FastDeploy's")
    part, _, _ = part.partition("\n## ")
    rows = re.findall(r"^\| `(K\w+|SET\w+)` \| `(\w+)` \|", part, re.M)
    assert dict(rows) == {name: option for name, (_, option, _) in SEED.items()}
    sentence = re.search(r"\n\n([^|;]*) do\s+nothing;", part)
    assert sentence is not None
    named = re.findall(r"`(\w+)`", sentence[1])
    assert sorted(named) == sorted(WITHOUT_EFFECT)


def test_levels_of_debugging() -> None:
    for level, on in (("0", False), ("1", True), ("2", True)):
        options = Options.load(environ={"KV_IS_DEBUG_ENABLED": level})
        assert options.debug is on
    assert Options.load(environ={"KVCACHE_DEBUG": "0"}).debug is False


def test_each_value_and_where_it_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "kvxfer.toml"
    config.write_text("[kvxfer]\nretry_cnt = 3\nport = 1\nwrite_timeout = 2.5\n")
    code, out, _ = run(
        "--config", str(config), "--json", KVXFER_PORT="7000", KVCACHE_IB_TIMEOUT="16"
    )
    assert code == 0
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert set(rows) == {option.name for option in OPTIONS}
    for name, value, source in (
        ("port", 7000, "environment KVXFER_PORT"),
        ("ib_timeout", 16, "environment KVCACHE_IB_TIMEOUT"),
        ("retry_cnt", 3, f"file {config}"),
        ("write_timeout", 2.5, f"file {config}"),
        ("chain", 64, "default"),
    ):
        assert (rows[name]["value"], rows[name]["source"]) == (value, source)
    assert (rows["ib_timeout"]["low"], rows["ib_timeout"]["high"]) == (14, 31)


def test_only_what_has_changed() -> None:
    code, out, _ = run("--changed", KVXFER_CHAIN="8")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["option", "value", "from", "permitted"]
    assert lines[1].split()[:2] == ["chain", "8"]


def test_out_of_range_is_refused_with_the_range() -> None:
    code, _, err = run(KVCACHE_IB_TIMEOUT="5")
    assert code == 2
    assert "14 to 31" in err and "KVCACHE_IB_TIMEOUT" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("bad", [{"nics": "mlx5 0"}, {"gpu_pci": "1a"}, {"nics": ",a"}])
def test_lists_and_addresses_are_checked(bad: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=f"option {next(iter(bad))}"):
        Options(**bad)  # type: ignore[arg-type]


def test_what_does_nothing_is_said() -> None:
    for variable, why in WITHOUT_EFFECT.items():
        assert remarks({variable: "1"}) == [f"{variable} has no effect: {why}"]
        assert remarks({variable: ""}) == []
    assert remarks({"KVXFER_CHIAN": "1"}) == [
        "KVXFER_CHIAN is no variable of kvxfer; did you mean KVXFER_CHAIN?"
    ]
    assert remarks({"KVXFER_CONFIG": "x", "KVXFER_SOFT_FAULT": "", "PATH": "/"}) == []
    _, _, err = run(KVXFER_PROT="1")
    assert "did you mean KVXFER_PORT?" in err


async def test_a_server_listens_on_the_interface_that_is_named() -> None:
    with KVCache.allocate(n_blocks=2, block_bytes=64, n_layers=1) as cache:
        async with Server(cache, socket_ifname="lo", port=0, device="soft") as server:
            assert server.endpoint == f"127.0.0.1:{server.port}"
        server = Server(cache, socket_ifname="none7", port=0, device="soft")
        with pytest.raises(OptionError, match=r"none7.*no such interface.*lo"):
            await server.open()


def test_the_address_of_an_interface() -> None:
    assert address_of("lo") == "127.0.0.1"
    names = [name for _, name in socket.if_nameindex()]
    assert "lo" in names
