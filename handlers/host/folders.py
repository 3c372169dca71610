"""inotify on one folder, so that a launch waits for the jailer's files without polling for them."""

import asyncio
import ctypes
import os
from types import TracebackType
from typing import Self

from handlers.host.errnos import os_failure

IN_CREATE = 0x100
IN_CLOSE_WRITE = 0x8
IN_ONLYDIR = 0x0100_0000
IN_DONT_FOLLOW = 0x0200_0000

_libc = ctypes.CDLL(None, use_errno=True)


class FolderWatch:
    """Tells that something was made in a folder, or written and closed; not what.

    Events from before a `changed` count: look at the folder first, then wait, and nothing is lost.
    Source: inotify(7). The kernel watches the inode, so a chroot or another mount of the same
    folder makes no difference.

    Raises:
        Exhausted: `fs.inotify.max_user_instances` is used up.
    """

    def __init__(self, path: str) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise os_failure(_last_error(), "cannot make an inotify instance")
        mask = IN_CREATE | IN_CLOSE_WRITE | IN_ONLYDIR | IN_DONT_FOLLOW
        if _libc.inotify_add_watch(self._fd, os.fsencode(path), mask) < 0:
            error = _last_error()
            self.close()
            raise os_failure(error, f"cannot watch {path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    async def changed(self, timeout_s: float) -> bool:
        """Wait for the next change; false when the time is up first."""
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        loop.add_reader(self._fd, event.set)
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._fd)
        os.read(self._fd, 65536)
        return True


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
