"""A test that leaves a task, a thread or a child process behind fails, by name."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.leaks import Snapshot, left_since, tasks_left_since

REPOSITORY = Path(__file__).parents[3]
ASLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
LEAKS = """
import asyncio, subprocess, sys, threading
import pytest, pytest_asyncio

KEPT = []
ASLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]

async def test_task():
    KEPT.append(asyncio.create_task(asyncio.Event().wait(), name="forgotten"))

def test_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()

def test_child():
    KEPT.append(subprocess.Popen(ASLEEP))

@pytest.fixture(scope="module")
def shared():
    child = subprocess.Popen(ASLEEP)
    yield child
    child.kill()
    child.wait()

def test_what_a_module_owns_is_not_blamed_on_its_tests(shared):
    assert shared.poll() is None

async def test_what_ends_is_no_leak():
    task = asyncio.create_task(asyncio.sleep(0))
    await asyncio.to_thread(int)
    with subprocess.Popen([sys.executable, "-c", ""]):
        pass

def teardown_module():
    for child in KEPT[1:]:
        child.kill()
        child.wait()
"""
SHARED_LOOP = """
import asyncio
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEPT = []

async def test_that_starts():
    KEPT.append(asyncio.create_task(asyncio.Event().wait(), name="shared"))

async def test_that_uses():
    assert not KEPT[0].done()
"""


@pytest.fixture
def outcome(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.RunResult:
    """Of a run of LEAKS and SHARED_LOOP with the plugin."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    pytester.makepyfile(test_leaks=LEAKS, test_shared_loop=SHARED_LOOP)
    return pytester.runpytest_subprocess("-p", "tests.leaks", "-o", "asyncio_mode=auto", "-v")


def test_each_leak_is_an_error_of_its_test_and_names_what_was_left(
    outcome: pytest.RunResult,
) -> None:
    outcome.assert_outcomes(passed=7, errors=4)
    outcome.stdout.fnmatch_lines_random(
        [
            "*ERROR at teardown of test_task*",
            "left behind: task forgotten: *",
            "*ERROR at teardown of test_thread*",
            "left behind: thread forgotten *",
            "*ERROR at teardown of test_child*",
            "left behind: child process *",
            "*ERROR at teardown of test_that_uses*",  # the last of its module
            "left behind: task shared: *",
        ]
    )


async def test_a_task_that_ends_in_some_turns_is_not_left() -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(asyncio.sleep(0))
    assert await tasks_left_since(before) == []

    waiting = asyncio.create_task(asyncio.Event().wait(), name="waiting")
    (left,) = await tasks_left_since(before)

    assert left.startswith("task waiting: ")
    waiting.cancel()
    await asyncio.gather(task, waiting, return_exceptions=True)


def test_a_thread_and_a_child_are_left_until_they_end() -> None:
    before, end = Snapshot.take(), threading.Event()
    thread = threading.Thread(target=end.wait, name="busy")
    thread.start()
    with subprocess.Popen(ASLEEP) as child:
        left_child, left_thread = left_since(before, within_s=0)

        assert left_child.startswith("child process ")
        assert left_child.endswith(f"({child.pid})")
        assert left_thread == f"thread busy ({thread.ident})"
        child.kill()
        end.set()

    assert left_since(before) == []


def test_a_comparison_is_cheap_where_nothing_is_left() -> None:
    """It is made before and after every test: no child process means no walk through /proc."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.leaks.os.listdir", no_walk)
        assert Snapshot.take().children == frozenset()


def no_walk(path: str) -> list[str]:
    assert path != "/proc"
    return []
