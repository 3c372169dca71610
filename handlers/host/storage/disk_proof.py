"""What can be proved of a data disk that no record names: before `adopt` takes it over.

The directory is agentd's, which can put any file there, also the disk of another instance. What it
cannot do: own a file as root, and set a `trusted.` attribute. So owner and mark prove most; the
label is the guest's to change and proves nothing alone. All of it is read from one descriptor.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Collection

from handlers.claims.facts import DiskProof, Fact
from handlers.errors import of_os_error
from handlers.host.linux.file_id import FileId
from handlers.host.linux.openat2 import MARK, NO_MARK
from handlers.host.linux.procfs import list_pids
from handlers.host.storage.disk_ownership import DiskMark, described, identity_of, parse_mark
from handlers.specs import MIB
from schemas.requests import InstanceRef

SUPERBLOCK, SUPERBLOCK_BYTES = 1024, 1024
MAGIC, MAGIC_AT, LABEL_AT, LABEL_BYTES = b"\x53\xef", 56, 120, 16  # little endian 0xEF53


def prove_disk(
    fd: int,
    ref: InstanceRef,
    path: str,
    *,
    owners: Collection[int],
    links: int,
    label: str,
    used_by: int | None,
) -> DiskProof:
    """Look at an open data disk; changes nothing. Every fact but inode and label is required.

    Args:
        fd: opened beneath the tenant's directory without following a symlink, a regular file.
        owners: uids that it may belong to: root at rest, a jail's uid while that uses it.
        links: how many hard links it may have, those in the instance's own jails included.
        used_by: the one process that may have it open; None: nobody may.

    Source: xattr(7), fcntl(2) F_SETLEASE, proc_pid_fd(5), ext4's struct ext4_super_block.
    Needs: CAP_SYS_ADMIN for the mark, CAP_SYS_PTRACE and CAP_LEASE for who has it open.
    """
    found = os.fstat(fd)
    mark = _raw_mark(fd)
    name = "no label" if (read := read_label(fd)) is None else f"label {read!r}"
    return DiskProof(
        facts=(
            Fact("file", True, f"{path}: a regular file, {described(identity_of(found))}"),
            _is(
                "links", found.st_nlink <= links, f"{found.st_nlink} hard links", f"at most {links}"
            ),
            _is(
                "owner",
                found.st_uid in owners,
                f"uid {found.st_uid}",
                " or ".join(map(str, sorted(owners))),
            ),
            _is(
                "mark",
                mark is not None and mark.ref == str(ref),
                "no mark of hostd's" if mark is None else f"marked for {mark.ref}",
                f"marked for {ref}",
            ),
            _inode(mark, found.st_ino),
            _is(
                "size",
                found.st_size > 0 and found.st_size % MIB == 0,
                f"{found.st_size} bytes",
                "whole MiB",
            ),
            _is("label", read == label, name, f"label {label!r}", required=False),
            _use(fd, used_by),
        ),
        identity=identity_of(found),
    )


def read_label(fd: int) -> str | None:
    """The label of an ext4 file system; None if it is none."""
    block = os.pread(fd, SUPERBLOCK_BYTES, SUPERBLOCK)
    if block[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        return None
    label = block[LABEL_AT : LABEL_AT + LABEL_BYTES]
    return label.rstrip(b"\0").decode("ascii", "backslashreplace")


def openers(fd: int) -> list[int]:
    """The other processes that have the file open. Those that end meanwhile are left out."""
    wanted = FileId.of(os.fstat(fd))
    return sorted(pid for pid in list_pids() if pid != os.getpid() and _has_open(pid, wanted))


def _is(name: str, proven: bool, found: str, expected: str, *, required: bool = True) -> Fact:
    return Fact(name, proven, found if proven else f"{found}, expected {expected}", required)


def _inode(mark: DiskMark | None, ino: int) -> Fact:
    """A copy that a privileged process made, e.g. out of a backup, carries the mark of another."""
    if mark is None:
        return Fact("inode", False, f"inode {ino}, no mark to compare with", required=False)
    return _is("inode", mark.ino == ino, f"inode {ino}", f"inode {mark.ino}", required=False)


def _use(fd: int, used_by: int | None) -> Fact:
    """A write lease is given only if nobody else has the file open, the kernel included."""
    allowed = "nobody" if used_by is None else f"process {used_by}"
    others = [pid for pid in openers(fd) if pid != used_by]
    if others:
        names = ", ".join(map(str, others[:8]))
        return Fact("use", False, f"open by process {names}, expected {allowed}")
    if used_by is None:
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                what = "open in the kernel, e.g. by a loop device or a mount (see losetup -j)"
                return Fact("use", False, f"{what}, expected {allowed}")
            # No leases on this file system, or no CAP_LEASE: only /proc is left to say it.
    return Fact("use", True, f"open by {allowed}")


def _raw_mark(fd: int) -> DiskMark | None:
    """The mark, also if it is for another inode."""
    try:
        return parse_mark(os.getxattr(fd, MARK))
    except OSError as error:
        if error.errno in NO_MARK:
            return None
        raise of_os_error(error, "cannot read the mark of a data disk") from error


def _has_open(pid: int, wanted: FileId) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # it has ended, or is of another user namespace
        return False
    for name in names:
        with contextlib.suppress(OSError):  # e.g. of a file system that is gone
            if FileId.at(f"/proc/{pid}/fd/{name}") == wanted:
                return True
    return False
