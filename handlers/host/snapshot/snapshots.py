"""Memory snapshots: moved out of the jail, sealed, published, verified, linked again, deleted.

A snapshot is a directory with a manifest: its rename is Sleep's point of no return. Files without
one are leftovers. Nothing is loaded that cannot be shown to be what was saved.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from handlers.errors import HostFault, NotFound, of_os_error
from handlers.host.jail.layout import JailLayout
from handlers.host.linux.file_threads import run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_tree
from handlers.host.linux.sparse_copy import sha256_of
from handlers.host.linux.state_dirs import remove_empty, sync_dir
from handlers.host.linux.syscalls import link_open
from handlers.host.snapshot.discards import MemoryFreer, be_nice, discard_dir, unname_dir
from handlers.host.snapshot.manifest import (
    BLOCK_BYTES,
    CONSUMED,
    MANIFEST,
    UNPUBLISHED,
    Manifest,
    SnapshotDir,
    numbers_of,
)
from handlers.host.snapshot.memory_file import Memories
from handlers.host.snapshot.sealer import Sealer, disk_facts, fresh_dir, wipe_kept
from handlers.interfaces import Discarded
from handlers.jail_names import (
    CONFIG_DRIVE,
    MEMORY,
    SECRETS_DRIVE,
    SNAPSHOT_DIR,
    STATE,
    WOKEN_DIR,
    in_jail,
)
from handlers.specs import SnapshotFacts, SnapshotInfo
from schemas.requests import InstanceRef


class Snapshots:
    """Snapshots below `<state>/snapshots`. `close` stops a hash that is being computed."""

    def __init__(
        self, *, data: str, state: str, jail_base: str, cpu_model: str, kernel_release: str
    ) -> None:
        self._data = data
        self._base = f"{state}/snapshots"
        self._layout = JailLayout(jail_base)
        self._cpu_model = cpu_model
        self._memories = Memories()
        self._sealer = Sealer(
            data=data,
            base=self._base,
            layout=self._layout,
            memories=self._memories,
            cpu_model=cpu_model,
            kernel_release=kernel_release,
        )
        self._stop = threading.Event()
        # One at a time and at the lowest priority: hashing must never slow a wake.
        self._hashing = ThreadPoolExecutor(1, "hash-memory", initializer=be_nice)
        self._freer = MemoryFreer()

    def close(self) -> None:
        """Stop hashing; a hash not finished is not noted and can be taken again."""
        self._stop.set()
        self._hashing.shutdown()
        self._freer.close()

    # -- Sleep ---------------------------------------------------------------------------------

    async def begin_write(self, jail_id: str, uid: int) -> tuple[str, str]:
        """An empty directory of the uid's in the jail, for the VMM to write to.

        Returns the paths of state and memory as the VMM sees them.
        """
        root = self._layout.root(jail_id)
        await run_in_thread(fresh_dir, root, SNAPSHOT_DIR, uid=uid, gid=uid, mode=0o700)
        return in_jail(SNAPSHOT_DIR, STATE), in_jail(SNAPSHOT_DIR, MEMORY)

    async def seal(self, jail_id: str, facts: SnapshotFacts) -> SnapshotInfo:
        """Move the files out of the jail, hash the state, write the manifest beside its name.

        All or nothing: what cannot be sealed is removed. Everything is synced when it returns.

        Raises:
            HostFault: the VMM's files are not a whole snapshot, or not the VMM's own.
            Exhausted: the disk is full.
        """
        directory = SnapshotDir(self._base, facts.ref, facts.number)
        return await run_in_thread(lambda: directory.info(self._sealer.seal(jail_id, facts)))

    async def publish(self, ref: InstanceRef, number: int) -> None:
        """Rename the manifest into place, durably. Published already is success."""
        directory = SnapshotDir(self._base, ref, number)

        def rename() -> None:
            try:
                if not directory.published:
                    os.rename(directory.file(UNPUBLISHED), directory.file(MANIFEST))
                sync_dir(directory.path)
            except OSError as error:
                raise of_os_error(error, f"cannot publish {directory.path}") from error

        await run_in_thread(rename)

    async def hash_memory(self, ref: InstanceRef, number: int) -> str | None:
        """Take the memory's sha256, once, and bind it to the file; None if it is gone by then.

        Raises:
            HostFault: the file is not what was sealed any more.
        """
        directory = SnapshotDir(self._base, ref, number)
        stop = threading.Event()

        def work() -> str | None:
            return None if self._stop.is_set() else self._memories.hash(directory, stop)

        if self._stop.is_set():
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._hashing, work)
        finally:
            stop.set()

    async def is_hashed(self, ref: InstanceRef, number: int) -> bool:
        directory = SnapshotDir(self._base, ref, number)
        return await run_in_thread(
            lambda: not directory.published or self._memories.is_hashed(directory)
        )

    # -- Wake ----------------------------------------------------------------------------------

    async def read(self, ref: InstanceRef) -> SnapshotInfo | None:
        """The published snapshot with the highest number, or None.

        Raises:
            HostFault: its manifest is damaged.
        """

        def look() -> SnapshotInfo | None:
            for number in numbers_of(self._base, ref):
                directory = SnapshotDir(self._base, ref, number)
                if directory.published:
                    return directory.info(directory.manifest())
            return None

        return await run_in_thread(look)

    async def verify(self, ref: InstanceRef, number: int) -> SnapshotInfo:
        """Check all that can be checked without a VMM; see docs/contract.md, snapshot truth.

        Raises:
            HostFault: names what differs. The snapshot stays; once the file is restored it can be
                woken.
        """
        return await run_in_thread(self._verify, SnapshotDir(self._base, ref, number))

    async def link(self, jail_id: str, uid: int, info: SnapshotInfo) -> tuple[str, str]:
        """Hard-link state and memory into the jail, for the uid to read and not to write.

        Returns their paths as the VMM sees them.
        """
        await run_in_thread(self._link, jail_id, uid, info)
        return in_jail(WOKEN_DIR, STATE), in_jail(WOKEN_DIR, MEMORY)

    async def restore_ownership(self, ref: InstanceRef, number: int) -> None:
        """After a failed wake, before or after its jail is gone: the files are root's again.

        A file that is gone needs none: what is wrong with a snapshot is for `verify` to say.
        """
        directory = SnapshotDir(self._base, ref, number)

        def restore() -> None:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.chown(directory.file(STATE), 0, 0)
                    os.chmod(directory.file(STATE), 0o600)
                if os.path.exists(directory.file(MEMORY)):
                    self._memories.restore_ownership(directory)
            except OSError as error:
                raise of_os_error(error, f"cannot restore the owner of {directory.path}") from error

        await run_in_thread(restore)

    async def mark_consumed(self, ref: InstanceRef, number: int) -> None:
        """Unpublish it durably, so that it cannot be woken again; absent is success.

        State and memory stay, since the running VM maps the memory; the deletions remove them
        later. Images kept with it are wiped and removed: the jail has copies of its own, and no
        secret is on a disk while the instance runs.
        """
        directory = SnapshotDir(self._base, ref, number)

        def rename() -> None:
            try:
                if directory.published:
                    os.rename(directory.file(MANIFEST), directory.file(CONSUMED))
                    sync_dir(directory.path)
                for name in (CONFIG_DRIVE, SECRETS_DRIVE):
                    wipe_kept(directory.file(name))
            except OSError as error:
                raise of_os_error(error, f"cannot mark {directory.path} as consumed") from error

        await run_in_thread(rename)

    async def delete(self, ref: InstanceRef, number: int) -> None:
        """Remove one, and what a failed write of it left in the jail; absent is success."""

        def remove() -> None:
            try:
                discard_dir(SnapshotDir(self._base, ref, number))
                remove_empty(f"{self._base}/{ref}", up_to=self._base)
                self._clear_jails(ref)
            except OSError as error:
                raise of_os_error(error, f"cannot delete snapshot {number} of {ref}") from error

        await run_in_thread(remove)

    async def discard(self, ref: InstanceRef, *, below: int | None = None) -> Discarded:
        """As `delete_all`, or those with a lower number; the memory's blocks are freed later.

        Nothing of them has a name any more on return, and nothing is woken from them.
        """
        size_bytes, freed = await run_in_thread(self._discard, ref, below)
        return Discarded(size_bytes, tuple(map(asyncio.wrap_future, freed)))

    async def delete_all(self, ref: InstanceRef) -> None:
        """Delete all snapshots, and what a failed one left in the jails; absent is success."""
        await run_in_thread(self._delete, ref, None, discard_dir)

    # -- in a thread ---------------------------------------------------------------------------

    def _verify(self, directory: SnapshotDir) -> SnapshotInfo:
        manifest = directory.manifest()
        if manifest.cpu_model != self._cpu_model:
            raise HostFault(
                f"{directory.path} was saved on the CPU {manifest.cpu_model}, "
                f"found {self._cpu_model}"
            )
        try:
            _check_file(directory, STATE, manifest.state_bytes, manifest.state_sha256)
            for name, drive in manifest.kept.items():
                _check_file(directory, name, drive.size_bytes, drive.sha256)
            self._memories.verify(directory, manifest.mem_bytes)
        except OSError as error:
            raise of_os_error(error, f"cannot check {directory.path}") from error
        self._check_disk(manifest)
        return directory.info(manifest)

    def _check_disk(self, manifest: Manifest) -> None:
        """Old memory over a newer disk would corrupt it."""
        if manifest.disk is None:
            return
        path = manifest.disk.path
        try:
            now = disk_facts(self._data, path)
        except NotFound as error:
            raise HostFault(f"data disk {path} is missing: move it back", path=path) from error
        for field in ("ino", "size_bytes", "mtime_ns"):
            if getattr(now, field) != getattr(manifest.disk, field):
                raise HostFault(
                    f"data disk {path} changed since the sleep: {field}: expected"
                    f" {getattr(manifest.disk, field)}, found {getattr(now, field)}",
                    path=path,
                )

    def _link(self, jail_id: str, uid: int, info: SnapshotInfo) -> None:
        ref = InstanceRef(*os.path.relpath(info.directory, self._base).split("/")[:3])
        directory = SnapshotDir(self._base, ref, info.number)
        try:
            self._memories.mark_linked(directory)
            root = self._layout.root(jail_id)
            fresh_dir(root, WOKEN_DIR, uid=0, gid=uid, mode=0o750)
            with Directory.trusted(f"{root}/{WOKEN_DIR}") as woken:
                for name in (STATE, MEMORY):
                    fd = os.open(directory.file(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        # Not the uid's own: what may have to be tried again must not be written.
                        os.fchown(fd, 0, uid)
                        os.fchmod(fd, 0o440)
                        link_open(fd, woken.fd, name)
                    finally:
                        os.close(fd)
        except OSError as error:
            raise of_os_error(error, f"cannot link {directory.path} into the jail") from error

    def _discard(self, ref: InstanceRef, below: int | None) -> tuple[int, list[Future[None]]]:
        freed: list[Future[None]] = []
        size_bytes = 0

        def unname(directory: SnapshotDir) -> None:
            nonlocal size_bytes
            memory = unname_dir(directory)
            if memory is not None:
                with contextlib.ExitStack() as unless_freed:
                    unless_freed.callback(os.close, memory)
                    size_bytes += os.fstat(memory).st_blocks * BLOCK_BYTES
                    unless_freed.pop_all()
                freed.append(self._freer.free(memory))

        self._delete(ref, below, unname)
        return size_bytes, freed

    def _delete(
        self, ref: InstanceRef, below: int | None, delete: Callable[[SnapshotDir], object]
    ) -> None:
        try:
            for number in numbers_of(self._base, ref):
                if below is None or number < below:
                    delete(SnapshotDir(self._base, ref, number))
            remove_empty(f"{self._base}/{ref}", up_to=self._base)
            if below is None:
                self._clear_jails(ref)
        except OSError as error:
            raise of_os_error(error, f"cannot delete the snapshots of {ref}") from error

    def _clear_jails(self, ref: InstanceRef) -> None:
        for jail_id in self._layout.ids_of(ref):
            with (
                contextlib.suppress(NotFound),
                Directory.trusted(self._layout.root(jail_id)) as root,
            ):
                remove_tree(root.fd, SNAPSHOT_DIR)


def _check_file(directory: SnapshotDir, name: str, size_bytes: int, sha256: str) -> None:
    path = directory.file(name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostFault(f"snapshot file {path} is missing", path=path) from error
    try:
        if os.fstat(fd).st_size != size_bytes or sha256_of(fd) != sha256:
            raise HostFault(
                f"{path}: size or sha256 mismatch: not the file that was saved", path=path
            )
    finally:
        os.close(fd)
