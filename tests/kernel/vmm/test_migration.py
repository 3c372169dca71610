"""The write that prepares the kernel for a move between cgroups."""

import os
import threading
from pathlib import Path

import pytest

from handlers.host.linux import file_threads
from handlers.host.vmm import migration
from handlers.host.vmm.cgroups import find_mount
from handlers.host.vmm.migration import MigrationLock
from handlers.host.vmm.processes import read_cgroup


def ended(lock: MigrationLock) -> None:
    """Wait for the write that is under way."""
    seen = threading.Event()
    file_threads.start_in_thread(seen.set)
    assert seen.wait(10)
    while lock._writing:  # ends with the write, which is bounded
        pass


async def test_the_process_stays_in_its_cgroup() -> None:
    before = read_cgroup(os.getpid())
    lock = MigrationLock(find_mount())

    lock.prepare()
    ended(lock)

    assert before is not None
    assert read_cgroup(os.getpid()) == before


async def test_a_tree_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    lock = MigrationLock(str(tmp_path))

    lock.prepare()
    ended(lock)

    assert os.listdir(tmp_path) == []


def test_one_write_at_a_time_serves_all_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []

    def begin(work: object) -> bool:
        begun.append(work)
        return True

    monkeypatch.setattr(migration, "start_in_thread", begin)
    lock = MigrationLock(find_mount())

    lock.prepare()
    lock.prepare()

    assert len(begun) == 1
