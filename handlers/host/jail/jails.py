"""The jail of one launch: everything the VMM will see, made before the jailer starts.

Kernel and disks are hard links, never copies: a write to a copied disk would be lost with the jail.
A jail can be removed whatever the VMM did to its directory.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Generator
from typing import ClassVar

import msgspec

from handlers.errors import Conflict, Failure, HostFault, of_os_error
from handlers.host.jail import secrets_tmpfs
from handlers.host.jail.layout import JailLayout, JailMetadata, launch_of
from handlers.host.jail.logs import JailLogs
from handlers.host.jail.warm_jails import WarmJails
from handlers.host.linux.file_id import FileId
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.procfs import list_pids
from handlers.host.linux.rmtree import remove_names, remove_tree
from handlers.host.linux.syscalls import link_open
from handlers.host.storage import disk_ownership, wipe
from handlers.host.storage.agentd_files import open_tenant, split_tenant_path
from handlers.host.storage.drive_images import CONFIG, SECRETS, SmallDrives, copy_drive
from handlers.jail_names import (
    CONFIG_DRIVE,
    DATA_DISK,
    LOG,
    MEMORY,
    METADATA,
    ROOT,
    SECRETS_DIR,
    SERIAL,
    STATE,
)
from handlers.mechanism import Durability
from handlers.specs import Jail, JailFile, JailSpec
from schemas import naming
from schemas.requests import InstanceRef

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Jails:
    """Makes and removes jails and reads their logs; the key is the jail ID.

    Source: docs/jailer.md of Firecracker, linkat(2).
    Needs: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_SYS_ADMIN.
    """

    name: ClassVar[str] = "jail"
    durability: ClassVar[Durability] = Durability.DURABLE
    swept: ClassVar[bool] = True

    def __init__(self, *, data: str, state: str, jail_base: str, log_bytes: int = 1 << 20) -> None:
        self._data = data
        self._layout = JailLayout(jail_base)
        self._logs = JailLogs(self._layout, state=state, limit_bytes=log_bytes)
        self._drives = SmallDrives()
        self._warm = WarmJails(jail_base)

    async def ensure(self, spec: JailSpec) -> Jail:
        """Make the jail, all or nothing; an incomplete one is removed first.

        Raises:
            Conflict: a jail of that ID belongs to another instance or uid.
            Invalid: the data disk is not one that hostd made for the instance.
            HostFault: a file is on another file system than the jails.
            Exhausted: the disk is full.
        """
        return await run_in_thread(self._ensure, spec)

    async def exists(self, key: str) -> bool:
        return os.path.lexists(self._layout.directory(key))

    async def remove(self, key: str) -> None:
        """Remove the jail; its VMM must be gone. Keeps the log; the data disk is root's again."""
        await run_in_thread(self._remove, key)

    async def launches(self, ref: InstanceRef) -> list[int]:
        """The launches of an instance with a jail or a kept log, newest first."""
        return await run_in_thread(self._logs.launches, ref)

    async def read_log(self, ref: InstanceRef, launch: int | None = None) -> bytes:
        return await run_in_thread(self._logs.read, ref, launch)

    async def bound_logs(self) -> int:
        """Cut the logs of live jails to their limit; to be called every few seconds.

        Returns the bytes freed.
        """
        return await run_in_thread(self._logs.bound)

    async def remove_unused(self, key: str) -> None:
        """As `remove`, but if something may still need it: Conflict, and nothing is changed.

        A process whose root it is needs it, and a data disk whose only name is in it. The blocks
        of a guest's memory are discarded, the log is kept.
        """

        def unused() -> None:
            root = FileId.at(self._layout.root(key))
            if root is not None and (pids := _pids_in(root)):
                raise Conflict(f"jail {key} is the root directory of process {pids[0]}")
            with self._layout.file(key, DATA_DISK) as fd:
                if fd is not None and os.fstat(fd).st_nlink == 1:
                    raise Conflict(
                        f"jail {key} has the only name of a data disk, {DATA_DISK}: link it to "
                        "where it belongs, or delete it"
                    )
            self._remove(key)

        await run_in_thread(unused)

    async def list_ids(self) -> list[str]:
        """All jails on this host, incomplete ones included."""
        return await run_in_thread(self._layout.list_ids)

    async def metadata(self, jail_id: str) -> JailMetadata | None:
        return await run_in_thread(self._layout.read_metadata, jail_id)

    async def set_released(self, jail_id: str, *, released: bool) -> None:
        def note() -> None:
            found = self._layout.read_metadata(jail_id)
            if found is not None and found.released != released:
                noted = msgspec.structs.replace(found, released=released)
                self._layout.write_metadata(jail_id, noted)

        await run_in_thread(note)

    # -- making --------------------------------------------------------------------------------

    def _ensure(self, spec: JailSpec) -> Jail:
        root = self._layout.root(spec.jail_id)
        metadata = self._layout.read_metadata(spec.jail_id)
        if metadata is not None and metadata.complete:
            if (metadata.ref, metadata.uid) != (spec.ref, spec.uid):
                raise Conflict(
                    f"jail {spec.jail_id} belongs to another instance or uid: expected "
                    f"{spec.ref} with uid {spec.uid}, found {metadata.ref} with uid {metadata.uid}",
                    detail={"uid": metadata.uid},
                )
            return Jail(root, has_config=metadata.has_config, has_secrets=metadata.has_secrets)
        self._remove(spec.jail_id, keep_log=False)
        try:
            return self._make(spec, root)
        except (Failure, OSError) as error:
            with contextlib.suppress(Failure):
                self._remove(spec.jail_id, keep_log=False)
            if isinstance(error, OSError):
                raise of_os_error(error, f"cannot make jail {spec.jail_id}") from error
            raise

    def _make(self, spec: JailSpec, root: str) -> Jail:
        directory = self._layout.directory(spec.jail_id)
        has_secrets = spec.secrets is not None or spec.kept_secrets is not None
        has_config = spec.config is not None or spec.kept_config is not None
        metadata = JailMetadata(
            ref=spec.ref,
            uid=spec.uid,
            launch=launch_of(spec.jail_id),
            complete=False,
            has_config=has_config,
            has_secrets=has_secrets,
            disks=tuple(file.source for file in spec.files if file.writable),
            record=spec.record,
        )
        ours: dict[str, FileId] = {}
        # The metadata before anything else, so that a disk given to the uid is given back even
        # after kill -9.
        log = spec.warm and self._warm.take(spec.warm, spec.jail_id, metadata)
        if log:
            ours[LOG] = log
        else:
            self._layout.make_base()
            os.mkdir(directory, 0o700)
            self._layout.write_metadata(spec.jail_id, metadata)
            os.mkdir(root, 0o700)
        with Directory.trusted(root) as opened:
            for file in spec.files:
                self._link(spec, file, opened.fd)
        for name in (LOG, SERIAL) if spec.serial else (LOG,):
            if name not in ours:
                ours[name] = _new_file(f"{root}/{name}", 0o600, uid=spec.uid)
        if has_config:
            ours[CONFIG_DRIVE] = self._make_config(spec, f"{root}/{CONFIG_DRIVE}")
        if has_secrets:
            secrets = f"{root}/{SECRETS_DIR}"
            with secrets_tmpfs.new_drive(secrets, spec.uid, mounted=bool(log)) as fd:
                if spec.kept_secrets is None:
                    self._drives.write(fd, SECRETS, spec.secrets or b"")
                else:
                    copy_drive(spec.kept_secrets, fd)
        os.chown(root, spec.uid, spec.uid)
        metadata = msgspec.structs.replace(metadata, complete=True, ours=ours)
        self._layout.write_metadata(spec.jail_id, metadata)
        return Jail(root, has_config=has_config, has_secrets=has_secrets)

    def _link(self, spec: JailSpec, file: JailFile, root: int) -> None:
        with self._source(file.source, writable=file.writable) as fd:
            if file.disk is not None:
                disk_ownership.check_identity(fd, file.disk, file.source)
                disk_ownership.check_mark(fd, spec.ref, file.source)
                disk_ownership.write_mark(fd, spec.ref, new=False)
                os.fchmod(fd, 0o600)
                os.fchown(fd, spec.uid, spec.uid)
            try:
                link_open(fd, root, file.name)
                linked = os.stat(file.name, dir_fd=root, follow_symlinks=False)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                raise HostFault(
                    f"cannot link {file.source} into {self._layout.base}: they are on different "
                    "file systems; put [vmm] jail_base, [paths] state and data on one",
                    path=file.source,
                ) from error
            if not os.path.samestat(linked, os.fstat(fd)):
                raise HostFault(f"{root}/{file.name} is not the file that was linked there")

    @contextlib.contextmanager
    def _source(self, source: str, *, writable: bool) -> Generator[int, None, None]:
        """Open what is to be linked; below the data root through `openat2`, as anything there."""
        shared = split_tenant_path(self._data, source)
        if shared is not None:
            tenant_id, below = shared
            with open_tenant(self._data, tenant_id) as tenant:
                if writable:
                    with tenant.marked_file(below, os.O_RDWR) as fd:
                        yield fd
                else:
                    with tenant.file(below) as fd:
                        yield fd
            return
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def _make_config(self, spec: JailSpec, path: str) -> FileId:
        fd = os.open(path, NEW, 0o400)
        try:
            if spec.kept_config is None:
                self._drives.write(fd, CONFIG, spec.config or b"")
            else:
                copy_drive(spec.kept_config, fd)
            os.fchmod(fd, 0o444)
            return FileId.of(os.fstat(fd))
        finally:
            os.close(fd)

    # -- removing ------------------------------------------------------------------------------

    def _remove(self, jail_id: str, *, keep_log: bool = True) -> None:
        path = self._layout.directory(jail_id)
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise of_os_error(error, f"cannot open jail {jail_id}") from error
        metadata = self._layout.read_metadata(jail_id)
        try:
            secrets_tmpfs.unmount_secrets(f"{path}/{ROOT}/{SECRETS_DIR}")
            if metadata is not None and keep_log:
                self._logs.keep(jail_id, metadata)
            self._release_disks(jail_id, metadata.disks if metadata is not None else ())
            remove_tree(directory, ROOT, before_unlink=_discard_memory)
            remove_names(directory, keep=frozenset({METADATA}))
            remove_names(directory)
            os.rmdir(path)
        except OSError as error:
            raise of_os_error(error, f"cannot remove jail {jail_id}") from error
        finally:
            os.close(directory)

    def _release_disks(self, jail_id: str, sources: tuple[str, ...]) -> None:
        """Give data disks back to root, unless a newer jail of the instance has linked them.

        Searched both at the source of the link and in the jail: agentd may have moved the one, the
        VMM the other. hostd's mark distinguishes them from other files.
        """
        with self._layout.file(jail_id, DATA_DISK, os.O_RDWR) as fd:
            if fd is not None:
                self._release(jail_id, fd)
        for source in sources:
            with (
                contextlib.suppress(Failure),
                self._source(source, writable=True) as fd,
            ):
                self._release(jail_id, fd)

    def _release(self, jail_id: str, disk: int) -> None:
        mark = disk_ownership.read_mark(disk)
        if mark is None:
            return
        ref = naming.parse_ref(mark.ref)
        if naming.jail_id(ref, launch_of(jail_id)) == jail_id and not self._used(
            jail_id, ref, disk
        ):
            os.fchown(disk, 0, 0)
            os.fchmod(disk, 0o600)

    def _used(self, jail_id: str, ref: InstanceRef, disk: int) -> bool:
        for other in self._layout.ids_of(ref):
            if other != jail_id:
                with self._layout.file(other, DATA_DISK) as fd:
                    if fd is not None and os.path.sameopenfile(fd, disk):
                        return True
        return False


def _new_file(path: str, mode: int, *, uid: int) -> FileId:
    fd = os.open(path, NEW, mode)
    try:
        os.fchown(fd, uid, uid)
        return FileId.of(os.fstat(fd))
    finally:
        os.close(fd)


def _pids_in(root: FileId) -> list[int]:
    """The processes that have this root directory."""
    found: list[int] = []
    for pid in list_pids():
        with contextlib.suppress(PermissionError):  # of another user namespace
            if FileId.at(f"/proc/{pid}/root") == root:
                found.append(pid)
    return found


def _discard_memory(directory: int, name: str) -> None:
    """Discard the blocks of a memory file before its last name goes: they hold the guest's RAM."""
    if name not in {MEMORY, STATE}:
        return
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        fd = os.open(name, flags, dir_fd=directory)
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                wipe.discard(fd)
        finally:
            os.close(fd)
