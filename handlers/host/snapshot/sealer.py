"""Sealing: the VMM's files are moved out of its jail, verified, synced and described.

The jail's directory belongs to the VMM's uid, and a guest may have taken its VMM over: no file in
it is trusted by its name.
"""

import contextlib
import errno
import os
import stat
import time

from handlers.errors import Failure, HostFault, Invalid, of_os_error
from handlers.host.jail.layout import JailLayout, JailMetadata
from handlers.host.linux.checksummed_json import write_sealed
from handlers.host.linux.file_id import FileId
from handlers.host.linux.rmtree import remove_tree
from handlers.host.linux.sparse_copy import copy_sparse, sha256_of
from handlers.host.linux.state_dirs import make_dir, sync_dir
from handlers.host.snapshot.discards import FILE, discard_dir
from handlers.host.snapshot.manifest import (
    UNPUBLISHED,
    DiskFacts,
    KeptDrive,
    Manifest,
    SnapshotDir,
)
from handlers.host.snapshot.memory_file import Memories
from handlers.host.storage import wipe
from handlers.host.storage.agentd_files import open_tenant, split_tenant_path
from handlers.host.storage.disk_ownership import check_identity, read_mark
from handlers.host.storage.drive_images import CONFIG, SECRETS
from handlers.jail_names import (
    CONFIG_DRIVE,
    MEMORY,
    SECRETS_DIR,
    SECRETS_DRIVE,
    SNAPSHOT_DIR,
    STATE,
)
from handlers.specs import MIB, SnapshotFacts
from schemas.records import DiskIdentity

STATE_MAX_BYTES = 64 * MIB
DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Sealer:
    """Seals snapshots of jails into directories below `base`."""

    def __init__(
        self,
        *,
        data: str,
        base: str,
        layout: JailLayout,
        memories: Memories,
        cpu_model: str,
        kernel_release: str,
    ) -> None:
        self._data = data
        self._base = base
        self._layout = layout
        self._memories = memories
        self._cpu_model = cpu_model
        self._kernel_release = kernel_release

    def seal(self, jail_id: str, facts: SnapshotFacts) -> Manifest:
        """See `Snapshots.seal`; the manifest is on disk, but not yet under its name."""
        directory = SnapshotDir(self._base, facts.ref, facts.number)
        jail = self._layout.read_metadata(jail_id)
        if jail is None or jail.ref != facts.ref:
            raise HostFault(f"cannot seal: jail {jail_id} does not belong to {facts.ref}")
        if directory.published:
            raise HostFault(f"{directory.path} is published already", path=directory.path)
        try:
            discard_dir(directory)  # of an interrupted sleep
            make_dir(directory.path, sync=True)
            manifest = self._sealed(directory, jail_id, jail, facts)
            write_sealed(directory.file(UNPUBLISHED), manifest)
            sync_dir(directory.path)
        except (Failure, OSError) as error:
            with contextlib.suppress(OSError):
                discard_dir(directory)
            if isinstance(error, OSError):
                raise of_os_error(error, f"cannot seal {directory.path}") from error
            raise
        return manifest

    def _sealed(
        self, directory: SnapshotDir, jail_id: str, jail: JailMetadata, facts: SnapshotFacts
    ) -> Manifest:
        with contextlib.ExitStack() as opened:
            source = os.open(f"{self._layout.root(jail_id)}/{SNAPSHOT_DIR}", DIR)
            opened.callback(os.close, source)
            state = _take(source, STATE, directory, jail.uid)
            opened.callback(os.close, state)
            memory = _take(source, MEMORY, directory, jail.uid)
            opened.callback(os.close, memory)
            state_bytes, mem_bytes = os.fstat(state).st_size, os.fstat(memory).st_size
            if mem_bytes != facts.mem_mib * MIB:
                raise HostFault(
                    f"memory file: expected {facts.mem_mib} MiB, found {mem_bytes} bytes"
                )
            if not 0 < state_bytes <= STATE_MAX_BYTES:
                raise HostFault(
                    f"state file: expected 1 to {STATE_MAX_BYTES} bytes, found {state_bytes}"
                )
            kept = self._keep_drives(directory, jail_id, jail) if facts.keep_drives else {}
            self._memories.record(directory, memory)
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
                disk=disk_facts(self._data, facts.data_disk_path, facts.disk)
                if facts.data_disk_path
                else None,
                has_secrets=jail.has_secrets,
                kept=kept,
            )

    def _keep_drives(
        self, directory: SnapshotDir, jail_id: str, jail: JailMetadata
    ) -> dict[str, KeptDrive]:
        """Copies, since the guest continues with the originals if the sleep fails later."""
        root = self._layout.root(jail_id)
        kept: dict[str, KeptDrive] = {}
        if jail.has_config:
            source = os.open(root, DIR)
            try:
                expected = jail.ours[CONFIG_DRIVE]
                kept[CONFIG_DRIVE] = _keep(
                    source, CONFIG_DRIVE, directory, CONFIG.size_bytes, expected
                )
            finally:
                os.close(source)
        if jail.has_secrets:
            source = os.open(f"{root}/{SECRETS_DIR}", DIR)
            try:
                kept[SECRETS_DRIVE] = _keep(
                    source, SECRETS_DRIVE, directory, SECRETS.size_bytes, None
                )
            finally:
                os.close(source)
        return kept


def fresh_dir(root: str, name: str, *, uid: int, gid: int, mode: int) -> None:
    """Replace whatever has that name in a jail by an empty directory."""
    try:
        parent = os.open(root, DIR)
        try:
            remove_tree(parent, name)
            os.mkdir(name, 0o700, dir_fd=parent)
            directory = os.open(name, DIR, dir_fd=parent)
            try:
                os.fchown(directory, uid, gid)
                os.fchmod(directory, mode)
            finally:
                os.close(directory)
        finally:
            os.close(parent)
    except OSError as error:
        raise of_os_error(error, f"cannot create the directory {name} in {root}") from error


def disk_facts(data: str, path: str, known: DiskIdentity | None = None) -> DiskFacts:
    """The data disk as it is now, opened beneath the tenant directory. Raises NotFound, Invalid."""
    shared = split_tenant_path(data, path)
    if shared is None:
        raise Invalid(f"invalid path of a data disk: {path} is not below {data}/tenants", path=path)
    tenant_id, below = shared
    with open_tenant(data, tenant_id) as tenant, tenant.marked_file(below) as fd:
        if known is not None:
            check_identity(fd, known, path, marked=read_mark(fd) is not None)
        return DiskFacts.of(path, os.fstat(fd))


def wipe_kept(path: str) -> None:
    """Wipe and unlink an image kept with a snapshot; absent is success."""
    try:
        fd = os.open(path, FILE)
    except FileNotFoundError:
        return
    try:
        wipe.wipe(fd)
    finally:
        os.close(fd)
    os.unlink(path)


def _take(source: int, name: str, directory: SnapshotDir, uid: int) -> int:
    """Move one of the VMM's files into the snapshot, root:root 0600, synced; stays open."""
    try:
        fd = os.open(name, FILE, dir_fd=source)
    except FileNotFoundError as error:
        raise HostFault(f"snapshot file {name} is missing: the VMM did not write it") from error
    with contextlib.ExitStack() as unless_taken:
        unless_taken.callback(os.close, fd)
        found = os.fstat(fd)
        if not (stat.S_ISREG(found.st_mode) and found.st_uid == uid and found.st_nlink == 1):
            raise HostFault(
                f"snapshot file {name}: wrong owner or link count: expected a regular file of uid"
                f" {uid} with 1 hard link, found mode {found.st_mode:o}, uid {found.st_uid},"
                f" {found.st_nlink} hard links"
            )
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o600)
        _move(source, name, directory)
        if not os.path.samestat(os.stat(directory.file(name), follow_symlinks=False), found):
            raise HostFault(f"snapshot file {name} was replaced during the move")
        os.fsync(fd)
        unless_taken.pop_all()
    return fd


def _move(source: int, name: str, directory: SnapshotDir) -> None:
    try:
        os.rename(name, directory.file(name), src_dir_fd=source)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise HostFault(
            f"{directory.base} and the jails are on different file systems: set [vmm] jail_base",
            path=directory.base,
        ) from error


def _keep(
    source: int, name: str, directory: SnapshotDir, size_bytes: int, expected: FileId | None
) -> KeptDrive:
    original = os.open(
        name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source
    )
    try:
        found = os.fstat(original)
        known = expected is None or FileId.of(found) == expected
        if not (stat.S_ISREG(found.st_mode) and known and found.st_size == size_bytes):
            raise HostFault(f"{name} in the jail is not the drive image that hostd created")
        copy = os.open(directory.file(name), NEW, 0o600)
        try:
            copy_sparse(original, copy)
            os.fsync(copy)
            return KeptDrive(os.fstat(copy).st_size, sha256_of(copy))
        finally:
            os.close(copy)
    finally:
        os.close(original)
