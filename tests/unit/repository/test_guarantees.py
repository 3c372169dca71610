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


@pytest.fixture
def suite(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> pytest.Pytester:
    """Two tests of each kind, in CI, and a page that names those of one kind, and one more."""
    page = tmp_path / "page.md"
    names = ("test_there", "test_other", "test_gone")
    page.write_text(" ".join(f"`tests/unit/test_it.py::{name}`" for name in names))
    monkeypatch.setattr(guarantees, "PAGE", page)
    monkeypatch.setenv("CI", "true")
    for kind in KINDS:
        path = pytester.path / "tests" / kind / "test_it.py"
        path.parent.mkdir(parents=True)
        path.write_text("def test_there():\n    pass\n\ndef test_other():\n    pass\n")
    return pytester


def ran(suite: pytest.Pytester, *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and which tests are said to be without a proof."""
    options = (
        "-p tests.guarantees --import-mode=importlib -o asyncio_default_fixture_loop_scope=function"
    )
    done = suite.runpytest_inprocess(*options.split(), *arguments)
    return int(done.ret), re.findall(r"without its proof: (\S+)", "\n".join(done.outlines))


WHOLE = [f"tests/{kind}" for kind in KINDS]


@pytest.mark.parametrize("processes", ["", "-n2 --dist=loadfile"])
def test_a_complete_run_fails_without_a_named_test_that_was_not_deselected(
    suite: pytest.Pytester, processes: str
) -> None:
    deselected = "--deselect=tests/unit/test_it.py::test_other"

    assert ran(suite, *processes.split(), deselected, *WHOLE) == (
        pytest.ExitCode.TESTS_FAILED,
        ["tests/unit/test_it.py::test_gone"],
    )


def test_a_run_of_a_part_is_not_judged(suite: pytest.Pytester) -> None:
    assert ran(suite, "tests/unit") == (pytest.ExitCode.OK, [])
