"""The command lines that came with the first release, typed as they stand there.

Each runs in ``examples/kvbench`` and prints, to the byte, what was printed then.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "examples" / "kvbench"
RULE = "=" * 80

HELP = """\
usage: main.py [-h] {plan,profile,kvcache,iosize} ...

KVBench

positional arguments:
  {plan,profile,kvcache,iosize}
                        Available commands
    plan                Display the recommended configuration for nixlbench
    profile             Run nixlbench
    kvcache             Display kvcache information
    iosize              Display io size information

options:
  -h, --help            show this help message and exit
"""


def planned(config: str, requests: int, pp: int, batch: int, block: int) -> str:
    return f"""\
{RULE}
Model Config: ./examples/{config}.yaml
ISL: 10000 tokens
Page Size: 256
Requests: {requests}
TP: 1
PP: {pp}
{RULE}
nixlbench \\
    --backend GDS \\
    --max_batch_size {batch} \\
    --max_block_size {block} \\
    --start_batch_size {batch} \\
    --start_block_size {block} \\
    --target_seg_type VRAM
"""


# A command line and its output; None where none was shown.
COMMANDS = [
    ("python main.py --help", HELP),
    (
        "python main.py plan --model ./examples/model_deepseek_r1.yaml "
        '--model_config "./examples/block-tp1-pp8.yaml"',
        None,
    ),
    (
        "python main.py kvcache --model ./examples/model_deepseek_r1.yaml "
        '--model_config "./examples/block-tp1-pp8.yaml"',
        "Model                  : DEEPSEEK_R1\n"
        "Input Sequence Length  : 10000\n"
        "Batch Size             : 298\n"
        "IO Size                : 1.12 MB\n",
    ),
    (
        "python main.py iosize --model ./examples/model_deepseek_r1.yaml "
        '--model_config "./examples/block-tp1-pp8.yaml"',
        "IO Size per GPU: 4608\n",
    ),
    (
        """python main.py plan \\
  --model ./examples/model_deepseek_r1.yaml \\
  --model_config ./examples/block-tp1-pp16.yaml \\
  --backend GDS \\
  --source gpu \\
  --etcd-endpoint "http://localhost:2379\"""",
        planned("block-tp1-pp16", 10, 16, 5958, 589824),
    ),
    (
        """python main.py plan \\
  --model ./examples/model_deepseek_r1.yaml \\
  --model_config ./examples/layer-tp1-pp16.yaml \\
  --backend GDS \\
  --source gpu \\
  --etcd-endpoint "http://localhost:2379\"""",
        planned("layer-tp1-pp16", 10, 16, 23829, 147456),
    ),
    (
        """python main.py plan \\
  --model ./examples/model_deepseek_r1.yaml \\
  --model_config ./examples/block-tp1-pp8.yaml \\
  --backend GDS \\
  --source gpu \\
  --etcd-endpoint "http://localhost:2379" \\
  --pp 32 \\
  --num_requests 100""",
        planned("block-tp1-pp8", 100, 32, 119141, 294912),
    ),
]


def run(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command.replace("python ", f"{sys.executable} ", 1)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "COLUMNS": "80"},
    )


@pytest.mark.parametrize(("command", "output"), COMMANDS)
def test_prints_what_it_printed(
    command: str, output: str | None, tmp_path: Path
) -> None:
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    if output is None:
        assert "nixlbench" in done.stdout
    else:
        assert done.stdout == output


def test_profile_without_nixlbench(tmp_path: Path) -> None:
    # No output was shown for it, and all of it takes hours of memory copies.
    done = run(
        "python main.py profile --model ./examples/model_deepseek_r1.yaml "
        '--model_config "./examples/block-tp1-pp8.yaml" --dry_run',
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "engine kvxfer: WRITE 298 x 1179648 bytes, 1000 times after 100, 1 threads",
        "endpoint: python -m kvxfer.serve --host 127.0.0.1 --port 0 --layers 1 "
        "--planes kv --dtype u8 --blocks 596 --block-bytes 1179648",
    ]


def test_the_plan_that_could_never_run_says_so(tmp_path: Path) -> None:
    done = run(COMMANDS[-1][0], tmp_path)
    assert "119141 requests at once" in done.stderr
    assert "35136110592 bytes and does not fit" in done.stderr


def test_configs_are_the_references_but_for_three() -> None:
    golden = Path(__file__).parent / "golden" / "examples"
    shipped = sorted(path.name for path in (HERE / "examples").iterdir())
    assert shipped == sorted(path.name for path in golden.iterdir())
    changed = {
        name
        for name in shipped
        if (golden / name).read_text() != (HERE / "examples" / name).read_text()
    }
    assert changed == {
        "block-tp1-pp8.yaml",
        "block-tp1-pp16.yaml",
        "layer-tp1-pp16.yaml",
    }
