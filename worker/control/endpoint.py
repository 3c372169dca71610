"""The socket `<paths.run>/control.sock`, and who may connect: root and the worker's own user.

Source: unix(7) for SO_PEERCRED; the mode that a socket has before bind(2) becomes the file's.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Generator
from typing import Final

import structlog

SOCKET: Final = "control.sock"
BACKLOG: Final = 16
_UCRED: Final = "3i"  # pid, uid, gid

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


def path_in(run: str) -> str:
    """The path that messages name."""
    return f"{run}/{SOCKET}"


@contextlib.contextmanager
def short_path(run: str) -> Generator[str]:
    """A path of the socket to bind or connect: an address takes 107 bytes, `run` may be longer.

    Raises:
        OSError: there is no such directory.
    """
    directory = os.open(run, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET}"
    finally:
        os.close(directory)


def listen(run: str) -> socket.socket:
    """Listen there, mode 0600; replaces the socket that a killed worker left.

    Raises:
        OSError: the name is taken by a directory, or the socket cannot be bound.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        os.fchmod(listener.fileno(), 0o600)
        with short_path(run) as path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def client_of(connection: socket.socket) -> str | None:
    """The process that connected; None if it is another user's."""
    size = struct.calcsize(_UCRED)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack(_UCRED, credentials)
    if uid not in (0, os.geteuid()):
        log.warning("control.refused", uid=uid, pid=pid)
        return None
    return str(pid)
