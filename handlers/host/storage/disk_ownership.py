"""hostd's mark on a data disk: an extended attribute that nobody unprivileged can set or move.

It binds the file to its instance by inode number, so that a copy, or the disk of another instance
renamed to this place, carries no valid mark. `new` says that hostd made the file but no jail has
used it yet: that tells a disk whose creation was cut short from one that somebody put back.
"""

import errno
import os

import msgspec

from handlers.errors import Invalid
from handlers.host.linux.errnos import os_failure
from schemas.decode_error import DecodeError
from schemas.naming import parse_ref
from schemas.requests import InstanceRef

ATTRIBUTE = "trusted.hostd.disk"
ABSENT = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


class DiskMark(msgspec.Struct, frozen=True):
    ref: str
    ino: int
    new: bool


def write_mark(fd: int, ref: InstanceRef, *, new: bool) -> None:
    """Needs: CAP_SYS_ADMIN, and a file system with `trusted.` attributes (ext4, XFS, btrfs).

    Raises:
        HostFault: the file system has none.
    """
    mark = DiskMark(str(ref), os.fstat(fd).st_ino, new)
    try:
        os.setxattr(fd, ATTRIBUTE, msgspec.json.encode(mark))
    except OSError as error:
        raise os_failure(error, f"cannot mark the data disk of {ref}") from error


def read_mark(fd: int) -> DiskMark | None:
    """The mark of an open file if it is one for this inode, else None."""
    try:
        data = os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise os_failure(error, "cannot read the mark of a data disk") from error
    try:
        mark = msgspec.json.decode(data, type=DiskMark)
        parse_ref(mark.ref)
    except (msgspec.MsgspecError, DecodeError):
        return None
    return mark if mark.ino == os.fstat(fd).st_ino else None


def check_mark(fd: int, ref: InstanceRef, path: str) -> DiskMark:
    """Raises Invalid if hostd did not make, or adopt, this file as the disk of this instance."""
    mark = read_mark(fd)
    if mark is None or mark.ref != str(ref):
        raise Invalid(f"{path} is no data disk that hostd made for {ref}", path=path)
    return mark
