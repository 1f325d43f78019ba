"""The list of required tests and the page of verdicts are about the same things."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from tests.shim import pyverbs_required
from tests.shim.judges import PAGE, REQUIRED, TABLE, verdicts_in
from tests.shim.pyverbs_required import make_list, read_required, reason_to_leave_out
from tests.shim.pyverbs_results import MODULES


def test_what_is_not_required_has_its_reason() -> None:
    required, left_out = read_required(REQUIRED.read_text())
    assert len(required) > 40
    assert {name: reason_to_leave_out(name) for name in required} == dict.fromkeys(
        required
    )
    assert left_out == {name: reason_to_leave_out(name) for name in left_out}
    assert all(left_out.values())
    assert required == sorted(set(required))


def test_the_page_shows_every_module_and_no_failure() -> None:
    required, _ = read_required(REQUIRED.read_text())
    modules = {name.split(".")[1] for name in required}
    assert modules <= {f"test_{module}" for module in MODULES}
    found = TABLE.search(PAGE.read_text())
    assert found is not None
    assert {name for name in modules if f"`{name}.py`" not in found[0]} == set()
    assert "FAILED" not in found[0]


def results_on_soft_roce() -> str:
    """What the guest printed when the list was made, more or less."""
    required, left_out = read_required(REQUIRED.read_text())
    lines = [f"ok\t{name}" for name in [*left_out, *reversed(required)]]
    noise = [
        "guest: 6.1.0-50-amd64",
        "ok",
        "skip\ttests.a.b\twhy",
        "fail\ttests.c.d\tE",
    ]
    return "\n".join([*noise, *lines, "guest: pyverbs has ended"])


def test_the_list_is_made_of_results() -> None:
    text = REQUIRED.read_text()
    releases = re.search(r"Soft-RoCE:\n# (.*)\.\n", text)
    assert releases is not None
    assert make_list(results_on_soft_roce(), releases[1]) == text


def test_another_result_is_a_failure_or_the_new_list(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.txt"
    path.write_text(REQUIRED.read_text())
    monkeypatch.setattr(pyverbs_required, "LIST", path)

    def run(results: str, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pyverbs_required.py", "Linux 7", *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO(results))
        return pyverbs_required.main()

    same, one_more = results_on_soft_roce(), "\nok\ttests.test_cq.New.test_one"
    assert run(same) == 0  # of another release, but the same tests
    assert run(same + one_more) == 1
    assert "\n+tests.test_cq.New.test_one\n" in capsys.readouterr().out
    assert path.read_text() == REQUIRED.read_text()
    assert run("", "--write") == 1  # nothing has passed: that was no Soft-RoCE
    assert path.read_text() == REQUIRED.read_text()
    assert run(same + one_more, "--write") == 0
    assert "tests.test_cq.New.test_one" in read_required(path.read_text())[0]
    assert "# Linux 7." in path.read_text()


def test_the_page_counts_the_list() -> None:
    required, left_out = read_required(REQUIRED.read_text())
    page = " ".join(PAGE.read_text().split())
    assert f"own software RDMA: {len(required) + len(left_out)} of" in page
    assert f"leaves out {len(left_out)}, each" in page
    assert f"the other {len(required)} must pass" in page
    found = re.findall(r"required tests: (\d+)", page)
    assert sum(map(int, found)) == len(required)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ok\ttests.test_cq.A.b", [("tests.test_cq.A.b", "ok")]),
        ("skip\tx\tno such thing", [("x", "skip")]),
        ("fail\tx\tE: no", [("x", "fail")]),
        ("ok", []),
        ("something else\tx", []),
    ],
)
def test_verdicts_are_read(line: str, expected: list[tuple[str, str]]) -> None:
    assert list(verdicts_in(line)) == expected
