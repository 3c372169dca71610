"""Copies of large, mostly empty files, and their checksums."""

import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator

from handlers.host.linux.syscalls import reflink

CANNOT_SHARE = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM}
)
CANNOT_COPY_THERE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
CHUNK_BYTES = 1 << 20
COPY_BYTES = 16 << 20
SYNC_BYTES = 256 << 20
ZEROS = memoryview(bytes(CHUNK_BYTES))
Check = Callable[[], None]
Copied = Callable[[int], None]


def copy_sparse(
    source: int,
    target: int,
    *,
    check: Check = lambda: None,
    copied: Copied = lambda size_bytes: None,
) -> None:
    """Make the empty file `target` equal to `source`, sharing blocks if the file system can.

    Holes stay holes, and cost no time whatever their size: a plain copy_file_range over the whole
    file would fill them on ext4. No more than the size at the start is copied.

    `check` is called between chunks, `copied` after each with its size; both may raise to end it.

    Source: ioctl_ficlone(2), lseek(2) SEEK_DATA, copy_file_range(2).
    """
    try:
        reflink(target, source)
        return
    except OSError as error:
        if error.errno not in CANNOT_SHARE:
            raise
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    written = synced_often(target)
    for start, end in data_ranges(source, size):
        for done in _copy_range(source, target, start, end, check):
            copied(done)
            written(done)


def synced_often(fd: int) -> Copied:
    """A function to call with the size of each write to the file: it syncs each SYNC_BYTES.

    One fsync at the end could have as much to write as the kernel keeps dirty, a fifth of the
    memory; that takes minutes on a slow disk, without a sign that it goes on.

    Source: vm.dirty_ratio in the kernel's Documentation/admin-guide/sysctl/vm.rst.
    """
    unsynced = 0

    def written(size_bytes: int) -> None:
        nonlocal unsynced
        unsynced += size_bytes
        if unsynced >= SYNC_BYTES:
            os.fdatasync(fd)
            unsynced = 0

    return written


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes, as (start, end) byte offsets."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole until the end
                return
            raise
        if start >= size:  # the file has grown
            return
        try:
            end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # truncated meanwhile
                return
            raise
        yield start, end


def sha256_of(fd: int, *, check: Check = lambda: None) -> str:
    """Hex sha256 of a whole file, a chunk at a time; `check` may raise between two to end it.

    Holes are hashed as the zeros that they read as, without reading them.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    size = os.fstat(fd).st_size
    at = 0
    for start, end in itertools.chain(data_ranges(fd, size), [(size, size)]):
        while at < start:
            check()
            length = min(start - at, CHUNK_BYTES)
            digest.update(ZEROS[:length])
            at += length
        while at < end and (got := os.preadv(fd, [buffer[: min(CHUNK_BYTES, end - at)]], at)):
            check()
            digest.update(buffer[:got])
            at += got
    return digest.hexdigest()


def _copy_range(source: int, target: int, start: int, end: int, check: Check) -> Iterator[int]:
    """The sizes of the pieces, each after it was copied."""
    while start < end:
        check()
        try:
            done = os.copy_file_range(source, target, min(end - start, COPY_BYTES), start, start)
        except OSError as error:
            if error.errno not in CANNOT_COPY_THERE:
                raise
            done = os.pwrite(target, os.pread(source, min(end - start, CHUNK_BYTES), start), start)
        if not done:  # the source was truncated meanwhile; the caller compares the sizes
            return
        yield done
        start += done
