"""What a snapshot is, on disk: `<state>/snapshots/<t>/<p>/<i>/<n>/`.

`state`, `mem`       Firecracker's files, root:root 0600.
`consumed.json`      the manifest of one that was woken, while its VM maps the memory.
`manifest.json`      the facts that make them a snapshot; without it they are nothing.
`memory.json`        which memory file it was, and its hash once that was taken.
`config.ext4`, `secrets.ext4`   for a guest that had not unmounted them.
"""

import glob
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import msgspec

from handlers.errors import Failure, HostFault
from handlers.host.linux.checksummed_json import read_sealed
from handlers.host.linux.file_threads import run_in_thread
from handlers.jail_names import CONFIG_DRIVE, MEMORY, SECRETS_DRIVE, STATE
from handlers.specs import SnapshotInfo
from schemas.decode_error import DecodeError
from schemas.naming import parse_ref, version_text
from schemas.records import DiskIdentity
from schemas.requests import InstanceRef

MANIFEST = "manifest.json"
UNPUBLISHED = "manifest.json.tmp"
CONSUMED = "consumed.json"
MEMORY_FACTS = "memory.json"
BLOCK_BYTES = 512  # of `st_blocks`
NUMBER = re.compile(r"[0-9]{1,15}")


class KeptDrive(msgspec.Struct, frozen=True):
    size_bytes: int
    sha256: str


class DiskFacts(msgspec.Struct, frozen=True):
    """The data disk as the sleeping memory believes it to be."""

    path: str
    ino: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str, found: os.stat_result) -> "DiskFacts":
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`manifest.json`. `number` is the lineage counter: each sleep of an instance has the next."""

    v: int = 1
    ref: InstanceRef
    number: int
    launch: int
    revision: str
    vcpus: int
    mem_mib: int
    vmm_version: str
    cpu_model: str
    kernel_release: str
    sealed_at_ms: int
    state_bytes: int
    state_sha256: str
    mem_bytes: int
    disk: DiskFacts | None
    has_secrets: bool
    kept: dict[str, KeptDrive]


@dataclass(frozen=True, slots=True)
class SnapshotDir:
    """One snapshot of an instance, published or not."""

    base: str
    ref: InstanceRef
    number: int

    @property
    def path(self) -> str:
        return f"{self.base}/{self.ref}/{self.number}"

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    @property
    def published(self) -> bool:
        return os.path.exists(self.file(MANIFEST))

    def manifest(self) -> Manifest:
        """The published manifest.

        Raises:
            HostFault: there is none, it is damaged, or it is another instance's.
        """
        path = self.file(MANIFEST)
        found = read_sealed(path, Manifest)
        if found is None:
            raise HostFault(f"snapshot manifest {path} is missing", path=path)
        if (found.ref, found.number) != (self.ref, self.number):
            raise HostFault(
                f"{path}: expected snapshot {self.number} of {self.ref}, found {found.number} of"
                f" {found.ref}",
                path=path,
            )
        return found

    def info(self, manifest: Manifest) -> SnapshotInfo:
        kept = {name: self.file(name) for name in manifest.kept}
        disk = manifest.disk
        return SnapshotInfo(
            number=self.number,
            directory=self.path,
            state_path=self.file(STATE),
            mem_path=self.file(MEMORY),
            launch=manifest.launch,
            revision=manifest.revision,
            vcpus=manifest.vcpus,
            mem_mib=manifest.mem_mib,
            vmm_version=version_text(manifest.vmm_version),
            size_bytes=manifest.state_bytes + manifest.mem_bytes,
            kept_config=kept.get(CONFIG_DRIVE),
            kept_secrets=kept.get(SECRETS_DRIVE),
            has_secrets=manifest.has_secrets,
            disk=DiskIdentity(0, disk.ino, disk.size_bytes) if disk is not None else None,
            allocated_bytes=sum(map(_allocated, (self.file(STATE), self.file(MEMORY)))),
        )


def _allocated(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * BLOCK_BYTES
    except FileNotFoundError:  # for `verify` to say
        return 0


def numbers_of(base: str, ref: InstanceRef) -> list[int]:
    """All snapshot directories of an instance, highest first."""
    try:
        names = os.listdir(f"{base}/{ref}")
    except FileNotFoundError:
        return []
    return sorted((int(name) for name in names if NUMBER.fullmatch(name)), reverse=True)


async def published_versions(state: str, known: Collection[InstanceRef]) -> set[str]:
    """The versions of Firecracker that wrote the published snapshots of other instances than
    `known`; "" is that of a manifest that cannot be read. `state` is `[paths] state`."""
    return await run_in_thread(_published_versions, f"{state}/snapshots", frozenset(known))


def _published_versions(base: str, known: frozenset[InstanceRef]) -> set[str]:
    found = _published(base, "*/*", known)
    return {"" if info is None else info.vmm_version for info in found}


async def sleeps_on(state: str, key: str, known: Collection[InstanceRef]) -> bool:
    """Whether a published snapshot of the pool needs the artifact revision of this key, or may: its
    manifest cannot be read. Not those of `known`. `state` is `[paths] state`."""
    pool, _, revision = key.rpartition("/")

    def look() -> bool:
        found = _published(f"{state}/snapshots", glob.escape(pool), frozenset(known))
        return any(info is None or info.revision == revision for info in found)

    return await run_in_thread(look)


def _published(
    base: str, pool: str, known: frozenset[InstanceRef]
) -> Iterator[SnapshotInfo | None]:
    """The published snapshots of the pools, a glob, but for those of `known`; None: unreadable."""
    for path in glob.iglob(f"{pool}/*/*/{MANIFEST}", root_dir=base):
        instance, number = os.path.split(os.path.dirname(path))
        try:
            ref = parse_ref(instance)
        except DecodeError:
            continue  # no instance of hostd's
        if ref not in known and NUMBER.fullmatch(number):
            directory = SnapshotDir(base, ref, int(number))
            try:
                yield directory.info(directory.manifest())
            except (Failure, OSError):
                yield None
