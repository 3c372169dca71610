"""Build the Debian package and run the tests of tests/lab/booted in a lab that systemd booted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guests import cache
from tests.lab.inside_run import PYTEST, names_in, outcomes
from tests.lab.run import LabResult, run_in_lab

BOOTED = Path(__file__).parent / "booted"
PAGE = cache.REPOSITORY / "docs/operations.md"
BUILD = cache.REPOSITORY / "deploy/debian/build.py"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hostd_1.deb, and hostd_2.deb, which differs only by its version; not compressed, since the
    lab would spend minutes on that."""
    made = tmp_path_factory.mktemp("packages")
    build = [sys.executable, str(BUILD), "--version", "1", "--output", str(made)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL, timeout=600)
    tree = made / "tree"
    subprocess.run(["dpkg-deb", "-R", str(made / "hostd_1_amd64.deb"), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    for version in ("1", "2"):
        control.write_text(re.sub("(?m)^Version: .*$", f"Version: {version}", control.read_text()))
        pack = ["dpkg-deb", "-Znone", "--root-owner-group", "-b", str(tree)]
        subprocess.run(
            [*pack, str(made / f"hostd_{version}.deb")], check=True, stdout=subprocess.DEVNULL
        )
    return made


@pytest.fixture(scope="module")
def lab_run(packages: Path) -> LabResult:
    return run_in_lab(
        [*PYTEST, str(BOOTED.relative_to(cache.REPOSITORY))],
        files={f"/packages/{file.name}": file for file in (*packages.glob("hostd_?.deb"), PAGE)},
        environment={"LAB_SYSTEMD": "1"},
        systemd=True,
        sink=sys.stderr.write,
    )


@pytest.mark.parametrize("name", names_in(BOOTED))
def test_with_a_booted_systemd(lab_run: LabResult, name: str) -> None:
    assert outcomes(lab_run.output, name) == {"PASSED"}, lab_run.output[-6000:]


def test_the_run_as_a_whole_succeeds(lab_run: LabResult) -> None:
    assert lab_run.exit_code == 0, lab_run.output[-6000:]
