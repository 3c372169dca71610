"""hostd's mark on a data disk: an extended attribute that only a privileged process can set.

It binds the file to its instance by inode number, so that a copy, or the disk of another instance
renamed to this place, carries no valid mark. `new` means that hostd created the file and no jail
has used it yet: that distinguishes a disk whose creation was interrupted from one put back later.

Source: xattr(7), trusted extended attributes.
"""

import errno
import os

import msgspec

from handlers.errors import Invalid, of_os_error
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
    """Mark an open file as the data disk of an instance, replacing an earlier mark.

    Needs: CAP_SYS_ADMIN, and a file system with `trusted.` attributes (ext4, XFS, btrfs).

    Raises:
        HostFault: the file system has no such attributes.
    """
    mark = DiskMark(str(ref), os.fstat(fd).st_ino, new)
    try:
        os.setxattr(fd, ATTRIBUTE, msgspec.json.encode(mark))
    except OSError as error:
        raise of_os_error(error, f"cannot mark the data disk of {ref}") from error


def read_mark(fd: int) -> DiskMark | None:
    """The mark of an open file; None if there is none, or it is for another inode."""
    try:
        data = os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise of_os_error(error, "cannot read the mark of a data disk") from error
    try:
        mark = msgspec.json.decode(data, type=DiskMark)
        parse_ref(mark.ref)
    except (msgspec.MsgspecError, DecodeError):
        return None
    return mark if mark.ino == os.fstat(fd).st_ino else None


def check_mark(fd: int, ref: InstanceRef, path: str) -> DiskMark:
    """Return the mark that says that hostd created this file as the disk of this instance.

    Raises:
        Invalid: there is no mark, or it is for another instance.
    """
    mark = read_mark(fd)
    if mark is None or mark.ref != str(ref):
        found = f"is marked for {mark.ref}" if mark else "has no mark"
        raise Invalid(
            f"{path} was not created by hostd for {ref}: it {found} (see docs/operations.md)",
            path=path,
        )
    return mark
