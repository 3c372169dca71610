"""The layout of jails on this host: where each one is, which there are, what hostd wrote beside it.

`<jail_base>/firecracker/<jail id>/` belongs to root, `root/` in it to the jail's uid: the VMM can
replace anything directly in `root/`, so the last name of a path below it is never followed.
"""

import contextlib
import os
import stat
from collections.abc import Collection, Generator

import msgspec

from handlers import jail_names
from handlers.errors import HostFault, Invalid
from handlers.host.linux.checksummed_json import read_sealed, write_sealed
from handlers.host.linux.file_id import FileId
from handlers.host.linux.state_dirs import make_dir
from handlers.host.linux.syscalls import spread_subdirectories
from schemas import naming
from schemas.records import InstanceRecord
from schemas.requests import InstanceRef


class JailMetadata(msgspec.Struct, frozen=True):
    """`hostd.json` beside `root/`, root-only: whose jail it is, readable without a journal.

    `ours` are the files that hostd made in the jail: another inode by such a name is the VMM's.
    `disks` are the absolute paths of what was chowned to the uid. `record` is the journal's record
    of the launch, by which a worker without that journal adopts the VM, unless it is `released`.
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
    released: bool = False


class JailLayout:
    """The jails below one `[vmm] jail_base`."""

    def __init__(self, jail_base: str) -> None:
        self.jail_base = jail_base
        self.base = jail_names.jails_dir(jail_base)
        self._spread = False

    def make_base(self) -> None:
        """Make the directory of all jails, if it is missing.

        ext4 searches a free inode past each that was deleted in the last minutes, and all jails
        would search the same block group: their parent's. Other file systems do not need it.
        """
        if self._spread and os.path.isdir(self.base):
            return
        make_dir(self.base)
        base = os.open(self.base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                spread_subdirectories(base)
        finally:
            os.close(base)
        self._spread = True

    def directory(self, jail_id: str) -> str:
        """Raises Invalid: not a jail ID; the jailer itself accepts some non-ASCII letters."""
        if naming.JAIL_ID_PATTERN.fullmatch(jail_id) is None:
            raise Invalid(f"invalid jail ID {jail_id[:100]!r}: want 12 hex digits, '-', a number")
        return jail_names.jail_dir(self.jail_base, jail_id)

    def root(self, jail_id: str) -> str:
        """The directory that is `/` for the VMM. Raises Invalid: not a jail ID."""
        return f"{self.directory(jail_id)}/{jail_names.ROOT}"

    def read_metadata(self, jail_id: str) -> JailMetadata | None:
        """None if there is no such jail, or its metadata is missing or damaged."""
        try:
            return read_sealed(self._metadata_path(jail_id), JailMetadata)
        except HostFault:
            return None

    def write_metadata(self, jail_id: str, metadata: JailMetadata) -> None:
        """Not synced: after a power loss its VMM is gone and the jail is removed."""
        write_sealed(self._metadata_path(jail_id), metadata, sync=False)

    def list_ids(self) -> list[str]:
        """All jails that hostd named, complete or not; other tools name theirs differently."""
        return sorted(filter(naming.JAIL_ID_PATTERN.fullmatch, self._names()))

    def ids_of(self, ref: InstanceRef) -> list[str]:
        """The jails of an instance, newest launch first.

        The launches' numbers are not known, so all names are read: 0.9 ms for 2,000 jails.
        """
        prefix = naming.jail_id_prefix(ref)
        ids = [each for each in self._names() if each.startswith(prefix)]
        return sorted(filter(naming.JAIL_ID_PATTERN.fullmatch, ids), key=launch_of, reverse=True)

    @contextlib.contextmanager
    def file(
        self, jail_id: str, name: str, flags: int = os.O_RDONLY
    ) -> Generator[int | None, None, None]:
        """Open a regular file directly in the jail's root; None if missing or of another type."""
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

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.base)
        except FileNotFoundError:
            return []

    def _metadata_path(self, jail_id: str) -> str:
        return f"{self.directory(jail_id)}/{jail_names.METADATA}"


def launch_of(jail_id: str) -> int:
    """The launch number in a jail ID; -1 if it has none."""
    last = jail_id.rpartition("-")[2]
    return int(last) if last.isascii() and last.isdigit() else -1


def launched_versions(jail_base: str, known: Collection[InstanceRef]) -> set[str]:
    """The versions of Firecracker of the jails of other instances than `known`; "" is that of one
    whose metadata cannot be read or has none."""
    layout = JailLayout(jail_base)
    found = set[str]()
    for jail_id in layout.list_ids():
        metadata = layout.read_metadata(jail_id)
        if metadata is None or metadata.ref not in known:
            record = None if metadata is None else metadata.record
            found.add("" if record is None else record.vmm_version)
    return found
