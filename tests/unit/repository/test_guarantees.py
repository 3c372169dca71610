"""docs/guarantees.md: complete, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

from tests import guarantees
from tests.guarantees import PAGE, as_run, named, unproven
from tests.kinds import KINDS
from tests.unit.repository.test_docs import CONTRACT, read

ROOT = Path(__file__).parents[3]
TEXT = PAGE.read_text(encoding="utf-8")
# Sections of the contract that say who is who and what is not built.
NO_PROMISES = ("## 1. Roles", "## Not yet")


def functions(file: str) -> set[str]:
    """The names of a module's functions."""
    path = ROOT / file
    if not path.is_file():
        return set()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    ids = named(TEXT)
    assert len(ids) > 100

    missing = [
        each for each in ids if each.partition("::")[2] not in functions(each.split("::")[0])
    ]

    assert missing == []


def test_every_backticked_test_is_a_whole_id() -> None:
    quoted = re.findall(r"`([^`]*test_\w+[^`]*)`", TEXT)
    whole = {*named(TEXT), "tests/guarantees.py", "tests/unit/repository/test_guarantees.py"}

    assert [each for each in quoted if each not in whole] == []


def test_every_promise_of_the_contract_has_a_row() -> None:
    contract = read(CONTRACT)
    for section in re.split(r"^(?=## )", contract, flags=re.MULTILINE):
        if section.startswith(NO_PROMISES):
            contract = contract.replace(section, "")
    promised = set(re.findall(r"^- \*\*([^*]+)\*\*", contract, re.MULTILINE))
    assert {"Lanes", "Undo is data."} <= promised

    assert set(re.findall(r"\*\*([^*]+)\*\*", TEXT)) == promised


def table(text: str, start: str) -> list[list[str]]:
    """The cells of the first table whose head is at `start` or after it, without its head."""
    lines = text[text.index(start) :].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    rows: list[list[str]] = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_bound_of_the_contract_has_a_row() -> None:
    bounds = [row[0] for row in table(read(CONTRACT), "### Bounds")]
    assert len(bounds) > 8

    assert [row[0] for row in table(TEXT, "### Bounds")] == bounds


def test_every_command_has_a_row() -> None:
    commands = [row[0] for row in table(read(CONTRACT), "| command | `Ok` means |")]
    first = " ".join(row[0] for row in table(TEXT, "## Commands"))

    assert re.findall(r"`(Ping|\w+(?:Network|Instance))`", first) == commands


def test_every_promise_names_a_test_and_every_yes_of_the_ways_out_does() -> None:
    promises = TEXT.partition("## Ways out")[0]
    lines = [line for line in promises.splitlines() if line.startswith("|")]
    rows = [line for line in lines if not re.match(r"\| (promise|what|---)", line)]

    assert [row for row in rows if not named(row)] == []
    ways = table(TEXT, "## Ways out")
    assert {row[2] for row in ways} <= {"yes", "part", "no"}
    assert [row for row in ways if row[2] != "no" and not named(" ".join(row))] == []


@pytest.mark.parametrize(
    ("passed", "deselected", "found"),
    [
        (["tests/unit/test_a.py::test_x[1]"], [], []),
        (["tests/unit/test_a.py::test_y"], [], ["tests/unit/test_a.py::test_x"]),
        ([], ["tests/unit/test_a.py::test_x"], []),
        ([], [], ["tests/unit/test_a.py::test_x"]),
    ],
)
def test_a_named_test_has_to_pass_or_to_be_deselected(
    passed: list[str], deselected: list[str], found: list[str]
) -> None:
    assert unproven(["tests/unit/test_a.py::test_x"], passed, deselected) == found


def test_a_test_inside_the_lab_is_the_parameter_of_one_outside() -> None:
    inside = "tests/lab/inside/test_life.py::test_limits_are_enforced"
    outside = "tests/lab/test_lab.py::test_in_the_lab[test_limits_are_enforced]"

    assert as_run(inside) == outside
    assert unproven([inside], [outside], []) == []
    assert unproven([inside], ["tests/lab/test_lab.py::test_in_the_lab[test_other]"], []) == [
        inside
    ]


def test_a_complete_run_without_a_named_test_fails(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("`tests/unit/test_it.py::test_there` `tests/unit/test_it.py::test_gone`")
    monkeypatch.setattr(guarantees, "PAGE", page)
    monkeypatch.setenv("CI", "true")
    for kind in KINDS:
        path = pytester.path / "tests" / kind / "test_it.py"
        path.parent.mkdir(parents=True)
        path.write_text("def test_there():\n    pass\n")

    options = (
        "-p tests.guarantees --import-mode=importlib -o asyncio_default_fixture_loop_scope=function"
    )
    whole = pytester.runpytest_inprocess(*options.split(), *(f"tests/{kind}" for kind in KINDS))
    part = pytester.runpytest_inprocess(*options.split(), "tests/unit")

    assert whole.ret == pytest.ExitCode.TESTS_FAILED
    lines = [line for line in whole.outlines if "without its proof" in line]
    (line,) = lines
    assert "tests/unit/test_it.py::test_gone" in line
    assert part.ret == pytest.ExitCode.OK
