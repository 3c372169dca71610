"""Fails a test that leaves something running or mounted behind. A pytest plugin, on everywhere.

What is compared, before and after: asyncio tasks, threads, child processes, the network namespace
of the main thread and the named ones, cgroups, mounts.

A fixture of a module owns what it makes until the module ends: it is set up before the first
comparison of a test, and what the tests of a shared event loop (`loop_scope="module"`) add to the
host that they share is compared when the module ends.

Other test runs may be on this machine: cgroups and named namespaces count if their name has this
process's id, as all names of ours have; mounts if they are below a directory of ours.
"""

import asyncio
import gc
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import pytest_asyncio

from handlers.errors import Failure
from handlers.host.vmm.cgroups import find_mount

# Pools that live as long as the process (handlers.host.linux.file_threads) or as their event loop,
# which ends them when it is closed, after the comparison.
POOLS = ("files_", "slow-files_", "imports_", "asyncio_", "uvloop_")
SETTLED_WITHIN_S = 2.0
TURNS = 20
NETNS = "/run/netns"

_directories: set[str] = set()
_reported: set[str] = set()


def own_directory(path: str | os.PathLike[str]) -> None:
    """What is mounted below this directory is the tests'."""
    _directories.add(os.path.realpath(path))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is there: each set holds names that a reader understands."""

    threads: frozenset[str]
    children: frozenset[str]
    namespaces: frozenset[str]
    cgroups: frozenset[str]
    mounts: frozenset[str]

    @classmethod
    def take(cls) -> "Snapshot":
        return cls(
            threads=_threads(),
            children=_children(),
            namespaces=_namespaces(),
            cgroups=_cgroups(),
            mounts=_mounts(),
        )

    def since(self, before: "Snapshot") -> list[str]:
        """What is new in this one."""
        return sorted(
            [
                *(f"thread {name}" for name in self.threads - before.threads),
                *(f"child process {name}" for name in self.children - before.children),
                *(f"network namespace {name}" for name in self.namespaces - before.namespaces),
                *(f"cgroup {name}" for name in self.cgroups - before.cgroups),
                *(f"mount {name}" for name in self.mounts - before.mounts),
            ]
        )


def left_since(before: Snapshot, *, within_s: float = SETTLED_WITHIN_S) -> list[str]:
    """What is new and stays: a thread that is about to end is given the time for it."""
    deadline = time.monotonic() + within_s
    while (left := Snapshot.take().since(before)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return left


async def tasks_left_since(before: set["asyncio.Task[object]"]) -> list[str]:
    """Tasks of this loop that are new and do not end within some turns of the loop."""
    for _ in range(TURNS):
        if asyncio.all_tasks() <= before:
            return []
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before
    return sorted(f"task {task.get_name()}: {task.get_coro()!r}" for task in left)


def _threads() -> frozenset[str]:
    return frozenset(
        f"{thread.name} ({thread.ident})"
        for thread in threading.enumerate()
        if not thread.name.startswith(POOLS)
    )


def _children() -> frozenset[str]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return frozenset()  # the usual case, by one system call
    found: set[str] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if int(rest.split()[1]) == os.getpid():
            found.add(f"{name} ({entry})")
    return frozenset(found)


def _namespaces() -> frozenset[str]:
    own = {os.readlink("/proc/thread-self/ns/net")}
    try:
        named = os.listdir(NETNS)
    except FileNotFoundError:
        named = []
    return frozenset(own | {name for name in named if _is_ours(name)})


def _is_ours(name: str) -> bool:
    return str(os.getpid()) in name.split("-")


@cache
def _cgroup_mount() -> str | None:
    try:
        return find_mount()
    except (Failure, OSError):
        return None


def _cgroups() -> frozenset[str]:
    mount = _cgroup_mount()
    return frozenset(n for n in os.listdir(mount) if _is_ours(n)) if mount else frozenset()


def _mounts() -> frozenset[str]:
    with open("/proc/self/mountinfo", "rb", buffering=0) as file:
        points = [line.split(b" ", 5)[4] for line in file.read().splitlines()]
    return frozenset(
        path
        for point in points
        if any((path := os.fsdecode(point)).startswith(f"{top}/") for top in _directories)
    )


# -- fixtures --------------------------------------------------------------------------------------


def _shares_the_loop(node: pytest.Item | pytest.Collector) -> bool:
    marker = node.get_closest_marker("asyncio")
    return marker is not None and marker.kwargs.get("loop_scope", "function") != "function"


def _report(left: list[str]) -> None:
    new = [what for what in left if what not in _reported]
    _reported.update(new)
    if new:
        pytest.fail("left behind: " + ", ".join(new), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _a_session_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the last test lost is an error of that test: later, pytest-xdist does not report it."""
    own_directory(tmp_path_factory.getbasetemp())
    yield
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _a_module_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    before = Snapshot.take()
    if _shares_the_loop(request.node):
        request.getfixturevalue("_a_module_leaves_no_task")
    yield
    _report(left_since(before))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _a_module_leaves_no_task() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    _report(await tasks_left_since(before | _current()))


@pytest.fixture(autouse=True)
def _a_test_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    if _shares_the_loop(request.node):
        yield
        return
    before = Snapshot.take()
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("_a_test_leaves_no_task")
    yield
    _report(left_since(before))


@pytest_asyncio.fixture
async def _a_test_leaves_no_task() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    _report(await tasks_left_since(before | _current()))


def _current() -> set["asyncio.Task[object]"]:
    task = asyncio.current_task()
    return set() if task is None else {task}
