"""Where the jails of a host are made."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.host.jail.layout import JailLayout
from handlers.host.jail.warm_jails import WarmJails

UID = 2_000_000_007
GROUPS, INODES_PER_GROUP = 64, 512


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A file system of many small block groups."""
    image, there = tmp_path / "image", tmp_path / "ext4"
    there.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    inodes = GROUPS * INODES_PER_GROUP
    options = ["-q", "-b", "1024", "-g", "1024", "-O", "^flex_bg,^resize_inode", "-N", str(inodes)]
    subprocess.run(["mkfs.ext4", *options, image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, there], check=True, capture_output=True)
    assert os.statvfs(there).f_files == inodes
    yield there
    subprocess.run(["umount", there], check=True)


def group_of(path: Path) -> int:
    return (path.stat().st_ino - 1) // INODES_PER_GROUP


@pytest.mark.parametrize("exists", [False, True])
def test_ext4_spreads_the_jails_over_its_block_groups(ext4: Path, exists: bool) -> None:
    """A jail's new inodes are then searched among those that few others have just deleted."""
    jails = WarmJails(str(ext4))
    if exists:  # made by a version that did not ask for it
        (ext4 / "firecracker").mkdir()
    warm = [f"warm-{number:012x}" for number in range(12)]
    for warm_id in warm:
        jails.make(warm_id, UID)
    try:
        directories = [ext4 / "firecracker" / warm_id for warm_id in warm]
        groups = [group_of(each) for each in directories]
        within = [group_of(each / "root" / "log") for each in directories]
    finally:
        for warm_id in warm:
            jails.remove(warm_id)

    assert len(set(groups)) > 6
    assert within == groups


def test_a_file_system_that_cannot_spread_them_is_no_failure() -> None:
    base = Path("/dev/shm") / f"hostd-{os.getpid()}"
    JailLayout(str(base)).make_base()
    try:
        assert (base / "firecracker").is_dir()
    finally:
        (base / "firecracker").rmdir()
        base.rmdir()
