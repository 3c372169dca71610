"""`volumes/data.ext4`: created by hostd, never resized, never trusted by its name alone.

Its directory belongs to agentd, which may put anything there; so a disk is identified by device and
inode as the journal recorded them, and by hostd's mark on the inode (`disk_ownership.py`).
"""

import contextlib
import errno
import os
from collections.abc import Collection
from typing import ClassVar

from handlers.claims.facts import DiskProof, Fact
from handlers.errors import HostFault, Invalid, NotFound, of_os_error
from handlers.host.linux.file_threads import CancelToken, run_in_slow_thread, run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.syscalls import link_open
from handlers.host.storage import wipe
from handlers.host.storage.agentd_files import instance_path, open_instance
from handlers.host.storage.disk_ownership import (
    check_identity,
    check_mark,
    described,
    identity_of,
    read_mark,
    write_mark,
)
from handlers.host.storage.disk_proof import prove_disk
from handlers.host.storage.mkfs import make_ext4
from handlers.jail_names import DATA_DISK, jail_root, jails_dir
from handlers.mechanism import Durability
from handlers.specs import MIB, DataDisk, DataDiskSpec
from schemas import naming
from schemas.records import DiskIdentity
from schemas.requests import InstanceRef

LABEL = "mvm-data"
BLOCK_BYTES = 512  # of `st_blocks`


class DataDisks:
    """The data disks of this host's instances; a key is `<tenant>/<pool>/<instance>`.

    Needs: CAP_SYS_ADMIN for the mark, CAP_CHOWN, and a file system with `trusted.` attributes and
    O_TMPFILE (ext4, XFS, btrfs) below the data root.
    """

    name: ClassVar[str] = "data_disk"
    durability: ClassVar[Durability] = Durability.DURABLE
    swept: ClassVar[bool] = True

    def __init__(self, *, data: str, jail_base: str) -> None:
        self._data = data
        self._jail_base = jail_base

    def path(self, ref: InstanceRef) -> str:
        return f"{self._data}/tenants/{ref.tenant_id}/{instance_path(ref)}/volumes/{DATA_DISK}"

    async def ensure(self, spec: DataDiskSpec) -> DataDisk:
        """Create the disk, or return the recorded one; its size is never changed.

        It gets its name when it is complete: created unnamed, allocated in full, marked, synced,
        then linked. So a guest's writes never need space that the file system may not have.

        Source: open(2) O_TMPFILE, posix_fallocate(3), linkat(2).

        Raises:
            Invalid: the file there is not the disk that hostd recorded or created, is a symlink or
                not a regular file, or has hard links outside the instance's jails. What to do is in
                docs/operations.md, "A data disk that hostd did not create".
            NotFound: the instance's directory, or the recorded disk, is missing.
            Exhausted: the file system is full.
        """
        return await run_in_thread(self._ensure, spec)

    async def unallocated_bytes(self, ref: InstanceRef) -> int:
        """What the disk lacks of its nominal size, e.g. one made sparse by an earlier hostd."""

        def look() -> int:
            try:
                with self._volumes(ref) as volumes:
                    found = volumes.stat(DATA_DISK)
            except NotFound:
                return 0
            return 0 if found is None else _unallocated(found)

        return await run_in_thread(look)

    async def exists(self, key: str) -> bool:
        def look() -> bool:
            try:
                with self._volumes(naming.parse_ref(key)) as volumes:
                    return volumes.stat(DATA_DISK) is not None
            except NotFound:
                return False

        return await run_in_thread(look)

    async def remove(self, key: str) -> None:
        """Undo a creation: unlink a disk that hostd created; any other file of the name stays."""
        await run_in_thread(self._remove, naming.parse_ref(key))

    async def check_wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Raise what `wipe` would raise, before a VMM is stopped; changes nothing.

        The hard links of the instance's jails are allowed here, since they go with the jails.

        Raises:
            Invalid: the recorded disk is missing, or what is there is not the recorded disk, not
                one that hostd created for this instance, or has more hard links.
        """

        def check() -> None:
            try:
                with (
                    self._volumes(ref) as volumes,
                    volumes.marked_file(DATA_DISK) as fd,
                ):
                    _check_recorded(fd, ref, known, volumes.named(DATA_DISK))
                    self._check_links(ref, fd, volumes.named(DATA_DISK))
            except NotFound as error:
                if known is not None:
                    path = self.path(ref)
                    raise Invalid(_missing(path, known), path=path) from error

        await run_in_thread(check)

    async def wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Overwrite, verify and free the blocks of the recorded disk; the empty file stays.

        Its name stays too, so that a repeated wipe finds the disk until the journal knows that it
        is wiped. Without a recorded disk (`known` is None), absent is success.

        Raises:
            Invalid: not the recorded disk, or not one that hostd created for this instance;
                nothing is changed.
            HostFault: the recorded disk is missing, so its data is not wiped; or the blocks did
                not read back as zeros.
        """
        await run_in_slow_thread(lambda token: self._wipe(ref, known, token))

    async def prove(
        self, ref: InstanceRef, owners: Collection[int], used_by: int | None = None
    ) -> DiskProof | None:
        """What can be proved of the disk, for `adopt`; None if there is none. Changes nothing."""

        def look() -> DiskProof | None:
            try:
                with self._volumes(ref) as volumes, volumes.marked_file(DATA_DISK) as fd:
                    links = 1 + self._links_in_jails(ref, os.fstat(fd))
                    path = volumes.named(DATA_DISK)
                    return prove_disk(
                        fd, ref, path, owners=owners, links=links, label=LABEL, used_by=used_by
                    )
            except NotFound:
                return None
            except Invalid as error:  # a symlink, or no regular file
                return DiskProof((Fact("file", False, error.message),), None)

        return await run_in_thread(look)

    def _volumes(self, ref: InstanceRef) -> Directory:
        with open_instance(self._data, ref) as instance:
            return instance.directory("volumes")

    def _ensure(self, spec: DataDiskSpec) -> DataDisk:
        with open_instance(self._data, spec.ref) as instance:
            made = _make_dir(instance)
            with instance.directory("volumes") as volumes:
                if made:  # by descriptor: the name may have been replaced by now
                    owner = os.fstat(instance.fd)
                    os.fchown(volumes.fd, owner.st_uid, owner.st_gid)
                if volumes.stat(DATA_DISK) is None:
                    if spec.known is not None:
                        path = volumes.named(DATA_DISK)
                        raise NotFound(_missing(path, spec.known), path=path)
                    self._make(spec, volumes)
                return self._checked(spec, volumes)

    def _make(self, spec: DataDiskSpec, volumes: Directory) -> None:
        path = volumes.named(DATA_DISK)
        try:
            fd = os.open(f"/proc/self/fd/{volumes.fd}", os.O_TMPFILE | os.O_RDWR, 0o600)
            try:
                os.ftruncate(fd, spec.size_mib * MIB)
                make_ext4(fd, label=LABEL)
                os.posix_fallocate(fd, 0, spec.size_mib * MIB)
                write_mark(fd, spec.ref, new=True)
                os.fsync(fd)
                link_open(fd, volumes.fd, DATA_DISK)
            finally:
                os.close(fd)
            os.fsync(volumes.fd)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise Invalid(
                    f"cannot create data disk {path}: {spec.size_mib} MiB is more than this file"
                    " system allows for a file",
                    path="pool.json: $.instance_resources.data_disk_mib",
                ) from error
            raise of_os_error(error, f"cannot create data disk {path}") from error

    def _checked(self, spec: DataDiskSpec, volumes: Directory) -> DataDisk:
        path = volumes.named(DATA_DISK)
        with volumes.marked_file(DATA_DISK, os.O_RDWR) as fd:
            identity = identity_of(os.fstat(fd))
            mark = read_mark(fd)
            ours = mark is not None and mark.ref == str(spec.ref)
            if spec.known is None and not (ours and mark is not None and mark.new):
                raise Invalid(
                    f"{path} was not created by hostd for this instance: move it away and start"
                    " again for an empty disk (see docs/operations.md)",
                    path=path,
                )
            if spec.known is not None:
                check_identity(fd, spec.known, path, marked=ours)
            self._check_links(spec.ref, fd, path)
            if not ours:
                write_mark(fd, spec.ref, new=False)
            if not spec.asleep and _unallocated(os.fstat(fd)):
                try:
                    os.posix_fallocate(fd, 0, identity.size_bytes)
                except OSError as error:
                    raise of_os_error(error, f"cannot allocate data disk {path}") from error
        return DataDisk(path=path, identity=identity)

    def _check_links(self, ref: InstanceRef, fd: int, path: str) -> None:
        """One hard link here and one in each jail of the instance; one more is not hostd's."""
        found = os.fstat(fd)
        _check_links(path, found, expected=1 + self._links_in_jails(ref, found))

    def _links_in_jails(self, ref: InstanceRef, disk: os.stat_result) -> int:
        if disk.st_nlink == 1 or not os.path.isdir(jails_dir(self._jail_base)):
            return 0
        prefix = naming.jail_id_prefix(ref)
        count = 0
        for jail in os.listdir(jails_dir(self._jail_base)):
            if jail.startswith(prefix):
                with contextlib.suppress(OSError):
                    name = f"{jail_root(self._jail_base, jail)}/{DATA_DISK}"
                    count += os.path.samestat(os.stat(name, follow_symlinks=False), disk)
        return count

    def _remove(self, ref: InstanceRef) -> None:
        try:
            with self._volumes(ref) as volumes:
                with volumes.marked_file(DATA_DISK, os.O_RDWR) as fd:
                    check_mark(fd, ref, volumes.named(DATA_DISK))
                    _unlink_same(volumes, fd)
                os.fsync(volumes.fd)
        except (NotFound, Invalid):
            return
        except OSError as error:
            raise of_os_error(error, f"cannot remove the data disk of {ref}") from error

    def _wipe(self, ref: InstanceRef, known: DiskIdentity | None, token: CancelToken) -> None:
        path = self.path(ref)
        try:
            with (
                self._volumes(ref) as volumes,
                volumes.marked_file(DATA_DISK, os.O_RDWR) as fd,
            ):
                _check_recorded(fd, ref, known, path)
                _check_links(path, os.fstat(fd), expected=1)
                try:
                    wipe.wipe(fd, check=token.check)
                except OSError as error:
                    raise of_os_error(error, f"cannot wipe {path}") from error
                if not wipe.is_empty(fd):
                    raise HostFault(f"{path} still has allocated blocks after the wipe", path=path)
        except NotFound as error:
            if known is not None:
                raise HostFault(f"not wiped: {_missing(path, known)}", path=path) from error


def _missing(path: str, known: DiskIdentity) -> str:
    return (
        f"data disk {path} is missing: expected {described(known)}; move it back"
        " (see docs/operations.md)"
    )


def _check_recorded(fd: int, ref: InstanceRef, known: DiskIdentity | None, path: str) -> None:
    """Check that the open file is the recorded disk, or, without a record, hostd's for `ref`."""
    if known is None:
        check_mark(fd, ref, path)
    else:
        mark = read_mark(fd)
        check_identity(fd, known, path, marked=mark is not None and mark.ref == str(ref))


def _check_links(path: str, found: os.stat_result, *, expected: int) -> None:
    if found.st_nlink > expected:
        raise Invalid(f"{path} has {found.st_nlink} hard links, expected {expected}", path=path)


def _unallocated(found: os.stat_result) -> int:
    return max(0, found.st_size - found.st_blocks * BLOCK_BYTES)


def _make_dir(instance: Directory) -> bool:
    """Create `volumes` unless it exists; true if it was created."""
    try:
        os.mkdir("volumes", 0o755, dir_fd=instance.fd)
    except FileExistsError:
        return False
    except OSError as error:
        raise of_os_error(error, f"cannot create {instance.named('volumes')}") from error
    return True


def _unlink_same(volumes: Directory, fd: int) -> None:
    """Unlink the name if it still belongs to the open file."""
    found = volumes.stat(DATA_DISK)
    if found is not None and os.path.samestat(found, os.fstat(fd)):
        volumes.unlink(DATA_DISK)
