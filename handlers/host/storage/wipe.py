"""Wiping a data disk, and verifying as much of it as can be verified.

What is guaranteed: every block that held data is overwritten with zeros through the file and
synced, the zeros are read back from the device, then all blocks are freed (where the file
system is mounted with `discard`, also on the device) and the file is checked to have none.

What is not: on a copy-on-write file system (btrfs, XFS after a reflink) the zeros go to new blocks,
and the old ones are only freed; a device may keep what it remapped. There only encryption helps.
"""

import os

from handlers.errors import HostFault
from handlers.host.linux.sparse_copy import CHUNK_BYTES, Check, data_ranges, synced_often
from handlers.host.linux.syscalls import punch_hole

ZEROS = bytes(CHUNK_BYTES)


def wipe(fd: int, *, check: Check = lambda: None) -> None:
    """Overwrite all data of an open file with zeros, check, and free its blocks. Its size stays.

    `check` is called between chunks and may raise to stop; a repeated wipe starts over.

    Source: lseek(2) SEEK_DATA, posix_fadvise(2), fallocate(2).

    Raises:
        HostFault: the data did not read back as zeros.
    """
    size = os.fstat(fd).st_size
    ranges = list(data_ranges(fd, size))
    written = synced_often(fd)
    for start, end in ranges:
        for at in range(start, end, CHUNK_BYTES):
            check()
            written(os.pwrite(fd, memoryview(ZEROS)[: min(CHUNK_BYTES, end - at)], at))
    os.fsync(fd)
    for start, end in ranges:
        # Out of the page cache first, so that the reading is from the device.
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
        for at in range(start, end, CHUNK_BYTES):
            check()
            read = os.pread(fd, min(CHUNK_BYTES, end - at), at)
            if read != ZEROS[: len(read)] or not read:
                raise HostFault(f"wipe read-back mismatch: not zeros at offset {at}")
    if size:
        punch_hole(fd, 0, size)
    os.fsync(fd)


def is_empty(fd: int) -> bool:
    """Whether an open file holds no block of data."""
    return not list(data_ranges(fd, os.fstat(fd).st_size))


def discard(fd: int) -> None:
    """Give back all blocks of an open file at once, whoever else still has it open."""
    size = os.fstat(fd).st_size
    if size:
        punch_hole(fd, 0, size)
