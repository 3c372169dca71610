"""A run of several processes: files of some kinds run beside others, the rest alone."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.kinds import KINDS
from tests.side_by_side import SHARING, Turns

OPTIONS = (
    "-p tests.side_by_side --import-mode=importlib -o asyncio_default_fixture_loop_scope=function "
    "-n2 --dist=loadfile --no-loadscope-reorder"
)
# Waits for the mark of the other file; a file that runs alone takes its own away when it ends.
MEETS = """
import time
from pathlib import Path

def test_it():
    Path(__file__).with_suffix(".here").touch()
    end = time.monotonic() + {wait_s}
    while len(list(Path(__file__).parent.glob("*.here"))) < 2:
        assert time.monotonic() < end, "alone"
        time.sleep(0.01)

def test_it_ends():
    if {alone}:
        Path(__file__).with_suffix(".here").unlink()
"""

INTERRUPTED = """
import time
from pathlib import Path
import pytest

@pytest.fixture(scope="module", autouse=True)
def slowly():
    yield
    time.sleep(7)
    Path(__file__).with_suffix(".ended").touch()

def test_it():
    Path(__file__).with_suffix(".began").touch()
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> str:
    path = tmp_path / "lock"
    path.touch()
    return str(path)


def test_files_of_some_kinds_run_at_the_same_time_and_others_alone(
    pytester: pytest.Pytester,
) -> None:
    for kind, wait_s, alone in (("unit", 60, False), ("vm", 0.5, True)):
        for name in ("test_a.py", "test_b.py"):
            path = pytester.path / "tests" / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(MEETS.format(wait_s=wait_s, alone=alone))

    done = pytester.runpytest_inprocess(*OPTIONS.split(), "-rA", "tests/unit", "tests/vm")

    outcomes = [line.split()[:2] for line in done.outlines if line.startswith(("PASSED", "FAILED"))]
    assert sorted(outcomes) == sorted(
        [outcome, f"tests/{kind}/{name}.py::{test}"]
        for kind, first in (("unit", "PASSED"), ("vm", "FAILED"))
        for name in ("test_a", "test_b")
        for test, outcome in (("test_it", first), ("test_it_ends", "PASSED"))
    )


def test_one_file_waits_for_those_that_share_and_for_none_of_its_own_tests(lock: str) -> None:
    one, other = Turns(lock), Turns(lock)
    alone = threading.Event()

    def take() -> None:
        other.take("alone", shared=False)
        alone.set()

    one.take("a", shared=True)
    waits = threading.Thread(target=take)
    waits.start()
    assert not alone.wait(0.05)
    one.take("a", shared=True)
    assert not alone.wait(0.05)
    one.close()

    assert alone.wait(60)
    waits.join()
    other.take("alone", shared=False)
    other.close()


def test_who_waits_is_before_the_next_file_of_who_had_the_turn(lock: str) -> None:
    one, other = Turns(lock), Turns(lock)
    order: list[str] = []

    def take_alone() -> None:
        other.take("alone", shared=False)
        order.append("alone")
        other.close()

    one.take("a", shared=True)
    waits = threading.Thread(target=take_alone)
    waits.start()
    while _waiters(lock) < 1:
        os.sched_yield()
    one.take("b", shared=True)
    order.append("b")
    one.close()

    waits.join()
    assert order == ["alone", "b"]


def _waiters(lock: str) -> int:
    """Of locks of this file (proc(5): a line of one that waits has an arrow)."""
    inode = f":{os.stat(lock).st_ino} "
    lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    return sum("->" in line and inode in line for line in lines)


@pytest.mark.parametrize("split", [[], ["-n2", "--dist=loadfile"]], ids=["one", "two"])
def test_what_the_last_test_lost_is_an_error_of_a_split_run_too(
    pytester: pytest.Pytester, split: list[str]
) -> None:
    pytester.makepyfile(
        """
        class Lost:
            def __del__(self):
                raise ValueError("lost")

        def test_it():
            lost = Lost()
            lost.itself = lost
        """
    )
    options = "-p tests.leaks -W error -o asyncio_default_fixture_loop_scope=function"
    done = pytester.runpytest_subprocess(*options.split(), *split)

    done.assert_outcomes(passed=1, errors=1)


def test_after_ctrl_c_the_teardown_of_each_process_ends(pytester: pytest.Pytester) -> None:
    """pytest-xdist alone cuts it short after 5 s."""
    path = pytester.path / "tests" / "unit" / "test_it.py"
    path.parent.mkdir(parents=True)
    path.write_text(INTERRUPTED)
    command = [sys.executable, "-m", "pytest", *OPTIONS.split(), "tests/unit"]
    run = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    began, ended = path.with_suffix(".began"), path.with_suffix(".ended")
    while not began.exists():
        assert run.poll() is None
        os.sched_yield()

    os.killpg(run.pid, signal.SIGINT)

    assert run.wait(60) == pytest.ExitCode.INTERRUPTED
    assert ended.exists()


def test_the_kinds_that_share_exist() -> None:
    assert set(KINDS) > SHARING
