"""The plan of a launch, read and checked before anything is made: agentd's files, names, sizes."""

from dataclasses import dataclass

from handlers.errors import Conflict, Invalid
from handlers.instance.reservations import ReservationSpec
from handlers.interfaces import CPU_PERIOD_US, Host
from handlers.network_names import Names, names_of
from handlers.specs import MIB, Artifact, CgroupSpec, LaunchSpec, SnapshotInfo
from handlers.steps import Steps
from schemas import naming
from schemas.decode_error import DecodeError
from schemas.files import InstanceFile, PoolSpec, TenantConfig, check_instance_net, offset_of
from schemas.records import InstanceRecord, Status
from schemas.requests import InstanceRef, TenantNet

PIDS_PER_VMM = 64


@dataclass(frozen=True, slots=True)
class LaunchFiles:
    """`tenant.json`, `pool.json` and `instance.json`, validated against each other."""

    tenant: TenantConfig
    pool: PoolSpec
    file: InstanceFile
    offset: int

    @property
    def net(self) -> TenantNet:
        return self.tenant.net


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: its reserved record, its pool, its network names and the VMM to run."""

    record: InstanceRecord
    pool: PoolSpec
    names: Names
    vmm: LaunchSpec

    @property
    def ref(self) -> InstanceRef:
        return self.record.ref

    @property
    def jail_id(self) -> str:
        return self.record.jail_id


def launch_of(record: InstanceRecord, pool: PoolSpec, host: Host) -> Launch:
    """The launch of a record that has a reservation."""
    names = names_of(record)
    if names is None or record.uid_slot is None:
        raise Conflict(f"instance {record.ref} has no network address or uid reserved")
    spec = LaunchSpec(
        jail_id=record.jail_id,
        uid=host.settings.vmm.uid_base + record.uid_slot,
        cgroup=naming.cgroup_name(host.settings.limits.cgroup, record.cgroup_key),
        version=record.vmm_version,
    )
    return Launch(record, pool, names, spec)


def cgroup_spec(record: InstanceRecord, host: Host) -> CgroupSpec:
    """The leaf of the record's launch, with the limits that its size asks for."""
    return CgroupSpec(
        tenant_id=record.ref.tenant_id,
        jail_id=record.jail_id,
        memory_max_bytes=(record.mem_mib + host.settings.limits.vmm_overhead_mib) * MIB,
        cpu_quota_us=record.vcpus * CPU_PERIOD_US,
        pids_max=PIDS_PER_VMM,
    )


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What `launch.launched` makes. `snapshot` is None for a boot.

    `may_have_booted`: an earlier run of the command may have booted the guest, so its VMM and jail
    are used as they are.
    """

    launch: Launch
    artifact: Artifact
    snapshot: SnapshotInfo | None = None
    may_have_booted: bool = False


async def read_launch_files(ref: InstanceRef, record: InstanceRecord, host: Host) -> LaunchFiles:
    """Read and check the files that describe the instance to launch.

    Raises:
        NotFound, Invalid: a file is missing or wrong; names file and field.
        Conflict: the tenant's network is not set up, or the journal has another address.
    """
    tenant, pool, file = await host.shared.of_launch(ref)
    return checked_files(tenant, pool, file, record, host)


async def read_start_files(
    ref: InstanceRef, record: InstanceRecord, host: Host
) -> tuple[LaunchFiles, str]:
    """As `read_launch_files`, and the revision that the pool starts now.

    Raises:
        NotFound, Invalid: also if the pool has no current revision.
    """
    tenant, pool, file, revision = await host.shared.of_start(ref)
    return checked_files(tenant, pool, file, record, host), revision


def checked_files(
    tenant: TenantConfig, pool: PoolSpec, file: InstanceFile, record: InstanceRecord, host: Host
) -> LaunchFiles:
    """What `read_launch_files` returns and raises, for files that were read."""
    ref = record.ref
    try:
        offset = offset_of(file.net.guest_ip, tenant.net)
        check_instance_net(file, tenant.net, offset)
    except DecodeError as error:
        raise Invalid(error.message, path=error.path) from error
    check_file_sizes(pool, host.settings.vmm.max_file_mib)
    if record.offset is not None and record.offset != offset:
        raise Conflict(
            f"address offset of instance {ref} changed: instance.json has {offset}, "
            f"its first start used {record.offset}",
            path="instance.json: $.net.guest_ip",
        )
    network = host.records.network(ref.tenant_id)
    if network is None or network.status != "up" or network.net != tenant.net:
        raise Conflict(
            f"network of tenant {ref.tenant_id} is not set up as in tenant.json: send SetupNetwork "
            f"first (hostd net-up {ref.tenant_id})"
        )
    return LaunchFiles(tenant, pool, file, offset)


def check_file_sizes(pool: PoolSpec, max_file_mib: int) -> None:
    """The VMM is killed when it writes a file past its limit: its data disk, or its snapshot.

    Raises:
        Invalid: names the field.
    """
    resources = pool.instance_resources
    for name, size_mib in (
        ("mem_mib", resources.mem_mib),
        ("data_disk_mib", resources.data_disk_mib),
    ):
        if size_mib > max_file_mib:
            raise Invalid(
                f"got {size_mib} MiB, but a VMM of this host writes files of at most "
                f"{max_file_mib} MiB ([vmm] max_file_mib)",
                path=f"pool.json: $.instance_resources.{name}",
            )


async def newest_launch(record: InstanceRecord, host: Host) -> int:
    """The highest launch number of which this host has a trace, whatever the journal says.

    A lost or an older journal counts from a lower one: the jail of that number may be in use, and a
    second VMM would write to the same data disk. The instance is launched in its lane only, so this
    can be read before the reservation. One that is reserved has its number.

    Raises:
        Conflict: processes run in one of the jails.
    """
    if record.before is not None:
        return record.launch
    ref = record.ref
    jails, cgroups = await host.jails.launches(ref), await host.vmms.launches(ref)
    stray = host.unrecorded.of_instance(ref)
    for launch in (found := sorted({*jails, *cgroups})):
        jail_id = naming.jail_id(ref, launch)
        if stray is not None and stray.process.jail_id == jail_id:
            continue  # `Reservations` looks whether it still runs
        if await host.vmms.exists(jail_id):
            raise Conflict(
                f"cannot launch {ref}: processes run in its jail {jail_id}, which the journal does "
                "not know; see docs/operations.md#unknown",
                detail={"jail": jail_id},
            )
    return max([record.launch, *found])


def reservation_spec(
    files: LaunchFiles,
    before: InstanceRecord,
    steps: Steps,
    *,
    status: Status,
    revision: str,
    newest_launch: int,
    vmm_version: str,
    now_ms: int,
) -> ReservationSpec:
    """What to reserve for a launch of the size that the pool says."""
    resources = files.pool.instance_resources
    return ReservationSpec(
        command_id=steps.command_id,
        before=before,
        status=status,
        now_ms=now_ms,
        quota=files.tenant.quotas,
        net=files.net,
        offset=files.offset,
        revision=revision,
        newest_launch=newest_launch,
        vcpus=resources.vcpus,
        mem_mib=resources.mem_mib,
        agent_port=files.pool.agent_port if files.pool.ready == "agent" else None,
        vmm_version=vmm_version,
    )
