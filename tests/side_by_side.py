"""Which tests run at the same time in a run of several processes (`-n 2`). A pytest plugin.

A process gets whole files (`--dist loadfile`), and all files of the labs. Those of the kinds in
`SHARING` run side by side. Of the kinds in `HOSTS` one runs, and beside it only a lab, which is a
QEMU with one processor: the process waits until no other one has a file that this rules out.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.kinds import is_part_of_a_run

FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
DOOR: Final = ".next"
POINTS: Final = ".points"
TEARDOWN_S: Final = 60.0
HOST, LAB = ".host", ".lab"
SHARING: Final = frozenset({"unit", "contract", "kernel", "broker", "page"})
"""Their tests compute or wait in namespaces of their own."""
HOSTS: Final = frozenset({"vm", "crash"})
"""Their tests run a whole host with a real guest, and wait for it with deadlines."""


def lock_of(run: str) -> str:
    """What the names of the files begin with that the processes of a run lock: `run` is the ID that
    pytest-xdist gives it. That with `POINTS` has what they share (`tests/crash/points.py`)."""
    return os.path.join(tempfile.gettempdir(), f"hostd-tests-{run}.lock")


class Turns:
    """The machine, for a file that runs alone or for several that go together. Ends with the
    process.

    Who waits is next: one that gives its turn back queues behind it (`_door`).
    """

    def __init__(self, lock: str) -> None:
        self._host, self._lab, self._door = (
            os.open(lock + each, FLAGS, 0o600) for each in (HOST, LAB, DOOR)
        )
        self._file = ""

    def take(self, file: str, kind: str) -> None:
        """Wait for the turn of a file, unless it is still that file's. The one before is over."""
        if file == self._file:
            return
        for each in (self._host, self._lab):
            fcntl.flock(each, fcntl.LOCK_UN)
        fcntl.flock(self._door, fcntl.LOCK_EX)
        if kind in SHARING:
            fcntl.flock(self._host, fcntl.LOCK_SH)
            fcntl.flock(self._lab, fcntl.LOCK_SH)
        else:
            fcntl.flock(self._host if kind in HOSTS else self._lab, fcntl.LOCK_EX)
        fcntl.flock(self._door, fcntl.LOCK_UN)
        self._file = file

    def close(self) -> None:
        for each in (self._host, self._lab, self._door):
            os.close(each)


class SideBySide:
    """Takes a turn before the fixtures of a file are made; those of the file before are gone."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        file = _file_of(item.nodeid)
        self._turns.take(str(file), _kind_of(file))

    def pytest_unconfigure(self) -> None:
        self._turns.close()


class WholeFiles(LoadFileScheduling):
    """Gives whole files to the processes; one gets all labs, since they wait for each other."""

    def _split_scope(self, nodeid: str) -> str:
        file = _file_of(nodeid)
        return str(file.parent if _kind_of(file) == "lab" else file)


def _file_of(nodeid: str) -> Path:
    return Path(nodeid.partition("::")[0])


def _kind_of(file: Path) -> str:
    return file.parts[1]


class TheFirst:
    """Makes the lock of a run, once there are processes to share it.

    After Ctrl-C it waits for the teardown of the others: pytest-xdist ends them after 5 s, also in
    the middle of one, which would leave VMs, cgroups and namespaces behind.
    """

    def __init__(self) -> None:
        self._lock = ""

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(
        self, config: pytest.Config, log: Producer
    ) -> WholeFiles | None:
        return WholeFiles(config, log) if config.getoption("dist") == "loadfile" else None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        self._lock = lock_of(node.workerinput["testrunuid"])

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        if not self._lock:
            return
        end = time.monotonic() + TEARDOWN_S
        for each in (HOST, LAB):
            fd = os.open(self._lock + each, FLAGS, 0o600)
            while time.monotonic() < end:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
            os.close(fd)

    def pytest_unconfigure(self) -> None:
        if self._lock:
            for each in (HOST, LAB, DOOR, POINTS):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._lock + each)


def pytest_configure(config: pytest.Config) -> None:
    if is_part_of_a_run(config):
        lock = lock_of(vars(config)["workerinput"]["testrunuid"])
        config.pluginmanager.register(SideBySide(Turns(lock)), "side by side")
    else:
        config.pluginmanager.register(TheFirst(), "side by side")
