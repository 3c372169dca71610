"""System calls that Python's standard library does not offer, as thin as they can be.

Nothing here decides anything. Each raises OSError with the errno the kernel gave.
"""

import contextlib
import ctypes
import fcntl
import os
import struct

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

FALLOC_FL_KEEP_SIZE = 0x1
FALLOC_FL_PUNCH_HOLE = 0x2

_FICLONE = 0x4004_9409
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x8008_6601, 0x4008_6602
_FS_TOPDIR_FL = 0x0002_0000
_INODE_FLAGS = struct.Struct("=i")
_SYS_OPENAT2 = 437
_OPEN_HOW = struct.Struct("=QQQ")

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc["syscall"]  # with the types of openat2
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_int),
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t),
)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def openat2(directory: int, path: str, flags: int, *, mode: int = 0) -> int:
    """Open `path` beneath the directory; no link, of whatever kind, is followed on the way.

    Source: openat2(2), Linux 5.6. ELOOP: a link; EXDEV: an escape; EAGAIN: lost a race, try again.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, _RESOLVE)
    name = os.fsencode(path)
    fd: int = _syscall(_SYS_OPENAT2, directory, name, how, _OPEN_HOW.size)
    return fd if fd >= 0 else _checked(fd, path)


def link_open(fd: int, directory: int, name: str) -> None:
    """Give an open file one more name, whatever its other names mean by now.

    Source: linkat(2), AT_SYMLINK_FOLLOW over /proc/self/fd. Python follows only with a `dir_fd`.
    """
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)


def mount_tmpfs(path: str, *, size_bytes: int, inodes: int, uid: int) -> None:
    """A tmpfs that only the uid can enter, bounded in size and number of files.

    Source: mount(2), tmpfs(5). Needs: CAP_SYS_ADMIN.
    """
    options = f"size={size_bytes},nr_inodes={inodes},mode=0700,uid={uid},gid={uid}"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    done: int = _libc.mount(
        b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(flags), options.encode()
    )
    _checked(done, path)


def unmount(path: str, *, detach: bool = False) -> None:
    """Source: umount2(2); EINVAL: not a mount point. Needs: CAP_SYS_ADMIN."""
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0)
    done: int = _libc.umount2(os.fsencode(path), flags)
    _checked(done, path)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back; it reads as zeros, the file's size stays.

    Source: fallocate(2).
    """
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    done: int = _libc.fallocate(fd, mode, offset, length)
    _checked(done, None)


def reflink(target: int, source: int) -> None:
    """Make the target share all blocks of the source.

    Source: ioctl_ficlone(2). EOPNOTSUPP, EXDEV, EINVAL: this file system cannot.
    """
    fcntl.ioctl(target, _FICLONE, source)


def spread_subdirectories(directory: int) -> None:
    """Say that the subdirectories are unrelated: ext4 puts each into another block group.

    Source: ioctl_iflags(2), FS_TOPDIR_FL. ENOTTY, EOPNOTSUPP: this file system knows nothing of it.
    """
    found = fcntl.ioctl(directory, _FS_IOC_GETFLAGS, bytes(_INODE_FLAGS.size))
    (flags,) = _INODE_FLAGS.unpack(found)
    fcntl.ioctl(directory, _FS_IOC_SETFLAGS, _INODE_FLAGS.pack(flags | _FS_TOPDIR_FL))


def give_back_memory() -> None:
    """Give the kernel what the allocator keeps and nothing uses. Source: malloc_trim(3), glibc."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc.malloc_trim(0)


def _checked(result: int, path: str | None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
