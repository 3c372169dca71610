"""The locks of a worker: a second one that shares any of its directories does not start."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlers.errors import Conflict
from handlers.host.lock import HostLock

OWNED = ("run", "state", "jails")
HOLDER = """
import sys
from handlers.host.lock import HostLock
with HostLock(*sys.argv[1:]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_worker(*paths: Path) -> Generator[subprocess.Popen[bytes]]:
    """Another process that holds the locks."""
    arguments = [sys.executable, "-c", HOLDER, *map(str, paths)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process


def directories(base: Path) -> list[Path]:
    found = [base / name for name in OWNED]
    for path in found:
        path.mkdir(parents=True)
    return found


@pytest.mark.parametrize("shared", range(3), ids=OWNED)
def test_a_directory_that_another_worker_uses_is_named_with_its_pid(
    tmp_path: Path, shared: int
) -> None:
    theirs, ours = directories(tmp_path / "a"), directories(tmp_path / "b")
    ours[shared].rmdir()
    ours[shared].symlink_to(theirs[shared])

    with other_worker(*theirs) as process:
        with pytest.raises(Conflict, match=rf"cannot lock {ours[shared]}.* pid {process.pid};"):
            HostLock(*map(str, ours)).__enter__()
        process.communicate()

    with HostLock(*map(str, ours)):
        pass


def test_locks_end_with_the_process_and_a_failure_leaves_none(tmp_path: Path) -> None:
    run, state, jails = directories(tmp_path)
    with other_worker(run, jails) as process:
        with pytest.raises(Conflict):
            HostLock(str(tmp_path), str(state), str(jails)).__enter__()
        with HostLock(str(tmp_path), str(state)):
            pass
        process.send_signal(signal.SIGKILL)

    with HostLock(str(run), str(state), str(jails)):
        assert (run / "hostd.lock").read_text() == f"{os.getpid()}\n"


def test_a_directory_named_twice_is_locked_once(tmp_path: Path) -> None:
    run, state, _ = directories(tmp_path)

    with HostLock(str(run), str(state), str(state), f"{state}/"):
        assert os.listdir(state) == []
