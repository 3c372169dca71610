"""Connect to the sockets in a jail, and read the end of a file there, without following a symlink.

The jail's root directory belongs to the jail's uid: the VMM may have replaced any file in it.
"""

import os
import socket
import stat

from handlers.errors import HostFault


def read_tail(root: str, name: str, limit_bytes: int) -> str:
    """The end of a file in the jail as text; empty if it is missing or not a regular file."""
    try:
        fd = _opened(root, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return ""
        tail = os.pread(fd, limit_bytes, max(0, found.st_size - limit_bytes))
        return tail.decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def connect(root: str, name: str) -> socket.socket:
    """A non-blocking stream connection to a socket in the jail, whatever the path's length.

    The socket's inode is opened first, then reached through /proc/self/fd: no symlink is followed,
    and the path fits into the 107 bytes of `sun_path`.

    Raises:
        OSError: FileNotFoundError before it is bound, ConnectionRefusedError if nothing listens.
        HostFault: the name is not a socket.
    """
    target = _opened(root, name, os.O_PATH | os.O_NOFOLLOW)
    try:
        if not stat.S_ISSOCK(os.fstat(target).st_mode):
            raise HostFault(f"{name} in the jail is not a socket", path=f"{root}/{name}")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(f"/proc/self/fd/{target}")
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(target)


def _opened(root: str, name: str, flags: int) -> int:
    """A descriptor of a file in the jail, to be closed by the caller."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)
