"""Revisions imported below `<state>/artifacts`, so that a running VM's files do not change.

Jails hard-link from there; agentd may rewrite or remove its own copy at any time.
"""

import asyncio
import contextlib
import os
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import ClassVar

import msgspec
import structlog

from handlers.errors import HostFault, Invalid, Unavailable, of_os_error
from handlers.host.linux.checksummed_json import read_sealed, write_sealed
from handlers.host.linux.file_threads import CancelToken, run_in_import_thread, run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_path
from handlers.host.linux.sparse_copy import copy_sparse, sha256_of
from handlers.host.linux.state_dirs import make_dir, remove_empty, sync_dir
from handlers.host.storage.agentd_files import open_tenant
from handlers.mechanism import Durability
from handlers.specs import MIB, Artifact, ArtifactSpec
from schemas import naming

ELF = b"\x7fELF"
REQUIRED = ("vmlinux", "rootfs.ext4")
OPTIONAL = ("initrd",)
FACTS = "artifact.json"
PART = ".part"
BLOCK_BYTES = 512  # of `st_blocks`
LOG_EVERY_BYTES = 1 << 30

log = structlog.get_logger()


class ArtifactFile(msgspec.Struct, frozen=True):
    sha256: str
    size_bytes: int


class ArtifactFacts(msgspec.Struct, frozen=True):
    """`artifact.json`, written last."""

    files: dict[str, ArtifactFile]


async def nobody(key: str) -> bool:
    """The `asleep` of a host that has the records of all its instances."""
    del key
    return False


class Artifacts:
    """Imported revisions; the key is `t/p/revision`.

    `in_use(key)` returns whether an instance, running, asleep or stopped, refers to a revision,
    `asleep(key)` whether one that has no record does, after the loss of a journal; such a revision
    is not removed.
    """

    name: ClassVar[str] = "artifact"
    durability: ClassVar[Durability] = Durability.DURABLE
    swept: ClassVar[bool] = True

    def __init__(
        self,
        *,
        data: str,
        state: str,
        in_use: Callable[[str], bool] = lambda key: False,
        asleep: Callable[[str], Awaitable[bool]] = nobody,
        max_mib: int = 65_536,
    ) -> None:
        self.copied_bytes = 0
        self._max_mib = max_mib
        self._data = data
        self._base = f"{state}/artifacts"
        self._in_use = in_use
        self._asleep = asleep
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()
        # An import makes directories that a removal of the tenant's other revisions finds empty.
        self._dirs = threading.Lock()

    async def ensure(self, spec: ArtifactSpec) -> Artifact:
        """Import a revision unless it is imported already; atomic, with recorded sha256.

        It takes as long as its data needs. A cancelled caller gets its cancellation once the chunk
        that is being copied is done; nothing of the import is left.

        Raises:
            NotFound: the revision, its `vmlinux` or its `rootfs.ext4` is missing.
            Invalid: one of them is a symlink, not a regular file, another user's, a data disk,
                empty or larger than `[limits] max_artifact_mib`, or the kernel is not an ELF file.
            Exhausted: the file system is full.
            Unavailable: a file changed while it was copied; try again.
        """
        async with self._lock(spec.key):  # or a removal would take away what was found
            found = await run_in_thread(self._look, spec.key)
            if found is not None:
                return found
            return await run_in_import_thread(lambda token: self._ensure(spec, token))

    async def size_of_import(self, spec: ArtifactSpec) -> int:
        """The disk space in bytes that importing the revision takes; holes take none.

        Raises: as `ensure`.
        """

        def measure() -> int:
            try:
                with self._source(spec) as source:
                    return sum(self._size_of_file(source, name) for name in (*REQUIRED, *OPTIONAL))
            except OSError as error:
                raise of_os_error(error, f"cannot read {spec.key}") from error

        return await run_in_thread(measure)

    def count(self, size_bytes: int) -> None:
        """Add to `copied_bytes`: what all imports have copied so far, from several threads."""
        with self._dirs:
            self.copied_bytes += size_bytes

    async def exists(self, key: str) -> bool:
        return os.path.exists(self._dir(key))

    async def imported(self, key: str) -> bool:
        """Whether it is there as a whole, and is not being removed."""
        return os.path.exists(f"{self._dir(key)}/{FACTS}")

    async def remove(self, key: str) -> None:
        """Remove a revision unless an instance refers to it; absent is success."""
        parse_key(key)
        if self._in_use(key):  # perhaps being imported: nothing to wait for
            return
        async with self._lock(key):
            if not await self._asleep(key) and not self._in_use(key):
                await run_in_thread(self._remove, key)

    @asynccontextmanager
    async def _lock(self, key: str) -> AsyncGenerator[None]:
        """One import or removal of a revision at a time; those of others do not wait for it."""
        self._users[key] += 1
        try:
            async with self._locks.setdefault(key, asyncio.Lock()):
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]

    def _dir(self, key: str) -> str:
        return f"{self._base}/{'/'.join(parse_key(key))}"

    def _ensure(self, spec: ArtifactSpec, token: CancelToken) -> Artifact:
        found = self._look(spec.key)
        if found is not None:
            return found
        directory = self._dir(spec.key)
        try:
            self._import(spec, directory, token)
        except OSError as error:
            raise of_os_error(error, f"cannot import {spec.key}") from error
        found = self._look(spec.key)
        if found is None:
            raise HostFault(f"{directory} was removed right after its import", path=directory)
        return found

    def _look(self, key: str) -> Artifact | None:
        directory = self._dir(key)
        facts = read_sealed(f"{directory}/{FACTS}", ArtifactFacts)
        if facts is None:
            return None
        for name, file in facts.files.items():
            path = f"{directory}/{name}"
            try:
                size = os.stat(path, follow_symlinks=False).st_size
            except FileNotFoundError as error:
                raise HostFault(f"imported file {path} is missing", path=path) from error
            if size != file.size_bytes:
                raise HostFault(
                    f"imported file {path}: expected {file.size_bytes} bytes, found {size}",
                    path=path,
                )
        initrd = f"{directory}/initrd" if "initrd" in facts.files else None
        return Artifact(
            vmlinux=f"{directory}/vmlinux",
            rootfs=f"{directory}/rootfs.ext4",
            initrd=initrd,
            sha256={name: file.sha256 for name, file in facts.files.items()},
        )

    def _import(self, spec: ArtifactSpec, directory: str, token: CancelToken) -> None:
        pool = os.path.dirname(directory)
        part = f"{pool}/.{spec.revision}{PART}"
        make_dir(self._base, sync=True)
        remove_path(part)
        progress = _Progress(self, spec)
        try:
            with self._source(spec) as source:
                for name in (*REQUIRED, *OPTIONAL):
                    self._size_of_file(source, name)
                with self._dirs:
                    make_dir(pool, sync=True)
                    os.mkdir(part, 0o700)
                files = {name: _copied(source, name, part, token, progress) for name in REQUIRED}
                for name in OPTIONAL:
                    if source.stat(name) is not None:
                        files[name] = _copied(source, name, part, token, progress)
            write_sealed(f"{part}/{FACTS}", ArtifactFacts(files))
            sync_dir(part)
            remove_path(directory)  # left by an interrupted import: without its facts
            os.rename(part, directory)
            sync_dir(pool)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_path(part)
                with self._dirs:
                    remove_empty(pool, up_to=self._base)
            raise
        log.info("artifact.imported", artifact=spec.key, copied_bytes=progress.copied_bytes)

    def _size_of_file(self, source: Directory, name: str) -> int:
        """Of one file on disk; 0 for an optional one that is not there."""
        if name in OPTIONAL and source.stat(name) is None:
            return 0
        with source.file(name) as fd:
            found = os.fstat(fd)
        if found.st_size > self._max_mib * MIB:
            path = source.named(name)
            raise Invalid(
                f"{path} has {found.st_size} bytes, expected at most {self._max_mib} MiB: "
                "raise [limits] max_artifact_mib or make it smaller",
                path=path,
            )
        return min(found.st_blocks * BLOCK_BYTES, found.st_size + MIB)

    def _source(self, spec: ArtifactSpec) -> Directory:
        with open_tenant(self._data, spec.tenant_id) as tenant:
            return tenant.directory(f"pools/{spec.pool_id}/artifacts/revisions/{spec.revision}")

    def _remove(self, key: str) -> None:
        directory = self._dir(key)
        try:
            # First, so that half of it is never taken for an import.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{directory}/{FACTS}")
                sync_dir(directory)
            remove_path(directory)
            remove_path(f"{os.path.dirname(directory)}/.{os.path.basename(directory)}{PART}")
            with self._dirs:
                remove_empty(os.path.dirname(directory), up_to=self._base)
        except OSError as error:
            raise of_os_error(error, f"cannot remove the artifact {key}") from error


def parse_key(key: str) -> tuple[str, str, str]:
    """Tenant, pool and revision of an `ArtifactSpec.key`, each safe as the name of a directory.

    Raises:
        Invalid: anything else, e.g. a key with `..` in it.
    """
    match key.split("/"):
        case [tenant_id, pool_id, revision] if (
            naming.ID_PATTERN.fullmatch(tenant_id)
            and naming.ID_PATTERN.fullmatch(pool_id)
            and naming.REVISION_PATTERN.fullmatch(revision)
        ):
            return tenant_id, pool_id, revision
        case _:
            raise Invalid(f"invalid artifact key {key[:200]!r}: want <tenant>/<pool>/<revision>")


class _Progress:
    """What an import has copied: logged now and then, counted, held to what was admitted."""

    def __init__(self, artifacts: Artifacts, spec: ArtifactSpec) -> None:
        self.copied_bytes = 0
        self._artifacts = artifacts
        self._spec = spec
        self._logged_bytes = 0

    def add(self, size_bytes: int) -> None:
        self.copied_bytes += size_bytes
        self._artifacts.count(size_bytes)
        admitted = self._spec.admitted_bytes
        if admitted is not None and self.copied_bytes > admitted + MIB:
            raise Unavailable(
                f"artifact {self._spec.key} grew while it was imported: expected at most "
                f"{admitted} bytes of data; try again"
            )
        if self.copied_bytes - self._logged_bytes >= LOG_EVERY_BYTES:
            self._logged_bytes = self.copied_bytes
            log.info(
                "artifact.import_progressed",
                artifact=self._spec.key,
                copied_bytes=self.copied_bytes,
                admitted_bytes=admitted,
            )


def _copied(
    source: Directory, name: str, part: str, token: CancelToken, progress: _Progress
) -> ArtifactFile:
    """Copy one file, root:root 0444. The copy is hashed, not the original."""
    with source.file(name) as original:
        before = os.fstat(original)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        copy = os.open(f"{part}/{name}", flags, 0o400)
        try:
            copy_sparse(original, copy, check=token.check, copied=progress.add)
            _check_kind(name, copy, source.named(name))
            after = os.fstat(original)
            if _version(before) != _version(after):
                path = source.named(name)
                raise Unavailable(f"{path} changed while it was copied: try again", path=path)
            os.fchmod(copy, 0o444)
            os.fsync(copy)
            digest = sha256_of(copy, check=token.check)
        finally:
            os.close(copy)
    return ArtifactFile(sha256=digest, size_bytes=before.st_size)


def _check_kind(name: str, fd: int, path: str) -> None:
    """Refuse what no VMM can boot before any resource of a launch is created.

    Source: elf(5); Firecracker on x86_64 accepts no other kernel format.
    """
    if os.fstat(fd).st_size == 0:
        raise Invalid(f"{path} is empty", path=path)
    if name == "vmlinux" and os.pread(fd, len(ELF), 0) != ELF:
        raise Invalid(f"{path} is not an ELF kernel", path=path)


def _version(found: os.stat_result) -> tuple[int, int]:
    """Differs after a write. By ctime, since a writer can put the mtime back. Source: inode(7)."""
    return found.st_ctime_ns, found.st_size
