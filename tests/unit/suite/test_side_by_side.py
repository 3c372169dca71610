"""A run of several processes: files of some kinds run beside others, the rest alone."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.kinds import KINDS
from tests.side_by_side import HOST, HOSTS, LAB, SHARING, Turns

OPTIONS = (
    "-p tests.side_by_side --import-mode=importlib -o asyncio_default_fixture_loop_scope=function "
    "-n2 --dist=loadfile --no-loadscope-reorder"
)
# Waits for the mark of the other file; one that runs alone takes its own away when it ends.
MEETS = """
import os
import time
from pathlib import Path

MARK = Path("{name}.here")

def test_it():
    Path("{name}.process").write_text(str(os.getpid()))
    MARK.touch()
    end = time.monotonic() + {wait_s}
    while len(list(Path().glob("*.here"))) < 2:
        assert time.monotonic() < end, "alone"
        time.sleep(0.01)

def test_it_ends():
    if {alone}:
        MARK.unlink()
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
    return str(tmp_path / "lock")


@pytest.mark.parametrize(("kind", "meet"), [("unit", True), ("vm", False)])
def test_files_of_some_kinds_run_at_the_same_time_and_others_alone(
    pytester: pytest.Pytester, kind: str, meet: bool
) -> None:
    for name in ("a", "b"):
        path = pytester.path / "tests" / kind / f"test_{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MEETS.format(name=name, wait_s=60 if meet else 0.5, alone=not meet))

    done = pytester.runpytest_inprocess(*OPTIONS.split(), f"tests/{kind}")

    done.assert_outcomes(passed=4 if meet else 2, failed=0 if meet else 2)


def test_the_labs_are_one_process_s_and_leave_the_other_to_the_hosts(
    pytester: pytest.Pytester,
) -> None:
    for name, kind in (("a", "lab"), ("b", "lab"), ("c", "vm")):
        path = pytester.path / "tests" / kind / f"test_{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MEETS.format(name=name, wait_s=60, alone=False))

    done = pytester.runpytest_inprocess(*OPTIONS.split(), "tests/lab", "tests/vm")

    done.assert_outcomes(passed=6)
    processes = [(pytester.path / f"{name}.process").read_text() for name in "abc"]
    assert processes[0] == processes[1] != processes[2]


@pytest.mark.parametrize(
    ("kind", "other_kind", "waits"),
    [
        ("unit", "page", False),
        ("unit", "vm", True),
        ("unit", "lab", True),
        ("vm", "unit", True),
        ("vm", "crash", True),
        ("vm", "lab", False),
        ("lab", "crash", False),
        ("lab", "lab", True),
        ("lab", "unit", True),
    ],
)
def test_which_kinds_wait_for_which(lock: str, kind: str, other_kind: str, waits: bool) -> None:
    one, other = Turns(lock), Turns(lock)
    taken = threading.Event()

    def take() -> None:
        other.take("b", other_kind)
        taken.set()

    one.take("a", kind)
    takes = threading.Thread(target=take)
    takes.start()

    if waits:
        while not _waiters(lock):
            os.sched_yield()
        assert not taken.is_set()
    else:
        assert taken.wait(60)
    one.close()
    takes.join()
    assert taken.is_set()
    other.close()


def test_one_file_waits_for_those_that_share_and_for_none_of_its_own_tests(lock: str) -> None:
    one, other = Turns(lock), Turns(lock)
    alone = threading.Event()

    def take() -> None:
        other.take("alone", "vm")
        alone.set()

    one.take("a", "unit")
    waits = threading.Thread(target=take)
    waits.start()
    assert not alone.wait(0.05)
    one.take("a", "unit")
    assert not alone.wait(0.05)
    one.close()

    assert alone.wait(60)
    waits.join()
    other.take("alone", "vm")
    other.close()


def test_who_waits_is_before_the_next_file_of_who_had_the_turn(lock: str) -> None:
    one, other = Turns(lock), Turns(lock)
    order: list[str] = []

    def take_alone() -> None:
        other.take("alone", "vm")
        order.append("alone")
        other.close()

    one.take("a", "unit")
    waits = threading.Thread(target=take_alone)
    waits.start()
    while _waiters(lock) < 1:
        os.sched_yield()
    one.take("b", "unit")
    order.append("b")
    one.close()

    waits.join()
    assert order == ["alone", "b"]


def _waiters(lock: str) -> int:
    """Of locks of these files (proc(5): a line of one that waits has an arrow)."""
    inodes = [f":{os.stat(lock + each).st_ino} " for each in (HOST, LAB)]
    lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    return sum("->" in line and any(each in line for each in inodes) for line in lines)


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


def test_each_kind_has_its_place() -> None:
    assert set(KINDS) == SHARING | HOSTS | {"lab"}
