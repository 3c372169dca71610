"""The interfaces between handlers and this host: one Protocol per mechanism. Types only.

Implemented in `handlers/host/`, one mechanism per file, and in memory by `tests/fakes/host.py`;
`tests/contract` runs the same tests against both. All paths are absolute host paths, all sizes in
bytes unless a name says otherwise. Every method raises a `Failure` of `handlers/errors.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any, Protocol

from handlers.admission.ranking import Ranking
from handlers.claims.facts import DiskProof
from handlers.claims.unrecorded import TapOwner, UnrecordedVmms, VmmProcess
from handlers.concurrency import Slots
from handlers.errors import Failure
from handlers.mechanism import Mechanism
from handlers.specs import (
    Ack,
    Artifact,
    ArtifactSpec,
    BootConfig,
    BridgeSpec,
    CgroupSpec,
    CgroupUsage,
    DataDisk,
    DataDiskSpec,
    DiskUsage,
    ExpectedNetwork,
    Jail,
    JailSpec,
    LaunchSpec,
    PinSpec,
    Restored,
    SnapshotFacts,
    SnapshotInfo,
    TapSpec,
    TapTraffic,
    TenantRulesSpec,
)
from handlers.tenant_locks import TenantLocks
from handlers.vmm_ends import ExitStatus, OomCounts
from schemas.envelopes import EventKind
from schemas.files import InstanceFile, PoolSpec, TenantConfig
from schemas.records import (
    DiskIdentity,
    InstanceRecord,
    NetworkRecord,
    Tombstone,
    Usage,
    VmmIdentity,
)
from schemas.requests import InstanceRef
from schemas.settings import Settings
from schemas.usage import Moment

# -- network ---------------------------------------------------------------------------------------
# `ensure` of these mechanisms returns true if anything was made or repaired.


class Networks(Protocol):
    """The host's network outside of tenants: routes, interfaces, base rules, sysctls."""

    async def overlapping_route(self, subnet: str, *, except_bridge: str) -> str | None:
        """A host route that overlaps the subnet, or None. Not considered: the default route,
        those of `except_bridge` and those within `[network] exempt_routes`."""
        ...

    async def taps_on(self, bridge: str) -> Sequence[str]:
        """Names of the interfaces attached to the bridge."""
        ...

    async def warnings(self, tenants: int) -> Sequence[str]:
        """What other programs and the kernel's settings keep from the guests of so many tenants:
        one sentence each, with what to do."""
        ...

    async def flush_conntrack(self, address: str) -> None:
        """End all tracked connections of a guest's address, from or to it, on either side of NAT.
        Nothing is done if that was done since the address last had a TAP."""
        ...

    async def prepare(self) -> bool:
        """Put base table, uplinks, `ip_forward`, `bridge-nf-call-*` in effect; true if changed."""
        ...

    async def damaged(
        self, expected: Sequence[ExpectedNetwork], *, rules_only: bool
    ) -> Sequence[str]:
        """The tenants whose networks are not as expected. Changes nothing; `rules_only` leaves out
        bridges and TAPs."""
        ...


class Taps(Mechanism[TapSpec, bool], Protocol):
    """TAPs by interface name."""

    async def release(self, key: str) -> None:
        """As `remove`, but the kernel may take a moment to delete it: nobody can use it any more,
        and it is deleted whatever happens. `exists` is false; `ensure` waits for its end."""
        ...

    async def settle(self, tenant_net_id: int) -> None:
        """Return when no TAP of the network that was released is left."""
        ...

    async def traffic(self, key: str) -> TapTraffic | None:
        """What its guest sent and received since it was made; None if it is gone."""
        ...

    async def owners(self) -> Mapping[str, TapOwner]:
        """All TAPs of hostd, by name."""
        ...


# -- files -----------------------------------------------------------------------------------------


class SharedFiles(Protocol):
    """agentd's directories, writable by an unprivileged process: every open stays beneath the
    tenant's directory and follows no symlink.

    Raises:
        NotFound: the file is missing. Invalid: it is malformed or hostile. Both name the file.
    """

    async def tenant(self, tenant_id: str) -> TenantConfig:
        """`tenant.json`, validated."""
        ...

    async def pool(self, tenant_id: str, pool_id: str) -> PoolSpec:
        """`pool.json`, validated."""
        ...

    async def instance(self, ref: InstanceRef) -> InstanceFile:
        """`instance.json`, validated."""
        ...

    async def instances(
        self, refs: Sequence[InstanceRef]
    ) -> Mapping[InstanceRef, InstanceFile | Failure | OSError]:
        """Each one's `instance.json`, or why it cannot be read."""
        ...

    async def of_launch(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile]:
        """The three files that a launch needs, read in this order."""
        ...

    async def of_start(self, ref: InstanceRef) -> tuple[TenantConfig, PoolSpec, InstanceFile, str]:
        """As `of_launch`, and then the revision that the pool's symlink `artifacts/current` names.

        Raises:
            NotFound: the pool has no artifacts. Invalid: not a symlink `revisions/<hash>`.
        """
        ...

    async def secrets(self, tenant_id: str) -> bytes | None:
        """The tenant's secrets as JSON, or None if it has none."""
        ...

    async def prepare_update(
        self, ref: InstanceRef, changes: dict[str, Any]
    ) -> "PreparedUpdate | None":
        """Make ready what `update_instance` will do; the file is as before, and no other has a
        name. The caller closes it. None if this cannot be prepared."""
        ...

    async def update_instance(self, ref: InstanceRef, changes: dict[str, Any]) -> None:
        """Replace hostd's fields of `instance.json`, atomically; all else in it, owner, group and
        mode are kept."""
        ...

    async def remove_instance(self, ref: InstanceRef, *, keep_volumes: bool) -> None:
        """Remove the instance's directory, except `volumes/` if kept; success if absent."""
        ...


class PreparedUpdate(Protocol):
    """An update of `instance.json` that was made ready; it is nowhere until it is done."""

    async def apply(self, changes: dict[str, Any]) -> bool:
        """Do it, if these are its changes and the file is still as it was; else false."""
        ...

    def close(self) -> None:
        """To be called in any case."""
        ...


class Artifacts(Mechanism[ArtifactSpec, Artifact], Protocol):
    """Imported revisions; the key is `<tenant>/<pool>/<revision>`. `ensure` can be cancelled."""

    async def size_of_import(self, spec: ArtifactSpec) -> int:
        """The disk space in bytes that the import needs; raises as `ensure`. No effect."""
        ...

    async def imported(self, key: str) -> bool:
        """Whether `ensure` finds it: it `exists` as a whole, and is not being removed."""
        ...


class DataDisks(Mechanism[DataDiskSpec, DataDisk], Protocol):
    """`volumes/data.ext4` of instances; the key is `<tenant>/<pool>/<instance>`.

    `ensure` makes the disk or finds the known one, and never changes its size. A file that hostd
    did not make, by device and inode, is Invalid. `remove` unlinks only a disk that hostd made.
    """

    def path(self, ref: InstanceRef) -> str:
        """The path of the instance's data disk, whether it exists or not."""
        ...

    async def unallocated_bytes(self, ref: InstanceRef) -> int:
        """The space that the disk does not have yet of its nominal size; 0 if there is none."""
        ...

    async def prove(
        self, ref: InstanceRef, owners: Collection[int], used_by: int | None = None
    ) -> DiskProof | None:
        """What can be proved of the disk, whoever made it; None if there is none. No effect.

        `owners` are the uids that it may belong to, `used_by` the process that may have it open.
        """
        ...

    async def check_wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Raise Invalid if `wipe` would fail: the disk is not hostd's, or missing. No effect."""
        ...

    async def wipe(self, ref: InstanceRef, known: DiskIdentity | None) -> None:
        """Overwrite the blocks, verify, free them; the empty file stays until `remove_instance`.

        Raises:
            HostFault: the recorded disk `known` is missing: its data is not wiped.
        """
        ...


# -- jail and VMM ----------------------------------------------------------------------------------


CPU_PERIOD_US = 100_000  # of which `cpu_quota_us` may be used


class Cgroups(Mechanism[CgroupSpec, None], Protocol):
    """The leaf of each VMM with its limits; the key is `<tenant>/<jail id>`."""

    async def oom_counts(self, key: str) -> OomCounts | None:
        """What the OOM killer did in the leaf; None if nothing counts it. It does not block."""
        ...

    async def usage(self, key: str) -> CgroupUsage | None:
        """What the processes in the leaf have used since it was made; None if it is gone. It does
        not block."""
        ...

    async def differing(self, specs: Sequence[CgroupSpec]) -> Mapping[str, Sequence[str]]:
        """By key, the limits that are not in effect. Changes nothing."""
        ...

    async def restore(self, spec: CgroupSpec) -> Restored:
        """Put the limits of a running VMM back in effect; a memory limit below what is in use is
        `lost`: it would kill the VMM."""
        ...


class JailMetadata(Protocol):
    """Whose jail it is, as written at launch. `record` is the journal's record of the launch.

    `released`: an operator gave up hostd's claim, so only an operator takes it up again.
    """

    @property
    def ref(self) -> InstanceRef: ...
    @property
    def uid(self) -> int: ...
    @property
    def record(self) -> InstanceRecord | None: ...
    @property
    def released(self) -> bool: ...


class Jails(Mechanism[JailSpec, Jail], Protocol):
    """Directory, hard links, small drives and secrets tmpfs of each VMM; the key is the jail id.

    `remove` unmounts the tmpfs, gives the data disk back to root and keeps the launch's log.
    """

    async def launches(self, ref: InstanceRef) -> Sequence[int]:
        """Numbers of the launches that left a jail or a log on this host."""
        ...

    async def read_log(self, ref: InstanceRef, launch: int | None = None) -> bytes:
        """The VMM's log of a launch, by default the last; live or kept (the last 3 launches are);
        empty if there is none."""
        ...

    async def metadata(self, jail_id: str) -> JailMetadata | None:
        """Whose jail it is; None if there is no such jail, or its metadata is damaged."""
        ...

    async def set_released(self, jail_id: str, *, released: bool) -> None:
        """Note in the metadata whether hostd's claim on it was given up; nothing without any."""
        ...


class VmmApi(Protocol):
    """The API of one live VMM, typed; one request at a time.

    Raises:
        Conflict: the VM's state does not allow the request.
        Unavailable: the VMM does not answer. HostFault: it refused.
    """

    async def configure(self, config: BootConfig) -> None:
        """Everything that precedes InstanceStart."""
        ...

    async def start(self) -> None:
        """InstanceStart: the guest boots."""
        ...

    async def pause(self) -> None:
        """Stop the vCPUs."""
        ...

    async def resume(self) -> None:
        """Let the vCPUs of a paused or loaded VM run."""
        ...

    async def state(self) -> str:
        """`Not started`, `Running` or `Paused`."""
        ...

    async def version(self) -> str:
        """Firecracker's version, e.g. `1.12.1`, of what the VMM says.

        Raises:
            HostFault: that is not a version.
        """
        ...

    async def create_snapshot(self, state_path: str, mem_path: str) -> None:
        """Write a full snapshot to two paths inside the jail; the VM must be paused."""
        ...

    async def load_snapshot(self, state_path: str, mem_path: str) -> None:
        """Load with `resume_vm: false`; the VM stays paused. After a failure the VMM exits."""
        ...

    async def send_ctrl_alt_del(self) -> None:
        """Ask the guest to shut down; whether it does is up to the guest."""
        ...

    async def close(self) -> None:
        """Close the connection; the VMM stays."""
        ...


class Vmms(Mechanism[LaunchSpec, VmmIdentity], Protocol):
    """VMM processes; the key is the jail id.

    `ensure` launches through the jailer, waits for the API and proves the identity. `remove` proves
    the identity, sends SIGKILL by pidfd and waits until the process has exited.
    """

    def expect_launch(self) -> None:
        """A launch is coming: begin what the kernel makes it wait for. Changes nothing."""
        ...

    async def version_for(self, wanted: str | None, *, reread: bool = True) -> str:
        """The version of Firecracker for a launch: the one `wanted`, or that of new Starts.

        `reread`: files that were replaced are read first, and taken for later launches as well.

        Raises:
            HostFault: it is not on this host, or its files changed under the running worker.
        """
        ...

    async def launches(self, ref: InstanceRef) -> Sequence[int]:
        """Numbers of the launches whose cgroup exists, with or without a process."""
        ...

    def free_uid(self, taken: Callable[[int], bool], *, keep_turn: bool = False) -> int | None:
        """A uid of `[vmm]` that is not `taken` and that no process has, known or not.

        The next after the one that was found last: a uid is used again as late as possible, and
        those in use are not gone through each time. None if there is none. It does not block.
        With `keep_turn` the next call finds the same one.
        """
        ...

    async def processes(self) -> Sequence[VmmProcess]:
        """All live processes with a uid of `[vmm]`, whatever jail or cgroup they are in."""
        ...

    async def find(self, jail_id: str) -> VmmIdentity | None:
        """The live VMM of a jail, proven from the kernel, or None."""
        ...

    async def alive(self, identity: VmmIdentity) -> bool:
        """Whether that very process still runs."""
        ...

    async def lacking(self, vmms: Mapping[str, VmmIdentity]) -> Mapping[str, Sequence[str]]:
        """By jail ID, what a running VMM lacks of what its launch made, for good: names of files in
        its jail, or its place in the cgroup tree. Changes nothing."""
        ...

    async def wait_exit(self, identity: VmmIdentity, timeout_s: float) -> bool:
        """True once it has exited; false after the timeout."""
        ...

    async def exit_status(self, identity: VmmIdentity) -> ExitStatus:
        """How a process exited that has exited, as far as the kernel still says so."""
        ...

    async def check_confinement(self, identity: VmmIdentity, spec: LaunchSpec) -> None:
        """Read back root, uid, gid, capabilities, no_new_privs, seccomp on all threads, cgroup,
        pid namespace, once the VM is started or loaded.

        Raises:
            HostFault: names the first fact that differs.
        """
        ...

    def api(self, jail_id: str) -> VmmApi:
        """The VMM's API; connects with the first request."""
        ...


class GuestAgents(Protocol):
    """The guest agent on vsock, framed JSON; untrusted, bounded in size and time.

    Each call opens a connection and retries until `timeout_s`: the first connection after a resume
    may be reset, a paused guest never answers.

    Raises:
        Unavailable: no well-formed answer within `timeout_s`.
    """

    async def ping(self, jail_id: str, port: int, *, timeout_s: float) -> None:
        """Return once the agent answers."""
        ...

    async def sleep_prep(
        self, jail_id: str, port: int, *, drain_timeout_s: int, timeout_s: float
    ) -> Ack:
        """Ask the guest to finish its work, unmount its small drives and sync."""
        ...

    async def wake(self, jail_id: str, port: int, *, timeout_s: float) -> Ack:
        """Announce that the guest was restored, so that it mounts its small drives again."""
        ...

    async def set_clock(self, jail_id: str, port: int, *, timeout_s: float) -> float:
        """Set the guest's clock to the host's; returns by how many seconds it was off."""
        ...


# -- snapshots -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Discarded:
    """Memory without a name, whose blocks are being freed until all of `freed` are done."""

    size_bytes: int = 0
    freed: tuple[asyncio.Future[None], ...] = ()


class Snapshots(Protocol):
    """`<state>/snapshots/<t>/<p>/<i>/<n>/{state,mem,manifest.json}`; `number` is the launch's."""

    async def begin_write(self, jail_id: str, uid: int) -> tuple[str, str]:
        """An empty directory in the jail for the VMM to write to; the two paths inside the jail."""
        ...

    async def seal(self, jail_id: str, facts: SnapshotFacts) -> SnapshotInfo:
        """Move the files out of the jail, hash the state, fsync; the manifest is not published."""
        ...

    async def publish(self, ref: InstanceRef, number: int) -> None:
        """Rename the manifest into place and fsync the directory: Sleep's point of no return."""
        ...

    async def read(self, ref: InstanceRef) -> SnapshotInfo | None:
        """The published snapshot with the highest number, or None."""
        ...

    async def verify(self, ref: InstanceRef, number: int) -> SnapshotInfo:
        """Check manifest, state hash, memory identity or hash, disks, CPU; not the VMM's version.

        Raises:
            HostFault: what differs; the instance stays asleep, and can wake once it is restored.
        """
        ...

    async def hash_memory(self, ref: InstanceRef, number: int) -> str | None:
        """The sha256 of the memory file, recorded with the file's identity; None if it is gone."""
        ...

    async def is_hashed(self, ref: InstanceRef, number: int) -> bool:
        """Whether the memory's hash is recorded; also true if the snapshot is gone."""
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

    async def discard(self, ref: InstanceRef, *, below: int | None = None) -> Discarded:
        """As `delete_all`, or for those with a lower number, without waiting for the blocks of the
        memory: they have no name any more, and are freed whatever happens."""
        ...

    async def delete_all(self, ref: InstanceRef) -> None:
        """Delete every snapshot of the instance and discard its memory; absent is success."""
        ...


# -- disk space ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class DiskClaim:
    """Space that was admitted for something that may not exist yet; see `disk_admission.py`."""

    tenant_id: str
    size_bytes: int
    host_bytes: int
    exists: Callable[[], bool]


class DiskSpace(Protocol):
    """The one file system of `[paths] state`, `[paths] data` and the jails."""

    @property
    def path(self) -> str:
        """`[paths] state`, for messages."""
        ...

    @property
    def low(self) -> bool:
        """Whether it was full and the ballast is released."""
        ...

    @property
    def high(self) -> bool:
        """Whether it is above its high watermark, or was and is not below the low one yet."""
        ...

    def usage_bytes(self) -> tuple[int, int]:
        """What is used, and the size, as df(1) has them, the ballast counted as free."""
        ...

    def used_percent(self) -> float:
        """How much of it is used, as df(1) has it."""
        ...

    def free_bytes(self) -> int:
        """What is free, the ballast included."""
        ...

    async def usage(self, tenant_id: str, *, without: InstanceRef | None = None) -> DiskUsage:
        """What the tenant's files take up, except the snapshots of the instance `without`."""
        ...


# -- the whole -------------------------------------------------------------------------------------


class Records(Protocol):
    """The journal's records of instances and networks: reads are from memory, writes committed.

    A put whose `status` differs from the stored one also writes the `status` event and the state
    row, in the same transaction.
    """

    def instance(self, ref: InstanceRef) -> InstanceRecord | None:
        """The record, or None if the instance was never launched or is destroyed."""
        ...

    def instances(self, tenant_id: str | None = None) -> Sequence[InstanceRecord]:
        """All records, or those of one tenant. Not for a command: it must not cost more on a host
        with more instances, and the next methods look at none."""
        ...

    def usage(self, tenant_id: str | None = None) -> Usage:
        """What all instances, or those of one tenant, take up."""
        ...

    def ranking(self, resource: str, tenant_id: str | None = None) -> Ranking:
        """Who takes up most of one field of `Usage`: all tenants, or the instances of one, named
        `<pool>/<instance>`."""
        ...

    def pools(self, tenant_id: str) -> Ranking:
        """The tenant's pools that have instances on this host, by their number."""
        ...

    def vmm_versions(self) -> Mapping[tuple[str, str], int]:
        """How many instances run or sleep by each version of Firecracker: by version and
        `running` or `sleeping`. The version "" is that of records which do not say."""
        ...

    def held_uids(self) -> int:
        """How many uids instances have."""
        ...

    def held_addresses(self) -> int:
        """How many addresses instances have, live or sleeping."""
        ...

    def address_count(self) -> int:
        """How many addresses the networks have for instances."""
        ...

    def with_slot(self, slot: int) -> InstanceRef | None:
        """The instance that has the uid slot."""
        ...

    def with_offset(self, tenant_id: str, offset: int) -> InstanceRecord | None:
        """The tenant's instance, live or sleeping, that has the address offset."""
        ...

    def refers(self, revision: str) -> bool:
        """Whether an instance refers to the artifact revision named by this `ArtifactSpec.key`.

        An instance being destroyed does not: its Destroy is always completed.
        """
        ...

    def tenant_of_jail(self, jail_id: str) -> str | None:
        """The tenant of the instance on record whose launches have such jail IDs."""
        ...

    async def put_instance(
        self,
        record: InstanceRecord,
        *,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        durable: bool = False,
    ) -> None:
        """Write a record; `durable` syncs the commit.

        Raises:
            Conflict: another instance has the uid slot or the offset.
        """
        ...

    async def put_with_event(
        self, record: InstanceRecord, kind: EventKind, *, reason: str, detail: dict[str, Any]
    ) -> None:
        """As `put_instance`, durable, with an event of this kind in the same commit."""
        ...

    async def release_instance(
        self, ref: InstanceRef, *, reason: str, detail: dict[str, Any]
    ) -> None:
        """Delete the record, durably, with a `released` event in the same commit."""
        ...

    async def drop_instance(self, ref: InstanceRef, tombstone: Tombstone | None) -> None:
        """Delete the record, in the same commit write the tombstone, if any."""
        ...

    def tombstone(self, ref: InstanceRef) -> Tombstone | None:
        """What remains of a destroyed instance."""
        ...

    def kept_volumes(self, tenant_id: str) -> Sequence[Tombstone]:
        """The tenant's destroyed instances whose volumes were kept."""
        ...

    def network(self, tenant_id: str) -> NetworkRecord | None:
        """The desired state of the tenant's network, or None."""
        ...

    def networks(self) -> Sequence[NetworkRecord]:
        """All networks that should exist. Not for a command, as `instances`."""
        ...

    def network_count(self) -> int:
        """How many networks should exist."""
        ...

    def network_with_id(self, tenant_net_id: int) -> NetworkRecord | None:
        """The network that has the net id."""
        ...

    def networks_overlapping(self, subnet: IPv4Network) -> Sequence[NetworkRecord]:
        """The networks that have an address in common with the subnet."""
        ...

    def expect_network(self, record: NetworkRecord) -> None:
        """Return this record from now on, though it is committed with the command's outcome.

        For a command that holds the locks under which net ids and subnets are allocated.
        """
        ...

    async def put_network(self, record: NetworkRecord) -> None:
        """Write a record; delete one that is absent.

        Raises:
            Conflict: another tenant has the net id.
        """
        ...

    async def event(
        self,
        kind: EventKind,
        *,
        ref: InstanceRef | None = None,
        tenant_id: str | None = None,
        reason: str | None = None,
        detail: dict[str, Any] | None = None,
        command_id: str | None = None,
    ) -> None:
        """Append an event, published once committed."""
        ...


class ClaimedVmm(Protocol):
    """The warm VMM that one launch uses."""

    @property
    def jail_id(self) -> str:
        """The jail to take with it."""
        ...

    async def enter(self) -> None:
        """Move it into the launch's cgroup, which must exist.

        What fails is not raised: the VMM is killed, and the launch runs the jailer.
        """
        ...


class WarmPool(Protocol):
    """Idle VMMs launched ahead, each with its uid; see `handlers/host/vmm/warm_pool.py`."""

    @property
    def slots(self) -> Collection[int]:
        """The uid slots that the pool holds, the claimed ones included."""
        ...

    def claim(self, jail_id: str, version: str) -> int | None:
        """Set one aside for the launch of this jail; returns its uid slot, which the launch gets.

        None if there is none of this version of Firecracker. A claim ends with `used_by` or
        `give_back`.
        """
        ...

    def give_back(self, jail_id: str) -> None:
        """The launch did not come to use its claim. Nothing claimed is success."""
        ...

    def ready_slot(self, version: str) -> int | None:
        """The uid slot that `claim` would return. No effect."""
        ...

    def launch(self) -> AbstractAsyncContextManager[None]:
        """While a launch goes on, and for a moment after it, nothing is launched ahead."""
        ...

    def used_by(self, spec: LaunchSpec) -> AbstractAsyncContextManager[ClaimedVmm | None]:
        """The claimed VMM, to `enter` the launch's cgroup while its jail is made.

        None without a claim. At the end the VMM is in the cgroup, or it is killed: then the launch
        runs the jailer. It is killed, too, if what is done meanwhile fails.
        """
        ...

    def fit(self, free_mib: int) -> None:
        """Remove what does not fit into the memory that is free after a launch was admitted."""
        ...


class HostFacts(Protocol):
    """Facts of this host that no mechanism changes."""

    def now_ms(self) -> int:
        """Wall clock, Unix milliseconds."""
        ...

    def moment(self) -> Moment:
        """Now, by the wall clock and by one that is never set."""
        ...

    def boot_id(self) -> str:
        """`/proc/sys/kernel/random/boot_id`: changes with each boot."""
        ...

    def memory_mib(self) -> int:
        """Total memory of the host."""
        ...

    def cpus(self) -> int:
        """How many CPUs VMMs may run on."""
        ...


class Later(Protocol):
    """Background work that no reply waits for."""

    def __call__(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start `work` in the background; its failure is logged under `name`. Cancelled at
        shutdown."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """Everything that a handler uses. The worker has one, each test makes one.

    `pending_reservations` are the records of launches whose reservation is being committed;
    `disk_claims` the disk space of what is being made; `unrecorded` the VMMs without a record;
    `seen_alive`, by instance, the VMM that this worker has launched or has seen alive.
    """

    settings: Settings
    locks: TenantLocks
    records: Records
    facts: HostFacts
    shared: SharedFiles
    networks: Networks
    bridges: Mechanism[BridgeSpec, bool]
    tenant_rules: Mechanism[TenantRulesSpec, bool]
    pins: Mechanism[PinSpec, bool]
    taps: Taps
    artifacts: Artifacts
    data_disks: DataDisks
    cgroups: Cgroups
    jails: Jails
    vmms: Vmms
    warm: WarmPool
    agents: GuestAgents
    snapshots: Snapshots
    disk: DiskSpace
    slots: Slots
    later: Later
    pending_reservations: dict[InstanceRef, InstanceRecord]
    disk_claims: set[DiskClaim]
    unrecorded: UnrecordedVmms
    seen_alive: dict[InstanceRef, VmmIdentity]
