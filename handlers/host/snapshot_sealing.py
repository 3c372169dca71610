"""From the VMM's files in its jail to a snapshot of hostd's own: taken, checked, synced, described.

The jail's folder belongs to the VMM's uid, and a VMM may have been taken over by its guest: nothing
in it is believed by its name.
"""

import contextlib
import errno
import os
import stat
import time

from handlers.errors import Failure, HostFault, Invalid
from handlers.host import disk_wipe
from handlers.host.copies import copy_sparse, sha256_of
from handlers.host.errnos import os_failure
from handlers.host.jail_folders import (
    CONFIG_DRIVE,
    SECRETS_DRIVE,
    SECRETS_FOLDER,
    SNAPSHOT_FOLDER,
    FileId,
    JailFacts,
    JailFolders,
)
from handlers.host.memory_facts import Memories
from handlers.host.sealed_json import write_sealed
from handlers.host.shared_files import open_tenant
from handlers.host.small_drives import CONFIG, SECRETS
from handlers.host.snapshot_manifest import (
    MANIFEST,
    MEMORY,
    MEMORY_FACTS,
    STATE,
    UNPUBLISHED,
    DiskFacts,
    KeptDrive,
    Manifest,
    SnapshotFolder,
)
from handlers.host.state_folders import make_folder, sync_folder
from handlers.host.trees import remove_path, remove_tree
from handlers.specs import SnapshotFacts

STATE_MAX_BYTES = 64 << 20
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Sealer:
    """Seals snapshots of jails into folders below `base`."""

    def __init__(
        self,
        *,
        data: str,
        base: str,
        folders: JailFolders,
        memories: Memories,
        cpu_model: str,
        kernel_release: str,
    ) -> None:
        self._data = data
        self._base = base
        self._folders = folders
        self._memories = memories
        self._cpu_model = cpu_model
        self._kernel_release = kernel_release

    def seal(self, jail_id: str, facts: SnapshotFacts) -> Manifest:
        """See `Snapshots.seal`; the manifest is on disk, but not yet under its name."""
        folder = SnapshotFolder(self._base, facts.ref, facts.number)
        jail = self._folders.facts(jail_id)
        if jail is None or jail.ref != facts.ref:
            raise HostFault(f"{jail_id} is no jail of {facts.ref}")
        if folder.published:
            raise HostFault(f"{folder.path} is published already", path=folder.path)
        try:
            discard_folder(folder)  # of a sleep that was cut short
            make_folder(folder.path, sync=True)
            manifest = self._sealed(folder, jail_id, jail, facts)
            write_sealed(folder.file(UNPUBLISHED), manifest)
            sync_folder(folder.path)
        except (Failure, OSError) as error:
            with contextlib.suppress(OSError):
                discard_folder(folder)
            if isinstance(error, OSError):
                raise os_failure(error, f"cannot seal {folder.path}") from error
            raise
        return manifest

    def _sealed(
        self, folder: SnapshotFolder, jail_id: str, jail: JailFacts, facts: SnapshotFacts
    ) -> Manifest:
        with contextlib.ExitStack() as opened:
            source = os.open(f"{self._folders.root(jail_id)}/{SNAPSHOT_FOLDER}", FOLDER)
            opened.callback(os.close, source)
            state = _take(source, STATE, folder, jail.uid)
            opened.callback(os.close, state)
            memory = _take(source, MEMORY, folder, jail.uid)
            opened.callback(os.close, memory)
            state_bytes, mem_bytes = os.fstat(state).st_size, os.fstat(memory).st_size
            if mem_bytes != facts.mem_mib << 20:
                raise HostFault(f"the memory file is {mem_bytes} bytes, not {facts.mem_mib} MiB")
            if not 0 < state_bytes <= STATE_MAX_BYTES:
                raise HostFault(f"the state file is {state_bytes} bytes")
            kept = self._keep_drives(folder, jail_id, jail) if facts.keep_drives else {}
            self._memories.record(folder, memory)
            return Manifest(
                ref=facts.ref,
                number=facts.number,
                launch=facts.launch,
                revision=facts.revision,
                vcpus=facts.vcpus,
                mem_mib=facts.mem_mib,
                vmm_version=facts.vmm_version,
                cpu_model=self._cpu_model,
                kernel_release=self._kernel_release,
                sealed_at_ms=time.time_ns() // 1_000_000,
                state_bytes=state_bytes,
                state_sha256=sha256_of(state),
                mem_bytes=mem_bytes,
                disk=disk_facts(self._data, facts.data_disk_path) if facts.data_disk_path else None,
                has_secrets=jail.has_secrets,
                kept=kept,
            )

    def _keep_drives(
        self, folder: SnapshotFolder, jail_id: str, jail: JailFacts
    ) -> dict[str, KeptDrive]:
        """Copies, for the guest goes on with the originals if the sleep fails after all."""
        root = self._folders.root(jail_id)
        kept: dict[str, KeptDrive] = {}
        if jail.has_config:
            source = os.open(root, FOLDER)
            try:
                expected = jail.ours[CONFIG_DRIVE]
                kept[CONFIG_DRIVE] = _keep(
                    source, CONFIG_DRIVE, folder, CONFIG.size_bytes, expected
                )
            finally:
                os.close(source)
        if jail.has_secrets:
            source = os.open(f"{root}/{SECRETS_FOLDER}", FOLDER)
            try:
                kept[SECRETS_DRIVE] = _keep(source, SECRETS_DRIVE, folder, SECRETS.size_bytes, None)
            finally:
                os.close(source)
        return kept


def fresh_folder(root: str, name: str, *, uid: int, gid: int, mode: int) -> None:
    """An empty folder in a jail, whatever was there by that name."""
    try:
        parent = os.open(root, FOLDER)
        try:
            remove_tree(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent)
            folder = os.open(name, FOLDER, dir_fd=parent)
            try:
                os.fchown(folder, uid, gid)
                os.fchmod(folder, mode)
            finally:
                os.close(folder)
        finally:
            os.close(parent)
    except OSError as error:
        raise os_failure(error, f"cannot make the folder {name} in {root}") from error


def disk_facts(data: str, path: str) -> DiskFacts:
    """The data disk as it is now, opened beneath its tenant's folder. Raises NotFound, Invalid."""
    tenants = f"{data}/tenants/"
    if not path.startswith(tenants):
        raise Invalid(f"{path} is not below {tenants}", path=path)
    tenant, _, rest = path.removeprefix(tenants).partition("/")
    with open_tenant(data, tenant) as folder, folder.file(rest) as fd:
        return DiskFacts.of(path, os.fstat(fd))


def discard_folder(folder: SnapshotFolder) -> None:
    """Unpublish first, so that half of it is never taken for one; then free the blocks, unlink.

    Blocks of a memory file that a jail still links are left alone: a running VM may be reading its
    memory from there. They are freed with the jail.
    """
    if not os.path.isdir(folder.path):
        return
    for name in (MANIFEST, UNPUBLISHED, MEMORY_FACTS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder.file(name))
    sync_folder(folder.path)
    for name in os.listdir(folder.path):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            fd = os.open(folder.file(name), FILE)
            try:
                found = os.fstat(fd)
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                    disk_wipe.discard(fd)
            finally:
                os.close(fd)
    remove_path(folder.path)


def _take(source: int, name: str, folder: SnapshotFolder, uid: int) -> int:
    """Move one of the VMM's files into the snapshot, root:root 0600, synced; stays open."""
    try:
        fd = os.open(name, FILE, dir_fd=source)
    except FileNotFoundError as error:
        raise HostFault(f"the VMM left no {name} file") from error
    with contextlib.ExitStack() as unless_taken:
        unless_taken.callback(os.close, fd)
        found = os.fstat(fd)
        if not (stat.S_ISREG(found.st_mode) and found.st_uid == uid and found.st_nlink == 1):
            raise HostFault(f"the VMM's {name} file is not its own")
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o600)
        _move(source, name, folder)
        if not os.path.samestat(os.stat(folder.file(name), follow_symlinks=False), found):
            raise HostFault(f"the VMM's {name} file was exchanged while it was taken")
        os.fsync(fd)
        unless_taken.pop_all()
    return fd


def _move(source: int, name: str, folder: SnapshotFolder) -> None:
    try:
        os.rename(name, folder.file(name), src_dir_fd=source)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise HostFault(
            f"{folder.base} and the jails are on different file systems: set [vmm] jail_base",
            path=folder.base,
        ) from error


def _keep(
    source: int, name: str, folder: SnapshotFolder, size_bytes: int, expected: FileId | None
) -> KeptDrive:
    original = os.open(
        name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source
    )
    try:
        found = os.fstat(original)
        known = expected is None or FileId.of(found) == expected
        if not (stat.S_ISREG(found.st_mode) and known and found.st_size == size_bytes):
            raise HostFault(f"{name} in the jail is not the drive that hostd made")
        copy = os.open(folder.file(name), NEW, 0o600)
        try:
            copy_sparse(original, copy)
            os.fsync(copy)
            return KeptDrive(os.fstat(copy).st_size, sha256_of(copy))
        finally:
            os.close(copy)
    finally:
        os.close(original)
