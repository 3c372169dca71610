"""What a handler asks of a mechanism and what it gets: specs, each with its key, and values.

All paths are absolute host paths, all sizes in bytes unless a name says otherwise.
"""

from dataclasses import dataclass

from schemas.records import DiskIdentity, InstanceRecord
from schemas.requests import InstanceRef, TenantNet

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class BridgeSpec:
    """A tenant's bridge with its gateway address. `key` is the link's name."""

    tenant_id: str
    net: TenantNet

    @property
    def key(self) -> str:
        return self.net.bridge_name


@dataclass(frozen=True, slots=True)
class TenantRulesSpec:
    """A tenant's NAT, isolation and input rules; removal also flushes the tenant's conntrack."""

    tenant_id: str
    net: TenantNet

    @property
    def key(self) -> str:
        return f"{self.net.tenant_net_id},{self.net.ipv4_subnet},{self.net.gateway_ip}"


@dataclass(frozen=True, slots=True)
class PinSpec:
    """MAC and address pinned to a TAP in the bridge table; made before the TAP is up."""

    tap: str
    mac: str
    guest_ip: str

    @property
    def key(self) -> str:
        return f"{self.tap},{self.mac},{self.guest_ip}"


@dataclass(frozen=True, slots=True)
class TapSpec:
    """A TAP owned by the jail's uid, attached to the bridge, up, with static FDB and neighbour.

    `alias` (`hostd:<t>/<p>/<i>`) marks it as ours: one without it is foreign and never touched.
    """

    name: str
    bridge: str
    owner_uid: int
    mac: str
    guest_ip: str
    alias: str

    @property
    def key(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class ArtifactSpec:
    """One revision of a pool's artifacts. `key` is `<tenant>/<pool>/<revision>`."""

    tenant_id: str
    pool_id: str
    revision: str

    @property
    def key(self) -> str:
        return f"{self.tenant_id}/{self.pool_id}/{self.revision}"

    @classmethod
    def key_of(cls, record: InstanceRecord) -> str | None:
        """The key of the revision that an instance refers to; None before its first launch."""
        if record.revision is None:
            return None
        return cls(record.ref.tenant_id, record.ref.pool_id, record.revision).key


@dataclass(frozen=True, slots=True)
class Artifact:
    """An imported revision: root:root 0444 files below `<state>/artifacts`."""

    vmlinux: str
    rootfs: str
    initrd: str | None
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class DataDiskSpec:
    """`volumes/data.ext4` of an instance. `known` is the one hostd recorded, if any."""

    ref: InstanceRef
    size_mib: int
    known: DiskIdentity | None

    @property
    def key(self) -> str:
        return str(self.ref)


@dataclass(frozen=True, slots=True)
class DataDisk:
    path: str
    identity: DiskIdentity


@dataclass(frozen=True, slots=True)
class CgroupSpec:
    """Leaf `<limits.cgroup>/<tenant>/<jail id>` of the cgroup2 tree; limits are read back."""

    tenant_id: str
    jail_id: str
    memory_max_bytes: int
    cpu_quota_us: int
    pids_max: int

    @property
    def key(self) -> str:
        return f"{self.tenant_id}/{self.jail_id}"


@dataclass(frozen=True, slots=True)
class JailFile:
    """A hard link into the jail. `writable` ones are chowned to the jail's uid while in use."""

    name: str
    source: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class JailSpec:
    """The jail's root before the jailer starts: links, log, small drives, secrets on tmpfs.

    `config` and `secrets` are the contents for new `config.ext4` and `secrets.ext4`; a path in
    `kept_config`, `kept_secrets` (images kept with a snapshot) is used instead where given.
    `record` is noted beside the jail: a worker that lost its journal adopts the VM by it.
    """

    ref: InstanceRef
    jail_id: str
    uid: int
    files: tuple[JailFile, ...]
    config: bytes | None = None
    secrets: bytes | None = None
    kept_config: str | None = None
    kept_secrets: str | None = None
    serial: bool = False
    record: InstanceRecord | None = None

    @property
    def key(self) -> str:
        return self.jail_id


@dataclass(frozen=True, slots=True)
class Jail:
    """`root` is `<jail_base>/firecracker/<jail id>/root`."""

    root: str
    has_config: bool
    has_secrets: bool


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One jailer execution. The cgroup leaf must exist: the jailer silently does without."""

    jail_id: str
    uid: int
    cgroup: str

    @property
    def key(self) -> str:
        return self.jail_id


@dataclass(frozen=True, slots=True)
class DriveConfig:
    drive_id: str
    path_in_jail: str
    read_only: bool
    root_device: bool = False


@dataclass(frozen=True, slots=True)
class BootConfig:
    """All that the API calls before InstanceStart say; paths are inside the jail."""

    vcpus: int
    mem_mib: int
    kernel: str
    initrd: str | None
    boot_args: str
    drives: tuple[DriveConfig, ...]
    tap: str
    mac: str
    vsock: str
    serial: str | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """A guest agent's answer. `detail` is untrusted text, bounded to 200 characters."""

    success: bool
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """What the handler knows of a snapshot and the manifest must name."""

    ref: InstanceRef
    number: int
    launch: int
    revision: str
    vcpus: int
    mem_mib: int
    vmm_version: str
    disk: DiskIdentity | None
    data_disk_path: str | None
    keep_drives: bool


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A sealed snapshot. `kept_config`, `kept_secrets`: images kept with it, or None.

    `disk` is the data disk that slept with it; its device number is not known (0).
    """

    number: int
    directory: str
    state_path: str
    mem_path: str
    launch: int
    revision: str
    vcpus: int
    mem_mib: int
    size_bytes: int
    kept_config: str | None
    kept_secrets: str | None
    has_secrets: bool
    disk: DiskIdentity | None = None
