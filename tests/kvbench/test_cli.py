"""The command line: names, prefixes, choices, errors, formats."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvxfer.kvbench.cli import main
from kvxfer.kvbench.options import OPTIONS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "kvbench" / "examples"
MODEL = str(EXAMPLES / "model_deepseek_r1.yaml")
CONFIG = str(EXAMPLES / "block-tp1-pp2.yaml")
BASE = ["--model", MODEL, "--model_config", CONFIG]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], list[str]]:
    def write(text: str) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--model", MODEL, "--model_config", str(path)]

    return write


# --- names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--etcd-endpoints", "http://e:1"],
        ["--etcd_endpoints", "http://e:1"],
        ["--etcd-endpoint=http://e:1"],
        ["--etcd_e", "http://e:1"],
        ["--etcd", "http://e:1"],
    ],
)
def test_etcd_endpoints_in_every_spelling(run: Run, words: list[str]) -> None:
    code, out, _ = run("plan", *BASE, *words)
    assert code == 0
    assert "--etcd_endpoints http://e:1" in out


@pytest.mark.parametrize(
    ("prefix", "value", "printed"),
    [
        # Unambiguous at first, whatever has come since.
        ("--gds", "/x", "--filepath /x"),
        ("--back", "POSIX", "--backend POSIX"),
        ("--b", "POSIX", "--backend POSIX"),
        ("--run", "ASIO", "--runtime_type ASIO"),
        ("--dev", "mlx5_0", "--device_list mlx5_0"),
        # Unambiguous later.
        ("--posix", "URING", "--posix_api_type URING"),
        ("--obj-r", "", None),
        ("--num-f", "3", "--num_files 3"),
    ],
)
def test_prefixes(run: Run, prefix: str, value: str, printed: str | None) -> None:
    code, out, err = run("plan", *BASE, prefix, value)
    if printed is None:
        assert code == 2
        assert "ambiguous" in err
        return
    assert code == 0, err
    assert printed in out


def test_every_option_is_taken_and_printed(run: Run) -> None:
    computed = {"start_block_size", "max_block_size"}
    computed |= {"start_batch_size", "max_batch_size"}
    for option in OPTIONS:
        if option.kind == "count":
            value = str(option.default + 1)
        elif option.kind == "truth":
            value = "true"
        elif option.choices:
            value = next(one for one in option.choices if one != option.default)
        else:
            value = "some thing"
        for name in (option.name, *option.spellings):
            code, out, err = run("plan", *BASE, f"--{name}", value)
            assert code == 0, err
            if option.name in computed:
                assert f"--{name} {value} is not used" in err
            elif option.name.endswith("seg_type"):
                assert "source and destination decide it" in err or "decides it" in err
            elif option.name.startswith(("obj_access", "obj_secret", "obj_session")):
                assert value not in out
                assert f"--{option.name} '********'" in out
            else:
                shown = "True" if value == "true" else shlex.quote(value)
                assert f"--{option.name} {shown}" in out


@pytest.mark.parametrize("name", ["enable_vmm", "storage_enable_direct"])
def test_flags_bare_or_with_a_value(run: Run, name: str) -> None:
    for words in ([f"--{name}"], [f"--{name}", "yes"], [f"--{name}=1"]):
        assert f"--{name} True" in run("plan", *BASE, *words, "--isl", "64")[1]
    assert f"--{name}" not in run("plan", *BASE, f"--{name}", "off")[1]
    code, out, err = run("plan", *BASE, f"--{name}", "maybe")
    assert (code, out) == (2, "")
    assert "'maybe' is neither true nor false" in err


def test_ucx_mo_is_taken_with_a_warning(run: Run) -> None:
    code, out, err = run("plan", *BASE, "--backend", "UCX_MO")
    assert code == 0
    assert "--backend UCX_MO" in out
    assert "gone from NIXL" in err
    assert "UCX_MO" not in run("plan", *BASE, "--backend", "UCX_MO", "--repair")[1]


def test_a_backend_in_lower_case_is_printed_as_nixlbench_wants_it(run: Run) -> None:
    assert "--backend Mooncake" in run("plan", *BASE, "--backend", "mooncake")[1]


def test_io_size_is_iosize(run: Run) -> None:
    assert run("io-size", *BASE) == run("iosize", *BASE)


@pytest.mark.parametrize("command", ["plan", "profile", "kvcache", "iosize"])
def test_help_of_each_command(run: Run, command: str) -> None:
    code, out, _ = run(command, "-h")
    assert code == 0
    assert "--model_configs" in out


def test_no_command_prints_the_help(run: Run) -> None:
    assert run()[1] == run("--help")[1]


# --- model configs ---------------------------------------------------------------


def test_several_configs_and_patterns(run: Run) -> None:
    code, out, _ = run(
        "plan",
        *BASE,
        "--model_configs",
        str(EXAMPLES / "block-tp1-pp[42].yaml"),
        str(EXAMPLES / ".." / "examples" / "block-tp1-pp1.yaml"),
        "--model_configs",
        str(EXAMPLES / "block-tp1-pp4.yaml"),
    )
    assert code == 0
    named = [line for line in out.splitlines() if line.startswith("Model Config")]
    assert [os.path.basename(line) for line in named] == [
        "block-tp1-pp2.yaml",  # --model_config first
        "block-tp1-pp4.yaml",  # then the pattern's, sorted, none twice
        "block-tp1-pp1.yaml",
    ]


@pytest.mark.parametrize("command", ["kvcache", "iosize"])
def test_model_configs_on_every_command(run: Run, command: str) -> None:
    pattern = str(EXAMPLES / "block-tp1-pp[12].yaml")
    code, out, _ = run(command, "--model", MODEL, "--model_configs", pattern)
    assert code == 0
    assert "block-tp1-pp1.yaml" in out
    assert "block-tp1-pp2.yaml" in out


def test_one_bad_config_and_nothing_is_printed(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("strategy: {tp_size: many}\n")
    worse = tmp_path / "worse.yaml"
    worse.write_text("- 1\n")
    configs = [CONFIG, str(bad), str(worse)]
    code, out, err = run("plan", "--model", MODEL, "--model_configs", *configs)
    assert (code, out) == (1, "")
    assert "bad.yaml, line 1: 'strategy.tp_size' has to be a number, not 'many'" in err
    assert "worse.yaml" in err


# --- wrong use and wrong files -----------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan"], "--model is required"),
        (["plan", "--model", MODEL], "--model_config or --model_configs is required"),
        (["plan", *BASE, "--op_type", "WRIT"], "did you mean 'WRITE'?"),
        (["plan", *BASE, "--op_type", "WRIT"], "one of READ, WRITE"),
        (["plan", *BASE, "--backend", "UXC"], "did you mean 'UCX'?"),
        (["plan", *BASE, "--scheme", "ring"], "pairwise, manytoone, onetomany, tp"),
        (["plan", *BASE, "--format", "yaml"], "text, json, csv, shell"),
        (["plan", *BASE, "--num_iter", "0"], "0 is less than 1"),
        (["plan", *BASE, "--num_iter", "1e3"], "'1e3' is not a whole number"),
        (["plan", *BASE, "--isl", "ten"], "'ten' is not a whole number"),
        (["plan", *BASE, "--source", "disk"], "file, memory, gpu, obj"),
        (
            ["plan", *BASE, "--backend", "GDS", "--source", "memory"],
            "--source 'memory' does not go with backend GDS (one of file, gpu)",
        ),
        (["plan", *BASE, "--bogus"], "unrecognized arguments: --bogus"),
        (["profile", *BASE, "--target", "h:1", "--engine", "file"], "--target is for"),
    ],
)
def test_wrong_use(run: Run, words: list[str], said: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("- 1", "expected a mapping"),
        ("strategy: [1]", "line 1: 'strategy' has to be a mapping"),
        ("strategy:\n  tp_size: 0", "line 2: 'strategy.tp_size' is 0"),
        ("strategy:\n  tp_size: true", "line 2: 'strategy.tp_size' has to be a number"),
        ("runtime:\n  isl: null", "line 2: 'runtime.isl' has to be a number"),
        (
            "strategy:\n  tp_size: 1\n  tp_size: 2",
            "line 3: key 'strategy.tp_size'",
        ),
        ("strategy: {kvcache_quant_mode: fp9}", "did you mean 'fp8'?"),
        ("a: &a {b: *a}", "unknown key 'a'"),
        ("strategy: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_wrong_config(
    run: Run, config: Callable[[str], list[str]], text: str, said: str
) -> None:
    code, out, err = run("plan", *config(text))
    assert said in err
    if "unknown" not in said:
        assert (code, out) == (1, "")
        assert "config.yaml" in err


def test_unknown_keys_are_told_with_a_suggestion(
    run: Run, config: Callable[[str], list[str]]
) -> None:
    words = config("runtme: {}\nsystem:\n  pagesize: 4\n")
    code, out, err = run("plan", *words)
    assert code == 0
    assert out
    assert "line 1: unknown key 'runtme' is not used, did you mean 'runtime'?" in err
    assert (
        "line 3: unknown key 'system.pagesize' is not used, did you mean 'page_size'?"
        in err
    )


def test_wrong_models(run: Run, tmp_path: Path) -> None:
    def told(text: str, name: str = "model.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        code, out, err = run("kvcache", "--model", str(path), "--model_config", CONFIG)
        assert (code, out) == (1, "")
        assert name in err
        return err

    assert "this file says 'model'" in told("model: DEEPSEEK_R1")
    assert "is not supported" in told("model_name: MIXTRAL")
    text = Path(MODEL).read_text()
    assert "line 2: unknown key 'num_layer', did you mean 'num_layers'" in told(
        text.replace("num_layers", "num_layer")
    )
    assert "missing or null: num_layers" in told(text.replace("num_layers: 61", ""))
    assert "has to be a number, not '61'" in told(text.replace("61", "'61'", 1))
    assert "0 layers" in told(text.replace("61", "0", 1))
    assert "not valid JSON" in told("{", "config.json")
    assert "'model_type' is missing" in told("{}", "config.json")
    assert "did you mean 'llama'" in told('{"model_type": "lama"}', "config.json")
    assert "'num_hidden_layers' is missing" in told(
        '{"model_type": "llama"}', "config.json"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    err = run("iosize", "--model", str(empty), *BASE[2:])[2]
    assert "a folder without a config.json" in err
    err = run("iosize", "--model", "nosuch.yaml", "--model_config", CONFIG)[2]
    assert "nosuch.yaml: No such file" in err


def test_values_that_the_reference_takes_are_taken_and_told(
    run: Run, config: Callable[[str], list[str]]
) -> None:
    words = config("runtime: {isl: '100'}\nsystem: {access_pattern: blok}")
    code, _, err = run("plan", *words, "--tp", "0", "--num_requests", "-3")
    assert code == 0
    assert "'runtime.isl' is text" in err
    assert "did you mean 'block'?: counted as layer" in err
    assert "--tp 0 is not used" in err
    assert "num_requests is -3" in err
    # The exact sizing takes none of it.
    code, out, err = run("plan", *words, "--sizing", "exact")
    assert (code, out) == (1, "")
    assert "access pattern 'blok' (one of block, layer)" in err


# --- formats -----------------------------------------------------------------------


def test_json_has_everything(run: Run) -> None:
    code, out, _ = run("plan", *BASE, "--format", "json", "--obj_secret_key", "hush")
    assert code == 0
    (row,) = json.loads(out)
    assert row["model"] == "DEEPSEEK_R1"
    assert row["model_strategy_pp_size"] == 2
    assert row["obj_secret_key"] == "********"
    assert {option.name for option in OPTIONS} <= row.keys()
    shown = run("plan", *BASE, "--format=json", "--obj_secret=hush", "--show_secrets")
    assert json.loads(shown[1])[0]["obj_secret_key"] == "hush"


def test_csv_columns_never_change(run: Run) -> None:
    pattern = str(EXAMPLES / "block-*.yaml")
    words = ["plan", "--model", MODEL, "--model_configs", pattern, "--format", "csv"]
    _, out, _ = run(*words)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 10
    assert all(row["model"] == "DEEPSEEK_R1" for row in rows)
    head = out.splitlines()[0].split(",")
    assert len(head) == len(set(head)) == 64
    assert head[0] == "backend"
    assert head[47:50] == ["config_file", "model", "model_strategy_tp_size"]
    assert run(*words, "--sizing", "both")[1].splitlines()[0].split(",") == head


def test_arguments_are_quoted(run: Run) -> None:
    _, out, _ = run("plan", *BASE, "--filepath", "/a b;rm $HOME", "--etcd", "")
    assert "--filepath '/a b;rm $HOME'" in out
    assert "--etcd_endpoints ''" in out


@pytest.mark.parametrize("backend", ["POSIX", "UCX"])
def test_shell_runs(run: Run, tmp_path: Path, backend: str) -> None:
    code, script, _ = run(
        "plan",
        *BASE,
        f"--backend={backend}",
        "--format=shell",
        "--filepath=/a b;rm $HOME",
        "--obj_secret_key=hush",
        "--enable_pt",
    )
    assert code == 0
    assert "hush" not in script
    called = tmp_path / "called"
    tool = tmp_path / "nixlbench"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" END >> "{called}"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def sh(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh"], input=script, env={**env, **more}, capture_output=True, text=True
        )

    assert "KVBENCH_OBJ_SECRET_KEY" in sh().stderr
    done = sh(KVBENCH_OBJ_SECRET_KEY="se cret")
    assert done.returncode == 0, done.stderr
    calls = called.read_text().split("END\n")[:-1]
    assert len(calls) == (2 if backend == "UCX" else 1)
    words = calls[0].splitlines()
    assert "--filepath=/a b;rm $HOME" in words
    assert "--obj_secret_key=se cret" in words
    assert "--enable_pt=true" in words
    called.unlink()
    sh(KVBENCH_OBJ_SECRET_KEY="x", KVBENCH_PROCESSES="1")
    assert called.read_text().count("END") == 1
    # A nixlbench that fails is the script's failure.
    tool.write_text("#!/bin/sh\nexit 7\n")
    assert sh(KVBENCH_OBJ_SECRET_KEY="x").returncode == 7


def test_a_path_cannot_break_out_of_a_comment(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x\necho broken"
    path.write_text(Path(CONFIG).read_text())
    words = ["--model", MODEL, "--model_config", str(path), "--format", "shell"]
    _, script, _ = run("plan", *words)
    assert "\necho broken" not in script


def test_kvcache_formats(run: Run) -> None:
    (row,) = json.loads(run("kvcache", *BASE, "--format", "json")[1])
    assert row["per_token_bytes"] == 61 * 576
    assert row["per_page_bytes"] == 61 * 576 * 16
    assert row["per_request_bytes"] == 61 * 576 * 1000
    assert row["total_bytes"] == 61 * 576 * 1000 * 10
    assert row["per_gpu_bytes"] == 61 * 576 * 1000 * 10 / 2
    (line,) = csv.DictReader(io.StringIO(run("kvcache", *BASE, "--format", "csv")[1]))
    assert line == {name: str(value) for name, value in row.items()}
    table = run("kvcache", *BASE, "--format", "table")[1]
    for column in ("Per Token", "Per Page", "Per Request", "Per GPU", "Total"):
        assert column in table


def test_a_reader_that_goes_away() -> None:
    command = [sys.executable, "-m", "kvxfer.kvbench", "plan", *BASE]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


# --- cost ----------------------------------------------------------------------------

#: A bare interpreter has 70, the command 180; numpy alone would bring 100 more.
MOST_MODULES = 240


@pytest.mark.parametrize("module", ["kvxfer.kvbench.cli", "kvxfer.cli"])
def test_plan_imports_little(module: str) -> None:
    """What makes its start fast, told without a clock."""
    if module == "kvxfer.cli":  # as `kvxfer kvbench` does it
        pytest.importorskip("click")
        words = ["kvbench", "plan", *BASE]
    else:
        words = ["plan", *BASE]
    code = (
        f"import sys; from {module} import main; "
        "sys.argv[0] = 'kvxfer'; "
        "code = 0\n"
        "try: code = main() or 0\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'numpy', 'zmq', 'msgspec', 'asyncio', 'matplotlib', 'torch'}\n"
        "heavy &= set(sys.modules)\n"
        "for name in sys.modules:\n"  # no extension
        "    if name.startswith('kvxfer._') and name != 'kvxfer._version':\n"
        "        heavy.add(name)\n"
        f"if len(sys.modules) > {MOST_MODULES}: heavy.add(len(sys.modules))\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
