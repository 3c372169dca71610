"""What the journal remembers of instances and networks. Values only; `worker/journal` owns them."""

from enum import StrEnum

import msgspec

from schemas import naming
from schemas.requests import InstanceRef, TenantNet


class Status(StrEnum):
    """What an instance may be; the first six also appear in `instance.json`."""

    CREATED = "created"
    READY = "ready"
    RUNNING = "running"
    WARM = "warm"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    STARTING = "starting"
    STOPPING = "stopping"
    DRAINING = "draining"
    SNAPSHOTTING = "snapshotting"
    WAKING = "waking"
    DESTROYING = "destroying"
    FAILED = "failed"
    UNKNOWN = "unknown"
    DESTROYED = "destroyed"


class DiskIdentity(msgspec.Struct, frozen=True):
    """A data disk that hostd made: device and inode; a file that differs is refused."""

    dev: int
    ino: int
    size_bytes: int


class VmmIdentity(msgspec.Struct, frozen=True):
    """What proves that a pid still is the VMM launched: all of it must hold before a signal.

    `start_ticks` is field 22 of /proc/<pid>/stat (proc(5)); `exe_dev`, `exe_ino` those of the
    executable in the jail; `cgroup` the path in the cgroup2 tree without leading slash.
    """

    pid: int
    start_ticks: int
    exe_dev: int
    exe_ino: int
    cgroup: str
    boot_id: str


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One instance on this host. Changed with `msgspec.structs.replace`, saved by the journal.

    `uid_slot` is held from before the first effect of a launch until its VMM was seen gone.
    `offset` stays from the first Start on; it excludes others while the instance lives or sleeps.
    `before` is the record as it was before the command that runs now: what a failure gives back.
    """

    ref: InstanceRef
    status: Status
    since_ms: int
    launch: int = 0
    uid_slot: int | None = None
    offset: int | None = None
    net: TenantNet | None = None
    revision: str | None = None
    vcpus: int = 0
    mem_mib: int = 0
    agent_port: int | None = None
    vmm: VmmIdentity | None = None
    disk: DiskIdentity | None = None
    snapshot: int | None = None
    consumed: bool = False
    command_id: str | None = None
    before: "InstanceRecord | None" = None

    @property
    def jail_id(self) -> str:
        """Of the last launch."""
        return naming.jail_id(self.ref, self.launch)

    @property
    def cgroup_key(self) -> str:
        """Of the last launch."""
        return naming.cgroup_key(self.ref.tenant_id, self.jail_id)

    @property
    def holds_host(self) -> bool:
        """Whether it has, or may have, a VMM: counts against quota and the host's memory."""
        return self.uid_slot is not None

    @property
    def holds_offset(self) -> bool:
        return self.holds_host or self.status is Status.SLEEPING


class NetworkRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant's network under standing order. `status`: up, down (being set up or taken down)."""

    tenant_id: str
    net: TenantNet
    status: str
    since_ms: int


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """What remains of a destroyed instance: lets a later Destroy wipe the kept volumes."""

    ref: InstanceRef
    at_ms: int
    launch: int
    disk: DiskIdentity | None = None
    kept_volumes: bool = False
