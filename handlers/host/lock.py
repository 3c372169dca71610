"""One worker per host: locks on what a worker owns, held while it lives.

Locked are a file in the run directory, the state directory (with the journal and the snapshots) and
the jail base: two workers that share any of them would undo each other's work. The journal's file
is not locked itself: closing a descriptor of it would drop the locks that SQLite has on it.

Source: flock(2), by inode, so also through a bind mount; the kernel releases it with the process,
also after kill -9. proc_locks(5).
"""

import contextlib
import fcntl
import os
from types import TracebackType
from typing import Self

from handlers.errors import Conflict
from handlers.host.linux import procfs

FILE = "hostd.lock"


class HostLock:
    """Held inside the `with`. What is locked remains; without the lock it has no meaning.

    Args:
        run: the run directory; a file in it is locked, and has the pid.
        owned: further directories that only one worker may use.
    """

    def __init__(self, run: str, *owned: str) -> None:
        self._run = run
        self._owned = owned
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Take the locks.

        Raises:
            Conflict: another worker holds one of them; names the path and the pid.
        """
        with contextlib.ExitStack() as taken:
            file = self._lock(taken, f"{self._run}/{FILE}", os.O_RDWR | os.O_CREAT)
            seen: set[tuple[int, int]] = set()
            for directory in self._owned:
                found = os.stat(directory)
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    self._lock(taken, directory, os.O_RDONLY | os.O_DIRECTORY)
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            self._held = taken.pop_all()
        return self

    def _lock(self, taken: contextlib.ExitStack, path: str, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        taken.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"cannot lock {path}: another worker uses it, pid {_holder(fd)}; stop it first, or "
                "give each worker its own [paths] state, [paths] run and [vmm] jail_base"
            ) from error
        return fd

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()


def _holder(fd: int) -> str:
    """The pid that holds the flock on this file, or `unknown` (in another pid namespace)."""
    inode = str(os.fstat(fd).st_ino)
    for line in procfs.read_text("/proc/locks").splitlines():
        fields = line.split()  # 1: FLOCK ADVISORY WRITE 1234 08:01:131090 0 EOF
        if fields[1:2] == ["FLOCK"] and fields[5].rpartition(":")[2] == inode and fields[4] != "0":
            return fields[4]
    return "unknown"
