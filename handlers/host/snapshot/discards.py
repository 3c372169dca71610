"""Deletion of snapshots: first they are no snapshots any more, then without names, then of blocks.

A memory file whose last name is gone belongs to its descriptor alone: its blocks are freed by
whoever closes that, also if the worker is killed, and after a power loss when the file system is
mounted. So a caller need not wait for it (ADR 0942).
"""

import contextlib
import os
import stat
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from handlers.host.linux.rmtree import remove_path
from handlers.host.linux.state_dirs import sync_dir
from handlers.host.snapshot.manifest import MANIFEST, MEMORY_FACTS, UNPUBLISHED, SnapshotDir
from handlers.host.storage import wipe
from handlers.jail_names import MEMORY

FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def discard_dir(directory: SnapshotDir) -> None:
    """Unpublish first, so that half of it is never taken for one; then free the blocks, unlink."""
    memory = unname_dir(directory)
    if memory is not None:
        _free(memory)


def unname_dir(directory: SnapshotDir) -> int | None:
    """As `discard_dir`, except for the blocks of the memory: returns its descriptor, for the caller
    to free and close, or None.

    Blocks of a memory file that a jail still links are left alone: a running VM may be reading its
    memory from there. They are freed with the jail.
    """
    if not os.path.isdir(directory.path):
        return None
    for name in (MANIFEST, UNPUBLISHED, MEMORY_FACTS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory.file(name))
    sync_dir(directory.path)
    memory: int | None = None
    with contextlib.ExitStack() as unless_done:
        for name in os.listdir(directory.path):
            with (
                contextlib.suppress(FileNotFoundError, IsADirectoryError),
                contextlib.ExitStack() as opened,
            ):
                fd = os.open(directory.file(name), FILE)
                opened.callback(os.close, fd)
                found = os.fstat(fd)
                if not (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
                    continue
                if name == MEMORY:
                    memory = fd
                    unless_done.push(opened.pop_all())
                else:
                    wipe.discard(fd)
        remove_path(directory.path)
        unless_done.pop_all()
    return memory


def _free(fd: int) -> None:
    try:
        wipe.discard(fd)
    finally:
        os.close(fd)


class MemoryFreer:
    """Frees the blocks of memory files without names, one at a time, at the lowest priority."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "free-memory", initializer=be_nice)

    def free(self, fd: int) -> Future[None]:
        """Takes the descriptor over, also if it raises: the thread was ended."""
        try:
            return self._thread.submit(_free, fd)
        except RuntimeError:
            os.close(fd)
            raise

    def close(self) -> None:
        """What waits is freed by the end of the process."""
        self._thread.shutdown(cancel_futures=True)


def be_nice() -> None:
    """The lowest priority, of this thread alone. Source: setpriority(2), NPTL note."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
