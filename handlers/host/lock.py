"""One worker per host: a lock on a file in the run directory, held while the worker lives.

Source: flock(2); the kernel releases it with the process, also after kill -9.
"""

import fcntl
import os
from types import TracebackType
from typing import Self

from handlers.errors import Conflict


class HostLock:
    """Held inside the `with`. The file remains; without the lock it has no meaning."""

    def __init__(self, run: str) -> None:
        self._path = f"{run}/hostd.lock"
        self._fd = -1

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            Conflict: another worker on this host holds it; names its pid.
        """
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise Conflict(
                f"cannot lock {self._path}: another worker runs on this host, pid {holder}; "
                "stop it first"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
