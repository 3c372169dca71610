"""The arguments and results of mechanisms: specs, each with its key, and values.

All paths are absolute host paths, all sizes in bytes unless a name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network

from schemas import naming
from schemas.records import DiskIdentity, InstanceRecord
from schemas.requests import InstanceRef, TenantNet

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class BridgeSpec:
    """A tenant's bridge with its gateway address. `key` is the name of the interface."""

    tenant_id: str
    net: TenantNet

    @property
    def key(self) -> str:
        return self.net.bridge_name


@dataclass(frozen=True, slots=True)
class TenantRulesKey:
    """What a tenant's rules are removed by: `<net id>,<subnet>,<gateway>` in the step log."""

    tenant_net_id: int
    ipv4_subnet: str
    gateway_ip: str

    def __str__(self) -> str:
        return f"{self.tenant_net_id},{self.ipv4_subnet},{self.gateway_ip}"

    @classmethod
    def parse(cls, key: str) -> "TenantRulesKey":
        net_id, subnet, gateway = key.split(",")
        return cls(int(net_id), subnet, gateway)

    def overlaps(self, net: TenantNet) -> bool:
        """Whether removal would touch that network's elements, pins or conntrack entries."""
        return self.tenant_net_id == net.tenant_net_id or IPv4Network(self.ipv4_subnet).overlaps(
            IPv4Network(net.ipv4_subnet)
        )


@dataclass(frozen=True, slots=True)
class TenantRulesSpec:
    """A tenant's NAT, isolation and input rules; removal also flushes the tenant's conntrack."""

    tenant_id: str
    net: TenantNet

    @property
    def key(self) -> str:
        net = self.net
        return str(TenantRulesKey(net.tenant_net_id, net.ipv4_subnet, net.gateway_ip))


@dataclass(frozen=True, slots=True)
class PinSpec:
    """Anti-spoofing entry: the MAC and the address that a TAP may send from, in the nftables
    bridge table; made before the TAP is up."""

    tap: str
    mac: str
    guest_ip: str

    @property
    def key(self) -> str:
        return f"{self.tap},{self.mac},{self.guest_ip}"

    @classmethod
    def parse(cls, key: str) -> "PinSpec":
        return cls(*key.split(","))


@dataclass(frozen=True, slots=True)
class TapSpec:
    """A TAP owned by the jail's uid, attached to the bridge, up, with static FDB and neighbour.

    `alias` (`hostd:<t>/<p>/<i>`) marks it as hostd's: an interface without it is never changed.
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
class ExpectedNetwork:
    """What should be in force of one tenant's network; `ports` are those of its live instances."""

    rules: TenantRulesSpec
    bridge: BridgeSpec
    ports: tuple[tuple[PinSpec, TapSpec], ...]


@dataclass(frozen=True, slots=True)
class ArtifactSpec:
    """One revision of a pool's artifacts. `key` is `<tenant>/<pool>/<revision>`.

    `admitted_bytes` is the disk space that an import may take; None: as much as it needs.
    """

    tenant_id: str
    pool_id: str
    revision: str
    admitted_bytes: int | None = None

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
class CgroupUsage:
    """Of a VMM's leaf, made anew for each launch. Memory is None without the controller, the peak
    before Linux 5.19, too."""

    cpu_us: int
    memory_bytes: int | None
    memory_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class TapTraffic:
    """What a guest sent and received since its TAP was made: frames with their Ethernet headers,
    also those that the host's rules dropped."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """The disk space of one tenant's files below `<state>`."""

    artifacts_bytes: int
    snapshots_bytes: int
    logs_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.artifacts_bytes + self.snapshots_bytes + self.logs_bytes


@dataclass(frozen=True, slots=True)
class DataDiskSpec:
    """`volumes/data.ext4` of an instance. `known` is the disk in the journal, if any.

    With `asleep` nothing of it is changed: a snapshot belongs to it.
    """

    ref: InstanceRef
    size_mib: int
    known: DiskIdentity | None
    asleep: bool = False

    @property
    def key(self) -> str:
        return str(self.ref)


@dataclass(frozen=True, slots=True)
class DataDisk:
    """A data disk and the identity by which it is recognized from now on."""

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
        return naming.cgroup_key(self.tenant_id, self.jail_id)


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a repair: what is in effect again, and what cannot be restored while it runs,
    e.g. a missing TAP, which its VMM could not open again."""

    repaired: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JailFile:
    """A hard link to make in the jail, read-only unless it is the recorded data disk `disk`.

    A data disk belongs to the jail's uid while in use.
    """

    name: str
    source: str
    disk: DiskIdentity | None = None

    @property
    def writable(self) -> bool:
        return self.disk is not None


@dataclass(frozen=True, slots=True)
class JailSpec:
    """The jail's root before the jailer runs: hard links, log, small drives, secrets on tmpfs.

    `config` and `secrets` are the contents for new `config.ext4` and `secrets.ext4`; a path in
    `kept_config`, `kept_secrets` (images kept with a snapshot) is used instead where given.
    `record` is written to the jail's metadata: a worker without its journal adopts the VM by it.
    `warm` is the jail of an idle VMM to take for this launch, if it still can be taken.
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
    warm: str | None = None

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
    """One run of the jailer. The cgroup must exist: the jailer silently continues without it.

    `version` is Firecracker's; empty: that of new Starts.
    """

    jail_id: str
    uid: int
    cgroup: str
    version: str = ""

    @property
    def key(self) -> str:
        return self.jail_id


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """One version of Firecracker on this host. `state`:

    `installed`; `removed`: its files are gone, hostd has copies; `changed`: its files are not those
    that were read; `missing`: in use and not here; `refused`: here and not used, see `reason`;
    `unknown`: that of records from before hostd kept it. `starts`: new Starts use it. `running` and
    `sleeping` are numbers of instances, `sha256` is by program. `one_pair`: the host has no
    `[vmm] versions_dir`, so an upgrade replaces the files under the VMMs that run.
    """

    version: str
    state: str
    starts: bool
    running: int
    sleeping: int
    reason: str | None
    sha256: Mapping[str, str]
    lacks: tuple[str, ...]
    one_pair: bool = False

    @property
    def in_trouble(self) -> bool:
        """Launches of it, or of what sleeps by it, fail or soon would."""
        in_use = bool(self.sleeping or (self.running and not self.one_pair))
        return self.state == "changed" or (in_use and self.state in ("removed", "missing"))


@dataclass(frozen=True, slots=True)
class DriveConfig:
    """One block device, as Firecracker's `/drives` has it."""

    drive_id: str
    path_in_jail: str
    read_only: bool
    root_device: bool = False


@dataclass(frozen=True, slots=True)
class NicConfig:
    """The guest's network interface: the host's TAP and the MAC that the guest has."""

    tap: str
    mac: str


@dataclass(frozen=True, slots=True)
class BootConfig:
    """Everything that is configured before InstanceStart; paths are inside the jail."""

    vcpus: int
    mem_mib: int
    kernel: str
    initrd: str | None
    boot_args: str
    drives: tuple[DriveConfig, ...]
    nic: NicConfig
    vsock: str
    serial: str | None = None


@dataclass(frozen=True, slots=True)
class Ack:
    """A guest agent's answer. `detail` is untrusted text, bounded to 200 characters."""

    success: bool
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class SnapshotKey:
    """One snapshot of an instance: `<t>/<p>/<i>#<number>` in the step log."""

    ref: InstanceRef
    number: int

    def __str__(self) -> str:
        return f"{self.ref}#{self.number}"

    @classmethod
    def parse(cls, key: str) -> "SnapshotKey":
        ref, _, number = key.partition("#")
        return cls(naming.parse_ref(ref), int(number))


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """The facts of a snapshot that the handler has and the manifest records."""

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

    `disk` is the data disk of the sleeping instance; its device number is not recorded (0).
    `allocated_bytes` are the blocks of state and memory, which `size_bytes` is the length of.
    """

    number: int
    directory: str
    state_path: str
    mem_path: str
    launch: int
    revision: str
    vcpus: int
    mem_mib: int
    vmm_version: str
    size_bytes: int
    kept_config: str | None
    kept_secrets: str | None
    has_secrets: bool
    disk: DiskIdentity | None = None
    allocated_bytes: int = 0
