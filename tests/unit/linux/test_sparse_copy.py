"""Long copies and wipes reach the disk as they go on."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from handlers.host.linux import sparse_copy
from handlers.host.linux.sparse_copy import CHUNK_BYTES, copy_sparse
from handlers.host.storage.wipe import wipe


def _no_reflink(target: int, source: int) -> None:
    raise OSError(95, "not supported")


def copied(file: Path) -> None:
    with file.open("rb") as source, file.with_suffix(".copy").open("xb") as target:
        copy_sparse(source.fileno(), target.fileno())


def wiped(file: Path) -> None:
    with file.open("rb+") as target:
        wipe(target.fileno())


@pytest.mark.parametrize("work", [copied, wiped])
def test_what_is_written_is_synced_long_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], None]
) -> None:
    file = tmp_path / "disk"
    file.write_bytes(b"x" * (6 * CHUNK_BYTES + 1))
    synced: list[int] = []
    monkeypatch.setattr(sparse_copy, "reflink", _no_reflink)
    monkeypatch.setattr(sparse_copy, "COPY_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(sparse_copy, "SYNC_BYTES", 2 * CHUNK_BYTES)
    monkeypatch.setattr(os, "fdatasync", synced.append)

    work(file)

    assert len(synced) == 3
