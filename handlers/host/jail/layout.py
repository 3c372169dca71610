"""The layout of a jail and what hostd notes beside it.

`<jail_base>/firecracker/<jail id>/` is root's, `root/` in it belongs to the jail's uid: of a path
below `root/` only the last name can have been tampered with, and it is never followed.
"""

import contextlib
import os
import stat
from collections.abc import Generator

import msgspec

from handlers.errors import HostFault, Invalid
from handlers.host.linux.checksummed_json import read_sealed
from schemas import naming
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef

LOG = "log"
SERIAL = "serial"
CONFIG_DRIVE = "config.ext4"
SECRETS_DIR = "secrets"
SECRETS_DRIVE = "secrets.ext4"
SNAPSHOT_DIR = "snap"
WOKEN_DIR = "woken"
FACTS = "hostd.json"


class FileId(msgspec.Struct, frozen=True):
    dev: int
    ino: int

    @classmethod
    def of(cls, found: os.stat_result) -> "FileId":
        return cls(found.st_dev, found.st_ino)


class JailFacts(msgspec.Struct, frozen=True):
    """`hostd.json` beside `root/`, root-only: whose jail it is, also without a journal.

    `ours` are the files that hostd made in the jail: another inode by such a name is the VMM's.
    `disks` are the absolute paths of what was chowned to the uid. `record` is the journal's of the
    launch: what a worker without that journal adopts the VM by.
    """

    ref: InstanceRef
    uid: int
    launch: int
    complete: bool
    has_config: bool = False
    has_secrets: bool = False
    ours: dict[str, FileId] = {}
    disks: tuple[str, ...] = ()
    record: InstanceRecord | None = None


class JailDirs:
    """Where jails are."""

    def __init__(self, jail_base: str) -> None:
        self.base = f"{jail_base}/firecracker"

    def directory(self, jail_id: str) -> str:
        if naming.JAIL_ID_PATTERN.fullmatch(jail_id) is None:
            raise Invalid(f"invalid jail ID {jail_id[:100]!r}: want 12 hex digits, '-', a number")
        return f"{self.base}/{jail_id}"

    def root(self, jail_id: str) -> str:
        return f"{self.directory(jail_id)}/root"

    def facts(self, jail_id: str) -> JailFacts | None:
        """None if there is no such jail, or what is noted is damaged."""
        try:
            return read_sealed(f"{self.directory(jail_id)}/{FACTS}", JailFacts)
        except HostFault:
            return None

    def list_ids(self) -> list[str]:
        """All jails that hostd named, complete or not; other tools name theirs differently."""
        try:
            names = os.listdir(self.base)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if naming.JAIL_ID_PATTERN.fullmatch(name))

    def ids_of(self, ref: InstanceRef) -> list[str]:
        """The jails of an instance, newest launch first."""
        prefix = naming.jail_id_prefix(ref)
        found = [each for each in self.list_ids() if each.startswith(prefix)]
        return sorted(found, key=launch_of, reverse=True)

    @contextlib.contextmanager
    def file(
        self, jail_id: str, name: str, flags: int = os.O_RDONLY
    ) -> Generator[int | None, None, None]:
        """A regular file directly below the jail's root; None if it is not there or no such."""
        path = f"{self.root(jail_id)}/{name}"
        try:
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        try:
            yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)


def launch_of(jail_id: str) -> int:
    """The launch number in a jail id; -1 if it has none."""
    last = jail_id.rpartition("-")[2]
    return int(last) if last.isascii() and last.isdigit() else -1
