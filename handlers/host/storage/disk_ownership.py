"""hostd's mark on a data disk: an extended attribute that only a privileged process can set.

It binds the file to its instance by inode number, so that a copy, or the disk of another instance
renamed to this place, carries no valid mark. `new` means that hostd created the file and no jail
has used it yet: that distinguishes a disk whose creation was interrupted from one put back later.

Source: xattr(7), trusted extended attributes.
"""

import os

import msgspec

from handlers.errors import Invalid, of_os_error
from handlers.host.linux.openat2 import MARK, NO_MARK
from schemas.decode_error import DecodeError
from schemas.naming import parse_ref
from schemas.records import DiskIdentity
from schemas.requests import InstanceRef


class DiskMark(msgspec.Struct, frozen=True):
    ref: str
    ino: int
    new: bool


def identity_of(found: os.stat_result) -> DiskIdentity:
    return DiskIdentity(dev=found.st_dev, ino=found.st_ino, size_bytes=found.st_size)


def described(identity: DiskIdentity) -> str:
    """For messages: what `stat` prints as device, inode and size."""
    return f"device {identity.dev} inode {identity.ino}, {identity.size_bytes} bytes"


def check_identity(fd: int, known: DiskIdentity, path: str, *, marked: bool = False) -> None:
    """Check that the open file has the recorded device, inode and size.

    To be called on the descriptor that is then linked, written or wiped: agentd can exchange the
    name at any moment. With the mark the device number may differ, since a reboot can change it:
    the mark is bound to the inode, and a copy does not carry it.

    Raises:
        Invalid: it is another file.
    """
    found = identity_of(os.fstat(fd))
    same_inode = (found.ino, found.size_bytes) == (known.ino, known.size_bytes)
    if found != known and not (marked and same_inode):
        raise Invalid(
            f"{path}: inode mismatch: expected {described(known)}, found {described(found)};"
            " move the recorded disk back (see docs/operations.md)",
            path=path,
        )


def write_mark(fd: int, ref: InstanceRef, *, new: bool) -> None:
    """Mark an open file as the data disk of an instance, replacing an earlier mark.

    Needs: CAP_SYS_ADMIN, and a file system with `trusted.` attributes (ext4, XFS, btrfs).

    Raises:
        HostFault: the file system has no such attributes.
    """
    mark = DiskMark(str(ref), os.fstat(fd).st_ino, new)
    try:
        os.setxattr(fd, MARK, msgspec.json.encode(mark))
    except OSError as error:
        raise of_os_error(error, f"cannot mark the data disk of {ref}") from error


def read_mark(fd: int) -> DiskMark | None:
    """The mark of an open file; None if there is none, or it is for another inode."""
    try:
        data = os.getxattr(fd, MARK)
    except OSError as error:
        if error.errno in NO_MARK:
            return None
        raise of_os_error(error, "cannot read the mark of a data disk") from error
    mark = parse_mark(data)
    return mark if mark is not None and mark.ino == os.fstat(fd).st_ino else None


def parse_mark(data: bytes) -> DiskMark | None:
    """The mark in the bytes of the attribute; None if they are none."""
    try:
        mark = msgspec.json.decode(data, type=DiskMark)
        parse_ref(mark.ref)
    except (ValueError, RecursionError, DecodeError):
        return None
    return mark


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
