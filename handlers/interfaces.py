"""What a handler may ask of this host: the mechanisms, their specs and values. Types only.

Implemented for real in `handlers/host/`, one mechanism per file, and in memory by `tests/fakes`;
`tests/contract` runs the same tests against both. All paths are absolute host paths, all sizes in
bytes unless a name says otherwise. Every method raises a `Failure` of `handlers/errors.py`.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from handlers.concurrency import Slots
from handlers.mechanism import Mechanism
from handlers.specs import (
    Ack,
    Artifact,
    ArtifactSpec,
    BootConfig,
    BridgeSpec,
    CgroupSpec,
    DataDisk,
    DataDiskSpec,
    Jail,
    JailSpec,
    LaunchSpec,
    PinSpec,
    SnapshotFacts,
    SnapshotInfo,
    TapSpec,
    TenantRulesSpec,
)
from handlers.tenant_locks import TenantLocks
from schemas.files import InstanceFile, PoolSpec, TenantConfig
from schemas.records import DiskIdentity, InstanceRecord, NetworkRecord, Tombstone, VmmIdentity
from schemas.requests import InstanceRef
from schemas.settings import Settings

# -- network ---------------------------------------------------------------------------------------
# `ensure` of these mechanisms gives true if anything had to be made or repaired.


class Networks(Protocol):
    """Questions about the host's network, and what no single resource owns."""

    async def overlapping_route(self, subnet: str, *, except_bridge: str) -> str | None:
        """A host route, other than the default route and the exempt ones, that overlaps."""
        ...

    async def taps_on(self, bridge: str) -> Sequence[str]:
        """Names of the links enslaved to the bridge."""
        ...

    async def prepare(self) -> bool:
        """Base table, uplinks, `ip_forward`, `bridge-nf-call-*`; true if any had to change."""
        ...


# -- files -----------------------------------------------------------------------------------------


class SharedFiles(Protocol):
    """agentd's directories: every open stays beneath the tenant's and follows no symlink."""

    async def tenant(self, tenant_id: str) -> TenantConfig: ...

    async def pool(self, tenant_id: str, pool_id: str) -> PoolSpec: ...

    async def instance(self, ref: InstanceRef) -> InstanceFile: ...

    async def of_launch(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile]:
        """The three files that a launch asks, read in this order."""
        ...

    async def current_revision(self, tenant_id: str, pool_id: str) -> str: ...

    async def secrets(self, tenant_id: str) -> bytes | None: ...

    async def update_instance(self, ref: InstanceRef, changes: dict[str, Any]) -> None:
        """Change hostd's six fields, keeping all else; atomic, owner, group and mode kept."""
        ...

    async def remove_instance(self, ref: InstanceRef, *, keep_volumes: bool) -> None: ...


class DataDisks(Mechanism[DataDiskSpec, DataDisk], Protocol):
    def path(self, ref: InstanceRef) -> str:
        """Where the instance's data disk is, if it has one."""
        ...

    async def check_wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Whether `wipe` would do it: raises Invalid if the disk is not hostd's. No effect."""
        ...

    async def wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Overwrite or discard the blocks, verify, unlink; absent already is success."""
        ...


# -- jail and VMM ----------------------------------------------------------------------------------


CPU_PERIOD_US = 100_000  # of which `cpu_quota_us` may be used


class Jails(Mechanism[JailSpec, Jail], Protocol):
    """Removal unmounts the tmpfs, gives the data disk back to root and keeps the launch's log."""

    async def read_log(self, ref: InstanceRef, launch: int | None = None) -> bytes:
        """The VMM's log of a launch, live or kept (the last 3 are); empty if there is none."""
        ...


class Vmm(Protocol):
    """The API of one live VMM, typed; one request at a time. Closed by `close`."""

    async def configure(self, config: BootConfig) -> None: ...

    async def start(self) -> None: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def state(self) -> str:
        """`Not started`, `Running` or `Paused`."""
        ...

    async def version(self) -> str: ...

    async def create_snapshot(self, state_path: str, mem_path: str) -> None:
        """Paths inside the jail. Full snapshot; the VM must be paused."""
        ...

    async def load_snapshot(self, state_path: str, mem_path: str) -> None:
        """`resume_vm: false`. After a failure the VMM is gone."""
        ...

    async def send_ctrl_alt_del(self) -> None: ...

    async def close(self) -> None: ...


class Vmms(Mechanism[LaunchSpec, VmmIdentity], Protocol):
    """VMM processes. `ensure` launches through the jailer, waits for the API, proves identity.

    `remove(jail_id)` sends SIGKILL by pidfd after the proof and waits until it is gone.
    """

    async def find(self, jail_id: str) -> VmmIdentity | None:
        """The live VMM of a jail, proven from the kernel, or None."""
        ...

    async def alive(self, identity: VmmIdentity) -> bool: ...

    async def wait_exit(self, identity: VmmIdentity, timeout_s: float) -> bool:
        """True once it is gone; false when the time is up."""
        ...

    async def terminate(self, identity: VmmIdentity) -> None:
        """SIGTERM by pidfd (ignored in a pid namespace of its own)."""
        ...

    async def check_confinement(self, identity: VmmIdentity, spec: LaunchSpec) -> None:
        """Read back root, uid, gid, capabilities, no_new_privs, seccomp on all threads, cgroup,
        pid namespace, once the VM is started or loaded.

        Raises:
            HostFault: names the first fact that does not hold.
        """
        ...

    def api(self, jail_id: str) -> Vmm: ...


class GuestAgents(Protocol):
    """The guest agent on vsock, framed JSON; untrusted, bounded in size and time.

    Each call connects anew and retries until `timeout_s`: the first connection after a resume
    may be cut, a paused guest never answers.

    Raises:
        Unavailable: no well-formed answer within `timeout_s`.
    """

    async def ping(self, jail_id: str, port: int, *, timeout_s: float) -> None: ...

    async def sleep_prep(
        self, jail_id: str, port: int, *, drain_timeout_s: int, timeout_s: float
    ) -> Ack: ...

    async def wake(self, jail_id: str, port: int, *, timeout_s: float) -> Ack: ...

    async def set_clock(self, jail_id: str, port: int, *, timeout_s: float) -> float:
        """Step the guest's clock to the host's; returns the seconds it was off before."""
        ...


# -- snapshots -------------------------------------------------------------------------------------


class Snapshots(Protocol):
    """`<state>/snapshots/<t>/<p>/<i>/<n>/{state,mem,manifest.json}`."""

    async def begin_write(self, jail_id: str, uid: int) -> tuple[str, str]:
        """An empty directory in the jail for the VMM to write to; the two paths inside the jail."""
        ...

    async def seal(self, jail_id: str, facts: SnapshotFacts) -> SnapshotInfo:
        """Move the files out of the jail, hash the state, write and fsync; no manifest yet."""
        ...

    async def publish(self, ref: InstanceRef, number: int) -> None:
        """Rename the manifest into place and fsync the directory: Sleep's point of no return."""
        ...

    async def read(self, ref: InstanceRef) -> SnapshotInfo | None:
        """The published snapshot with the highest number, or None."""
        ...

    async def verify(self, ref: InstanceRef, number: int, vmm_version: str) -> SnapshotInfo:
        """Check manifest, state hash, memory identity or hash, disks, CPU, VMM version.

        Raises:
            HostFault: what differs; the instance stays asleep and a file put right can be woken.
        """
        ...

    async def hash_memory(self, ref: InstanceRef, number: int) -> str | None:
        """In the background after Sleep: sha256 bound to the file's identity; None if gone."""
        ...

    async def is_hashed(self, ref: InstanceRef, number: int) -> bool:
        """Whether the memory's hash was taken; true also of a snapshot that is gone."""
        ...

    async def link(self, jail_id: str, uid: int, info: SnapshotInfo) -> tuple[str, str]:
        """Hard-link state and memory into the jail, for the uid to read; the paths inside it."""
        ...

    async def restore_ownership(self, ref: InstanceRef, number: int) -> None:
        """After a failed wake: give the files back to root and record the memory file's identity.

        Undoes what `link` changed on the files; the hard links go with the jail.
        """
        ...

    async def mark_consumed(self, ref: InstanceRef, number: int) -> None:
        """Unpublish it, so that it cannot be woken again; absent is success.

        The files stay, since the running VM maps them, until one of the deletions.
        """
        ...

    async def delete(self, ref: InstanceRef, number: int) -> None:
        """Delete one, published or not; absent is success."""
        ...

    async def delete_older(self, ref: InstanceRef, number: int) -> None:
        """Delete those with a lower number and discard their memory; absent is success."""
        ...

    async def delete_all(self, ref: InstanceRef) -> None:
        """Delete every snapshot of the instance and discard its memory; absent is success."""
        ...


# -- the whole -------------------------------------------------------------------------------------


class Records(Protocol):
    """The journal's side of instances and networks: reads from memory, writes committed.

    A put whose `status` differs from the stored one also writes the `status` event and the state
    row, in the same transaction.
    """

    def instance(self, ref: InstanceRef) -> InstanceRecord | None: ...

    def instances(self, tenant_id: str | None = None) -> Sequence[InstanceRecord]: ...

    async def put_instance(
        self,
        record: InstanceRecord,
        *,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        durable: bool = False,
    ) -> None:
        """Raises Conflict if uid slot or offset are taken by another instance."""
        ...

    async def drop_instance(self, ref: InstanceRef, tombstone: Tombstone | None) -> None: ...

    def tombstone(self, ref: InstanceRef) -> Tombstone | None: ...

    def network(self, tenant_id: str) -> NetworkRecord | None: ...

    def networks(self) -> Sequence[NetworkRecord]: ...

    async def put_network(self, record: NetworkRecord) -> None: ...

    async def drop_network(self, tenant_id: str) -> None: ...

    async def event(
        self,
        kind: str,
        *,
        ref: InstanceRef | None = None,
        tenant_id: str | None = None,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        command_id: str | None = None,
    ) -> None: ...


class HostFacts(Protocol):
    def now_ms(self) -> int:
        """Wall clock, Unix milliseconds."""
        ...

    def boot_id(self) -> str: ...

    def memory_mib(self) -> int:
        """Total memory of the host."""
        ...


class Later(Protocol):
    def __call__(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run it in the background, logged under `name`; dropped at shutdown."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """Everything a handler touches. One for the worker, one made by each test."""

    settings: Settings
    locks: TenantLocks
    records: Records
    facts: HostFacts
    shared: SharedFiles
    networks: Networks
    bridges: Mechanism[BridgeSpec, bool]
    tenant_rules: Mechanism[TenantRulesSpec, bool]
    pins: Mechanism[PinSpec, bool]
    taps: Mechanism[TapSpec, bool]
    artifacts: Mechanism[ArtifactSpec, Artifact]
    data_disks: DataDisks
    cgroups: Mechanism[CgroupSpec, None]
    jails: Jails
    vmms: Vmms
    agents: GuestAgents
    snapshots: Snapshots
    slots: Slots
    later: Later
    pending_reservations: dict[InstanceRef, InstanceRecord]
