"""The ballast and what is measured, on a file system that really is full."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.host.storage.disk_space import DiskSpace
from handlers.specs import MIB
from schemas.requests import InstanceRef
from schemas.subjects import Subjects
from worker.journal.journal import Journal
from worker.journal.writer import JournalFault


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    there = tmp_path / "small"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", there], check=True)
    try:
        yield there
    finally:
        subprocess.run(["umount", "-l", there], check=True)


def fill(directory: Path, *, leave_bytes: int = 0) -> Path:
    there = os.statvfs(directory)
    filler = directory / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize - leave_bytes)
    return filler


def held(small: Path) -> DiskSpace:
    """With its ballast of 4 MiB."""
    disk = DiskSpace(state=str(small), reserve_mib=8)
    disk.check()
    assert not disk.low
    return disk


def test_the_ballast_takes_up_half_of_the_reserve(small: Path) -> None:
    empty = DiskSpace(state=str(small), reserve_mib=8).free_bytes()

    disk = held(small)

    assert (small / "ballast").stat().st_blocks * 512 == 4 * MIB
    assert (small / "ballast").stat().st_mode & 0o777 == 0o600
    assert disk.free_bytes() == empty


@pytest.mark.parametrize("full", [True, False], ids=["enospc", "looked at"])
def test_the_ballast_is_released_when_the_file_system_is_full(small: Path, *, full: bool) -> None:
    disk = held(small)
    fill(small)

    disk.relieve(full=full)

    assert disk.low
    assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize == 4 * MIB == disk.free_bytes()


def test_the_ballast_comes_back_with_the_reserve_and_not_before(small: Path) -> None:
    disk = held(small)
    filler = fill(small)
    disk.check()
    os.truncate(filler, filler.stat().st_size - 2 * MIB)  # 6 MiB are free
    disk.check()
    assert disk.low

    os.truncate(filler, filler.stat().st_size - 2 * MIB)
    disk.check()

    assert not disk.low
    disk.check()
    assert not disk.low, "what is made again is not released at once"


def test_a_ballast_of_an_earlier_worker_is_taken_over(small: Path) -> None:
    held(small)
    fill(small, leave_bytes=MIB)

    assert not held(small).low


def test_on_a_file_system_that_is_full_at_the_start_an_old_ballast_is_released(small: Path) -> None:
    held(small)
    fill(small)

    disk = DiskSpace(state=str(small), reserve_mib=8)
    disk.check()

    assert disk.low
    assert not (small / "ballast").exists()


def test_without_a_reserve_there_is_no_ballast(small: Path) -> None:
    disk = DiskSpace(state=str(small), reserve_mib=0)
    disk.check()

    assert not disk.low
    assert os.listdir(small) == []


def test_a_state_directory_that_is_gone_raises_nothing(small: Path) -> None:
    disk = DiskSpace(state=str(small / "gone"), reserve_mib=8)

    disk.check()
    disk.relieve(full=True)

    assert disk.low


def test_the_watermarks_have_a_gap_in_between(small: Path) -> None:
    """Of 16 MiB; the ballast counts as free. 100 for the high one is never passed."""
    disk = DiskSpace(state=str(small), reserve_mib=8, marks=(60.0, 40.0))
    off = DiskSpace(state=str(small), reserve_mib=0, marks=(100.0, 100.0))
    disk.check()
    seen: list[tuple[int, bool]] = []
    for used_mib in (8, 11, 8, 4, 8):
        filler = fill(small, leave_bytes=(12 - used_mib) * MIB)
        disk.check()
        off.check()
        seen.append((round(disk.used_percent()), disk.high))
        filler.unlink()
        assert not off.high

    assert seen == [(50, False), (69, True), (50, True), (25, False), (50, False)]


async def test_usage_is_what_is_allocated_without_imports_in_progress(small: Path) -> None:
    ref = InstanceRef("acme", "web", "i-1")
    for path, size in (
        ("artifacts/acme/web/r1/rootfs.ext4", 3),
        ("artifacts/acme/web/.r2.part/rootfs.ext4", 1),
        ("artifacts/other/web/r1/rootfs.ext4", 1),
        ("snapshots/acme/web/i-1/1/mem", 2),
        ("snapshots/acme/web/i-2/1/mem", 1),
        ("logs/acme/web/i-1/1.log", 1),
    ):
        file = small / path
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(size * MIB))
    os.truncate(small / "artifacts/acme/web/r1/rootfs.ext4", 1 << 30)
    disk = DiskSpace(state=str(small), reserve_mib=0)

    usage = await disk.usage("acme")

    sizes = (usage.artifacts_bytes, usage.snapshots_bytes, usage.logs_bytes)
    assert sizes == (3 * MIB, 3 * MIB, MIB)
    assert (await disk.usage("acme", without=ref)).snapshots_bytes == MIB
    assert (await disk.usage("nobody")).total_bytes == 0


async def commit_much(journal: Journal) -> None:
    for n in range(1000):
        await journal.store.put_meta(f"key-{n}", "x" * 65_536)


async def test_the_journal_commits_again_on_a_full_disk(small: Path) -> None:
    disk = held(small)
    journal = await Journal.open(
        f"{small}/journal.db",
        subjects=Subjects("hostd.v1.test", "h1", "test"),
        boot_id="b1",
        relieve=disk.relieve,
    )
    try:
        fill(small)

        with pytest.raises(JournalFault):
            await commit_much(journal)
        await journal.store.until_writable()
        await journal.store.put_meta("after", "written")

        assert disk.low
        assert journal.store.meta("after") == "written"
    finally:
        await journal.close()
