"""`volumes/data.ext4`: made by hostd, never resized, never believed by its name alone.

The directory it is in belongs to agentd, which may put anything there; so a disk is known by device
and inode as the journal has them, and by hostd's mark on the inode (`disk_marks.py`).
"""

import contextlib
import os
from typing import ClassVar

from handlers.errors import HostFault, Invalid, NotFound
from handlers.host.linux.errnos import os_failure
from handlers.host.linux.file_threads import CancelToken, run_in_slow_thread, run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.syscalls import link_open
from handlers.host.storage import wipe
from handlers.host.storage.agentd_files import instance_path, open_instance
from handlers.host.storage.disk_ownership import check_mark, read_mark, write_mark
from handlers.host.storage.mkfs import make_ext4
from handlers.specs import MIB, DataDisk, DataDiskSpec
from schemas import naming
from schemas.records import DiskIdentity
from schemas.requests import InstanceRef

DATA_DISK = "data.ext4"
LABEL = "mvm-data"


def identity_of(found: os.stat_result) -> DiskIdentity:
    return DiskIdentity(dev=found.st_dev, ino=found.st_ino, size_bytes=found.st_size)


class DataDisks:
    """The Protocol of `handlers/interfaces.py`; the key is `t/p/i`."""

    name: ClassVar[str] = "data_disks"

    def __init__(self, *, data: str, jail_base: str) -> None:
        self._data = data
        self._jails = f"{jail_base}/firecracker"

    def path(self, ref: InstanceRef) -> str:
        return f"{self._data}/tenants/{ref.tenant_id}/{instance_path(ref)}/volumes/{DATA_DISK}"

    async def ensure(self, spec: DataDiskSpec) -> DataDisk:
        """Make the disk, or find the one that is known; its size is never changed.

        It has no name until it is whole: made unnamed, synced, marked, then linked into place.

        Raises:
            Invalid: what is there is not the disk that hostd recorded (until `hostd adopt`), is a
                link, is no regular file, or has names that no jail explains.
            NotFound: the instance's directory is missing.
            Exhausted: the disk is full.
        """
        return await run_in_thread(self._ensure, spec)

    async def exists(self, key: str) -> bool:
        def look() -> bool:
            try:
                with self._volumes(naming.parse_ref(key)) as volumes:
                    return volumes.stat(DATA_DISK) is not None
            except NotFound:
                return False

        return await run_in_thread(look)

    async def remove(self, key: str) -> None:
        """Undo a creation: unlink a disk that hostd made; anything else by that name stays."""
        await run_in_thread(self._remove, naming.parse_ref(key))

    async def check_wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Raise what `wipe` would, before anything is taken down; jails may still link the disk.

        Raises:
            Invalid: not a disk that hostd made for this instance, or one with several names.
        """

        def check() -> None:
            with (
                contextlib.suppress(NotFound),
                self._volumes(ref) as volumes,
                volumes.file(DATA_DISK) as fd,
            ):
                path = volumes.named(DATA_DISK)
                if known is None or identity_of(os.fstat(fd)) != known:
                    check_mark(fd, ref, path)
                self._check_names(ref, fd, path)

        await run_in_thread(check)

    async def wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Overwrite, verify, give back the blocks, unlink; absent already is success.

        Raises:
            Invalid: not a disk that hostd made for this instance; nothing is touched.
            HostFault: the blocks did not read back as zeros; the file stays.
        """
        await run_in_slow_thread(lambda pace: self._wipe(ref, known, pace))

    async def adopt(self, ref: InstanceRef) -> DiskIdentity:
        """Take the file that is there as the instance's disk: the operator's word, `hostd adopt`.

        Raises:
            NotFound: there is none. Invalid: a link, not a regular file, or several names.
        """

        def take() -> DiskIdentity:
            with self._volumes(ref) as volumes, volumes.file(DATA_DISK, os.O_RDWR) as fd:
                self._check_names(ref, fd, volumes.named(DATA_DISK))
                write_mark(fd, ref, new=False)
                return identity_of(os.fstat(fd))

        return await run_in_thread(take)

    def _volumes(self, ref: InstanceRef) -> Directory:
        with open_instance(self._data, ref) as instance:
            return instance.directory("volumes")

    def _ensure(self, spec: DataDiskSpec) -> DataDisk:
        with open_instance(self._data, spec.ref) as instance:
            made = _make_dir(instance)
            with instance.directory("volumes") as volumes:
                if made:  # by descriptor: the name may be another's by now
                    owner = os.fstat(instance.fd)
                    os.fchown(volumes.fd, owner.st_uid, owner.st_gid)
                if volumes.stat(DATA_DISK) is None:
                    if spec.known is not None:
                        path = volumes.named(DATA_DISK)
                        raise NotFound(f"the recorded data disk {path} is gone", path=path)
                    self._make(spec, volumes)
                return self._checked(spec, volumes)

    def _make(self, spec: DataDiskSpec, volumes: Directory) -> None:
        path = volumes.named(DATA_DISK)
        try:
            fd = os.open(f"/proc/self/fd/{volumes.fd}", os.O_TMPFILE | os.O_RDWR, 0o600)
            try:
                os.ftruncate(fd, spec.size_mib * MIB)
                make_ext4(fd, label=LABEL)
                write_mark(fd, spec.ref, new=True)
                os.fsync(fd)
                link_open(fd, volumes.fd, DATA_DISK)
            finally:
                os.close(fd)
            os.fsync(volumes.fd)
        except OSError as error:
            raise os_failure(error, f"cannot make {path}") from error

    def _checked(self, spec: DataDiskSpec, volumes: Directory) -> DataDisk:
        path = volumes.named(DATA_DISK)
        with volumes.file(DATA_DISK, os.O_RDWR) as fd:
            identity = identity_of(os.fstat(fd))
            mark = read_mark(fd)
            ours = mark is not None and mark.ref == str(spec.ref)
            if spec.known is None and not (ours and mark is not None and mark.new):
                raise Invalid(f"{path} was not made by hostd: see `hostd adopt`", path=path)
            if spec.known is not None and not _is(identity, spec.known, marked=ours):
                raise Invalid(f"{path} is not the disk that hostd recorded", path=path)
            self._check_names(spec.ref, fd, path)
            if not ours:
                write_mark(fd, spec.ref, new=False)
        return DataDisk(path=path, identity=identity)

    def _check_names(self, ref: InstanceRef, fd: int, path: str) -> None:
        """One name here, and one in each jail of the instance; a further one is somebody else's."""
        found = os.fstat(fd)
        if found.st_nlink > 1 + self._names_in_jails(ref, found):
            raise Invalid(f"{path} has several names", path=path)

    def _names_in_jails(self, ref: InstanceRef, disk: os.stat_result) -> int:
        if disk.st_nlink == 1 or not os.path.isdir(self._jails):
            return 0
        prefix = naming.jail_id_prefix(ref)
        count = 0
        for jail in os.listdir(self._jails):
            if jail.startswith(prefix):
                with contextlib.suppress(OSError):
                    name = f"{self._jails}/{jail}/root/{DATA_DISK}"
                    count += os.path.samestat(os.stat(name, follow_symlinks=False), disk)
        return count

    def _remove(self, ref: InstanceRef) -> None:
        try:
            with self._volumes(ref) as volumes:
                with volumes.file(DATA_DISK, os.O_RDWR) as fd:
                    check_mark(fd, ref, volumes.named(DATA_DISK))
                    _unlink_same(volumes, fd)
                os.fsync(volumes.fd)
        except (NotFound, Invalid):
            return
        except OSError as error:
            raise os_failure(error, f"cannot remove the data disk of {ref}") from error

    def _wipe(self, ref: InstanceRef, known: DiskIdentity | None, pace: CancelToken) -> None:
        try:
            volumes = self._volumes(ref)
        except NotFound:
            return
        with volumes:
            if volumes.stat(DATA_DISK) is None:
                return
            path = volumes.named(DATA_DISK)
            with volumes.file(DATA_DISK, os.O_RDWR) as fd:
                if known is None or identity_of(os.fstat(fd)) != known:
                    check_mark(fd, ref, path)
                if os.fstat(fd).st_nlink > 1:
                    raise Invalid(f"{path} has several names", path=path)
                try:
                    wipe.wipe(fd, check=pace.check)
                    _unlink_same(volumes, fd)
                    os.fsync(volumes.fd)
                except OSError as error:
                    raise os_failure(error, f"cannot wipe {path}") from error
                if not wipe.is_empty(fd):
                    raise HostFault(f"{path} still holds data after the wipe", path=path)


def _is(found: DiskIdentity, known: DiskIdentity, *, marked: bool) -> bool:
    """Device, inode and size as recorded; under the mark, the device may be numbered anew by a
    reboot: the mark is bound to the inode, and no copy carries it.
    """
    if marked:
        return (found.ino, found.size_bytes) == (known.ino, known.size_bytes)
    return found == known


def _make_dir(instance: Directory) -> bool:
    """Whether `volumes` was not there before."""
    try:
        os.mkdir("volumes", 0o755, dir_fd=instance.fd)
    except FileExistsError:
        return False
    except OSError as error:
        raise os_failure(error, f"cannot make {instance.named('volumes')}") from error
    return True


def _unlink_same(volumes: Directory, fd: int) -> None:
    """Unlink the name if it still is the open file's."""
    found = volumes.stat(DATA_DISK)
    if found is not None and os.path.samestat(found, os.fstat(fd)):
        volumes.unlink(DATA_DISK)
