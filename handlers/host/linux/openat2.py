"""Files below a directory that others can write to, opened so that nothing leads out of it.

hostd runs as root and agentd's directories are not root's: a name in them may become a symlink, a
FIFO or another user's file at any moment: a link or a rename needs no rights on the file itself.
Every open goes through `openat2`, stays beneath one directory, follows no symlink, does not block,
and is judged by what was opened, never by its name. Below a tenant's directory only its owner's
files are taken (docs/adr/0706).
"""

import contextlib
import errno
import os
import stat
from collections.abc import Generator
from types import TracebackType
from typing import Self

from handlers.errors import Failure, Invalid, NotFound, Unavailable, of_os_error
from handlers.host.linux.small_files import read_up_to, write_all
from handlers.host.linux.syscalls import link_open, openat2

RACES = 16
MARK = "trusted.hostd.disk"  # on every file that hostd keeps in another's directory: a data disk
NO_MARK = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
PATH_ERRORS = {
    errno.ELOOP: "is a symlink, or its path contains one",
    errno.EXDEV: "leads out of its directory",
    errno.ENOTDIR: "has a path component that is not a directory",
    errno.EISDIR: "is a directory",
    errno.ENXIO: "is not a regular file",
    errno.ENAMETOOLONG: "has a name that is too long",
}


def refused(error: OSError, path: str) -> Failure:
    """The failure for a file that could not be opened; its message names `path`."""
    if error.errno == errno.ENOENT:
        return NotFound(f"{path} does not exist", path=path)
    if error.errno in PATH_ERRORS:
        return Invalid(f"{path} {PATH_ERRORS[error.errno]}", path=path)
    return of_os_error(error, f"cannot open {path}")


def has_mark(fd: int) -> bool:
    """Whether hostd marked the open file as a data disk. Source: xattr(7). Needs: CAP_SYS_ADMIN."""
    try:
        os.getxattr(fd, MARK)
    except OSError as error:
        if error.errno in NO_MARK:
            return False
        raise of_os_error(error, "cannot read the mark of a file") from error
    return True


class Directory:
    """An open directory; `path` is only for messages. Names given to it may hold slashes.

    `owner` is the uid that must own the files below it; None in a directory that is root's.

    Raises (all methods):
        NotFound: there is no such file.
        Invalid: a symlink, a path that leaves the directory, another kind of file, or another
            user's.
        Unavailable: the path changed while it was opened; try again.
    """

    def __init__(self, fd: int, path: str, owner: int | None = None) -> None:
        self.fd = fd
        self.path = path
        self.owner = owner

    @classmethod
    def trusted(cls, path: str) -> "Directory":
        """A directory that the operator configured, so symlinks in its path are followed."""
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)
        except OSError as error:
            raise refused(error, path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def named(self, name: str) -> str:
        """The full path of a name, for messages."""
        return f"{self.path}/{name}"

    def directory(self, name: str) -> "Directory":
        """Open a directory beneath this one."""
        fd = self._open(name, os.O_RDONLY | os.O_DIRECTORY)
        return Directory(fd, self.named(name), self.owner)

    def shared(self, name: str) -> "Directory":
        """Open a directory that another user fills: only files of its owner are taken below it."""
        directory = self.directory(name)
        try:
            directory.owner = os.fstat(directory.fd).st_uid
        except BaseException:
            directory.close()
            raise
        return directory

    def stat(self, name: str) -> os.stat_result | None:
        """lstat(2) of `name`, which has no slash; None if it does not exist."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise refused(error, self.named(name)) from error

    @contextlib.contextmanager
    def file(self, name: str, flags: int = os.O_RDONLY) -> Generator[int, None, None]:
        """Open a regular file of the directory's owner; closed at the end of the block."""
        fd, found = self._regular(name, flags)
        try:
            self._check_owner(fd, found, self.named(name))
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def marked_file(self, name: str, flags: int = os.O_RDONLY) -> Generator[int, None, None]:
        """Open a regular file whoever owns it. Only for a data disk, whose mark must be checked."""
        fd, _ = self._regular(name, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _regular(self, name: str, flags: int) -> tuple[int, os.stat_result]:
        """A descriptor of a regular file, to be closed by the caller; its status when opened."""
        fd = self._open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            found = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise Invalid(f"{self.named(name)} is not a regular file", path=self.named(name))
        return fd, found

    def read(self, name: str, limit_bytes: int) -> tuple[bytes, os.stat_result]:
        """The content of a small file, and its status when it was read.

        Raises:
            Invalid: also if it has more than one hard link or is larger than the limit.
        """
        path = self.named(name)
        fd, found = self._regular(name, os.O_RDONLY)
        try:
            self._check_owner(fd, found, path)
            if found.st_nlink > 1:
                raise Invalid(f"{path} has {found.st_nlink} hard links, expected 1", path=path)
            data = read_up_to(fd, limit_bytes + 1)
        finally:
            os.close(fd)
        if len(data) > limit_bytes:
            raise Invalid(f"{path} is larger than {limit_bytes} bytes", path=path)
        return data, found

    def link_target(self, name: str) -> str:
        """The target of a symlink of the directory's owner, not resolved; the caller must check it.

        Source: openat2(2), O_PATH and O_NOFOLLOW with RESOLVE_NO_SYMLINKS; readlinkat(2).
        """
        path = self.named(name)
        fd = self._open(name, os.O_PATH | os.O_NOFOLLOW)
        try:
            found = os.fstat(fd)
            if not stat.S_ISLNK(found.st_mode):
                raise Invalid(f"{path} is not a symlink", path=path)
            self._check_owner(fd, found, path, marks=False)  # a symlink has no `trusted.` attribute
            return os.readlink("", dir_fd=fd)
        except OSError as error:
            raise refused(error, path) from error
        finally:
            os.close(fd)

    def names(self, limit: int) -> list[str]:
        """The names in it, read one by one up to the limit: another user may have made millions.

        Raises:
            Invalid: there are more.
        """
        found: list[str] = []
        with os.scandir(self.fd) as entries:
            for entry in entries:
                if len(found) == limit:
                    raise Invalid(
                        f"{self.path} has more than {limit} entries: remove what is not needed",
                        path=self.path,
                    )
                found.append(entry.name)
        return found

    def replace(self, name: str, data: bytes, *, uid: int, gid: int, mode: int) -> None:
        """Replace the file `name`, or make it, with this content, owner, group and mode.

        Atomic: written beside it, synced and renamed, so after a power loss it is either the old
        file or the new one. `name` has no slash; one writer per name.
        """
        beside = f".{name}.hostd"
        path = self.named(name)
        try:
            self.unlink(beside)
            with self.created(beside) as fd:
                os.fchown(fd, uid, gid)
                os.fchmod(fd, mode)
                write_all(fd, data)
                os.fsync(fd)
                os.rename(beside, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.unlink(beside)
            raise of_os_error(error, f"cannot write {path}") from error

    def unnamed(self, data: bytes, *, uid: int, gid: int, mode: int) -> int:
        """A descriptor of a synced file with this content that has no name yet, for `replace_by`.

        Source: open(2), O_TMPFILE.

        Raises:
            OSError: EOPNOTSUPP: the file system has no such files.
        """
        fd = openat2(self.fd, ".", os.O_WRONLY | os.O_TMPFILE, mode=0o600)
        try:
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)
            write_all(fd, data)
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def replace_by(self, name: str, fd: int) -> None:
        """As `replace`, by what `unnamed` returned.

        Raises:
            OSError: EXDEV: it is on another file system.
        """
        beside = f".{name}.hostd"
        self.unlink(beside)
        link_open(fd, self.fd, beside)
        os.rename(beside, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Unlink a file; absent is success."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    @contextlib.contextmanager
    def created(self, name: str) -> Generator[int, None, None]:
        """Create a file for writing, 0600; closed at the end of the block. It must not exist."""
        fd = openat2(self.fd, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def _check_owner(
        self, fd: int, found: os.stat_result, path: str, *, marks: bool = True
    ) -> None:
        """Refuse what its owner did not put there. A rename gives a file another name, no owner."""
        if self.owner is None:
            return
        if found.st_uid != self.owner:
            raise Invalid(
                f"{path} belongs to uid {found.st_uid}, expected uid {self.owner}, the owner of the"
                " tenant's directory: copy it as that user",
                path=path,
            )
        if marks and has_mark(fd):
            raise Invalid(f"{path} is a data disk of hostd's: move it back", path=path)

    def _open(self, name: str, flags: int) -> int:
        for _ in range(RACES):
            try:
                return openat2(self.fd, name, flags)
            except BlockingIOError:  # EAGAIN: something was renamed while the path was walked
                continue
            except OSError as error:
                raise refused(error, self.named(name)) from error
        path = self.named(name)
        raise Unavailable(f"{path} changed during open ({RACES} retries): try again", path=path)
