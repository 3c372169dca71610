"""Run the tests of tests/lab/inside in the lab, with one boot for all of them."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.guests import cache
from tests.lab.inside_run import PYTEST, names_in, outcomes
from tests.lab.run import LabResult, run_in_lab

INSIDE = Path(__file__).parent / "inside"


@pytest.fixture(scope="module")
def lab_run() -> LabResult:
    if not shutil.which("qemu-system-x86_64"):
        pytest.fail("qemu-system-x86_64 is missing: run `make setup`")
    directory = str(INSIDE.relative_to(cache.REPOSITORY))
    return run_in_lab(
        [*PYTEST, directory],
        sink=sys.stderr.write,
    )


@pytest.mark.parametrize("name", names_in(INSIDE))
def test_in_the_lab(lab_run: LabResult, name: str) -> None:
    assert outcomes(lab_run.output, name) == {"PASSED"}, lab_run.output[-6000:]


def test_the_lab_run_as_a_whole_succeeds(lab_run: LabResult) -> None:
    assert lab_run.exit_code == 0, lab_run.output[-6000:]
