"""Revisions imported below `<state>/artifacts`, so that a running VM's files do not change.

Jails hard-link from there; agentd may rewrite or remove its own copy at any time.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import ClassVar

import msgspec

from handlers.errors import HostFault, Invalid, Unavailable, of_os_error
from handlers.host.linux.checksummed_json import read_sealed, write_sealed
from handlers.host.linux.file_threads import CancelToken, run_in_slow_thread, run_in_thread
from handlers.host.linux.openat2 import Directory
from handlers.host.linux.rmtree import remove_path
from handlers.host.linux.sparse_copy import copy_sparse, sha256_of
from handlers.host.linux.state_dirs import make_dir, remove_empty, sync_dir
from handlers.host.storage.agentd_files import open_tenant
from handlers.mechanism import Durability
from handlers.specs import Artifact, ArtifactSpec
from schemas import naming

ELF = b"\x7fELF"
REQUIRED = ("vmlinux", "rootfs.ext4")
OPTIONAL = ("initrd",)
FACTS = "artifact.json"


class ArtifactFile(msgspec.Struct, frozen=True):
    sha256: str
    size_bytes: int


class ArtifactFacts(msgspec.Struct, frozen=True):
    """`artifact.json`, written last."""

    files: dict[str, ArtifactFile]


class Artifacts:
    """Imported revisions; the key is `t/p/revision`.

    `in_use(key)` returns whether an instance, running, asleep or stopped, refers to a revision;
    such a revision is not removed.
    """

    name: ClassVar[str] = "artifact"
    durability: ClassVar[Durability] = Durability.DURABLE
    swept: ClassVar[bool] = True

    def __init__(
        self, *, data: str, state: str, in_use: Callable[[str], bool] = lambda key: False
    ) -> None:
        self._data = data
        self._base = f"{state}/artifacts"
        self._in_use = in_use
        self._locks: dict[str, asyncio.Lock] = {}

    async def ensure(self, spec: ArtifactSpec) -> Artifact:
        """Import a revision unless it is imported already; atomic, with recorded sha256.

        Raises:
            NotFound: the revision, its `vmlinux` or its `rootfs.ext4` is missing.
            Invalid: one of them is a symlink, not a regular file, another user's, a data disk or
                empty, or the kernel is not an ELF file.
            Exhausted: the file system is full.
            Unavailable: a file changed while it was copied; try again.
        """
        found = await run_in_thread(self._look, spec.key)
        if found is not None:
            return found
        async with self._lock(spec.tenant_id):
            return await run_in_slow_thread(lambda token: self._ensure(spec, token))

    async def exists(self, key: str) -> bool:
        return os.path.exists(self._dir(key))

    async def remove(self, key: str) -> None:
        """Remove a revision unless an instance refers to it; absent is success."""
        async with self._lock(parse_key(key)[0]):
            if not self._in_use(key):
                await run_in_thread(self._remove, key)

    def _lock(self, tenant_id: str) -> asyncio.Lock:
        """One import or removal per tenant at a time: they share the directories above."""
        for other in [each for each, lock in self._locks.items() if not lock.locked()]:
            if other != tenant_id:
                del self._locks[other]
        return self._locks.setdefault(tenant_id, asyncio.Lock())

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
        pool = make_dir(os.path.dirname(directory), sync=True)
        part = f"{pool}/.{spec.revision}.part"
        remove_path(part)
        try:
            with self._source(spec) as source:
                os.mkdir(part, 0o700)
                files = {name: _copied(source, name, part, token) for name in REQUIRED}
                for name in OPTIONAL:
                    if source.stat(name) is not None:
                        files[name] = _copied(source, name, part, token)
            write_sealed(f"{part}/{FACTS}", ArtifactFacts(files))
            sync_dir(part)
            remove_path(directory)  # left by an interrupted import: without its facts
            os.rename(part, directory)
            sync_dir(pool)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_path(part)
                remove_empty(pool, up_to=self._base)
            raise

    def _source(self, spec: ArtifactSpec) -> Directory:
        with open_tenant(self._data, spec.tenant_id) as tenant:
            return tenant.directory(f"pools/{spec.pool_id}/artifacts/revisions/{spec.revision}")

    def _remove(self, key: str) -> None:
        directory = self._dir(key)
        try:
            remove_path(directory)
            remove_path(f"{os.path.dirname(directory)}/.{os.path.basename(directory)}.part")
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


def _copied(source: Directory, name: str, part: str, token: CancelToken) -> ArtifactFile:
    """Copy one file, root:root 0444. The copy is hashed, not the original."""
    with source.file(name) as original:
        before = os.fstat(original)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        copy = os.open(f"{part}/{name}", flags, 0o400)
        try:
            copy_sparse(original, copy, check=token.check)
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
