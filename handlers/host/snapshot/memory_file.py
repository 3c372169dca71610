"""Which memory file belongs to a snapshot, and whether it still is as it was.

Firecracker's memory file has no checksum; a partial one resumes garbage. Its identity is recorded
when it is sealed; its hash is computed later, in the background, and bound to that identity. A file
with another identity is accepted only after its hash has been compared.
"""

import os
import threading

import msgspec

from handlers.errors import HostFault
from handlers.host.linux.checksummed_json import read_sealed, write_sealed
from handlers.host.linux.sparse_copy import Check, sha256_of
from handlers.host.snapshot.manifest import MEMORY_FACTS, SnapshotDir
from handlers.jail_names import MEMORY


class _Stopped(Exception):
    """The hash is not wanted any more."""


class MemoryFacts(msgspec.Struct, frozen=True):
    """`memory.json`. `linked`: hostd has hard-linked the file into a jail, or was about to, which
    changes its ctime; until it has one hard link again, the ctime is not compared.
    """

    dev: int
    ino: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    sha256: str | None = None
    linked: bool = msgspec.field(default=False, name="loose")

    @classmethod
    def of(cls, found: os.stat_result, *, sha256: str | None = None) -> "MemoryFacts":
        return cls(
            dev=found.st_dev,
            ino=found.st_ino,
            size_bytes=found.st_size,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            sha256=sha256,
        )

    def fits(self, found: os.stat_result) -> bool:
        """Whether the file is, by its identity, the one noted."""
        content = (self.dev, self.ino, self.size_bytes, self.mtime_ns) == (
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
        )
        return content and (self.linked or self.ctime_ns == found.st_ctime_ns)


class Memories:
    """The memory files of snapshots. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def record(self, directory: SnapshotDir, fd: int) -> None:
        """Note the identity of a memory file just sealed; the caller syncs the directory."""
        with self._lock:
            self._write(directory, MemoryFacts.of(os.fstat(fd)))

    def mark_linked(self, directory: SnapshotDir) -> None:
        """Before a link or chown of hostd's own; durable, for a crash may come right after it."""
        with self._lock:
            facts = self._read(directory)
            if not facts.linked:
                self._write(directory, msgspec.structs.replace(facts, linked=True))

    def restore_ownership(self, directory: SnapshotDir) -> None:
        """Give a memory file back to root; record its identity once it has one hard link again."""
        with self._lock:
            facts = self._read(directory)
            fd = _open(directory)
            try:
                if facts.linked and facts.fits(os.fstat(fd)):
                    _to_root(fd)
                    found = os.fstat(fd)
                    if found.st_nlink == 1:
                        self._write(directory, MemoryFacts.of(found, sha256=facts.sha256))
            finally:
                os.close(fd)

    def verify(self, directory: SnapshotDir, size_bytes: int) -> None:
        """Raises HostFault unless the memory file is, or is proved to be, what was sealed."""
        facts = self._read(directory)
        if facts.linked:
            self.restore_ownership(directory)
            facts = self._read(directory)
        path = directory.file(MEMORY)
        fd = _open(directory)
        try:
            found = os.fstat(fd)
            if found.st_size != size_bytes:
                raise HostFault(
                    f"{path}: expected {size_bytes} bytes, found {found.st_size}", path=path
                )
            if facts.fits(found):
                return
            if facts.sha256 is None:
                raise _touched(directory)
            if sha256_of(fd) != facts.sha256:
                raise HostFault(
                    f"{path}: sha256 mismatch: not the memory that was saved", path=path
                )
            _to_root(fd)
            with self._lock:
                self._write(directory, MemoryFacts.of(os.fstat(fd), sha256=facts.sha256))
        finally:
            os.close(fd)

    def is_hashed(self, directory: SnapshotDir) -> bool:
        """Raises HostFault if the note of the memory file is missing or damaged."""
        return self._read(directory).sha256 is not None

    def hash(self, directory: SnapshotDir, stop: threading.Event) -> str | None:
        """Take and note the hash; None if the file went away meanwhile, or `stop` was set.

        Raises:
            HostFault: the file is not the one that was sealed, or was changed while it was read.
        """

        def check() -> None:
            if stop.is_set() or not directory.published:
                raise _Stopped

        try:
            return self._hash(directory, check)
        except _Stopped:
            return None
        except HostFault:
            if directory.published:
                raise
            return None

    def _hash(self, directory: SnapshotDir, check: Check) -> str:
        before = self._read(directory)
        if before.sha256 is not None:
            return before.sha256
        fd = _open(directory)
        try:
            if not before.fits(os.fstat(fd)):
                raise _touched(directory)
            digest = sha256_of(fd, check=check)
            with self._lock:
                after = self._read(directory)
                # A wake may have linked the file meanwhile: its ctime moved, its content did not.
                if not after.fits(os.fstat(fd)) or after.mtime_ns != before.mtime_ns:
                    raise _touched(directory)
                self._write(directory, msgspec.structs.replace(after, sha256=digest))
            return digest
        finally:
            os.close(fd)

    def _read(self, directory: SnapshotDir) -> MemoryFacts:
        path = directory.file(MEMORY_FACTS)
        facts = read_sealed(path, MemoryFacts)
        if facts is None:
            raise HostFault(f"snapshot file {path} is missing", path=path)
        return facts

    def _write(self, directory: SnapshotDir, facts: MemoryFacts) -> None:
        write_sealed(directory.file(MEMORY_FACTS), facts)


def _open(directory: SnapshotDir) -> int:
    path = directory.file(MEMORY)
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostFault(f"snapshot file {path} is missing", path=path) from error


def _touched(directory: SnapshotDir) -> HostFault:
    path = directory.file(MEMORY)
    return HostFault(f"{path} was modified before it was hashed", path=path)


def _to_root(fd: int) -> None:
    """Only if it is not so already: each change moves the ctime."""
    found = os.fstat(fd)
    if (found.st_uid, found.st_gid) != (0, 0):
        os.fchown(fd, 0, 0)
    if found.st_mode & 0o777 != 0o600:
        os.fchmod(fd, 0o600)
