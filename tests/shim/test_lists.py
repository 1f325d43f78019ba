"""The list of required tests and the page of verdicts are about the same things."""

from __future__ import annotations

import pytest

from tests.shim.judges import PAGE, REQUIRED, TABLE, verdicts_in
from tests.shim.pyverbs_required import read_required, reason_to_leave_out
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
