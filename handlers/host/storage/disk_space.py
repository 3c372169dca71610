"""The file system of hostd's state: what is free, what a tenant uses, and the ballast.

All of hostd's files and all data disks are on one file system (`worker/preflight.py`). If somebody
fills it all the same, the ballast file is deleted: its space is for the journal, and for the
commands that give space back. It is made again once there is enough room.
"""

import contextlib
import os
import threading
from collections.abc import Generator, Iterator

import structlog

from handlers.host.linux.file_threads import run_in_thread
from handlers.host.storage.artifacts import PART
from handlers.specs import MIB, DiskUsage
from schemas.requests import InstanceRef

BALLAST = "ballast"
BALLAST_MAX_MIB = 64
BLOCK_BYTES = 512  # of `st_blocks`
PERCENT = 100.0

log = structlog.get_logger()


class DiskSpace:
    """Thread-safe: the journal's thread releases the ballast, the event loop reads `low`.

    Args:
        state: `[paths] state`.
        reserve_mib: `[limits] disk_reserve_mib`; the ballast is half of it, at most 64 MiB.
        marks: the high and the low watermark, in percent of the file system used; a high one of 100
            is never passed.
    """

    def __init__(
        self, *, state: str, reserve_mib: int, marks: tuple[float, float] = (100.0, 100.0)
    ) -> None:
        self.path = state
        self._ballast = f"{state}/{BALLAST}"
        self._ballast_bytes = min(BALLAST_MAX_MIB * MIB, reserve_mib * MIB // 2)
        self._reserve_bytes = reserve_mib * MIB
        self._lock = threading.Lock()
        self._held = False
        self._high_mark, self._low_mark = marks
        self._high = False

    @property
    def low(self) -> bool:
        """Whether the ballast is released: the file system is, or was, full."""
        return self._ballast_bytes > 0 and not self._held

    def free_bytes(self) -> int:
        """What is free, the ballast included. Source: statvfs(3)."""
        found = os.statvfs(self.path)
        ballast = self._ballast_bytes if self._held else 0
        return found.f_bavail * found.f_frsize + ballast

    @property
    def high(self) -> bool:
        """Whether it is above its high watermark, or was and is not below the low one yet: as of
        the last `check`."""
        return self._high

    def usage_bytes(self) -> tuple[int, int]:
        """What is used, and the size, as df(1) has them, the ballast counted as free."""
        found = os.statvfs(self.path)
        ballast = self._ballast_bytes if self._held else 0
        used = (found.f_blocks - found.f_bfree) * found.f_frsize - ballast
        return used, used + found.f_bavail * found.f_frsize + ballast

    def used_percent(self) -> float:
        """How much of it is used, as df(1) has it."""
        used, size = self.usage_bytes()
        return PERCENT * used / max(1, size)

    async def usage(self, tenant_id: str, *, without: InstanceRef | None = None) -> DiskUsage:
        """What the tenant's artifacts, snapshots and logs take up below `<state>`.

        The snapshots of the instance `without` are left out.
        """

        def measure() -> DiskUsage:
            skipped = "" if without is None else f"{self.path}/snapshots/{without}"
            return DiskUsage(
                artifacts_bytes=_allocated(f"{self.path}/artifacts/{tenant_id}"),
                snapshots_bytes=_allocated(f"{self.path}/snapshots/{tenant_id}", skipped),
                logs_bytes=_allocated(f"{self.path}/logs/{tenant_id}"),
            )

        return await run_in_thread(measure)

    # -- ballast -------------------------------------------------------------------------------

    def check(self) -> None:
        """Release the ballast if the file system is full, make it again if there is room; compare
        with the watermarks.

        Never raises: a host without a ballast is `low`.
        """
        with self._lock, _logged():
            if self.low and self._exists():
                self._held = True
            free_bytes = self.free_bytes()
            if self._held and free_bytes < self._ballast_bytes + self._ballast_bytes // 16:
                self._release(free_bytes)
            elif self.low and free_bytes >= self._reserve_bytes:
                self._make()
            if self._high_mark < PERCENT:
                mark = self._low_mark if self._high else self._high_mark
                self._high = self.used_percent() > mark

    def relieve(self, *, full: bool) -> None:
        """Release the ballast if a write has failed with ENOSPC (`full`), or nothing is free.

        Never raises.
        """
        if not full:
            self.check()
            return
        with self._lock, _logged():
            if self._held:
                self._release(self.free_bytes())

    def _exists(self) -> bool:
        """Whether an earlier worker's ballast is whole."""
        try:
            found = os.stat(self._ballast, follow_symlinks=False)
        except OSError:
            return False
        return found.st_blocks * BLOCK_BYTES >= self._ballast_bytes

    def _make(self) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._ballast, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._ballast_bytes)
                os.ftruncate(fd, self._ballast_bytes)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            log.warning("disk.ballast_failed", path=self._ballast, error=str(error))
            with contextlib.suppress(OSError):
                os.unlink(self._ballast)
            return
        self._held = True
        log.info("disk.ballast_made", path=self._ballast, size_bytes=self._ballast_bytes)

    def _release(self, free_bytes: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._ballast)
        self._held = False
        log.error("disk.ballast_released", path=self._ballast, free_bytes=free_bytes)


@contextlib.contextmanager
def _logged() -> Generator[None, None, None]:
    """The journal's thread must not end because the file system fails."""
    try:
        yield
    except OSError as error:
        log.warning("disk.check_failed", error=str(error))


def _allocated(directory: str, skipped: str = "") -> int:
    """The space that the files below a directory take up; imports in progress are not counted."""
    return sum(
        found.st_blocks * BLOCK_BYTES for found in _files(directory, skipped) if found.st_blocks
    )


def _files(directory: str, skipped: str) -> Iterator[os.stat_result]:
    try:
        entries = list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.path == skipped or entry.name.endswith(PART):
            continue
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, skipped)
            else:
                yield entry.stat(follow_symlinks=False)
