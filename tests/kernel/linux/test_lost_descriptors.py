"""What was opened is closed if the call that follows fails, before anybody has the descriptor."""

import errno
import os
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlers.host.linux.openat2 import Directory
from handlers.host.net.nft import libnftables
from handlers.host.snapshot.discards import MemoryFreer, unname_dir
from handlers.host.snapshot.manifest import SnapshotDir
from handlers.host.vmm import spawn
from handlers.jail_names import MEMORY
from tests.kernel.storage.store_host import REF, write

OPENERS: dict[str, Callable[[Directory], object]] = {
    "file": lambda directory: directory.file("file").__enter__(),
    "marked_file": lambda directory: directory.marked_file("file").__enter__(),
    "read": lambda directory: directory.read("file", 100),
    "shared": lambda directory: directory.shared("shared"),
}


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def without_status() -> Generator[None]:
    """As on a file system that was removed under the open file."""

    def fail(_: int) -> os.stat_result:
        raise OSError(errno.EIO, "no status")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fstat", fail)
        yield


@pytest.mark.parametrize("opener", OPENERS)
def test_a_file_without_a_status_is_closed(tmp_path: Path, opener: str) -> None:
    write(tmp_path / "file", b"x")
    (tmp_path / "shared").mkdir()
    with Directory.trusted(str(tmp_path)) as directory:
        before = descriptors()

        with pytest.raises(OSError, match="no status"), without_status():
            OPENERS[opener](directory)

        assert descriptors() == before


def test_a_snapshots_file_without_a_status_is_closed(tmp_path: Path) -> None:
    directory = SnapshotDir(str(tmp_path), REF, 1)
    write(Path(directory.file(MEMORY)), b"memory")
    before = descriptors()

    with pytest.raises(OSError, match="no status"), without_status():
        unname_dir(directory)

    assert descriptors() == before


def test_a_memory_file_is_closed_by_the_freer_that_has_ended(tmp_path: Path) -> None:
    freer = MemoryFreer()
    freer.close()
    memory = os.open(write(tmp_path / "memory", b"memory"), os.O_RDWR)

    with pytest.raises(RuntimeError):
        freer.free(memory)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(memory)


def test_a_descriptor_that_became_another_file_is_not_duplicated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def socket_always(_: int) -> bool:
        return True

    with open(write(tmp_path / "file", b"x"), "rb") as file:
        number = file.fileno()
        before = descriptors()

        with pytest.raises(OSError, match="non-socket"):
            libnftables.duplicate_of_one({number})
        monkeypatch.setattr(stat, "S_ISSOCK", socket_always)
        assert number not in libnftables.netfilter_sockets()

        assert descriptors() == before


async def test_a_program_that_cannot_be_watched_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, "no descriptor left")

    monkeypatch.setattr(os, "pidfd_open", none_left)
    output = os.memfd_create("output")
    before = descriptors()
    program = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]

    with pytest.raises(OSError, match="no descriptor left"):
        await spawn.run(program, output)

    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert descriptors() == before
    os.close(output)
