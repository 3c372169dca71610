"""The journal's records of instances and networks. Values only; `worker/journal` owns them."""

from enum import StrEnum
from typing import Final, assert_never

import msgspec

from schemas import naming
from schemas.requests import InstanceRef, TenantNet
from schemas.usage import Metering


class Status(StrEnum):
    """The status of an instance; only the first six appear in `instance.json`."""

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

    # Each predicate names every status: a new one does not pass the type checkers until each
    # predicate has decided about it.

    @property
    def never_started(self) -> bool:
        """As agentd created it: nothing of hostd's exists for it."""
        match self:
            case Status.CREATED | Status.READY:
                return True
            case (
                Status.RUNNING
                | Status.WARM
                | Status.SLEEPING
                | Status.STOPPED
                | Status.STARTING
                | Status.STOPPING
                | Status.DRAINING
                | Status.SNAPSHOTTING
                | Status.WAKING
                | Status.DESTROYING
                | Status.FAILED
                | Status.UNKNOWN
                | Status.DESTROYED
            ):
                return False
        assert_never(self)

    @property
    def at_rest(self) -> bool:
        """No VMM, no TAP and no snapshot: Start may run."""
        match self:
            case Status.CREATED | Status.READY | Status.STOPPED | Status.FAILED:
                return True
            case (
                Status.RUNNING
                | Status.WARM
                | Status.SLEEPING
                | Status.STARTING
                | Status.STOPPING
                | Status.DRAINING
                | Status.SNAPSHOTTING
                | Status.WAKING
                | Status.DESTROYING
                | Status.UNKNOWN
                | Status.DESTROYED
            ):
                return False
        assert_never(self)

    @property
    def expects_vmm(self) -> bool:
        """A VMM runs and no command is in progress: recovery adopts it, its exit is unexpected."""
        match self:
            case Status.RUNNING:
                return True
            case (
                Status.CREATED
                | Status.READY
                | Status.WARM
                | Status.SLEEPING
                | Status.STOPPED
                | Status.STARTING
                | Status.STOPPING
                | Status.DRAINING
                | Status.SNAPSHOTTING
                | Status.WAKING
                | Status.DESTROYING
                | Status.FAILED
                | Status.UNKNOWN
                | Status.DESTROYED
            ):
                return False
        assert_never(self)

    @property
    def holds_tap(self) -> bool:
        """It has, or may have, a TAP: its tenant's network must not be torn down."""
        match self:
            case (
                Status.RUNNING
                | Status.WARM
                | Status.STARTING
                | Status.STOPPING
                | Status.DRAINING
                | Status.SNAPSHOTTING
                | Status.WAKING
                | Status.DESTROYING
                | Status.UNKNOWN
            ):
                return True
            case (
                Status.CREATED
                | Status.READY
                | Status.SLEEPING
                | Status.STOPPED
                | Status.FAILED
                | Status.DESTROYED
            ):
                return False
        assert_never(self)


class DiskIdentity(msgspec.Struct, frozen=True):
    """The device, inode and size of a data disk that hostd made; any other file is refused."""

    dev: int
    ino: int
    size_bytes: int


class VmmIdentity(msgspec.Struct, frozen=True):
    """What proves that a pid still is the launched VMM: everything must match before a signal.

    `start_ticks` is field 22 of /proc/<pid>/stat (proc(5)); `exe_dev`, `exe_ino` those of the
    executable in the jail; `cgroup` is the path in the cgroup2 tree without a leading slash.
    """

    pid: int
    start_ticks: int
    exe_dev: int
    exe_ino: int
    cgroup: str
    boot_id: str


class Usage(msgspec.Struct, frozen=True):
    """What instances take up: the live ones' number, vCPUs and memory, and all data disks."""

    instances: int = 0
    vcpus: int = 0
    mem_mib: int = 0
    disk_bytes: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.instances + other.instances,
            self.vcpus + other.vcpus,
            self.mem_mib + other.mem_mib,
            self.disk_bytes + other.disk_bytes,
        )

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(
            self.instances - other.instances,
            self.vcpus - other.vcpus,
            self.mem_mib - other.mem_mib,
            self.disk_bytes - other.disk_bytes,
        )


class VmmEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Why the VMM of a launch ended without a command; see `handlers/vmm_ends.py`.

    `reason` is one of a bounded set of words, a metric label. `evidence` is who says so: `kernel`,
    `cgroup`, `log` (Firecracker's own word), `hostd`, `none`.
    """

    reason: str
    evidence: str
    launch: int
    at_ms: int
    code: int | None = None
    signal: int | None = None


class Hung(msgspec.Struct, frozen=True):
    """A VMM that does not answer. `killed`: hostd kills it for that, or has."""

    since_ms: int
    killed: bool = False


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One instance on this host. Changed with `msgspec.structs.replace`, saved by the journal.

    `uid_slot` is allocated before the first effect of a launch and freed once its VMM has exited.
    `offset` is kept from the first Start; no other instance may have it while this one lives or
    sleeps. `vmm_version` is Firecracker's, of the last launch; empty in records from before hostd
    kept it. `before` is the record from before the running command, which a failure restores.
    `last_end` is that of its last VMM that ended without a command, perhaps many launches ago.
    `metering` is what it used; None in records from before hostd kept it.
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
    vmm_version: str = ""
    disk: DiskIdentity | None = None
    snapshot: int | None = None
    consumed: bool = False
    command_id: str | None = None
    last_end: VmmEnd | None = None
    hung: Hung | None = None
    metering: Metering | None = None
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
    def exists(self) -> bool:
        """Whether it was ever brought up here: counts against the quotas of pools and instances.

        Not so an instance whose first Start failed: the record that undo restores has its old
        status.
        """
        return not self.status.never_started

    @property
    def holds_offset(self) -> bool:
        """Whether no other instance may have its address: live, asleep, or asleep until the command
        that is in progress."""
        held = self.before is not None and self.before.holds_offset
        return held or self.holds_host or self.status is Status.SLEEPING

    @property
    def usage(self) -> Usage:
        """Its part of a tenant's, or the host's."""
        disk_bytes = 0 if self.disk is None else self.disk.size_bytes
        if not self.holds_host:
            return Usage(disk_bytes=disk_bytes)
        return Usage(1, self.vcpus, self.mem_mib, disk_bytes)


ABSENT: Final = "absent"
RELEASED: Final = "released"
"""What an instance changes to whose record was given up: the `to` of its last event."""


class NetworkRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Desired state of a tenant's network. `status`: up, down (being torn down), or `ABSENT`, of
    which no record is kept."""

    tenant_id: str
    net: TenantNet
    status: str
    since_ms: int


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a destroyed instance: a later Destroy wipes the kept volumes by it."""

    ref: InstanceRef
    at_ms: int
    launch: int
    disk: DiskIdentity | None = None
    kept_volumes: bool = False
