"""The tables of promises and cases name tests that exist, and miss no case."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests import reliability
from tests.reliability import CASES, ROOT, TABLE, Seen

PLAN = {
    1,
    2,
    3,
    6,
    7,
    8,
    10,
    11,
    12,
    14,
    15,
    16,
    17,
    19,
    20,
    21,
    23,
    24,
    25,
    26,
    28,
    29,
    30,
    32,
    33,
    35,
    36,
    37,
}
PLAN |= {39, 40}
LINK = re.compile(r'\]\((tests/[a-z_]+\.py) "(test_[a-z0-9_]+)"\)')


@cache
def functions(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_case_of_the_plan_is_listed_once() -> None:
    numbers = [case.number for case in CASES]
    assert numbers == sorted(set(numbers))
    assert set(numbers) >= PLAN


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_tests_of_a_case_exist(case: reliability.Case) -> None:
    for test in case.tests:
        file, _, name = test.partition("::")
        assert name in functions(ROOT / "tests" / file), test


def test_the_written_table_has_every_case_with_its_result_and_its_links_hold() -> None:
    rows = {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \|.*$", TABLE.read_text(), re.MULTILINE)}
    assert set(rows) == {case.number for case in CASES}
    for row in rows.values():
        assert re.search(r"\| (pass|\*\*fail\*\*|not run)", row), row
    for link in re.findall(r"\]\(([^)]+)\)", TABLE.read_text()):
        assert (TABLE.parent / link).exists(), link


def test_every_promise_of_the_readme_links_to_a_test_that_holds_it() -> None:
    table = (ROOT / "README.md").read_text().partition("## What is promised")[2].partition("\n\n")[2]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    rows = rows[: next((n for n, row in enumerate(rows) if not row.startswith("|")), len(rows))]
    assert len(rows) >= 4
    for row in rows[:4]:
        for cell in row.strip("|").split("|")[1:]:
            links = LINK.findall(cell)
            assert links, f"no test for: {cell}"
            for file, name in links:
                assert name in functions(ROOT / file), (file, name)


def test_the_page_on_security_links_to_tests_that_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    links = re.findall(r'\]\(\.\./(tests/[a-z_]+\.py)(?: "(test_[a-z0-9_]+)")?\)', text)
    assert len(links) >= 10
    for file, name in links:
        assert not name or name in functions(ROOT / file), (file, name)


def test_a_case_fails_with_one_of_its_tests_and_says_why_it_was_not_run() -> None:
    case = reliability.Case(99, "x", "I1", ("a.py::test_a", "b.py::test_b"))
    good, bad = Seen(["passed"]), Seen(["passed", "failed"])
    skipped = Seen(["skipped"], ["no tool"])
    assert reliability.result(case, {"a.py::test_a": good, "b.py::test_b": bad}) == "**fail**: test_b"
    assert reliability.result(case, {"a.py::test_a": good, "b.py::test_b": good}) == "pass"
    assert reliability.result(case, {"a.py::test_a": skipped}) == "not run: no tool"
    assert reliability.result(case, {}) == "not run: no test ran"
    partly = reliability.result(case, {"a.py::test_a": good, "b.py::test_b": skipped})
    assert partly == "pass (a part not run: no tool)"
