"""Fixtures of the kernel tests."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own: full soon, and another device than everything else."""
    there = tmp_path / "tmpfs"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", there], check=True)
    try:
        yield there
    finally:
        subprocess.run(["umount", "-l", there], check=True)
