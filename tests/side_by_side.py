"""Which tests run at the same time in a run of several processes (`-n 2`). A pytest plugin.

A process gets whole files (`--dist loadfile`). Those of the kinds in `SHARING` run side by side. A
file of another kind has the machine to itself: the process waits until no other one has a file.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import pytest

from tests.kinds import is_part_of_a_run

FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
DOOR: Final = ".next"
POINTS: Final = ".points"
TEARDOWN_S: Final = 60.0
SHARING: Final = frozenset({"unit", "contract", "kernel", "broker", "page"})
"""Their tests compute or wait in namespaces of their own. The others (`vm`, `crash`, `lab`) run a
whole host with a real guest, and wait for it with deadlines."""


def lock_of(run: str) -> str:
    """The file that the processes of a run lock: `run` is the ID that pytest-xdist gives it. The
    same name with `POINTS` has what they share (`tests/crash/points.py`)."""
    return os.path.join(tempfile.gettempdir(), f"hostd-tests-{run}.lock")


class Turns:
    """The machine, for one file at a time or for several that share it. Ends with the process.

    Who waits is next: one that gives its turn back queues behind it (`_door`).
    """

    def __init__(self, lock: str) -> None:
        self._fd, self._door = (os.open(lock + each, FLAGS, 0o600) for each in ("", DOOR))
        self._file = ""

    def take(self, file: str, *, shared: bool) -> None:
        """Wait for the turn of a file, unless it is still that file's. The one before is over."""
        if file != self._file:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            fcntl.flock(self._door, fcntl.LOCK_EX)
            fcntl.flock(self._fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            fcntl.flock(self._door, fcntl.LOCK_UN)
            self._file = file

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._door)


class SideBySide:
    """Takes a turn before the fixtures of a file are made; those of the file before are gone."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        file = item.nodeid.partition("::")[0]
        self._turns.take(file, shared=Path(file).parts[1] in SHARING)

    def pytest_unconfigure(self) -> None:
        self._turns.close()


class TheFirst:
    """Makes the lock of a run, once there are processes to share it.

    After Ctrl-C it waits for the teardown of the others: pytest-xdist ends them after 5 s, also in
    the middle of one, which would leave VMs, cgroups and namespaces behind.
    """

    def __init__(self) -> None:
        self._lock = ""

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        self._lock = lock_of(node.workerinput["testrunuid"])

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        if not self._lock:
            return
        fd = os.open(self._lock, FLAGS, 0o600)
        end = time.monotonic() + TEARDOWN_S
        while time.monotonic() < end:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        os.close(fd)

    def pytest_unconfigure(self) -> None:
        if self._lock:
            for each in ("", DOOR, POINTS):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._lock + each)


def pytest_configure(config: pytest.Config) -> None:
    if is_part_of_a_run(config):
        lock = lock_of(vars(config)["workerinput"]["testrunuid"])
        config.pluginmanager.register(SideBySide(Turns(lock)), "side by side")
    else:
        config.pluginmanager.register(TheFirst(), "side by side")
