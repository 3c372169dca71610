"""Removal of a directory tree whose content is untrusted.

No symlink is followed, and neither depth nor number of files matters: a directory that is not empty
is moved up to the top and emptied there, so two descriptors are enough for any depth. Names are
read as they are removed, never all at once: somebody else may have made millions.
"""

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable

REFILLS = 64
MOVED_MAX = 256  # directories that wait at the top
ROUNDS_MAX = 100_000
Last = Callable[[int, str], None]


def remove_tree(parent: int, name: str, *, before_unlink: Last | None = None) -> None:
    """Remove `name` in the directory `parent`, with all below it; absent is success.

    `before_unlink(directory, name)` sees each file first. A process that keeps filling the
    directory is not waited for: OSError with ENOTEMPTY.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    numbers = itertools.count()
    waiting = [name]
    refilled = 0
    rounds = 0
    while waiting:
        top = waiting[-1]
        try:
            directory = os.open(top, flags, dir_fd=parent)
        except FileNotFoundError:
            waiting.pop()
            continue
        except OSError as error:
            if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
                raise
            waiting.pop()
            _remove_file(parent, top, before_unlink)
            continue
        try:
            moved = _empty(directory, parent, f".gone-{name[:64]}", numbers, before_unlink)
        finally:
            os.close(directory)
        waiting += moved
        rounds += len(moved) == MOVED_MAX
        if rounds > ROUNDS_MAX:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), top)
        if waiting[-1] == top:
            try:
                os.rmdir(top, dir_fd=parent)
                waiting.pop()
            except FileNotFoundError:
                waiting.pop()
            except OSError as error:
                refilled += 1
                if error.errno != errno.ENOTEMPTY or refilled > REFILLS:
                    raise


def remove_path(path: str) -> None:
    """Remove one of hostd's directories with its content; absent is success."""
    try:
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        remove_tree(parent, os.path.basename(path))
    finally:
        os.close(parent)


def remove_names(directory: int, *, keep: frozenset[str] = frozenset()) -> None:
    """Empty an open directory but for the names in `keep`."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name not in keep:
                remove_tree(directory, entry.name)


def _empty(
    directory: int, parent: int, prefix: str, numbers: "itertools.count[int]", before: Last | None
) -> list[str]:
    """Unlink what can be; move sub-directories up, at most `MOVED_MAX`. Returns their new names."""
    moved: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if len(moved) == MOVED_MAX:
                break
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(entry.name, dir_fd=directory, follow_symlinks=False)
                if not stat.S_ISDIR(found.st_mode):
                    _remove_file(directory, entry.name, before)
                    continue
                try:
                    os.rmdir(entry.name, dir_fd=directory)
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise
                    name = _free_name(parent, prefix, numbers)
                    os.rename(entry.name, name, src_dir_fd=directory, dst_dir_fd=parent)
                    moved.append(name)
    return moved


def _free_name(parent: int, prefix: str, numbers: "itertools.count[int]") -> str:
    """A name not taken in `parent`; an earlier removal may have been cut short there."""
    for number in numbers:
        name = f"{prefix}-{number}"
        try:
            os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return name
    raise AssertionError("unreachable")


def _remove_file(directory: int, name: str, before: Last | None) -> None:
    if before is not None:
        before(directory, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
