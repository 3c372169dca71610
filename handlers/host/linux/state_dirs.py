"""hostd's own directories below `<state>`: root-only, so plain paths are safe in them."""

import contextlib
import os
import re

from handlers.errors import Invalid
from schemas import naming

JAIL_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")


def make_dir(path: str, *, sync: bool = False) -> str:
    """Make a directory and its parents, 0700; with `sync`, each new name survives a power loss."""
    if os.path.isdir(path):
        return path
    above = os.path.dirname(path)
    make_dir(above, sync=sync)
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


def ids(key: str, count: int) -> list[str]:
    """The parts of a `t/p/i` key, each an id; the last may be a revision.

    Raises:
        Invalid: a key that is none, e.g. one with `..` in it.
    """
    parts = key.split("/")
    last = naming.REVISION_PATTERN.fullmatch(parts[-1]) or naming.ID_PATTERN.fullmatch(parts[-1])
    sound = last and all(naming.ID_PATTERN.fullmatch(part) for part in parts[:-1])
    if len(parts) != count or not sound:
        raise Invalid(f"not a key of {count} ids: {key[:200]!r}")
    return parts


def checked_jail_id(jail_id: str) -> str:
    """The id itself, if it is one. Raises Invalid otherwise."""
    if JAIL_ID.fullmatch(jail_id) is None:
        raise Invalid(f"not a jail id: {jail_id[:100]!r}")
    return jail_id
