"""Run the tests of tests/lab/inside in the lab, with one boot for all of them."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.guests import cache
from tests.lab.run import LabResult, run_in_lab

INSIDE = Path(__file__).parent / "inside"
OUTCOME = re.compile(r"::(test_\w+(?:\[[^\]]*\])?) (PASSED|FAILED|ERROR|SKIPPED)")


def names_inside() -> list[str]:
    """Names of the test functions, read from the source: importing needs the lab's machine."""
    return [
        node.name
        for file in sorted(INSIDE.glob("test_*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    ]


@pytest.fixture(scope="module")
def lab_run() -> LabResult:
    if not shutil.which("qemu-system-x86_64"):
        pytest.fail("qemu-system-x86_64 is missing: run `make setup`")
    directory = str(INSIDE.relative_to(cache.REPOSITORY))
    return run_in_lab(
        ["python", "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", directory],
        sink=sys.stderr.write,
    )


@pytest.mark.parametrize("name", names_inside())
def test_in_the_lab(lab_run: LabResult, name: str) -> None:
    outcomes = {
        outcome for test, outcome in OUTCOME.findall(lab_run.output) if test.split("[")[0] == name
    }

    assert outcomes == {"PASSED"}, lab_run.output[-6000:]


def test_the_lab_run_as_a_whole_succeeds(lab_run: LabResult) -> None:
    assert lab_run.exit_code == 0, lab_run.output[-6000:]
