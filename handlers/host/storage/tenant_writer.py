"""A tenant's files written in agentd's place, by `hostd seed`: never through a link of agentd's.

Everything is opened and made beneath the tenant's directory by descriptor (`openat2.py`) and given
to the directory's owner, so that the worker takes it.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Self

from handlers.errors import Invalid, NotFound, of_os_error
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_tree
from handlers.host.storage.instance_json import JSON_MAX_BYTES

NAMES_MAX = 4096


class TenantWriter:
    """Reads and writes below `<data>/tenants/<tenant_id>`, which is made if it is missing.

    Names are relative to it. The tenant ID must have been checked.

    Raises (all methods):
        Invalid: a symlink, another kind of file, or another user's.
        HostFault, Exhausted: it cannot be written.
    """

    def __init__(self, data: str, tenant_id: str) -> None:
        try:
            os.makedirs(data, exist_ok=True)  # the operator's own path
            with (
                Directory.trusted(data) as root,
                _made(root, "tenants") as tenants,
                _made(tenants, tenant_id),
            ):
                self._tenant = tenants.shared(tenant_id)
        except OSError as error:
            raise of_os_error(error, f"cannot make {data}/tenants/{tenant_id}") from error

    def __enter__(self) -> Self:
        """Waits for other writers of the tenant's."""
        fcntl.flock(self._tenant.fd, fcntl.LOCK_EX)  # until it is closed
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tenant.close()

    def named(self, name: str) -> str:
        return self._tenant.named(name)

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        try:
            return self._tenant.read(name, JSON_MAX_BYTES)[0]
        except NotFound:
            return None

    def names(self, name: str) -> list[str]:
        """The names in a directory, none if it does not exist.

        Raises:
            Invalid: also if there are more than `NAMES_MAX`.
        """
        try:
            with self._tenant.directory(name) as directory:
                return directory.names(NAMES_MAX)
        except NotFound:
            return []

    def link_target(self, name: str) -> str | None:
        """The target of a symlink; None if it does not exist."""
        try:
            return self._tenant.link_target(name)
        except NotFound:
            return None

    def make(self, name: str) -> None:
        """Make a directory and those above it."""
        with self._made(name):
            return

    def write(self, name: str, content: bytes, *, mode: int) -> None:
        """Replace a file atomically."""
        with self._parent(name) as (parent, last):
            owner = os.fstat(self._tenant.fd)
            parent.replace(last, content, uid=owner.st_uid, gid=owner.st_gid, mode=mode)

    def link(self, name: str, target: str) -> None:
        """Replace a symlink atomically."""
        with self._parent(name) as (parent, last):
            beside = f".{last}.{secrets.token_hex(8)}"
            os.symlink(target, beside, dir_fd=parent.fd)
            try:
                owner = os.fstat(self._tenant.fd)
                os.chown(
                    beside, owner.st_uid, owner.st_gid, dir_fd=parent.fd, follow_symlinks=False
                )
                os.rename(beside, last, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
            except OSError:
                parent.unlink(beside)
                raise

    def copy(self, name: str, sources: Mapping[str, str]) -> None:
        """Make a directory of copies of the operator's files, all or nothing; there is success."""
        with self._parent(name) as (parent, last):
            if parent.stat(last) is not None:
                return
            part = f".{secrets.token_hex(8)}"
            try:
                with _made(parent, part) as directory:
                    for file, source in sources.items():
                        with open(source, "rb") as original, directory.created(file) as copy:
                            with open(copy, "wb", closefd=False) as target:
                                shutil.copyfileobj(original, target)
                            owner = os.fstat(directory.fd)
                            os.fchown(copy, owner.st_uid, owner.st_gid)
                            os.fchmod(copy, 0o644)
                    os.rename(part, last, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
            except BaseException:
                remove_tree(parent.fd, part)
                raise

    @contextlib.contextmanager
    def _parent(self, name: str) -> Generator[tuple[Directory, str], None, None]:
        above, _, last = name.rpartition("/")
        try:
            with self._made(above) as parent:
                yield parent, last
        except OSError as error:
            raise of_os_error(error, f"cannot write {self.named(name)}") from error

    @contextlib.contextmanager
    def _made(self, name: str) -> Generator[Directory, None, None]:
        with contextlib.ExitStack() as opened:
            at = self._tenant
            for part in filter(None, name.split("/")):
                at = opened.enter_context(_made(at, part))
            yield at


@contextlib.contextmanager
def _made(parent: Directory, name: str) -> Generator[Directory, None, None]:
    """Open a directory, made for the parent's owner if it is missing."""
    if "/" in name or name in {"", ".", ".."}:
        raise Invalid(f"invalid name of a directory: {name!r}")
    try:
        os.mkdir(name, 0o755, dir_fd=parent.fd)
        made = True
    except FileExistsError:
        made = False
    with parent.directory(name) as directory:
        owner = os.fstat(parent.fd)
        if made and os.fstat(directory.fd).st_uid != owner.st_uid:
            os.fchown(directory.fd, owner.st_uid, owner.st_gid)
        yield directory
