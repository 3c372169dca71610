import os
from pathlib import Path

import pytest

from handlers.host.linux.small_files import CHUNK_BYTES, read_up_to, write_all


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (2 * CHUNK_BYTES + 7))
    fd = os.open(path, os.O_RDONLY)

    read = [read_up_to(fd, limit) for limit in (0, 5, 2 * CHUNK_BYTES, 5, 5)]

    os.close(fd)
    assert [len(each) for each in read] == [0, 5, 2 * CHUNK_BYTES, 2, 0]


def test_what_the_kernel_takes_in_parts_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def partly(fd: int, data: bytes) -> int:
        return write(fd, data[:3])

    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT, 0o600)

    with monkeypatch.context() as parts:
        parts.setattr(os, "write", partly)
        write_all(fd, b"0123456789")

    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"0123456789"
