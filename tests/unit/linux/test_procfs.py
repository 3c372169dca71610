"""The formats of /proc, as proc(5) and the kernel's own escapes have them."""

from pathlib import Path

import pytest

from handlers.host.linux.procfs import Mount, parse_mounts, read_mounts, read_status, read_text


def test_a_mount_is_read_with_its_optional_fields_and_its_escapes() -> None:
    lines = (
        "31 23 0:28 / / rw - ext4 /dev/vda rw\n"
        "38 31 0:37 / /mnt/a\\040b\\134c rw shared:9 master:1 - cgroup2 none rw\n"
    )

    assert parse_mounts(lines) == [
        Mount("0:28", "/", "ext4"),
        Mount("0:37", "/mnt/a b\\c", "cgroup2"),
    ]


def test_a_mount_point_that_is_not_ascii_keeps_its_name() -> None:
    (mount,) = parse_mounts("31 23 0:28 / /mnt/\u00fc rw - ext4 /dev/vda rw\n")

    assert mount.mount_point == "/mnt/\u00fc"


def test_proc_is_mounted_on_proc() -> None:
    assert "proc" in {mount.fs_type for mount in read_mounts() if mount.mount_point == "/proc"}


def test_fields_of_a_status_file_are_found_at_the_start_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "status"
    path.write_text("Name:\tfire:Uid:cracker\nNgid:\t0\nUid:\t0\t0\t0\t0\nGroups:\t \nTail:\t1")

    found = read_status(str(path), ("Name", "Uid", "Groups", "Tail", "Gid"))

    assert found == {"Name": "fire:Uid:cracker", "Uid": "0 0 0 0", "Groups": "", "Tail": "1"}


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(str(tmp_path / "none"))
