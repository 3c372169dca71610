"""hostd's own directories below `<state>`: root-only, so plain paths are safe in them."""

import contextlib
import os

ATTEMPTS = 16  # of making a directory whose parent others remove as empty meanwhile


def make_dir(path: str, *, sync: bool = False) -> str:
    """Make a directory and its parents, 0700; with `sync`, each new name survives a power loss.

    A parent that `remove_empty` takes away in between is made again.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            return _make_dir(path, sync=sync)
    return _make_dir(path, sync=sync)


def _make_dir(path: str, *, sync: bool) -> str:
    if os.path.isdir(path):
        return path
    above = os.path.dirname(path)
    _make_dir(above, sync=sync)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    if sync:
        sync_dir(above)
    return path


def sync_dir(path: str) -> None:
    """fsync(2) of a directory: the names in it are on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_empty(path: str, *, up_to: str) -> None:
    """Remove a directory and those above it while they are empty; `up_to` stays."""
    while len(path) > len(up_to):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError:  # not empty
            return
        path = os.path.dirname(path)
