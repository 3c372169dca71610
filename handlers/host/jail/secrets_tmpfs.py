"""The secrets drive of a jail: an image on a small tmpfs, so that it never reaches a disk."""

import contextlib
import errno
import os
from collections.abc import Generator

from handlers.host.linux.syscalls import mount_tmpfs, unmount
from handlers.host.storage.drive_images import SECRETS
from handlers.jail_names import SECRETS_DRIVE

TMPFS_BYTES = SECRETS.size_bytes + (1 << 20)
TMPFS_INODES = 8
NOTHING_MOUNTED = frozenset({errno.EINVAL, errno.ENOENT, errno.ENOTDIR})


@contextlib.contextmanager
def new_drive(directory: str, uid: int, *, mounted: bool = False) -> Generator[int, None, None]:
    """Mount the tmpfs on a new directory; yield an empty image file, given to the uid at the end.

    `mounted`: the empty tmpfs is there already. Needs: CAP_SYS_ADMIN.
    """
    if not mounted:
        mount_empty(directory, uid)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(f"{directory}/{SECRETS_DRIVE}", flags, 0o400)
    try:
        yield fd
        os.fchown(fd, uid, uid)
    finally:
        os.close(fd)


def mount_empty(directory: str, uid: int) -> None:
    """Mount the tmpfs on a new directory. Needs: CAP_SYS_ADMIN."""
    os.mkdir(directory, 0o700)
    mount_tmpfs(directory, size_bytes=TMPFS_BYTES, inodes=TMPFS_INODES, uid=uid)


def unmount_secrets(directory: str) -> None:
    """Unmount the secrets, every mount of them; nothing mounted there is success."""
    while True:
        try:
            unmount(directory)
        except OSError as error:
            if error.errno in NOTHING_MOUNTED:
                return
            if error.errno != errno.EBUSY:
                raise
            unmount(directory, detach=True)
